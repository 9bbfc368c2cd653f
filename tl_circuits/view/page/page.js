// The whole page: render(el, data, host). `host` says what differs between file, server and notebook; all of it is optional:
// loadNotes() and saveNotes(notes, fields) keep notes; steer({nodes, factor}) and heads({source, target}) ask a model;
// selected(ids) is told what is chosen; bar is put on top; keys is where to listen for keys.
import { button, download, el, percent, plural, shape } from "./dom.js";
import { unpackGraph } from "./unpack.js";
import { boxPlace, makeArrows, makeFlows, makeMeter, makeUnits, nodeName, verbOf } from "./units.js";
import { describe, drawStory } from "./story_view.js";
import { allRemoved, tale } from "./sentences.js";
import { scoresLine } from "./scores.js";
import { wordsStrip } from "./words.js";
import { carriedBy, influenceLine, little, meterParts } from "./meter.js";
import { NodesView } from "./nodes_view.js";
import { TableView } from "./table_view.js";
import { NoteBook } from "./notes.js";
import { nodeCard, restCard, unitCard } from "./card.js";
import { effectParts } from "./effect.js";
import { arrowCard, linkCard, linkName, storiesByArrow } from "./links.js";
import { carrierWords } from "./heads.js";
import { listenToKeys, keysDialog } from "./keys.js";
const NARROW = 420;

class App {
  constructor(root, graph, host) {
    Object.assign(this, { root, graph, host, level: 1, expanded: new Set(), marked: new Set(), chosen: null, query: "", view: "story" });
    this.level = graph.levels.findIndex((level) => level.usual);
    this.book = new NoteBook(graph, host, () => this.draw());
    this.build();
  }

  get notes() { return this.book.notes; }

  build() {
    const { graph } = this;
    this.tale = el("div", { class: "tale" });
    this.meter = el("div", { class: "meter" });
    this.live = el("p", { class: "hidden", role: "status", "aria-live": "polite" });
    this.svg = shape("svg", { role: "group", "aria-label": "The story: the prompt below, the answer above, boxes of features between" });
    this.linksTable = el("tbody");
    const legend = `Blue arrows raise what they point to, orange dashed ones lower it.${graph.compared_with.length ? " Boxes with ↓ are less active here than in the other prompts: blue arrows turn them down." : ""}`;
    this.story = el("div", { class: "story" }, this.svg, el("p", { class: "soft legend" }, legend), el("details", {}, el("summary", {}, "The picture as a table"),
      el("table", { class: "data" }, el("thead", {}, el("tr", {}, ...["from", "to", "share", "carried by"].map((t) => el("th", { scope: "col" }, t)))), this.linksTable)));
    this.nodesView = new NodesView(graph, (i) => (i < 0 ? this.rest() : this.chooseNode(i)));
    this.table = new TableView(this);
    this.card = el("section", { class: "card", "aria-label": "About what is chosen", tabindex: -1 });
    this.closer = button("×", () => this.rest(), { class: "close", "aria-label": "Close this card (Esc)" });
    this.offer = el("p", { class: "warning", hidden: true });
    const tabs = [["story", "Story"], ["nodes", "All nodes"], ["table", "Table"]].map(([view, name]) =>
      button(name, () => this.show(view), { "data-view": view, "aria-pressed": "false" }));
    this.tabs = el("div", { class: "tabs", role: "group", "aria-label": "View" }, ...tabs);
    this.search = el("input", { type: "search", placeholder: "Search features ( / )", "aria-label": "Search features and tokens",
      oninput: () => { this.query = this.search.value; this.drawSearch(); } });
    this.slider = el("input", { type: "range", min: 0, max: graph.levels.length - 1, step: 1, value: this.level, "aria-label": "Detail: number of boxes",
      oninput: () => { this.level = Number(this.slider.value); this.draw(); } });
    this.undo = button("Undo", () => this.book.undo(), { title: "Take back the last change of groups, pins or names (Ctrl Z)" });
    this.dialog = keysDialog();
    this.root.classList.add("tlc");
    this.root.replaceChildren(
      el("header", {}, el("div", { class: "question" }, el("h1", {}, graph.story.headline), el("p", { class: "prompt" }, graph.story.reads)), this.host.bar ?? ""),
      this.offer, el("div", { class: "words-part" }, ...wordsStrip(this)),
      el("div", { class: "panes" },
        el("div", { class: "told" }, this.tale, this.meter),
        el("div", { class: "stage" },
          el("div", { class: "bar" }, this.tabs, el("label", { class: "detail" }, "Fewer boxes ", this.slider, " more"), this.search,
            this.undo, button("Save notes", () => download("notes.json", `${JSON.stringify(this.book.file(), null, 1)}\n`, "application/json"), { title: "Download your groups, pins and names" }),
            button("?", () => this.dialog.showModal(), { "aria-label": "Keys and help" })),
          el("div", { class: "picture" }, this.story, this.nodesView.element, this.table.element)),
        this.card),
      this.live, this.dialog);
    listenToKeys(this);
    this.svg.addEventListener("click", (event) => this.clicked(event));
    this.svg.addEventListener("dblclick", (event) => this.toggleExpanded(event.target.closest(".unit")?.dataset.key));
    for (const type of ["pointerover", "pointerout"]) {
      this.svg.addEventListener(type, (event) => {
        const key = type === "pointerover" ? event.target.closest(".unit")?.dataset.key : null;
        if (key) this.scene?.emphasise(key);
        else this.emphasise();
      });
    }
    this.listenToDrops();
    new ResizeObserver(() => { if (this.view === "story" && this.story.clientWidth !== this.width) this.draw(); }).observe(this.story);
    this.show("story");
    this.rest();
    this.book.load().then((other) => { if (other) this.offerNotes(other); });
  }

