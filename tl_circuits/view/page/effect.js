// What removing or scaling a box does to the answer: computed beforehand in a file, live with a model.
import { button, el, percent, visible } from "./dom.js";
import { measured } from "./sentences.js";
const WAIT_MS = 150;

function bars(result) {
  return el("table", { class: "effect" },
    el("thead", {}, el("tr", {}, ...["next token", "before", "after"].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...result.top.map((t) => el("tr", {},
      el("th", { scope: "row" }, `“${visible(t.token)}”`),
      ...[t.before, t.after].map((p, k) => el("td", {}, el("meter", { class: k ? "after" : "before", min: 0, max: 1, value: p,
        "aria-label": `${k ? "after" : "before"}: ${percent(p)}` }), ` ${percent(p)}`))))));
}

function compared(result) {
  if (result.predicted === undefined) return null;
  const sign = (x) => `${x >= 0 ? "+" : "−"}${Math.abs(x).toFixed(2)}`;
  return el("p", { class: "soft" }, `Logit of “${visible(result.target)}”: predicted ${sign(result.predicted)}, measured ${sign(result.measured)} ` +
    (result.freeze === "none" ? "with nothing held (with attention and norms held, the run diverges)." : `with attention and norms held, ${sign(result.measured_free)} with nothing held.`));
}

// The part of a card about a set of features. `members` are node ids.
export function effectParts(app, members, name) {
  const shown = el("div", { class: "result", role: "status" });
  const show = (result, words) => shown.replaceChildren(el("p", {}, words), bars(result), compared(result) ?? "");
  if (app.host.steer) {
    const label = el("output", {}, "1 × (as it is)");
    const wait = el("progress", { "aria-label": "Asking the model", hidden: true });
    let timer = 0;
    const slider = el("input", { type: "range", min: -2, max: 2, step: 0.25, value: 1, "aria-label": `Scale ${name}`, class: "steer",
      oninput: () => {
        const factor = Number(slider.value);
        label.textContent = factor === 0 ? "off" : `${factor} ×${factor === 1 ? " (as it is)" : ""}`;
        clearTimeout(timer);
        timer = setTimeout(async () => {
          wait.hidden = false;
          try {
            const result = await app.host.steer({ nodes: members, factor });
            if (!result) return; // the slider has moved on; its answer comes later
            wait.hidden = true;
            if (factor === 0) app.keepMeasured(result);
            show(result, factor === 0 ? "In the model, without it:" : `In the model, with it at ${factor} ×:`);
          } catch (error) {
            wait.hidden = true;
            shown.textContent = String(error.message ?? error);
          }
        }, WAIT_MS);
      } });
    return [el("h3", {}, "Steer it"), el("p", { class: "steer" }, slider, " ", label, " ", wait), shown];
  }
  const known = measured(app.graph, members);
  if (!known) return [];
  return [el("p", {}, button(`Remove ${name}`, () => show(known, "Measured in the model, without it:"), { class: "act remove" })), shown];
}
