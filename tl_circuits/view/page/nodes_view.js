// All nodes by position and layer, on a canvas. Drawing thousands of nodes takes too long to do at every movement, so
// the picture is drawn once into a bitmap. The bitmap is moved and scaled, and drawn sharp again when the pointer rests. Links are
// drawn of the chosen node, or else only the strongest. For each zoom, all nodes are kept as a backdrop in strong and in faint
// colours, so that a click only has to draw what it is about.
import { clipped, el, visible } from "./dom.js";
const BOTTOM = 34, STRONGEST = 1200, REST_MS = 140, NEAR = 18, MOST_ZOOM = 24, NEIGHBOURS = 150;

function rowName({ kinds, nodes }, i) {
  if (kinds[i] === "embedding") return "tokens";
  if (kinds[i] === "logit") return "output";
  return nodes.site?.[i] ? `L${nodes.layer[i]} ${nodes.site[i]}` : `layer ${nodes.layer[i]}`;
}

export class NodesView {
  constructor(graph, choose) {
    this.graph = graph;
    this.choose = choose;
    this.left = graph.nodes.site ? 96 : 70; // room for the names of rows
    this.canvas = el("canvas", { tabindex: 0, role: "img",
      "aria-label": "All nodes, positions from left to right, layers from bottom to top. The table lists the same nodes." });
    this.tip = el("div", { class: "tip", hidden: true });
    this.element = el("div", { class: "nodes" }, this.canvas, this.tip);
    this.zoom = { x: 0, y: 0, k: 1 };
    this.chosen = -1;
    this.marked = new Set();
    this.backdrops = {};
    const flow = Array.from(graph.weight, (_, e) => Math.abs(graph.share[e]) * (graph.nodes.influence[graph.target[e]] ?? 0));
    this.strongest = [...flow.keys()].sort((a, b) => flow[b] - flow[a]).slice(0, STRONGEST);
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  resize() {
    const wide = this.element.clientWidth, high = this.element.clientHeight;
    if (!wide || !high || (wide === this.wide && high === this.high)) return;
    this.wide = wide;
    this.high = high;
    this.place();
    this.paint();
  }

  // A column is as wide as its fullest cell needs. Only layers that hold a node get a row; sites of a layer have rows of their own.
  place() {
    const { graph } = this, row = (i) => (graph.kinds[i] === "embedding" ? -1 : graph.kinds[i] === "logit" ? Infinity : graph.depth[i]);
    this.rowNames = new Map(graph.kinds.map((_, i) => [row(i), rowName(graph, i)]));
    this.rows = [...new Set(graph.kinds.map((_, i) => row(i)))].sort((a, b) => a - b);
    const rank = new Map(this.rows.map((r, i) => [r, i])), step = (this.high - BOTTOM - 16) / Math.max(1, this.rows.length);
    const cells = new Map(), fullest = graph.tokens.map(() => 1);
    graph.kinds.forEach((_, i) => {
      const p = Math.max(0, graph.nodes.position[i]), key = `${p}|${row(i)}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(i);
    });
    for (const [key, members] of cells) {
      const p = Number(key.split("|")[0]);
      fullest[p] = Math.max(fullest[p], members.length);
      members.sort((a, b) => graph.nodes.influence[b] - graph.nodes.influence[a]);
    }
    const weights = fullest.map((n) => Math.sqrt(n) + 1.5), total = weights.reduce((a, b) => a + b, 0);
    const unit = (this.wide - this.left - 10) / total;
    this.columns = [];
    let x = this.left;
    weights.forEach((w) => { this.columns.push([x, w * unit]); x += w * unit; });
    this.x = new Float32Array(graph.n);
    this.y = new Float32Array(graph.n);
    for (const [key, members] of cells) {
      const [p, r] = key.split("|").map(Number), [left, wide] = this.columns[p];
      const gap = Math.min(9, (wide - 8) / members.length);
      members.forEach((i, n) => {
        this.x[i] = left + 4 + gap * (n + 0.5);
        this.y[i] = this.high - BOTTOM - step * (rank.get(r) + 0.5);
      });
    }
    // Targets spread over the whole width, so that each has room for its name.
    this.logits = graph.kinds.flatMap((kind, i) => (kind === "logit" ? [i] : []));
    this.room = (this.wide - this.left) / Math.max(1, this.logits.length);
    this.logits.forEach((i, n) => { this.x[i] = this.left + 8 + this.room * n; });
    this.step = step;
  }

  colours() {
    const style = getComputedStyle(this.element);
    return Object.fromEntries(["ink", "soft", "line", "plus", "minus", "feature", "chosen", "paper"].map((n) => [n, style.getPropertyValue(`--${n}`)]));
  }

  // Draw the picture sharp at the present zoom.
  paint() {
    if (!this.wide) return;
    const ratio = Math.min(2, devicePixelRatio || 1), { canvas } = this;
    canvas.width = this.wide * ratio;
    canvas.height = this.high * ratio;
    const c = canvas.getContext("2d"), look = this.colours(), { x, y, k } = this.zoom;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    const faint = this.chosen >= 0 || this.marked.size > 0;
    c.drawImage(this.backdrop(look, ratio, faint), 0, 0, this.wide, this.high);
    if (faint) {
      c.setTransform(ratio * k, 0, 0, ratio * k, ratio * x, ratio * y);
      const links = this.chosen < 0 ? [] : [...this.graph.inputs[this.chosen].slice(0, NEIGHBOURS), ...this.graph.outputs[this.chosen].slice(0, NEIGHBOURS)];
      this.drawLinks(c, look, k, links, 0.7);
      this.drawNodes(c, look, k, this.loud(links), 1);
      c.setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    this.drawAxes(c, look);
    this.painted = { ...this.zoom };
    canvas.style.transform = "";
  }

  // All nodes as they look while nothing is chosen. In faint colours, they lie behind what is chosen.
  backdrop(look, ratio, faint) {
    const { x, y, k } = this.zoom, made = [x, y, k, this.wide, this.high, ratio, ...Object.values(look)].join();
    if (this.backdrops[faint]?.made === made) return this.backdrops[faint].canvas;
    const canvas = this.backdrops[faint]?.canvas ?? el("canvas"), c = canvas.getContext("2d");
    canvas.width = this.wide * ratio;
    canvas.height = this.high * ratio;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.fillStyle = look.paper;
    c.fillRect(0, 0, this.wide, this.high);
    c.setTransform(ratio * k, 0, 0, ratio * k, ratio * x, ratio * y);
    if (!faint) this.drawLinks(c, look, k, this.strongest, 0.28);
    this.drawNodes(c, look, k, this.graph.ids.keys(), faint ? 0.25 : 1);
    this.backdrops[faint] = { made, canvas };
    return canvas;
  }

  // The nodes that stand out: those marked, else what is chosen and the other ends of its links.
  loud(links) {
    if (this.marked.size) return this.marked;
    return new Set([...links.flatMap((e) => [this.graph.source[e], this.graph.target[e]]), this.chosen]);
  }

  drawLinks(c, look, k, links, alpha) {
    const { graph } = this;
    for (const up of [true, false]) {
      c.strokeStyle = up ? look.plus : look.minus;
      c.setLineDash(up ? [] : [5 / k, 4 / k]);
      for (const e of links) {
        const share = graph.share[e] * graph.towards[graph.target[e]];
        if ((share >= 0) !== up) continue;
        const s = graph.source[e], t = graph.target[e], bend = (this.y[s] - this.y[t]) / 2;
        c.globalAlpha = alpha;
        c.lineWidth = Math.max(0.4, 5 * Math.sqrt(Math.min(1, Math.abs(share)))) / Math.sqrt(k);
        c.beginPath();
        c.moveTo(this.x[s], this.y[s]);
        c.bezierCurveTo(this.x[s], this.y[s] - bend, this.x[t], this.y[t] + bend, this.x[t], this.y[t]);
        c.stroke();
      }
    }
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  drawNodes(c, look, k, nodes, alpha) {
    const { graph } = this, r0 = Math.max(1.4, Math.min(3, this.step / 5)) / Math.sqrt(k), own = alpha === 1;
    // One path for all nodes of a colour: filling 2,000 paths one by one is what takes time.
    const paths = new Map();
    const path = (colour) => {
      if (!paths.has(colour)) paths.set(colour, new Path2D());
      return paths.get(colour);
    };
    for (const i of nodes) {
      const x = this.x[i], y = this.y[i], kind = graph.kinds[i];
      const r = kind === "feature" ? r0 * (1 + 2 * Math.min(1, Math.sqrt(graph.nodes.influence[i]))) : r0 * 1.4;
      const colour = own && (i === this.chosen || this.marked.has(i)) ? "chosen" : kind === "feature" ? "feature" : kind === "error" ? "soft" : "ink";
      const into = path(colour);
      if (kind === "feature") { into.moveTo(x + r, y); into.arc(x, y, r, 0, 7); }
      else if (kind === "error") { into.moveTo(x, y - r); into.lineTo(x + r, y); into.lineTo(x, y + r); into.lineTo(x - r, y); into.closePath(); }
      else into.rect(x - r, y - r, 2 * r, 2 * r);
    }
    for (const [colour, drawn] of paths) {
      c.globalAlpha = alpha;
      c.fillStyle = c.strokeStyle = look[colour];
      c.lineWidth = 1 / k;
      if (colour === "soft") c.stroke(drawn);
      else c.fill(drawn);
    }
    c.globalAlpha = 1;
  }

  // Names of layers and tokens stay at the edges while the picture moves below them.
  drawAxes(c, look) {
    const { x, y, k } = this.zoom;
    c.fillStyle = look.paper;
    c.globalAlpha = 0.9;
    c.fillRect(0, 0, this.left - 6, this.high);
    c.fillRect(0, this.high - BOTTOM + 6, this.wide, BOTTOM);
    c.globalAlpha = 1;
    c.font = "12px system-ui, sans-serif";
    c.fillStyle = look.soft;
    let last = Infinity;
    this.rows.forEach((r, i) => {
      const at = y + k * (this.high - BOTTOM - this.step * (i + 0.5)) + 4;
      if (at > this.high - BOTTOM || at < 10 || (last - at < 13 && i < this.rows.length - 1)) return;
      last = at;
      c.fillText(this.rowNames.get(r), 6, at);
    });
    c.fillStyle = look.ink;
    for (const i of this.logits) {
      const at = x + k * this.x[i], name = visible(this.graph.nodes.label[i].replace(/^output /, ""));
      if (at > this.left - 10) c.fillText(clipped(name, Math.max(3, Math.floor((k * this.room - 14) / 7))), at + 8, y + k * this.y[i] + 4);
    }
    this.graph.tokens.forEach((token, p) => {
      const [left, wide] = this.columns[p], room = k * wide - 6;
      const text = visible(token), most = Math.max(1, Math.floor(room / 7));
      const at = x + k * left + 4;
      if (at > this.left - 20 && at < this.wide) c.fillText(text.length > most ? `${text.slice(0, Math.max(1, most - 1))}…` : text, at, this.high - 12);
    });
  }

  // Move the bitmap now, draw it sharp when the pointer rests.
  move(zoom) {
    this.zoom = zoom;
    const k = zoom.k / this.painted.k;
    this.canvas.style.transform = `translate(${zoom.x - k * this.painted.x}px,${zoom.y - k * this.painted.y}px) scale(${k})`;
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.paint(), REST_MS);
  }

  zoomBy(factor, px = this.wide / 2, py = this.high / 2) {
    const k = Math.max(1, Math.min(MOST_ZOOM, this.zoom.k * factor)), f = k / this.zoom.k;
    this.moveInside(k, px - f * (px - this.zoom.x), py - f * (py - this.zoom.y));
  }

  // Without leaving an empty margin.
  moveInside(k, x, y) {
    const clamp = (v, size) => Math.min(0, Math.max(v, size * (1 - k)));
    this.move({ k, x: clamp(x, this.wide), y: clamp(y, this.high) });
  }

  panBy(dx, dy) { this.moveInside(this.zoom.k, this.zoom.x + dx, this.zoom.y + dy); }

  // Brings a node into sight.
  reveal(i) {
    const { x, y, k } = this.zoom, px = x + k * this.x[i], py = y + k * this.y[i];
    if (px < this.left || px > this.wide - 10 || py < 10 || py > this.high - BOTTOM) this.moveInside(k, this.wide / 2 - k * this.x[i], this.high / 2 - k * this.y[i]);
  }

  fit() { this.move({ x: 0, y: 0, k: 1 }); }

  nearest(event) {
    const box = this.element.getBoundingClientRect(), { x, y, k } = this.zoom;
    const px = (event.clientX - box.left - x) / k, py = (event.clientY - box.top - y) / k;
    let best = -1, least = (NEAR / k) ** 2;
    for (let i = 0; i < this.graph.n; i += 1) {
      const d = (this.x[i] - px) ** 2 + (this.y[i] - py) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }

  show(chosen, marked = new Set()) {
    this.chosen = chosen;
    this.marked = marked;
    this.paint();
  }

  listen() {
    let drag = null;
    this.element.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = this.element.getBoundingClientRect();
      this.zoomBy(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    this.element.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, from: { ...this.zoom }, far: false }; });
    this.element.addEventListener("pointermove", (event) => {
      if (drag && event.buttons) {
        const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
        drag.far ||= Math.hypot(dx, dy) > 4;
        if (drag.far) this.moveInside(this.zoom.k, drag.from.x + dx, drag.from.y + dy);
        return;
      }
      const i = this.nearest(event);
      this.tip.hidden = i < 0;
      if (i < 0) return;
      this.tip.textContent = `${this.graph.nodes.label[i].slice(0, 120)} · ${this.graph.ids[i]}`;
      const box = this.element.getBoundingClientRect();
      this.tip.style.left = `${Math.min(event.clientX - box.left + 12, this.wide - 180)}px`;
      this.tip.style.top = `${event.clientY - box.top + 14}px`;
    });
    this.element.addEventListener("pointerleave", () => { this.tip.hidden = true; drag = null; });
    this.element.addEventListener("pointerup", (event) => {
      if (drag && !drag.far) this.choose(this.nearest(event));
      drag = null;
    });
  }
}
