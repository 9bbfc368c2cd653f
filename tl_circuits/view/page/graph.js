// Draws one attribution graph: headline, story, nodes by position and layer, and a card for the
// chosen node. Everything from the data enters as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 62, TOP = 16, WIDE = 850, LISTED = 12;
const FIRST_INPUTS = 10, FURTHER_INPUTS = 3, DEEPEST = 6; // the links drawn before anything is chosen

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "onclick") made.addEventListener("click", value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)} %`;
const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "→");

// Rows from bottom to top: tokens, then layers that hold a node, then targets.
function layout(data) {
  const row = (node) => node.kind === "embedding" ? -1 : node.kind === "logit" ? data.n_layers : node.layer;
  const rows = [...new Set(data.nodes.map(row))].sort((a, b) => a - b);
  const step = Math.max(15, Math.min(30, 520 / rows.length));
  const height = TOP + rows.length * step + 36;
  const y = new Map(rows.map((r, i) => [r, height - 44 - i * step]));
  const cells = new Map();
  data.nodes.forEach((node, i) => {
    const key = `${node.position}|${row(node)}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  });
  const fullest = data.tokens.map(() => 1);
  for (const [key, members] of cells) {
    const position = Number(key.split("|")[0]);
    fullest[position] = Math.max(fullest[position], members.length);
    members.sort((a, b) => data.nodes[b].influence - data.nodes[a].influence);
  }
  const column = (token, position, slot) =>
    Math.max(fullest[position] * slot, Math.min(visible(token).length, 14) * 7, 34) + 16;
  const total = (slot) => data.tokens.reduce((sum, token, p) => sum + column(token, p, slot), LEFT);
  let slot = 12;
  while (slot > 5 && total(slot) > WIDE) slot -= 0.5;
  const left = [];
  let x = LEFT;
  data.tokens.forEach((token, position) => {
    left.push(x);
    x += column(token, position, slot);
  });
  const places = [];
  for (const [key, members] of cells) {
    const [position, r] = key.split("|").map(Number);
    members.forEach((i, n) => { places[i] = { x: left[position] + 10 + n * slot, y: y.get(r) }; });
  }
  return { rows, y, left, places, width: x + 10, height };
}

function headline(data) {
  if (!data.targets.length) return "Why did this feature fire?";
  const { name, probability } = data.targets[0];
  return `Why “${visible(name)}”${probability < 1 ? ` (${percent(probability)})` : ""}?`;
}

