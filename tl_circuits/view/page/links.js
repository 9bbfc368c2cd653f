// The card of a link between two nodes, and the card of an arrow: all links between two boxes.
import { button, el, plural, signed } from "./dom.js";
import { carrierWords, storyOf, storyParts } from "./heads.js";
import { isLower, nodeName, nodePlace, verbOf } from "./units.js";
const LINKS_LISTED = 12;


// As a sentence begins: "Raises it", "Turns it down".
function verb(lower, share) {
  const [first, rest] = verbOf(lower, share).split(" ");
  return `${first[0].toUpperCase()}${first.slice(1)} it${rest ? ` ${rest}` : ""}`;
}

const shareOf = (graph, e) => graph.share[e] * graph.towards[graph.target[e]];

export function linkBetween(graph, source, target) {
  return graph.inputs[target].find((e) => graph.source[e] === source);
}

export function linkName(app, source, target) {
  return `${nodeName(app.graph, source, app.notes.names)} → ${nodeName(app.graph, target, app.notes.names)}`;
}

export function linkCard(app, source, target) {
  const { graph } = app, e = linkBetween(graph, source, target), story = storyOf(graph, source, target);
  const parts = [el("h2", {}, linkName(app, source, target)),
    el("p", { class: "soft" }, `${nodePlace(graph, source)} to ${nodePlace(graph, target)} · ${graph.ids[source]} > ${graph.ids[target]}`)];
  if (e !== undefined) parts.push(el("p", {}, `${verb(isLower(graph, [target]), shareOf(graph, e))}: `, signed(shareOf(graph, e)), ` of its inputs, direct effect ${graph.weight[e].toPrecision(3)}.`));
  parts.push(el("div", { class: "actions" }, button("Where it comes from", () => app.chooseNode(source)), button("Where it goes", () => app.chooseNode(target))));
  if (story) return [...parts, ...storyParts(app, story)];
  const shown = el("div", { role: "status" });
  if (app.host.heads) askModel(app, source, target, shown);
  else shown.append(el("p", { class: "soft" }, "Nothing has been computed about the heads that carried this link. “tl-circuits trace --heads” does it for the strongest links, “tl-circuits view FILE --model NAME” for any link."));
  return [...parts, shown];
}

async function askModel(app, source, target, shown) {
  const { graph } = app;
  shown.append(el("progress", { "aria-label": "Asking the model" }), " Asking the model which heads carried it");
  try {
    const story = await app.host.heads({ source: graph.ids[source], target: graph.ids[target] });
    if (!story) return; // another link was chosen meanwhile
    graph.headStories.set(`${story.source}>${story.target}`, story);
    shown.replaceChildren(...storyParts(app, story));
  } catch (error) { shown.replaceChildren(el("p", {}, String(error.message ?? error))); }
}

// The links an arrow is made of, strongest first.
function linksOfArrow(app, from, to) {
  const { graph } = app, inside = new Set(from.members), found = [];
  for (const t of to.members) {
    for (const e of graph.inputs[t]) if (inside.has(graph.source[e])) found.push([e, Math.abs(graph.share[e]) * graph.nodes.influence[t]]);
  }
  return found.sort((a, b) => b[1] - a[1]).map(([e]) => e);
}

export function arrowCard(app, from, to) {
  const { graph, scene } = app, share = scene.flows[scene.units.indexOf(to)][scene.units.indexOf(from)];
  const links = linksOfArrow(app, from, to);
  return [el("h2", {}, `${from.name} → ${to.name}`), el("p", {}, `${verb(to.lower, share)}: ${signed(share)} of ${to.kind === "target" ? "the answer" : "its inputs"}.`),
    el("h3", {}, plural(links.length, "link")), el("ul", { class: "list" }, ...links.slice(0, LINKS_LISTED).map((e) => {
      const source = graph.source[e], target = graph.target[e], known = storyOf(graph, source, target), value = shareOf(graph, e);
      return el("li", {}, el("button", { type: "button", class: "row", onclick: () => app.chooseLink(source, target) },
        el("span", { class: `share ${value >= 0 ? "plus" : "minus"}` }, signed(value)), el("span", {}, linkName(app, source, target), " ",
          el("span", { class: "soft" }, known ? `by ${carrierWords(known)}` : ""))));
    })), links.length > LINKS_LISTED ? el("p", { class: "soft" }, `and ${links.length - LINKS_LISTED} weaker ones`) : null];
}

// For each arrow, the story of the strongest of its links that has one.
export function storiesByArrow(graph, units) {
  const unitOf = new Map(units.flatMap((unit, u) => unit.members.map((i) => [i, u]))), found = new Map();
  for (const story of graph.headStories.values()) {
    const key = `${unitOf.get(graph.indexOf.get(story.source))}>${unitOf.get(graph.indexOf.get(story.target))}`;
    if (!found.has(key) || Math.abs(found.get(key).weight) < Math.abs(story.weight)) found.set(key, story);
  }
  return found;
}

// The key H: go through the links of what is chosen, those with a story first.
export function nextLink(app) {
  const { chosen, graph } = app, origin = chosen?.from ?? chosen;
  if (!origin) return false;
  const unit = app.view === "story" ? app.unit(origin.key) : null;
  const options = unit ? unitArrows(app, unit) : nodeLinks(graph, origin.node);
  const next = options[(options.findIndex(([key]) => key === chosen.key) + 1) % options.length];
  if (next) next[1](app);
  return undefined;
}

function unitArrows(app, unit) {
  const { arrows, units } = app.scene, u = units.indexOf(unit), told = storiesByArrow(app.graph, units);
  return arrows.filter((a) => a.source === u || a.target === u)
    .sort((a, b) => told.has(`${b.source}>${b.target}`) - told.has(`${a.source}>${a.target}`) || (b.target === u) - (a.target === u) || Math.abs(b.share) - Math.abs(a.share))
    .map((a) => [`arrow:${units[a.source].key}>${units[a.target].key}`, () => app.chooseArrow(units[a.source].key, units[a.target].key)]);
}

function nodeLinks(graph, i) {
  if (i === null || i === undefined) return [];
  const links = [...graph.inputs[i].slice(0, 20), ...graph.outputs[i].slice(0, 20)];
  const told = (e) => (storyOf(graph, graph.source[e], graph.target[e]) ? 1 : 0);
  return links.sort((a, b) => told(b) - told(a)).map((e) => {
    const source = graph.source[e], target = graph.target[e];
    return [`link:${graph.ids[source]}>${graph.ids[target]}`, (app) => app.chooseLink(source, target)];
  });
}
