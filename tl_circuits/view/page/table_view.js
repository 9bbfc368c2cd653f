// Every node as a table row: search, sort, CSV.
import { button, download, el } from "./dom.js";
import { nodeName } from "./units.js";
const ROWS = 200, COLUMNS = ["id", "kind", "token", "layer", "activation", "influence", "label"];

export class TableView {
  constructor(app) {
    this.app = app;
    this.sort = { column: "influence", up: false };
    this.count = el("p", { class: "soft", role: "status" });
    this.heads = COLUMNS.map((name) => el("th", { scope: "col" }, button(name, () => this.by(name), { class: "plain" })));
    this.body = el("tbody");
    const table = el("table", { class: "data" }, el("thead", {}, el("tr", {}, ...this.heads)), this.body);
    this.element = el("div", { class: "table" },
      el("div", { class: "bar" }, this.count, button("Download CSV", () => this.csv())), el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All nodes" }, table));
  }

  row(i) {
    const { graph } = this.app, { nodes } = graph;
    return { id: graph.ids[i], kind: graph.kinds[i], token: graph.tokens[nodes.position[i]] ?? "", layer: nodes.layer[i],
      activation: nodes.activation[i], influence: nodes.influence[i], label: nodeName(graph, i, this.app.notes.names) };
  }

  rows() {
    const words = this.app.query.toLowerCase().split(/\s+/).filter(Boolean);
    const all = this.app.graph.ids.map((_, i) => this.row(i));
    const found = words.length ? all.filter((r) => { const text = `${r.id} ${r.token} ${r.label}`.toLowerCase(); return words.every((w) => text.includes(w)); }) : all;
    const { column, up } = this.sort, sign = up ? 1 : -1;
    return found.sort((a, b) => sign * (typeof a[column] === "number" ? a[column] - b[column] : String(a[column]).localeCompare(String(b[column]))));
  }

  by(column) {
    this.sort = { column, up: this.sort.column === column ? !this.sort.up : false };
    this.draw();
  }

  draw() {
    const rows = this.rows(), shown = rows.slice(0, ROWS);
    this.count.textContent = rows.length > ROWS ? `${ROWS} of ${rows.length} nodes; search to narrow` : `${rows.length} nodes`;
    this.heads.forEach((head, i) => head.setAttribute("aria-sort", COLUMNS[i] === this.sort.column ? (this.sort.up ? "ascending" : "descending") : "none"));
    this.body.replaceChildren(...shown.map((r) => el("tr", {}, el("td", {}, button(r.id, () => this.app.chooseNode(this.app.graph.indexOf.get(r.id)), { class: "plain" })),
      ...COLUMNS.slice(1).map((name) => el("td", {}, typeof r[name] === "number" ? String(Number(r[name].toPrecision(4))) : r[name])))));
  }

  csv() {
    const cell = (v) => {
      const text = v === null ? "" : String(v);
      return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [COLUMNS, ...this.rows().map((r) => COLUMNS.map((name) => r[name]))];
    download("nodes.csv", `${lines.map((line) => line.map(cell).join(",")).join("\n")}\n`, "text/csv");
  }
}
