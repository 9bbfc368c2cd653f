// The story as SVG: tokens, boxes and targets with signed arrows. Each of them can have the focus.
import { clippedTo, makeRuler, plural, shape, signed, twoLines } from "./dom.js";
import { chipText, layout } from "./layout.js";
import { routes } from "./routes.js";

export function describe(unit) {
  const count = unit.kind === "box" && !unit.single ? `, ${plural(unit.members.length, "feature")}` : "";
  return `${unit.name}, ${unit.place}${count}${unit.chance ? `, ${unit.chance} likely` : ""}`;
}

function marker(sign) {
  return shape("marker", { id: `tip-${sign}`, viewBox: "0 0 8 8", refX: 4, refY: 4, markerWidth: 11, markerHeight: 11,
    markerUnits: "userSpaceOnUse", orient: "auto" }, shape("path", { d: "M0,0L8,4L0,8z", class: `tip ${sign}` }));
}

function boxTexts(unit, place, { ruler, pinned }) {
  const count = String(unit.members.length), badge = ruler(count, "foot") + 14, right = place.x + place.width - 6;
  const lines = twoLines(unit.name, [place.width - (unit.single ? 18 : badge + 19), place.width - 18], (text) => ruler(text, "name"));
  const top = place.y + (lines.length === 1 ? 26 : 19);
  const texts = lines.map((line, i) => shape("text", { x: place.x + 10, y: top + 16 * i, class: "name" }, line));
  texts.push(shape("text", { x: place.x + 10, y: place.y + place.height - 8, class: "foot" },
    clippedTo(unit.foot, place.width - (pinned(unit) ? 34 : 18), (text) => ruler(text, "foot"))));
  if (!unit.single) {
    texts.push(shape("rect", { x: right - badge, y: place.y + 6, width: badge, height: 18, rx: 9, class: "badge" }),
      shape("text", { x: right - badge / 2, y: place.y + 19, class: "foot", "text-anchor": "middle" }, count));
  }
  return texts;
}

function drawUnit(unit, place, state) {
  const group = shape("g", { class: `unit ${unit.kind}${unit.single ? " single" : ""}${unit.own ? " own" : ""}${unit.inside ? " inside" : ""}`,
    role: "button", tabindex: -1, "data-key": unit.key, "aria-label": describe(unit) });
  group.append(shape("title", {}, describe(unit)));
  const round = unit.kind === "box" ? 8 : unit.kind === "token" ? 4 : 15;
  group.append(shape("rect", { x: place.x, y: place.y, width: place.width, height: place.height, rx: round, class: "body" }));
  if (unit.kind === "box") {
    group.append(...boxTexts(unit, place, state));
    if (state.pinned(unit)) group.append(shape("text", { x: place.x + place.width - 18, y: place.y + place.height - 8, class: "pin" }, "★"));
  } else if (unit.kind === "errors") {
    const text = `What the features miss: ${plural(unit.members.length, "place")}, ${state.errorShare} of the influence`;
    group.append(shape("text", { x: place.x + place.width / 2, y: place.y + 20, class: "foot", "text-anchor": "middle" },
      clippedTo(text, place.width - 20, (line) => state.ruler(line, "foot"))));
  } else {
    const big = unit.kind === "target";
    group.append(shape("text", { x: place.x + place.width / 2, y: place.y + (big ? 22 : 20), "text-anchor": "middle", class: "name" },
      chipText(unit)));
  }
  return group;
}

// Draws into `svg`. Returns what the keys need: the units in reading order and their elements.
export function drawStory(svg, units, arrows, width, state) {
  const ruler = makeRuler(), { places, height } = layout(units, width, ruler);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  const lines = shape("g", { "aria-hidden": "true" }), marks = shape("g", {}), numbers = shape("g", { "aria-hidden": "true" });
  const weakest = [...arrows].sort((a, b) => Math.abs(a.share) - Math.abs(b.share));
  const ends = weakest.map((arrow) => [places.get(units[arrow.source].key), places.get(units[arrow.target].key)]);
  const ways = routes(ends, places, width);
  const drawn = weakest.map((arrow, i) => {
    const [from, to] = ends[i];
    const sign = arrow.share >= 0 ? "plus" : "minus";
    const path = shape("path", { d: ways[i], class: `arrow ${sign}`, "marker-end": `url(#tip-${sign})`,
      "stroke-width": Math.min(9, 1 + 9 * Math.sqrt(Math.abs(arrow.share))).toFixed(2) });
    // Wider than the arrow, so that a pointer can hit it; the H key and the table reach the same.
    lines.append(path, shape("path", { d: path.getAttribute("d"), class: "hit", "data-from": units[arrow.source].key, "data-to": units[arrow.target].key }));
    return { ...arrow, path, from, to };
  });
  const elements = new Map();
  for (const unit of units) {
    const made = drawUnit(unit, places.get(unit.key), { ...state, ruler });
    elements.set(unit.key, made);
    marks.append(made);
  }
  svg.replaceChildren(shape("defs", {}, marker("plus"), marker("minus")), lines, marks, numbers);
  const order = [...units].sort((a, b) => {
    const p = places.get(a.key), q = places.get(b.key);
    return p.y - q.y || p.x - q.x;
  });
  // Bring out one unit with its arrows and their numbers; if a second unit is given, only the arrow to it.
  function emphasise(key, to = null) {
    numbers.replaceChildren();
    const near = new Set(to === null ? [key] : [key, to]);
    for (const { path, source, target, share, from, to: head } of drawn) {
      const touches = to !== null ? units[source].key === key && units[target].key === to
        : key !== null && (units[source].key === key || units[target].key === key);
      path.classList.toggle("faint", key !== null && !touches);
      if (!touches) continue;
      near.add(units[source].key).add(units[target].key);
      const other = units[source].key === key ? head : from, above = other === head;
      const x = Math.max(24, Math.min(width - 24, other.x + other.width / 2));
      const y = above ? other.y + other.height + 20 : other.y - 8;
      numbers.append(shape("text", { x, y, class: `number ${share >= 0 ? "plus" : "minus"}`, "text-anchor": "middle" }, signed(share)));
    }
    for (const [k, made] of elements) {
      made.classList.toggle("faint", key !== null && !near.has(k));
      made.classList.toggle("chosen", to === null && k === key);
      made.setAttribute("aria-pressed", String(to === null && k === key));
    }
  }
  return { order, elements, emphasise };
}