  // A sentence on top of the card, until something else is chosen.
  say(words) {
    this.card.querySelector(".said")?.remove();
    const said = el("p", { class: "warning said", role: "status" }, words);
    this.card.prepend(said);
    said.scrollIntoView({ block: "nearest" });
  }

  offerNotes(other) {
    this.offer.hidden = false;
    this.offer.replaceChildren("The notes kept here were made for another graph. ",
      button("Use what fits", () => { this.book.change(this.book.known(other)); this.offer.hidden = true; }), " ",
      button("Leave them", () => { this.offer.hidden = true; }));
  }

  show(view) {
    this.view = view;
    for (const tab of this.tabs.children) tab.setAttribute("aria-pressed", String(tab.dataset.view === view));
    this.story.hidden = view !== "story";
    this.nodesView.element.hidden = view !== "nodes";
    this.table.element.hidden = view !== "table";
    this.draw();
  }

  draw() {
    this.undo.hidden = !this.book.past.length;
    if (this.view === "story") this.drawStory();
    if (this.view === "nodes") this.nodesView.show(this.chosen?.node ?? this.chosen?.link?.[1] ?? -1, this.found());
    if (this.view === "table") this.table.draw();
    if (this.chosen) this.drawCard();
  }

  drawStory() {
    const { graph } = this, level = graph.levels[this.level];
    const units = makeUnits(graph, level, this.notes, this.expanded);
    const flows = makeFlows(graph, units), arrows = makeArrows(units, flows, this.toldSteps(units)), meter = makeMeter(graph, units);
    this.width = this.story.clientWidth;
    const state = { pinned: (unit) => unit.members.length > 0 && unit.members.every((i) => this.notes.pins.includes(graph.ids[i])), errorShare: percent(meter.error) };
    const focus = this.svg.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const drawn = drawStory(this.svg, units, arrows, Math.max(300, this.width || NARROW), state);
    this.scene = { units, flows, arrows, ...drawn };
    this.drawTale();
    this.drawMeter(meter, carriedBy(units, level));
    const told = storiesByArrow(graph, units);
    this.linksTable.replaceChildren(...arrows.map((a) => {
      const from = units[a.source], to = units[a.target], story = told.get(`${a.source}>${a.target}`);
      return el("tr", {}, el("td", {}, from.name), el("td", {}, to.name), el("td", {}, `${verbOf(to.lower, a.share)} ${percent(Math.abs(a.share))}`),
        el("td", {}, button(story ? `by ${carrierWords(story)}` : "its links", () => this.chooseArrow(from.key, to.key),
          { class: "plain", "aria-label": `${story ? `Carried by ${carrierWords(story)}` : "The links"}: ${from.name} to ${to.name}` })));
    }));
    const key = this.chosen?.key ?? null;
    this.setTab(drawn.elements.has(key) ? key : drawn.order[0]?.key);
    drawn.elements.get(focus)?.focus();
    this.emphasise();
    for (const [k, made] of drawn.elements) made.classList.toggle("marked", this.marked.has(k));
  }

