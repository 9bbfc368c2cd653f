// The story in sentences: what the replacement model says, and whether the real model agreed when a box was removed.
import { el } from "./dom.js";

export const measured = (graph, ids) => graph.ablations.find((a) => a.nodes.length === ids.length && a.nodes.every((id) => ids.includes(id)));

// What removing a way's last box did to the answer's logit in the real model; null where that was not measured.
function checked(graph, level, way, sentence) {
  const last = level.boxes.find((box) => box.members[0] === way.at(-2));
  const result = last && measured(graph, last.members.map((i) => graph.ids[i]));
  if (result?.measured === undefined) return null;
  const fell = result.measured < 0, raises = sentence.lastIndexOf(" raises ") > sentence.lastIndexOf(" lowers ");
  return { agrees: fell === raises, words: `without that box its logit ${fell ? "falls" : "rises"} by ${Math.abs(result.measured).toFixed(2)} in the real model` };
}

export function tale(graph, level, own) {
  if (!level.sentences.length) return [];
  const checks = level.sentences.map((sentence, n) => checked(graph, level, level.ways[n], sentence));
  const lead = `In the replacement model${checks.some(Boolean) ? "" : ", until removing a box confirms it"}:`;
  const items = level.sentences.map((sentence, n) => el("li", {}, sentence,
    checks[n] && el("span", { class: "soft check" }, ` ${checks[n].agrees ? "Confirmed" : "Not confirmed"}: ${checks[n].words}.`)));
  if (own) items.push(el("li", { class: "soft" }, "These sentences tell the automatic boxes; you have made groups of your own."));
  return [el("p", { class: "soft" }, lead), el("ol", { class: "sentences" }, ...items)];
}
