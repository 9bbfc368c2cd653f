// What the story draws: tokens, boxes, targets, the error band, and the flows between them.
// view/story.py computes the same flows and the same meter.
import { percent, visible } from "./dom.js";
const ARROWS_PER_BOX = 4, LEAST_ARROW = 0.002, MEMBERS_SHOWN = 12;

export function weighted(graph, members, column) {
  let total = 0, weight = 0;
  for (const i of members) {
    const w = Math.max(graph.nodes.influence[i], 1e-30);
    total += w * column[i];
    weight += w;
  }
  return total / weight;
}

export function nodeName(graph, i, names) {
  return names[graph.ids[i]] ?? visible(graph.nodes.label[i].replace(/^output /, "").replace(/^token /, "").replace(graph.against_others, ""));
}

export function nodePlace(graph, i) {
  const kind = graph.kinds[i], token = graph.tokens[graph.nodes.position[i]] ?? "";
  if (kind === "logit") return "answer";
  const where = `“${visible(token)}”`;
  const site = graph.nodes.site?.[i] ? `, ${graph.nodes.site[i]}` : "";
  return kind === "embedding" ? `position ${graph.nodes.position[i]}` : `${where}, layer ${graph.nodes.layer[i]}${site}`;
}

// Where a box is, as Python writes it: “ France” and 1 more, layers 12–14. In the picture: “ France” +1, layers 12–14.
export function boxPlace(graph, members, more = (n) => ` and ${n} more`) {
  const reach = new Map(), layers = members.map((i) => graph.nodes.layer[i]);
  for (const i of members) {
    const p = graph.nodes.position[i];
    reach.set(p, (reach.get(p) ?? 0) + graph.nodes.influence[i]);
  }
  const most = [...reach].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([p]) => p);
  const low = Math.min(...layers), high = Math.max(...layers);
  return `“${visible(graph.tokens[most[0]] ?? "")}”${most.length > 1 ? more(most.length - 1) : ""}, ` +
    (low === high ? `layer ${low}` : `layers ${low}–${high}`);
}

// Whether features count most of all because they are less active than in the prompts compared with.
export const isLower = (graph, members) => graph.compared_with.length > 0 && weighted(graph, members, graph.towards) < 0;

// What a share of a target's inputs does to it, in words.
export const verbOf = (lower, share) => (lower ? (share >= 0 ? "turns down" : "keeps up") : share >= 0 ? "raises" : "lowers");

function boxUnit(graph, key, name, members, extra = {}) {
  const lower = isLower(graph, members);
  return {
    key, kind: "box", name, members, lower, place: `${boxPlace(graph, members)}${lower ? ", turned down" : ""}`,
    foot: `${lower ? "↓ " : ""}${boxPlace(graph, members, (n) => ` +${n}`)}`,
    row: (weighted(graph, members, graph.nodes.layer) + 1) / (graph.n_layers + 1),
    column: weighted(graph, members, graph.nodes.position), ...extra,
  };
}

// The person's groups, then the boxes of this level, then pinned features as boxes of their own.
function boxesOf(graph, level, notes) {
  const taken = new Set(), boxes = [];
  for (const [label, ...ids] of notes.groups) {
    const members = ids.map((id) => graph.indexOf.get(id)).filter((i) => i !== undefined && graph.kinds[i] === "feature");
    members.forEach((i) => taken.add(i));
    if (members.length) boxes.push(boxUnit(graph, `group:${label}`, label, members, { own: true }));
  }
  for (const box of level.boxes) {
    const members = box.members.filter((i) => !taken.has(i));
    if (members.length && !boxes.some((b) => b.name === box.label)) {
      boxes.push(boxUnit(graph, `box:${box.members[0]}`, box.label, members));
    }
    members.forEach((i) => taken.add(i));
  }
  for (const id of notes.pins) {
    const i = graph.indexOf.get(id);
    if (i !== undefined && graph.kinds[i] === "feature" && !taken.has(i)) {
      boxes.push(boxUnit(graph, `node:${id}`, nodeName(graph, i, notes.names), [i], { single: true }));
    }
  }
  return boxes;
}

// An expanded box is drawn as its strongest members and one box for the rest.
function opened(graph, box, notes) {
  const members = [...box.members].sort((a, b) => graph.nodes.influence[b] - graph.nodes.influence[a]);
  const shown = members.length > MEMBERS_SHOWN ? members.slice(0, MEMBERS_SHOWN - 1) : members;
  const units = shown.map((i) =>
    boxUnit(graph, `node:${graph.ids[i]}`, nodeName(graph, i, notes.names), [i], { single: true, inside: box.key }));
  const rest = members.slice(shown.length);
  if (rest.length) units.push(boxUnit(graph, `rest:${box.key}`, `${rest.length} more of ${box.name}`, rest, { inside: box.key }));
  return units;
}