  // The steps of the sentences, as pairs of units.
  toldSteps(units) {
    const at = (i) => units.findIndex((unit) => unit.members.includes(i));
    return this.graph.levels[this.level].ways.flatMap((way) => way.slice(1).map((i, n) => [at(way[n]), at(i)])).filter(([from, to]) => from >= 0 && to >= 0 && from !== to);
  }

  drawTale() { this.tale.replaceChildren(...tale(this.graph, this.graph.levels[this.level], this.notes.groups.length > 0)); }

  // Keep what the model did without a box; the sentences show it.
  keepMeasured(result) {
    this.graph.ablations = [...this.graph.ablations, result];
    this.drawTale();
  }

  drawMeter(meter, carried) {
    const few = little(meter, carried);
    this.meter.classList.toggle("few", few);
    if (few) this.tale.before(this.meter); // little is explained: say that first
    else this.tale.after(this.meter);
    const removed = carried === null ? "" : allRemoved(this.graph, this.graph.levels[this.level]);
    this.meter.replaceChildren(...meterParts(this.graph, meter, carried), removed, scoresLine(this) ?? "");
    this.influence = meter;
    this.card.querySelector(".influence")?.replaceWith(influenceLine(this.graph, meter));
  }

  found() {
    const words = this.query.toLowerCase().split(/\s+/).filter(Boolean), made = new Set();
    if (words.length) this.graph.ids.forEach((id, i) => {
      const text = `${id} ${this.graph.nodes.label[i]} ${this.notes.names[id] ?? ""}`.toLowerCase();
      if (words.every((w) => text.includes(w))) made.add(i);
    });
    return made;
  }

  drawSearch() {
    if (this.view === "story" && this.query) this.show("table");
    else this.draw();
  }

  setTab(key) {
    for (const [k, made] of this.scene.elements) made.setAttribute("tabindex", k === key ? "0" : "-1");
  }

  unit(key) { return this.scene?.units.find((u) => u.key === key); }

  clicked(event) {
    const key = event.target.closest(".unit")?.dataset.key, arrow = event.target.closest(".hit");
    if (arrow) { this.chooseArrow(arrow.dataset.from, arrow.dataset.to); return; }
    if (!key) { this.rest(); return; }
    if (event.shiftKey) this.toggleMark(key);
    else if (event.ctrlKey || event.metaKey) this.pin(key);
    else if (this.chosen?.key === key) this.rest();
    else this.chooseUnit(key);
  }

  // Choose what a notebook chose: the box of exactly these nodes, else the first of them.
  choose(ids) {
    const unit = this.scene?.units.find((u) => u.members.length === ids.length && this.ids(u).every((id) => ids.includes(id)));
    const i = this.graph.indexOf.get(ids[0]);
    if (unit) this.chooseUnit(unit.key);
    else if (i === undefined) this.rest();
    else this.chooseNode(i);
  }

  chooseUnit(key, focus = false) {
    const unit = this.unit(key);
    if (!unit) return;
    this.chosen = { key, node: unit.single ? unit.members[0] : null };
    if (this.view === "story") { this.setTab(key); this.scene.emphasise(key); }
    if (focus) this.scene.elements.get(key)?.focus();
    this.drawCard();
    this.live.textContent = describe(unit);
    this.host.selected?.(unit.members.map((i) => this.graph.ids[i]));
  }

  chooseNode(i) {
    const key = `node:${this.graph.ids[i]}`;
    if (this.view === "story" && this.unit(key)) { this.chooseUnit(key); return; }
    this.chosen = { key, node: i };
    if (this.view === "nodes") { this.nodesView.show(i, this.found()); this.nodesView.reveal(i); }
    if (this.view === "story") this.scene.emphasise(this.scene.units.find((u) => u.members.includes(i))?.key ?? null);
    this.drawCard();
    this.live.textContent = nodeName(this.graph, i, this.notes.names);
    this.host.selected?.([this.graph.ids[i]]);
  }

  // Bring out in the story what is chosen.
  emphasise() {
    if (!this.scene) return;
    const { key = null, link, arrow } = this.chosen ?? {};
    const home = (i) => this.scene.units.find((u) => u.members.includes(i))?.key;
    if (arrow || link) this.scene.emphasise(...(arrow ?? link.map(home)));
    else this.scene.emphasise(this.scene.elements.has(key) ? key : null);
  }

