// Which attention heads carried a link, and what made them look there: tables and lists for the card.
import { el, percent, signed, visible } from "./dom.js";
import { nodeName, nodePlace } from "./units.js";
const CARRIERS = 4, REASONS = 6, ROUNDING = 1e-3;

const headName = ({ layer, head }) => `layer ${layer} head ${head}`;
const amount = (x) => `${x >= 0 ? "+" : "−"}${Math.abs(x).toFixed(2)}`;
const signOf = (x) => (x >= 0 ? "plus" : "minus");

export function storyOf(graph, source, target) {
  return graph.headStories.get(`${graph.ids[source]}>${graph.ids[target]}`);
}

// What carried the largest part of a link, in a few words.
export function carrierWords(story) {
  const [first] = story.heads;
  const [name, loading] = !first || Math.abs(story.residual) > Math.abs(first.loading) ? ["the residual stream", story.residual] : [headName(first), first.loading];
  return `${name} (${signed(loading / story.weight)})`;
}

// Name and place of a source of a score: a node of the page, or something that is not in the graph.
function sourceWords(app, labels, id) {
  const { graph } = app, i = graph.indexOf.get(id);
  if (i !== undefined) return { name: nodeName(graph, i, app.notes.names), place: nodePlace(graph, i), act: () => app.chooseNode(i) };
  if (id === "bias") return { name: "constant", place: "what no feature, error or token wrote" };
  const found = /^L(\d+)(?:\.([\w.]+))?\/(?:F(\d+)|error)@(\d+)$/.exec(id);
  if (!found) return { name: labels[id] ?? id, place: "not in the graph" };
  const [, layer, site, feature, position] = found;
  const place = `“${visible(graph.tokens[position] ?? "")}”, layer ${layer}${site ? `, ${site}` : ""}, not in the graph`;
  return { name: labels[id] ?? (feature ? `feature ${feature}` : site ? `unexplained part of ${site}` : "unexplained MLP output"), place };
}

function reasons(app, labels, title, rows) {
  if (!rows?.length) return [];
  const items = rows.slice(0, REASONS).map(([id, weight]) => {
    const { name, place, act } = sourceWords(app, labels, id);
    const words = [el("span", { class: `share ${signOf(weight)}` }, amount(weight)), el("span", {}, name, " ", el("span", { class: "soft" }, place))];
    return el("li", {}, act ? el("button", { type: "button", class: "row", onclick: act }, ...words) : el("div", { class: "row" }, ...words));
  });
  return [el("h4", {}, title), el("ul", { class: "list" }, ...items)];
}

function pairsTable(app, labels, rows) {
  if (!rows?.length) return [];
  const words = (id) => { const { name, place } = sourceWords(app, labels, id); return [name, " ", el("span", { class: "soft" }, place)]; };
  return [el("h4", {}, "Pairs that meet"), el("table", { class: "data" },
    el("thead", {}, el("tr", {}, ...["query side", "key side", "score"].map((t) => el("th", { scope: "col", class: t === "score" ? "amount" : null }, t)))),
    el("tbody", {}, ...rows.slice(0, REASONS).map(([query, key, weight]) => el("tr", {}, el("td", {}, ...words(query)), el("td", {}, ...words(key)),
      el("td", { class: `amount ${signOf(weight)}` }, amount(weight))))))];
}

// What made a head look there, on both sides. Also for results in another program's file.
export function qkParts(app, labels, { byQuery, byKey, pairs }) {
  return [...reasons(app, labels, "What asks (query side)", byQuery), ...reasons(app, labels, "What answers (key side)", byKey), ...pairsTable(app, labels, pairs)];
}

function whyParts(app, story, head) {
  const { tokens } = app.graph, at = (p) => `“${visible(tokens[p] ?? "")}” (${p})`, { baseline } = head;
  const parts = [el("h3", {}, `Why ${headName(head)} looks there`),
    el("p", {}, `From ${at(head.query)} it gives ${at(head.key)} ${percent(head.attention)} of its attention. Score before softmax: ${amount(head.score)}, the sum of:`),
    ...qkParts(app, story.labels, { byQuery: head.by_query, byKey: head.by_key, pairs: head.pairs })];
  if (baseline) {
    parts.push(el("h3", {}, `Why not at ${at(baseline.key)}`),
      el("p", {}, `That position gets ${percent(baseline.attention)} of its attention. The score here is ${baseline.score >= 0 ? "higher" : "lower"} by ${Math.abs(baseline.score).toFixed(2)}. The difference:`),
      ...qkParts(app, story.labels, { byQuery: baseline.by_query, byKey: baseline.by_key, pairs: baseline.pairs }));
  }
  return parts;
}

// Through what a link went: the largest heads, sequences of heads, the residual stream, the rest. They add up to the link.
function carriers(story) {
  const words = (path) => path.replaceAll(/L(\d+)\/H(\d+)/g, "layer $1 head $2").replaceAll(" > ", ", then ");
  const ways = [...story.heads.slice(0, CARRIERS).map((h) => [headName(h), h.loading]), ...story.chains.slice(0, CARRIERS).map(([path, value]) => [words(path), value])]
    .sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).filter(([, value]) => value !== 0);
  const rest = story.weight - story.residual - ways.reduce((sum, [, value]) => sum + value, 0);
  ways.push(["residual stream, no head", story.residual]);
  if (Math.abs(rest) > ROUNDING * Math.abs(story.weight)) ways.push(["all other ways", rest]);
  return el("table", { class: "data carriers" },
    el("thead", {}, el("tr", {}, ...["through", "effect", "share"].map((t) => el("th", { scope: "col" }, t)))),
    el("tbody", {}, ...ways.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name),
      el("td", { class: signOf(value) }, `${value >= 0 ? "+" : "−"}${Number(Math.abs(value).toPrecision(3))}`), el("td", {}, signed(value / story.weight))))));
}

export function storyParts(app, story) {
  return [el("h3", {}, "Which heads carried it"), carriers(story), ...story.heads.filter((head) => head.pairs).flatMap((head) => whyParts(app, story, head))];
}
