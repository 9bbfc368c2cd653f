// Whatever the mouse can do, a key can do too.
import { button, el } from "./dom.js";
import { nextLink } from "./links.js";

const PAN = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] };
const HELP = [
  ["← →", "go to the next thing on the left or right"], ["↑ ↓", "follow the strongest arrow out or in"],
  ["Enter", "open a box in place, or close it"], ["Esc", "go back: close the box, clear the marks, choose nothing"], ["Space", "mark a box (mouse: Shift-click)"],
  ["G", "group the marked boxes; ungroup the chosen group (mouse: drop a box on a box)"], ["L", "name a box or feature"],
  ["H", "go through the links of what is chosen: which heads carried them, and why these heads looked there (mouse: click an arrow)"],
  ["P", "pin it: it stays in the picture (mouse: Ctrl-click)"], ["S", "steer or remove the chosen box"], ["E", "choose what the features miss"],
  ["/", "search"], ["+ −", "zoom in All nodes (mouse: wheel), 0 to fit"],
  ["Shift ← → ↑ ↓", "move All nodes (mouse: drag)"], ["1 2 3", "story, all nodes, table"], ["Ctrl Z", "undo"], ["?", "this help"],
];

export function keysDialog() {
  const dialog = el("dialog", { "aria-label": "Keys" }, el("h2", {}, "Keys"),
    el("dl", {}, ...HELP.flatMap(([key, does]) => [el("dt", {}, key), el("dd", {}, does)])));
  dialog.append(button("Close", () => dialog.close()));
  return dialog;
}

function sideways(app, step) {
  const { order } = app.scene, at = order.findIndex((u) => u.key === focused(app));
  const next = order[(at + step + order.length) % order.length];
  if (next) app.chooseUnit(next.key, true);
}

function along(app, up) {
  const { units, flows } = app.scene, u = units.findIndex((unit) => unit.key === focused(app));
  if (u < 0) return;
  let best = -1, most = 0;
  units.forEach((unit, o) => {
    const share = Math.abs(up ? flows[o][u] : flows[u][o]);
    if (unit.kind !== "errors" && share > most) { best = o; most = share; }
  });
  if (best >= 0) app.chooseUnit(units[best].key, true);
}

const focused = (app) => document.activeElement?.dataset?.key ?? app.root.getRootNode().activeElement?.dataset?.key ?? app.chosen?.key;

function back(app) {
  if (app.dialog.open) return;
  const unit = app.chosen && app.unit(app.chosen.key);
  if (app.marked.size) { app.marked.clear(); app.draw(); }
  else if (unit?.inside) app.toggleExpanded(unit.inside);
  else if (app.chosen?.from) { app.chosen = app.chosen.from; app.draw(); }
  else if (app.chosen) app.rest();
  else if (app.expanded.size) { app.expanded.clear(); app.draw(); }
}

function walkNodes(app, key) {
  const { graph } = app, at = app.chosen?.node;
  if (at === null || at === undefined) { app.chooseNode(graph.story.targets[0] ?? 0); return; }
  const links = key === "ArrowUp" ? graph.outputs[at] : key === "ArrowDown" ? graph.inputs[at] : null;
  if (links?.length) app.chooseNode(key === "ArrowUp" ? graph.target[links[0]] : graph.source[links[0]]);
  if (!links) {
    const { x, y } = app.nodesView, order = [...graph.ids.keys()].sort((a, b) => y[a] - y[b] || x[a] - x[b]);
    const step = key === "ArrowLeft" ? -1 : 1;
    app.chooseNode(order[(order.indexOf(at) + step + order.length) % order.length]);
  }
}

// To the slider or button of what is chosen; if there is none, a sentence says why.
function steer(app, at) {
  if (!app.chosen && at) app.chooseUnit(at);
  const control = app.card.querySelector("input.steer, button.remove");
  if (control) control.focus();
  else if (!app.chosen) app.say("Choose a box first, then S steers it.");
  else if (app.unit(app.chosen.key)?.kind !== "box") app.say("Only boxes of the story can be steered or removed here. Choose a box.");
  else app.say("What happens without this box has not been measured. “tl-circuits view FILE --model NAME” steers any box; “tl-circuits trace --ablations” measures the removal of each.");
}

function act(app, event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key, chosen = focused(app);
  const story = app.view === "story", inCard = app.card.contains(document.activeElement);
  if ((event.ctrlKey || event.metaKey) && key === "z") return app.book.undo();
  if (event.ctrlKey || event.metaKey || event.altKey) return false;
  if (key === "Escape") return back(app);
  if (key === "/") return app.search.focus();
  if (key === "?") return app.dialog.showModal();
  if ("123".includes(key)) return app.show(["story", "nodes", "table"][Number(key) - 1]);
  if (key === "0") { app.expanded.clear(); app.nodesView.painted && app.nodesView.fit(); return app.draw(); }
  if (app.view === "nodes" && (key === "+" || key === "-")) return app.nodesView.zoomBy(key === "+" ? 1.4 : 1 / 1.4);
  if (app.view === "nodes" && event.shiftKey && PAN[key]) return app.nodesView.panBy(...PAN[key]);
  if (key === "e" && story) return app.chooseUnit("errors", true);
  if (key === "l" && (app.chosen || chosen)) return app.rename(app.chosen?.key ?? chosen);
  if (key === "p" && (app.chosen || chosen)) return app.pin(app.chosen?.key ?? chosen);
  if (key === "g" && story) return app.groupMarked();
  if (key === "h") {
    if (!app.chosen && chosen) app.chooseUnit(chosen);
    return nextLink(app);
  }
  if (key === "s") return steer(app, chosen);
  if (inCard) return false;
  if (app.view === "nodes" && key.startsWith("Arrow") && document.activeElement === app.nodesView.canvas) return walkNodes(app, key);
  if (!story || !app.svg.contains(document.activeElement)) return false;
  if (key === "ArrowLeft" || key === "ArrowRight") return sideways(app, key === "ArrowLeft" ? -1 : 1);
  if (key === "ArrowUp" || key === "ArrowDown") return along(app, key === "ArrowUp");
  if (key === " ") return app.toggleMark(chosen);
  if (key === "Enter") {
    const unit = app.unit(chosen);
    if (unit && app.chosen?.key !== chosen) app.chooseUnit(chosen, true);
    if (unit?.inside && !unit.single) return undefined;
    return unit?.inside ? app.toggleExpanded(unit.inside) : app.toggleExpanded(chosen);
  }
  return false;
}

export function listenToKeys(app) {
  (app.host.keys ?? app.root).addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=range]), textarea, select");
    if (typing || app.dialog.open) {
      if (event.key === "Escape" && typing === app.search) { app.search.value = ""; app.query = ""; app.drawSearch(); app.search.blur(); }
      return;
    }
    if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
    if (act(app, event) !== false) event.preventDefault();
  });
}
