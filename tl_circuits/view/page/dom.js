// Elements and texts. Everything from the data enters as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";

// Keep a quoted token's first space with its quote, also at the end of a line.
const held = (text) => text.replaceAll("“ ", "“\u00a0");

function fill(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (typeof child === "string" ? held(child) : child)));
  return made;
}

export function el(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

export function shape(name, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, name), properties, children);
}

export function button(text, act, properties = {}) {
  return el("button", { type: "button", onclick: act, ...properties }, text);
}

export function percent(x, digits) {
  const size = Math.abs(100 * x);
  const usual = size === 0 || (size >= 10 && size < 99) || size === 100 ? 0 : size >= 1 ? 1 : 2;
  return `${x < 0 ? "−" : ""}${size.toFixed(digits ?? usual)} %`;
}

export const signed = (x) => `${x >= 0 ? "+" : "−"}${percent(Math.abs(x))}`;
export const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "→").replace(/^ +$|(?<=“) +(?=”)/g, (spaces) => "␣".repeat(spaces.length));
export const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

export function clipped(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

// Measures how wide a text is in the fonts of the story's picture.
export function makeRuler() {
  const pen = document.createElement("canvas").getContext("2d");
  const fonts = { name: "600 13px system-ui, sans-serif", plain: "13px system-ui, sans-serif", foot: "11.5px system-ui, sans-serif" };
  return (text, font) => {
    pen.font = fonts[font];
    return pen.measureText(text).width;
  };
}

// How many characters from the start take at most `room` pixels, by `width(text)`.
function fitting(text, room, width) {
  let kept = Math.min(text.length, Math.ceil(room / 2));
  while (kept > 1 && width(text.slice(0, kept)) > room) kept -= 1;
  return kept;
}

export function clippedTo(text, room, width) {
  return width(text) <= room ? text : `${text.slice(0, fitting(text, room - width("…"), width))}…`;
}

// At most two lines, broken after a comma, else at a space, else anywhere. `rooms`: pixels for each.
export function twoLines(text, rooms, width) {
  if (width(text) <= rooms[0]) return [text];
  const most = fitting(text, rooms[0], width), whole = text.replaceAll("“ ", "“_"); // no break after a quote
  const cut = [whole.lastIndexOf(", ", most - 1) + 1, whole.lastIndexOf(" ", most), most].find((at) => at > most / 3);
  return [text.slice(0, cut), clippedTo(text.slice(cut).trimStart(), rooms[1], width)];
}

// Gives text to the person as a file.
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
