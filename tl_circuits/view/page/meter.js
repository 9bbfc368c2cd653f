// How much of the influence on the answer the picture shows: a bar, and the same in words.
import { el, percent, shape } from "./dom.js";

export const little = (meter) => meter.shown < 0.5;

export function meterParts(graph, meter) {
  const parts = [["shown", meter.shown, "of the influence on the answer runs through what is drawn"], ["error", meter.error, "starts in what the features miss"],
    ["hidden-part", meter.hidden, "runs through features not drawn"]].filter(([name, share]) => name !== "error" || !graph.exact || share > 0);
  const bar = ([name, share]) => shape("svg", { class: name, viewBox: "0 0 1 1", preserveAspectRatio: "none", width: `${100 * share}%`, height: 10 }, shape("rect", { width: 1, height: 1 }));
  return [
    el("div", { class: "meter-bar", role: "img", "aria-label": parts.map(([, share, words]) => `${percent(share)} ${words}`).join(", ") }, ...parts.map(bar)),
    el("p", { class: "soft" }, little(meter) ? el("strong", {}, "Less than half is explained by this picture: ") : null,
      ...parts.flatMap(([name, share, words], i) => [i ? ", " : "", el("span", { class: `key ${name}` }, percent(share)), ` ${words}`]), "."),
  ];
}