// A target's probability in words. Differences and directions have weight one, which is not a probability.
export const chance = (weight) => (weight > 0 && weight < 1 ? percent(weight, weight >= 0.1 ? 0 : undefined) : "");

export function makeUnits(graph, level, notes, expanded) {
  const units = [];
  graph.kinds.forEach((kind, i) => {
    if (kind === "embedding") {
      units.push({ key: `node:${graph.ids[i]}`, kind: "token", name: nodeName(graph, i, notes.names), members: [i],
        place: nodePlace(graph, i), row: 0, column: graph.nodes.position[i], single: true });
    }
  });
  for (const box of boxesOf(graph, level, notes)) {
    if (expanded.has(box.key) && box.members.length > 1) units.push(...opened(graph, box, notes));
    else units.push(box);
  }
  const errors = graph.kinds.flatMap((kind, i) => (kind === "error" ? [i] : []));
  if (errors.length) {
    units.push({ key: "errors", kind: "errors", name: "What the features miss", members: errors,
      place: `${errors.length} places`, row: 0, column: 0 });
  }
  for (const [n, i] of graph.story.targets.entries()) {
    const taken = units.findIndex((unit) => unit.kind === "box" && unit.members.includes(i));
    if (taken >= 0) units[taken] = { ...units[taken], members: units[taken].members.filter((m) => m !== i) };
    units.push({ key: `node:${graph.ids[i]}`, kind: "target", name: nodeName(graph, i, notes.names), members: [i],
      place: "answer", row: 1, column: graph.tokens.length - 1, single: true, chance: chance(graph.story.weights[n]) });
  }
  return units.filter((unit) => unit.members.length);
}

function membership(graph, units) {
  const unitOf = new Int32Array(graph.n).fill(-1);
  units.forEach((unit, u) => unit.members.forEach((i) => { unitOf[i] = u; }));
  return unitOf;
}

// flows[target][source]: the source's signed share of the target's inputs; of an answer, the share of what there is to explain.
export function makeFlows(graph, units) {
  const answers = new Map(graph.story.targets.map((i, n) => [i, graph.nodes.mass[i] / graph.story.scales[n]]));
  const unitOf = membership(graph, units), reach = graph.nodes.influence;
  const flows = units.map(() => new Float64Array(units.length));
  const whole = units.map((unit) => unit.members.reduce((sum, i) => sum + Math.max(reach[i], 1e-30), 0));
  for (let e = 0; e < graph.source.length; e += 1) {
    const t = unitOf[graph.target[e]], s = unitOf[graph.source[e]];
    if (t < 0 || s < 0 || s === t) continue;
    flows[t][s] += graph.share[e] * (answers.get(graph.target[e]) ?? 1) * graph.towards[graph.target[e]] * Math.max(reach[graph.target[e]], 1e-30) / whole[t];
  }
  return flows;
}

// `told`: pairs of units in a sentence, whose arrows are always drawn.
export function makeArrows(units, flows, told = []) {
  const arrows = [];
  units.forEach((unit, target) => {
    if (unit.kind === "token" || unit.kind === "errors") return;
    const order = [...flows[target].keys()].filter((s) => units[s].kind !== "errors")
      .sort((a, b) => Math.abs(flows[target][b]) - Math.abs(flows[target][a]) || a - b);
    for (const source of order.slice(0, ARROWS_PER_BOX)) {
      if (Math.abs(flows[target][source]) >= LEAST_ARROW) arrows.push({ source, target, share: flows[target][source] });
    }
  });
  for (const [source, target] of told) {
    if (flows[target][source] && !arrows.some((a) => a.source === source && a.target === target)) arrows.push({ source, target, share: flows[target][source] });
  }
  return arrows;
}

// Follow the targets' inputs back until a token, an error or a feature that is not drawn.
export function makeMeter(graph, units) {
  const drawn = units.map((unit) => unit.kind === "box" || unit.kind === "target");
  const unitOf = membership(graph, units), arriving = new Float64Array(graph.n);
  let total = 0;
  const through = [];
  for (let i = 0; i < graph.n; i += 1) if (unitOf[i] >= 0 && drawn[unitOf[i]]) through.push(i);
  graph.story.targets.forEach((i, n) => { arriving[i] = graph.story.weights[n]; total += arriving[i]; });
  through.sort((a, b) => graph.depth[b] - graph.depth[a]);
  for (const i of through) {
    if (arriving[i]) for (const e of graph.inputs[i]) arriving[graph.source[e]] += arriving[i] * Math.abs(graph.share[e]);
  }
  let shown = 0, error = 0;
  for (let i = 0; i < graph.n; i += 1) {
    if (graph.kinds[i] === "embedding") shown += arriving[i];
    if (graph.kinds[i] === "error") error += arriving[i];
  }
  shown /= Math.max(total, 1e-30);
  error /= Math.max(total, 1e-30);
  return { shown, error, hidden: Math.max(0, 1 - shown - error) };
}
