// The story in sentences: what the replacement model says, and whether the real model agrees when a box is removed.
import { el } from "./dom.js";

export const measured = (graph, ids) => graph.ablations.find((a) => a.nodes.length === ids.length && a.nodes.every((id) => ids.includes(id)));

// What removing the last box of a path did to the answer's logit in the real model; null if that was not measured.
function checked(graph, level, way, sentence) {
  const last = level.boxes.find((box) => box.members[0] === way.at(-2));
  const result = last && measured(graph, last.members.map((i) => graph.ids[i]));
  if (result?.measured === undefined) return null;
  const fell = result.measured < 0, raises = [...sentence.matchAll(/ (raise|lower)s? /g)].at(-1)[1] === "raise"; // its last verb
  return { agrees: fell === raises, words: `without the last box, the answer’s logit ${fell ? "falls" : "rises"} by ${Math.abs(result.measured).toFixed(2)} in the real model` };
}

export function tale(graph, level, own) {
  if (!level.sentences.length) return [];
  const checks = level.sentences.map((sentence, n) => checked(graph, level, level.ways[n], sentence));
  const lead = `What the replacement model says${checks.some(Boolean) ? "" : " (remove a box to test it in the real model)"}:`;
  const items = level.sentences.map((sentence, n) => el("li", {}, sentence,
    checks[n] && el("span", { class: "soft check" }, ` ${checks[n].agrees ? "Confirmed" : "Not confirmed"}: ${checks[n].words}.`)));
  if (own) items.push(el("li", { class: "soft" }, "These sentences describe the automatic boxes, not the groups that you made."));
  return [el("p", { class: "soft" }, lead), el("ol", { class: "sentences" }, ...items)];
}
