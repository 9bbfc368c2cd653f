// Which words mattered: the prompt with a bar under each token, its share of what the tokens do to the answer.
import { el, signed, visible } from "./dom.js";
const LEAST_NAMED = 0.05, TALLEST = 26; // pixels

export function wordsStrip(app) {
  const { graph } = app, { effect, share } = graph.words;
  if (!share.length) return [];
  const most = Math.max(...share.map(Math.abs), 1e-30);
  const words = graph.tokens.map((token, p) => {
    const k = graph.words.position.indexOf(p), part = k < 0 ? 0 : share[k];
    const bar = el("span", { class: `word-bar ${part >= 0 ? "plus" : "minus"}`, "aria-hidden": "true" });
    bar.style.height = `${Math.max(part ? 1 : 0, Math.round((TALLEST * Math.abs(part)) / most))}px`;
    const words = k < 0 ? "no share" : `${signed(part)} of the words’ effect on the answer (${effect[k].toPrecision(3)})`;
    return el("button", { type: "button", class: "word", title: words, "aria-label": `${visible(token)}: ${words}`, onclick: () => app.chooseNode(graph.indexOf.get(`token@${p}`)) },
      el("span", { class: "word-text" }, visible(token).trim() || visible(token)), bar, el("span", { class: "word-share" }, Math.abs(part) >= LEAST_NAMED ? signed(part) : ""));
  });
  const lead = graph.compared_with.length ? "Which words mattered, beyond what the others share:" : "Which words mattered:";
  return [el("p", { class: "soft" }, lead), el("div", { class: "words" }, ...words)];
}
