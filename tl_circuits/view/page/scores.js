// Replacement and completeness of what is pinned or grouped: all other features count as part of the error of their
// layer (and site) and position, as on Neuronpedia's page. tl_circuits/graph/pinned.py computes the same.
import { el, percent } from "./dom.js";

export function pinnedScores(graph, ids) {
  const { depth } = graph, { position } = graph.nodes, kept = new Set(ids.map((id) => graph.indexOf.get(id)));
  const errorAt = new Map();
  graph.kinds.forEach((kind, i) => { if (kind === "error") errorAt.set(`${depth[i]}|${position[i]}`, i); });
  const gone = (i) => graph.kinds[i] === "feature" && !kept.has(i);
  const inputs = graph.kinds.map(() => new Map());
  for (let e = 0; e < graph.source.length; e += 1) {
    const target = graph.target[e], from = graph.source[e];
    if (gone(target)) continue;
    const source = gone(from) ? errorAt.get(`${depth[from]}|${position[from]}`) : from;
    if (source !== undefined) inputs[target].set(source, (inputs[target].get(source) ?? 0) + graph.weight[e]);
  }
  const reach = new Float64Array(graph.n), weights = new Float64Array(graph.n);
  graph.weights.forEach(([i, weight]) => { weights[i] = weight; });
  const order = [...inputs.keys()].filter((i) => inputs[i].size).sort((a, b) => depth[b] - depth[a]);
  let explained = 0;
  for (const i of order) {
    const out = reach[i] + weights[i], mass = Math.max([...inputs[i].values()].reduce((sum, w) => sum + Math.abs(w), 0), 1e-10);
    for (const [source, weight] of inputs[i]) {
      const share = Math.abs(weight) / mass;
      reach[source] += out * share;
      if (graph.kinds[source] === "error") explained -= out * share;
    }
  }
  let tokens = 0, errors = 0, whole = 0;
  for (let i = 0; i < graph.n; i += 1) {
    if (graph.kinds[i] === "embedding") tokens += reach[i];
    if (graph.kinds[i] === "error") errors += reach[i];
    whole += reach[i] + weights[i];
  }
  return { replacement: tokens / Math.max(tokens + errors, 1e-30), completeness: (whole + explained) / Math.max(whole, 1e-30) };
}

export function scoresLine(app) {
  const ids = [...new Set([...app.notes.pins, ...app.notes.groups.flatMap(([, ...members]) => members)])];
  if (!ids.length) return null;
  const { replacement, completeness } = pinnedScores(app.graph, ids);
  return el("p", { class: "soft pinned-scores" }, `With only what you pinned or grouped explained: replacement score ${percent(replacement)}, completeness ${percent(completeness)}.`);
}
