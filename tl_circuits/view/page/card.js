// The card beside the picture: what the chosen box or node is, what drives it, and what it drives.
import { button, el, percent, plural, signed, visible } from "./dom.js";
import { qkParts, storyOf } from "./heads.js";
import { linkName } from "./links.js";
import { influenceLine } from "./meter.js";
import { chance, nodeName, nodePlace } from "./units.js";
const LISTED = 10, LEAST_SHARE = 5e-5; // weaker ones would read 0.00 %, so they are only counted

const quoted = (tokens) => tokens.map((t) => `“${visible(t)}”`).join("  ");

function rows(title, items, empty) {
  if (!items.length) return empty ? [el("h3", {}, title), el("p", { class: "soft" }, empty)] : [];
  const listed = items.slice(0, LISTED).filter((item) => item.share === null || Math.abs(item.share) >= LEAST_SHARE), rest = items.length - listed.length;
  const list = el("ul", { class: "list" }, ...listed.map(({ share, name, place, act, why }) => el("li", { class: why ? "two" : null }, row(share, name, place, act), why ?? null)));
  return [el("h3", {}, title), list, rest > 0 ? el("p", { class: "soft" }, `and ${rest} weaker ones`) : null];
}

function row(share, name, place, act) {
  const sign = share === null ? null : el("span", { class: `share ${share >= 0 ? "plus" : "minus"}` }, signed(share));
  return el("button", { type: "button", class: "row", onclick: act }, sign ?? el("span", { class: "share" }),
    el("span", {}, name, " ", el("span", { class: "soft" }, place)));
}

function linkItems(app, links, end) {
  const { graph } = app;
  return links.map((e, n) => {
    if (n >= LISTED) return null; // only counted
    const other = end === "source" ? graph.source[e] : graph.target[e];
    return { share: graph.share[e] * graph.towards[graph.target[e]], name: nodeName(graph, other, app.notes.names),
      place: nodePlace(graph, other), act: () => app.chooseNode(other), why: whyButton(app, graph.source[e], graph.target[e]) };
  });
}

function whyButton(app, source, target) {
  if (!app.host.heads && !storyOf(app.graph, source, target)) return null;
  return button("heads", () => app.chooseLink(source, target), { class: "why", "aria-label": `Which heads carried ${linkName(app, source, target)}` });
}

// Texts that activate the feature most. The stronger a token activates it, the stronger its colour.
function topExamples(found) {
  const most = Math.max(...found.flatMap(([, values]) => values.map(Math.abs)), 1e-30);
  return found.map(([tokens, values]) => {
    const top = values.reduce((best, v, k) => (Math.abs(v) > Math.abs(values[best]) ? k : best), 0);
    return el("p", { class: "example", dir: "auto" }, ...tokens.map((token, k) => {
      const depth = values[k] ? Math.max(1, Math.ceil(5 * Math.abs(values[k]) / most)) : 0;
      return el(k === top && depth ? "strong" : "span", { class: depth ? `lit d${depth}${values[k] < 0 ? " minus" : ""}` : null, title: depth ? String(values[k]) : null }, visible(token));
    }));
  });
}

// The same feature at every token: where it is in the graph, how strongly it fired.
function activations(graph, i) {
  const found = new Map();
  for (let j = 0; j < graph.n; j += 1) {
    if (graph.kinds[j] === "feature" && graph.depth[j] === graph.depth[i] && graph.nodes.feature[j] === graph.nodes.feature[i]) {
      found.set(graph.nodes.position[j], graph.nodes.activation[j]);
    }
  }
  const most = Math.max(...[...found.values()].map(Math.abs), 1e-30);
  return el("p", { class: "strip" }, ...graph.tokens.map((token, p) => {
    const value = found.get(p), depth = value === undefined ? 0 : Math.max(1, Math.ceil(5 * Math.abs(value) / most));
    return el("span", { class: `fires d${depth}${value < 0 ? " minus" : ""}`, title: value === undefined ? "not in the graph" : String(value) },
      visible(token), value === undefined ? null : el("sub", {}, value.toPrecision(2)));
  }));
}

// In a contrast graph: how strongly the feature fires here, and how strongly on average in what it is compared with.
function besideOthers(graph, i) {
  const { baseline, activation } = graph.nodes;
  if (!baseline) return null;
  const there = graph.compared_with.length === 1 ? "there" : "in the others, on average";
  return el("p", {}, `${activation[i].toPrecision(3)} here, ${baseline[i].toPrecision(3)} ${there}`);
}

