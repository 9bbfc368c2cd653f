// The story in sentences: what the replacement model says, and what the model does when a box is removed, beside random sets.
import { el, percent, visible } from "./dom.js";

export const measured = (graph, ids) => graph.ablations.find((a) => a.nodes.length === ids.length && a.nodes.every((id) => ids.includes(id)));

const short = (x) => String(Number(x.toPrecision(3))).replace("-", "−");
const percents = (one) => `${percent(one.before)} → ${percent(one.after)}`;

const chanceOf = (result) => {
  const middle = result.random[Math.floor(result.random.length / 2)];
  return `${result.random.length} random sets of the same size: ${percent(result.before)} → ${percent(middle)} (${percent(result.random[0])} to ${percent(result.random.at(-1))})`;
};

// Whether removing the last box of a path moves the model's answer further than removing random sets of the same size.
function checked(graph, level, way) {
  const last = level.boxes.find((box) => box.members[0] === way.at(-2));
  const result = last && measured(graph, last.members.map((i) => graph.ids[i]));
  if (result?.before === undefined) return null;
  const words = `without it, “${visible(result.answer)}” goes ${percents(result)} in the model`;
  if (!result.random?.length) return { lead: "Last box measured", words };
  const lead = result.tested ? "Last box tested" : result.other_way ? "Last box does the opposite in the model" : "Last box not told apart from chance";
  return { lead, words: `${words}; ${chanceOf(result)}` };
}

// What the model itself does without all boxes of the picture, in the units of what they carry.
export function allRemoved(graph, level) {
  const result = level.boxes.length > 1 && measured(graph, level.boxes.flatMap((box) => box.members).map((i) => graph.ids[i]));
  if (!result || result.before === undefined) return "";
  const { value } = level.carried;
  const lead = result.measured_free === undefined || value === null ? "" : `it goes from ${short(value)} to ${short(value + result.measured_free)}, and `;
  const chance = result.random?.length ? `; ${chanceOf(result)}` : "";
  return el("p", { class: "soft check" }, `In the model itself, ${lead}“${visible(result.answer)}” goes ${percents(result)}${chance}.`);
}

export function tale(graph, level, own) {
  if (!level.sentences.length) return graph.story.too_little ? [el("p", { class: "soft" }, graph.story.too_little)] : [];
  const checks = level.sentences.map((sentence, n) => checked(graph, level, level.ways[n]));
  const lead = `What the replacement model says${checks.some(Boolean) ? " (tests remove the last box of each chain)" : " (not tested yet: remove a box to see what the model does)"}:`;
  const items = level.sentences.map((sentence, n) => el("li", {}, sentence,
    checks[n] && el("span", { class: "soft check" }, ` ${checks[n].lead}: ${checks[n].words}.`)));
  if (own) items.push(el("li", { class: "soft" }, "These sentences describe the automatic boxes, not the groups that you made."));
  return [el("p", { class: "soft" }, lead), el("ol", { class: "sentences" }, ...items)];
}
