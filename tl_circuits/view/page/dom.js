// Elements and texts. Everything from the data enters as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";

function fill(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
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
  return `${(100 * x).toFixed(digits ?? usual)} %`;
}

export const signed = (x) => `${x >= 0 ? "+" : "−"}${percent(Math.abs(x))}`;
export const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "→");
export const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

export function clipped(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

// At most two lines of at most `length` characters, broken after a comma, else at a space, else anywhere.
export function twoLines(text, length) {
  if (text.length <= length) return [text];
  const cut = [text.lastIndexOf(", ", length - 1) + 1, text.lastIndexOf(" ", length), length].find((at) => at > length / 3);
  return [text.slice(0, cut), clipped(text.slice(cut).trimStart(), length)];
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
