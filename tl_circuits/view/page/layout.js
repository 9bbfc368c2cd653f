import { clipped } from "./dom.js";
import { apart } from "./routes.js";
// Where the story's units go: tokens at the bottom, targets on top, boxes in lanes between them, by layer and token.
export const BOX = { width: 204, height: 58, gap: 16, lane: 40 };
const CHIP = 30, TOP = 12, TARGET_HEIGHT = 34, ERROR_HEIGHT = 30, CLOSE_ROWS = 0.22, CHIP_LETTERS = 20;

// What a token's or a target's chip says: the name, and how likely the target is.
export const chipText = (unit) => [clipped(unit.name, CHIP_LETTERS), unit.chance].filter(Boolean).join(" ");

// Chips in reading order, wrapped into lines.
function chips(units, width, chipWidth) {
  const lines = [[]];
  let x = 0;
  for (const unit of units) {
    const wide = chipWidth(unit);
    if (x + wide > width && lines.at(-1).length) { lines.push([]); x = 0; }
    lines.at(-1).push({ unit, x, wide });
    x += wide + 8;
  }
  return lines.map((line) => {
    const used = line.at(-1) ? line.at(-1).x + line.at(-1).wide : 0;
    return line.map((chip) => ({ ...chip, x: chip.x + (width - used) / 2 }));
  });
}

// A lane holds boxes of near rows, as many as fit beside each other.
function lanesOf(boxes, capacity) {
  const lanes = [];
  for (const box of [...boxes].sort((a, b) => a.row - b.row || a.column - b.column)) {
    const lane = lanes.at(-1);
    if (!lane || lane.length >= capacity || box.row - lane[0].row > CLOSE_ROWS) lanes.push([box]);
    else lane.push(box);
  }
  return lanes;
}

// `ruler(text, font)`: the width of a text.
export function layout(units, width, ruler) {
  const tokens = units.filter((u) => u.kind === "token").sort((a, b) => a.column - b.column);
  const boxes = units.filter((u) => u.kind === "box"), errors = units.find((u) => u.kind === "errors");
  const targets = units.filter((u) => u.kind === "target");
  const wide = Math.min(BOX.width, (width - BOX.gap - 4) / 2);
  const lanes = lanesOf(boxes, Math.max(1, Math.floor((width - 4 + BOX.gap) / (wide + BOX.gap))));
  const wideChip = (font) => (unit) => Math.max(34, ruler(chipText(unit), font) + 22);
  const tokenLines = chips(tokens, width, wideChip("plain")), targetLines = chips(targets, width, wideChip("name"));
  const places = new Map();
  let y = TOP;
  for (const line of targetLines) {
    for (const { unit, x, wide: w } of line) places.set(unit.key, { x, y, width: w, height: TARGET_HEIGHT });
    y += TARGET_HEIGHT + 8;
  }
  y += BOX.lane - 8;
  const centre = new Map();
  tokenLines.forEach((line) => line.forEach((c) => centre.set(c.unit.column, c.x + c.wide / 2)));
  const at = (column) => {
    const low = centre.get(Math.floor(column)) ?? width / 2, high = centre.get(Math.ceil(column)) ?? low;
    return low + (high - low) * (column - Math.floor(column));
  };
  for (const lane of lanes.reverse()) {
    lane.sort((a, b) => at(a.column) - at(b.column) || a.row - b.row);
    const left = apart(lane.map((box) => at(box.column) - wide / 2), 2, width - wide - 2, wide + BOX.gap);
    lane.forEach((box, i) => places.set(box.key, { x: left[i], y, width: wide, height: BOX.height }));
    y += BOX.height + BOX.lane;
  }
  for (const line of tokenLines) {
    for (const { unit, x, wide: w } of line) places.set(unit.key, { x, y, width: w, height: CHIP });
    y += CHIP + 8;
  }
  if (errors) { // below the tokens, whose arrows would run through it
    y += 20;
    places.set(errors.key, { x: 0, y, width, height: ERROR_HEIGHT, wide: true });
    y += ERROR_HEIGHT + 8;
  }
  return { places, width, height: y + 4 };
}