export function nodeCard(app, i) {
  const { graph } = app, kind = graph.kinds[i], parts = [];
  parts.push(el("h2", {}, kind === "error" ? "What the features miss here" : nodeName(graph, i, app.notes.names)));
  parts.push(el("p", { class: "soft" }, `${nodePlace(graph, i)} · ${graph.ids[i]}`));
  const card = graph.nodes.cards[i];
  if (app.notes.names[graph.ids[i]]) parts.push(el("p", { class: "soft" }, `You named it. Its label: ${graph.nodes.label[i]}`));
  else if (card) parts.push(el("p", { class: "soft" }, `Label from ${card[3] === "vocabulary" ? "the vocabulary: computed from its weights, without looking at any text" : card[3]}`));
  if (kind !== "embedding") parts.push(app.nodeActions(i));
  if (kind === "feature") parts.push(el("h3", {}, "How strongly it fires"), activations(graph, i), besideOthers(graph, i));
  if (kind !== "logit" && graph.nodes.total_effect) parts.push(el("p", {}, `Effect on the answer, over all paths: ${graph.nodes.total_effect[i].toPrecision(3)}`));
  const likely = chance(graph.story.weights[graph.story.targets.indexOf(i)]);
  if (likely) parts.push(el("p", {}, `Probability as the next token: ${likely}`));
  if (kind === "logit" && graph.nodes.value[i] !== null) parts.push(el("p", {}, `Logit above the mean: ${graph.nodes.value[i]}`));
  if (card) {
    for (const [at, title] of ["Makes more likely", "Makes less likely", "Responds to"].entries()) {
      if (card[at].length) parts.push(el("h3", {}, title), el("p", { class: "tokens" }, quoted(card[at])));
    }
  }
  if (card?.[4]?.length) parts.push(el("h3", {}, "Texts that activate it most"), ...topExamples(card[4]));
  const qk = graph.qk[i];
  if (qk) {
    parts.push(el("h3", {}, "Why it looks there"), ...qkParts(app, {}, { byQuery: qk.top_q_marginal_contributors,
      byKey: qk.top_k_marginal_contributors, pairs: qk.pair_wise_contributors }));
  }
  parts.push(...rows("Strongest inputs", linkItems(app, graph.inputs[i], "source"), kind === "embedding" ? null : "none traced"));
  parts.push(...rows("Strongest outputs", linkItems(app, graph.outputs[i], "target")));
  return parts.flat();
}

function unitItems(app, u, incoming) {
  const { units, flows } = app.scene, items = [];
  units.forEach((other, o) => {
    const share = incoming ? flows[u][o] : flows[o][u];
    if (o !== u && share) items.push({ share, name: other.name, place: other.place, act: () => app.chooseUnit(other.key) });
  });
  return items.sort((a, b) => Math.abs(b.share) - Math.abs(a.share));
}

export function unitCard(app, unit) {
  if (unit.single) return nodeCard(app, unit.members[0]);
  const u = app.scene.units.indexOf(unit), { graph } = app;
  const members = [...unit.members].sort((a, b) => graph.nodes.influence[b] - graph.nodes.influence[a]);
  const parts = [el("h2", {}, unit.name), el("p", { class: "soft" },
    unit.kind === "errors" ? "The part of each MLP’s output that the features do not rebuild. The graph does not say where it comes from or what it means."
      : `${plural(members.length, "feature")} at ${unit.place}${unit.own ? " · your group" : " · grouped automatically: similar inputs and outputs"}`)];
  if (unit.kind === "box") parts.push(app.boxActions(unit), ...app.effect(unit));
  parts.push(...rows(`Driven by (share of ${unit.kind === "target" ? "the answer" : "its inputs"})`, unitItems(app, u, true)));
  parts.push(...rows("Drives (share of their inputs, or of the answer)", unitItems(app, u, false)));
  parts.push(...rows(unit.kind === "errors" ? "Largest places" : "Its features", members.map((i) => ({
    share: null, name: unit.kind === "errors" ? graph.ids[i] : nodeName(graph, i, app.notes.names), place: nodePlace(graph, i), act: () => app.chooseNode(i) }))));
  return parts.flat();
}

export function restCard(graph, influence) {
  const s = graph.scores;
  return [
    el("h2", {}, "How to read this"),
    el("p", {}, "The prompt is at the bottom; what the model says next is on top. Each box is a group of features with like inputs and outputs; the number says how many. Click one."),
    el("p", {}, el("span", { class: "plus" }, "Blue solid"), " arrows raise what they point to, ",
      el("span", { class: "minus" }, "orange dashed"), " arrows lower it; thicker is stronger.", graph.compared_with.length ? " A box marked ↓ is turned down, less active than in the prompts compared with: blue arrows turn it down, orange ones keep it up." : ""),
    el("p", { class: "soft" }, "“say …” boxes make those tokens more likely; “sees …” boxes respond to them. All this is about the replacement model, " +
      "in which attention is frozen. To see what the real model does, remove a box."),
    el("h3", {}, "About this graph"),
    el("p", { class: "soft" }, `${graph.model}, features: ${graph.dictionary}. ${graph.features_traced.toLocaleString("en")} of ` +
      `${graph.features_active.toLocaleString("en")} active features traced; they carry ${percent(s.coverage)} of the direct effects. ` +
      (graph.exact ? "Neurons rebuild every MLP exactly. " : `Replacement score ${s.replacement.toFixed(2)}, completeness ${s.completeness.toFixed(2)}. `) +
      `This page holds ${graph.features_shown.toLocaleString("en")} features and the strongest ${graph.source.length.toLocaleString("en")} of ` +
      `${graph.links_traced.toLocaleString("en")} links (${percent(graph.links_share)} of the influence). ` +
      `Drawing boxes instead of their features loses ${percent(graph.levels.find((level) => level.usual).lump_error)} (lump error).`),
    influenceLine(graph, influence),
    el("p", { class: "soft" }, "Press ? for the keys."),
  ];
}