export function render(root, data) {
  const inputs = data.nodes.map(() => []), outputs = data.nodes.map(() => []);
  for (const link of data.links) { inputs[link[1]].push(link); outputs[link[0]].push(link); }
  for (const list of [...inputs, ...outputs]) list.sort((a, b) => Math.abs(b[3]) - Math.abs(a[3]));
  const place = layout(data);
  const { replacement, completeness, coverage } = data.scores;

  root.append(element("h1", {}, headline(data)));
  root.append(element("p", { class: "prompt" }, `${data.model} on “${data.prompt}”, features: ${data.dictionary}`));
  if (replacement < 0.5) {
    root.append(element("p", { class: "warning", role: "note" },
      `Less than half is explained: ${percent(1 - replacement)} of the influence starts in the part of the MLPs that the features miss.`));
  }
  if (data.story.length) {
    root.append(element("ol", { class: "story" }, ...data.story.map((s) => element("li", {}, s))));
  }
  const explained = data.exact
    ? "Neurons rebuild every MLP exactly, so no MLP output is left unexplained. "
    : `In the replacement model, ${percent(replacement)} of the influence starts in tokens rather than errors ` +
      `(replacement score); ${percent(completeness)} of nodes’ inputs are explained (completeness). `;
  root.append(element("p", { class: "numbers" }, explained +
    `Shown: ${data.features_shown} of ${data.features_traced} traced features (${data.features_active} active); ` +
    `the traced ones carry ${percent(coverage)} of the direct effects, the others the rest.`));

  const chart = element("div", { class: "chart" });
  const card = element("section", { class: "card", "aria-live": "polite", "aria-label": "Chosen node" });
  root.append(element("div", { class: "panes" }, chart, card));
  const svg = shape("svg", { width: place.width, height: place.height, role: "group",
    "aria-label": "Attribution graph: positions from left to right, layers from bottom to top" });
  chart.append(svg);

  for (const row of place.rows) {
    const y = place.y.get(row);
    shape("line", { class: "grid", x1: LEFT - 6, x2: place.width, y1: y, y2: y }, svg);
    const name = row === -1 ? "tokens" : row === data.n_layers ? "output" : `layer ${row}`;
    shape("text", { class: "axis", x: 4, y: y + 4 }, svg).textContent = name;
  }
  data.tokens.forEach((token, position) => {
    const text = visible(token);
    shape("text", { x: place.left[position], y: place.height - 14 }, svg).textContent =
      text.length > 14 ? `${text.slice(0, 13)}…` : text;
  });
  const linkLayer = shape("g", {}, svg);
  const marks = data.nodes.map((node, i) => mark(node, i));

  function mark(node, i) {
    const { x, y } = place.places[i];
    const r = node.kind === "feature" ? 3 + 4 * Math.min(1, Math.sqrt(node.influence)) : 5;
    let made;
    if (node.kind === "feature") made = shape("circle", { cx: x, cy: y, r }, svg);
    else if (node.kind === "error") made = shape("path", { d: `M${x},${y - r}l${r},${r}l${-r},${r}l${-r},${-r}z` }, svg);
    else made = shape("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, rx: 1 }, svg);
    made.classList.add("node", node.kind);
    made.setAttribute("tabindex", i === 0 ? "0" : "-1");
    made.setAttribute("role", "button");
    made.setAttribute("aria-label", node.label);
    made.dataset.id = node.id;
    shape("title", {}, made).textContent = node.label;
    made.addEventListener("click", (event) => { event.stopPropagation(); choose(i); });
    return made;
  }

  function drawLinks(links) {
    linkLayer.replaceChildren();
    for (const [source, target, weight, share] of links) {
      const a = place.places[source], b = place.places[target], bend = (a.y - b.y) / 2;
      const made = shape("path", {
        d: `M${a.x},${a.y}C${a.x},${a.y - bend} ${b.x},${b.y + bend} ${b.x},${b.y}`,
        "stroke-width": Math.max(0.5, 4 * Math.sqrt(Math.min(1, Math.abs(share)))),
        "stroke-opacity": 0.55,
      }, linkLayer);
      made.classList.add("link", weight >= 0 ? "plus" : "minus");
    }
  }

  // From the first target back along the strongest inputs: the way the story was told.
  function backbone() {
    const drawn = new Set();
    let front = [Math.max(0, data.nodes.findIndex((node) => node.kind === "logit"))];
    for (let depth = 0; depth < DEEPEST && front.length; depth += 1) {
      const next = new Set();
      for (const node of front) {
        for (const link of inputs[node].slice(0, depth ? FURTHER_INPUTS : FIRST_INPUTS)) {
          drawn.add(link);
          next.add(link[0]);
        }
      }
      front = [...next];
    }
    return [...drawn];
  }

  function rest() {
    drawLinks(backbone());
    for (const m of marks) m.classList.remove("chosen", "near");
    card.replaceChildren(
      element("h2", {}, "Click a node"),
      element("p", {}, "Circles are features, squares are tokens and outputs, diamonds are what the features miss. " +
        "Blue solid lines raise, orange dashed lines lower."),
      element("p", { class: "hint" }, "Keys: Tab into the picture, ↑ ↓ along the strongest output and input, ← → between neighbours, Esc to go back."));
  }

  let chosen = -1;
  function choose(i) {
    chosen = i;
    const near = new Set([...inputs[i].map((l) => l[0]), ...outputs[i].map((l) => l[1])]);
    marks.forEach((m, j) => {
      m.classList.toggle("chosen", j === i);
      m.classList.toggle("near", near.has(j));
      m.setAttribute("tabindex", j === i ? "0" : "-1");
    });
    drawLinks([...inputs[i].slice(0, 60), ...outputs[i].slice(0, 60)]);
    card.replaceChildren(...details(i));
  }

  function details(i) {
    const node = data.nodes[i];
    const where = node.kind === "logit" ? "output" : `“${visible(data.tokens[node.position])}” (position ${node.position})` +
      (node.kind === "embedding" ? "" : `, layer ${node.layer}`);
    const parts = [element("h2", {}, node.label), element("p", { class: "soft" }, `${node.id} · ${where}`)];
    if (node.kind === "feature" || node.kind === "logit") {
      parts.push(element("p", {}, `${node.kind === "feature" ? "Activation" : "Logit above the mean"} ${node.activation}`));
    }
    for (const [key, title] of [["promotes", "Promotes"], ["suppresses", "Suppresses"], ["reads", "Reads"]]) {
      if (node[key]) parts.push(element("p", {}, `${title}: ${node[key].map((t) => `“${visible(t)}”`).join(", ")}`));
    }
    if (node.origin) parts.push(element("p", { class: "soft" }, `Label from the ${node.origin}, computed without looking at any text.`));
    parts.push(...list("Strongest inputs (share of its inputs)", inputs[i], 0));
    parts.push(...list("Strongest outputs (share of their inputs)", outputs[i], 1));
    return parts;
  }

  function list(title, links, end) {
    if (!links.length) return [];
    const items = links.slice(0, LISTED).map((link) => {
      const share = element("span", { class: `share ${link[2] >= 0 ? "plus" : "minus"}` },
        `${link[2] >= 0 ? "+" : "−"}${percent(Math.abs(link[3]), 1)}`);
      const other = data.nodes[link[end]];
      return element("li", {}, element("button", { type: "button", onclick: () => { choose(link[end]); marks[link[end]].focus(); } },
        share, element("span", {}, `${other.label} `, element("span", { class: "soft" }, other.id))));
    });
    const rest = links.length - items.length;
    if (rest > 0) items.push(element("li", { class: "hint" }, `and ${rest} weaker ones`));
    return [element("h2", {}, title), element("ul", { class: "list" }, ...items)];
  }

  const byPlace = data.nodes.map((_, i) => i).sort((a, b) =>
    place.places[a].y - place.places[b].y || place.places[a].x - place.places[b].x);
  svg.addEventListener("keydown", (event) => {
    const at = marks.indexOf(document.activeElement);
    if (at < 0) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    let next = at;
    if (step) next = byPlace[(byPlace.indexOf(at) + step + byPlace.length) % byPlace.length];
    else if (event.key === "ArrowUp") next = outputs[at].length ? outputs[at][0][1] : at;
    else if (event.key === "ArrowDown") next = inputs[at].length ? inputs[at][0][0] : at;
    else if (event.key === "Escape") { chosen = -1; rest(); return; }
    else if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(next);
    marks[next].focus();
  });
  svg.addEventListener("click", () => { if (chosen >= 0) { chosen = -1; rest(); } });
  rest();
}

const data = document.getElementById("data");
if (data) render(document.getElementById("graph"), JSON.parse(data.textContent));
