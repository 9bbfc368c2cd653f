// How much of the answer the boxes carry, in words and as a bar; and how much of the influence the picture shows.
import { el, percent, shape } from "./dom.js";

// What Python says the boxes of this level carry; null if other boxes are drawn, such as a person's new group.
export function carriedBy(units, level) {
  const drawn = units.filter((unit) => unit.kind === "box").flatMap((unit) => unit.members).sort((a, b) => a - b);
  const known = level.boxes.flatMap((box) => box.members).sort((a, b) => a - b);
  return level.carried.share !== null && drawn.join() === known.join() ? level.carried : null;
}

export const little = (meter, carried) => (carried === null ? meter.shown : carried.share) < 0.5;

const meterBar = (parts) => el("div", { class: "meter-bar", role: "img", "aria-label": parts.map(([, share, words]) => `${percent(share)} ${words}`).join(", ") },
  ...parts.map(([name, share]) => shape("svg", { class: name, viewBox: "0 0 1 1", preserveAspectRatio: "none", width: `${100 * share}%`, height: 10 }, shape("rect", { width: 1, height: 1 }))));

const influenceParts = (graph, meter) => [["shown", meter.shown, "drawn"], ["error", meter.error, "from what the features miss"],
  ["hidden-part", meter.hidden, "not drawn"]].filter(([name, share]) => name !== "error" || !graph.exact || share > 0);

export function influenceLine(graph, meter) {
  return el("p", { class: "soft influence" }, "Of the influence, which counts all paths by their size, also those that cancel: ",
    ...influenceParts(graph, meter).flatMap(([name, share, words], i) => [i ? ", " : "", el("span", { class: `key ${name}` }, percent(share)), ` ${words}`]), ".");
}

export function meterParts(graph, meter, carried) {
  const few = little(meter, carried) ? el("strong", {}, "Less than half is explained by this picture. ") : null;
  if (carried === null) return [el("p", { class: "carried" }, few), meterBar(influenceParts(graph, meter)), influenceLine(graph, meter)];
  const share = Math.max(0, Math.min(1, carried.share));
  return [el("p", { class: "carried" }, few, carried.line), meterBar([["shown", share, "carried by the boxes"], ["hidden-part", 1 - share, "not"]])];
}