  chooseLink(source, target, arrow) {
    const name = `${this.graph.ids[source]}>${this.graph.ids[target]}`;
    this.chooseBetween({ key: arrow ? `arrow:${arrow.join(">")}` : `link:${name}`, link: [source, target], arrow }, linkName(this, source, target), [source, target]);
  }

  // Choose an arrow of the story. Between two single nodes it is one link.
  chooseArrow(from, to) {
    const [a, b] = [this.unit(from), this.unit(to)];
    if (!a || !b) return;
    if (a.single && b.single) this.chooseLink(a.members[0], b.members[0], [from, to]);
    else this.chooseBetween({ key: `arrow:${from}>${to}`, arrow: [from, to] }, `${a.name} to ${b.name}`, [...a.members, ...b.members]);
  }

  // `from` is what Escape goes back to.
  chooseBetween(chosen, words, members) {
    const from = this.chosen?.link || this.chosen?.arrow ? this.chosen.from : this.chosen;
    this.chosen = { node: null, from, ...chosen };
    if (this.view === "story") this.emphasise();
    if (this.view === "nodes" && chosen.link) this.nodesView.show(chosen.link[1], this.found());
    this.drawCard();
    this.live.textContent = words;
    this.host.selected?.(members.map((i) => this.graph.ids[i]));
  }

  // Put in labels that came later than the picture.
  relabel({ levels, label, cards }) {
    this.graph.levels = levels;
    Object.assign(this.graph.nodes, { label, cards });
    const busy = this.card.contains(document.activeElement) && this.chosen;
    if (this.view === "story") this.drawStory();
    if (this.view === "table") this.table.draw();
    if (this.chosen && !busy) this.drawCard();
  }

  drawCard() {
    const focused = this.card.contains(document.activeElement);
    this.fillCard();
    if (this.chosen) this.card.prepend(this.closer);
    if (this.told !== this.chosen?.key) this.card.scrollTop = 0;
    this.told = this.chosen?.key;
    if (focused) this.card.focus();
  }

  fillCard() {
    this.card.classList.remove("rest");
    const { link, arrow } = this.chosen, ends = arrow?.map((key) => this.unit(key));
    if (link) { this.card.replaceChildren(...linkCard(this, ...link).filter(Boolean)); return; }
    if (ends) {
      if (ends.every(Boolean)) this.card.replaceChildren(...arrowCard(this, ...ends).filter(Boolean));
      else this.rest();
      return;
    }
    const unit = this.unit(this.chosen.key);
    if (unit) this.card.replaceChildren(...unitCard(this, unit).filter(Boolean));
    else if (this.chosen.node !== null) this.card.replaceChildren(...nodeCard(this, this.chosen.node).filter(Boolean));
    else this.rest();
  }

  rest() {
    this.chosen = null;
    this.scene?.emphasise(null);
    if (this.view === "nodes") this.nodesView.show(-1, this.found());
    this.card.classList.add("rest");
    this.card.replaceChildren(...restCard(this.graph, this.influence));
    this.host.selected?.([]);
  }

  ids(unit) { return unit.members.map((i) => this.graph.ids[i]); }

  effect(unit) { return effectParts(this, this.ids(unit), unit.name); }

  boxActions(unit) {
    const open = this.expanded.has(unit.key);
    return el("div", { class: "actions" },
      unit.members.length > 1 ? button(open ? "Close (Enter)" : "Expand (Enter)", () => this.toggleExpanded(unit.key)) : null,
      button("Rename (L)", () => this.rename(unit.key)),
      button(this.ids(unit).every((id) => this.notes.pins.includes(id)) ? "Unpin (P)" : "Pin (P)", () => this.pin(unit.key)),
      unit.own ? button("Ungroup (G)", () => { this.marked.clear(); this.groupMarked(); }) : button(this.marked.has(unit.key) ? "Unmark (Space)" : "Mark to group (Space)", () => this.toggleMark(unit.key)),
      this.marked.size ? button("Group what is marked (G)", () => this.groupMarked()) : null);
  }

  nodeActions(i) {
    const id = this.graph.ids[i], pinned = this.notes.pins.includes(id);
    const owner = this.scene?.units.find((u) => u.inside && u.members.includes(i));
    return el("div", { class: "actions" },
      this.graph.kinds[i] === "feature" ? button(pinned ? "Unpin (P)" : "Pin (P)", () => this.book.togglePins([id])) : null,
      button("Rename (L)", () => this.rename(`node:${id}`)),
      owner ? button("Close its box (Esc)", () => this.toggleExpanded(owner.inside)) : null);
  }

  toggleExpanded(key) {
    if (!key) return;
    const unit = this.unit(key);
    if (this.expanded.has(key)) this.expanded.delete(key);
    else if (unit?.kind === "box" && unit.members.length > 1 && !unit.single) this.expanded.add(key);
    else return;
    if (this.expanded.has(key)) this.chosen = null;
    else this.chosen = { key, node: null };
    this.draw();
    if (!this.chosen) this.rest();
    const first = this.scene.units.find((u) => u.inside === key) ?? this.unit(key);
    if (first) { this.setTab(first.key); this.scene.elements.get(first.key).focus(); }
  }

  toggleMark(key) {
    if (this.unit(key)?.kind !== "box") return;
    if (this.marked.has(key)) this.marked.delete(key);
    else this.marked.add(key);
    this.scene.elements.get(key)?.classList.toggle("marked", this.marked.has(key));
    this.live.textContent = `${plural(this.marked.size, "box").replace("boxs", "boxes")} marked; G groups them`;
    if (this.chosen) this.drawCard();
  }

  // G: group what is marked; with nothing marked, ungroup the chosen group.
  groupMarked() {
    const units = [...this.marked].map((key) => this.unit(key)).filter(Boolean), chosen = this.chosen && this.unit(this.chosen.key);
    if (units.length === 0) {
      if (chosen?.own) { this.chosen = null; this.book.ungroup(chosen.name); this.rest(); }
      return;
    }
    if (chosen && chosen.kind === "box" && !units.includes(chosen)) units.push(chosen);
    this.joinUnits(units);
  }

  joinUnits(units) {
    const best = [...units].sort((a, b) => (b.own ? 1 : 0) - (a.own ? 1 : 0) || b.members.length - a.members.length)[0];
    this.marked.clear();
    const label = this.book.group(best.name, [...new Set(units.flatMap((u) => this.ids(u)))]);
    this.chooseUnit(`group:${label}`, true);
    this.live.textContent = `Grouped as ${label}`;
  }

  // A box dropped on a box makes a group of both.
  listenToDrops() {
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => { from = event.target.closest(".unit.box")?.dataset.key ?? null; });
    this.svg.addEventListener("pointerup", (event) => {
      const onto = document.elementFromPoint(event.clientX, event.clientY)?.closest?.(".unit.box")?.dataset.key;
      if (from && onto && from !== onto) {
        const units = [this.unit(onto), this.unit(from)];
        this.svg.addEventListener("click", (click) => click.stopPropagation(), { capture: true, once: true });
        this.joinUnits(units);
      }
      from = null;
    });
  }

  pin(key) {
    const unit = this.unit(key);
    const ids = unit ? this.ids(unit) : [key.replace(/^node:/, "")];
    if (unit && unit.kind !== "box") return;
    const now = this.book.togglePins(ids);
    this.live.textContent = now ? "Pinned" : "Unpinned";
  }

  rename(key) {
    const unit = this.unit(key), node = unit ? (unit.single ? unit.members[0] : null) : this.graph.indexOf.get(key.replace(/^node:/, ""));
    const old = unit?.name ?? nodeName(this.graph, node, this.notes.names);
    const input = el("input", { type: "text", value: old, maxlength: 200, "aria-label": "New name", class: "rename" });
    const done = (save) => {
      if (!input.isConnected) return;
      const name = input.value.trim();
      form.remove();
      if (!save || !name || name === old) return;
      if (node !== null && node !== undefined) this.book.nameNode(this.graph.ids[node], name);
      else if (unit.own) this.chosen = { key: `group:${this.book.renameGroup(unit.name, name)}`, node: null };
      else this.chosen = { key: `group:${this.book.group(name, this.ids(unit))}`, node: null };
      this.draw();
      if (this.chosen) this.chooseUnit(this.chosen.key, true);
    };
    const form = el("form", { class: "actions", onsubmit: (event) => { event.preventDefault(); done(true); } }, input, el("button", {}, "Save name"));
    input.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); done(false); } });
    this.card.prepend(form);
    input.focus();
    input.select();
  }
}

export async function render(root, data, host = {}) {
  if (typeof DecompressionStream === "undefined") {
    root.textContent = "This browser cannot unpack the graph (it has no DecompressionStream). Any browser from 2023 on can.";
    return null;
  }
  return new App(root, await unpackGraph(data), host);
}
