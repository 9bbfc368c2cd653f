// The page from a server: a list of graphs, notes that the server keeps, and a model to steer.
import { button, el } from "./dom.js";
import { render } from "./page.js";

// The token is taken out of the address bar, so that it is not in bookmarks, screenshots and copied addresses. This tab
// keeps it for later loads. Where storage is switched off it stays in the address, or a reload would lose it.
function takeToken() {
  const kept = `tl_circuits token ${location.pathname}`, address = new URL(location.href), given = address.searchParams.get("token");
  try {
    if (given === null) return sessionStorage.getItem(kept) ?? "";
    sessionStorage.setItem(kept, given);
    address.searchParams.delete("token");
    history.replaceState(history.state, "", address);
  } catch { /* storage is switched off */ }
  return given ?? "";
}

const token = takeToken();

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { "x-token": token, "content-type": "application/json" } });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error ?? `the server answered ${answer.status}`);
  return body;
}

// One websocket for the tab. Of several questions of one kind, only the latest gets its answer.
class Live {
  constructor() { this.number = 0; this.latest = {}; this.waiting = new Map(); this.onTrace = () => {}; this.onLabels = () => {}; }

  socket() {
    if (!this.line) {
      this.line = this.connect();
      this.line.catch(() => { this.line = null; });
    }
    return this.line;
  }

  async connect() {
    const url = new URL("live", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.search = new URLSearchParams({ token });
    const open = new WebSocket(url);
    open.addEventListener("message", (event) => this.heard(JSON.parse(event.data)));
    open.addEventListener("close", () => { this.line = null; for (const [, wait] of this.waiting) wait.fail(new Error("the server closed the connection; try again")); this.waiting.clear(); });
    await new Promise((done, fail) => { open.addEventListener("open", done); open.addEventListener("error", () => fail(new Error("the model cannot be reached"))); });
    return open;
  }

  heard(message) {
    if (message.labels) { this.onLabels(message.labels); return; }
    if (message.number === undefined || message.number === null) { this.onTrace(message); return; }
    const wait = this.waiting.get(message.number);
    this.waiting.delete(message.number);
    if (message.error) wait?.fail(new Error(message.error));
    else wait?.done(message.number === this.latest[wait.kind] && !message.skipped ? message.result : null);
  }

  // The answer to a question; null if a later question of the same kind came first.
  async wish(kind, wanted) {
    this.number += 1;
    const number = this.number;
    this.latest[kind] = number;
    const socket = await this.socket();
    return new Promise((done, fail) => {
      this.waiting.set(number, { kind, done, fail });
      socket.send(JSON.stringify({ do: kind, number, ...wanted }));
    });
  }

  async labels(graph, heard) {
    this.onLabels = heard;
    (await this.socket()).send(JSON.stringify({ do: "labels", graph }));
  }

  async trace(prompt, heard) {
    this.onTrace = heard;
    (await this.socket()).send(JSON.stringify({ do: "trace", prompt }));
  }
}

function traceForm(live) {
  const input = el("input", { type: "text", placeholder: "Trace a new prompt", "aria-label": "New prompt", maxlength: 2000 });
  const state = el("span", { class: "soft", role: "status" });
  return el("form", { class: "served", onsubmit: async (event) => {
    event.preventDefault();
    if (!input.value) return;
    state.replaceChildren(el("progress", { "aria-label": "Tracing" }), " waiting for the model");
    try {
      await live.trace(input.value, (message) => {
        if (message.progress) state.replaceChildren(el("progress", { "aria-label": "Tracing" }), ` ${message.progress}`);
        else if (message.error) state.textContent = message.error;
        else goTo(message.traced);
      });
    } catch (error) { state.textContent = error.message; }
  } }, input, el("button", {}, "Trace"), state);
}

// Each graph has an address of its own: it can be bookmarked, and nothing of the graph before is left on the page.
function goTo(id) {
  const url = new URL(location.href);
  url.searchParams.set("graph", id);
  location.assign(url);
}

// What is above every graph: the list of graphs, where a new one was saved, the form for new prompts, broken files.
function barOf(graphs, shown, live) {
  const readable = graphs.filter((g) => !g.problem), broken = graphs.filter((g) => g.problem);
  const bar = el("div", { class: "served" });
  if (readable.length > 1 || (readable.length && !shown)) {
    const select = el("select", { "aria-label": "Graph", onchange: () => select.value && goTo(select.value) },
      ...(shown ? [] : [el("option", { value: "" }, "Choose a graph")]),
      ...readable.map((g) => el("option", { value: g.id, selected: g.id === shown?.id }, g.name)));
    bar.append(select);
  }
  if (shown?.saved) bar.append(el("span", { class: "soft saved" }, shown.saved));
  if (live) bar.append(traceForm(live));
  if (broken.length) bar.append(el("details", {}, el("summary", {}, `${broken.length} cannot be read`), el("ul", {}, ...broken.map((g) => el("li", {}, g.problem.startsWith(g.name) ? g.problem : `${g.name}: ${g.problem}`)))));
  return bar;
}

// The graph with this id, or the first that can be read if none was asked for. Only the beginnings of files are judged
// when they are listed, so a file can turn out to be damaged when it is read; it is then listed as broken.
async function load(id) {
  let graphs = await ask("graphs");
  for (;;) {
    const wanted = id ? graphs.find((g) => g.id === id) : graphs.find((g) => !g.problem);
    if (!wanted) return { graphs, problem: id ? "This graph is not here any more." : "" };
    if (wanted.problem) return { graphs, problem: wanted.problem };
    const place = `graphs/${encodeURIComponent(wanted.id)}`;
    try {
      const [data, notes] = await Promise.all([ask(place), ask(`${place}/notes`)]);
      return { graphs, wanted, place, data, notes };
    } catch (error) {
      graphs = await ask("graphs");
      if (id || !graphs.find((g) => g.id === wanted.id)?.problem) return { graphs, problem: error.message };
    }
  }
}

async function openGraph(id, live, root) {
  const { graphs, wanted, place, data, notes, problem } = await load(id);
  const bar = barOf(graphs, wanted, live);
  root.classList.add("tlc");
  if (!wanted) {
    root.replaceChildren(...(problem ? [el("h1", {}, "This graph cannot be shown"), el("p", {}, problem)]
      : [el("h1", {}, "No graph here yet"), el("p", {}, "tl-circuits trace \"The capital of France is\" makes one.")]), bar);
    return;
  }
  let saving = Promise.resolve();
  const host = {
    bar, keys: document,
    loadNotes: () => notes,
    saveNotes(given, fields) { // one after the other, so that the last one wins
      saving = saving.then(() => ask(`${place}/notes`, { method: "PUT", body: JSON.stringify({ notes: given, fields }) }))
        .catch((error) => { app.live.textContent = `Not saved: ${error.message}`; app.offer.hidden = false; app.offer.textContent = `Your last change was not saved: ${error.message}`; });
      return saving;
    },
  };
  if (live) {
    host.steer = (wish) => live.wish("steer", { graph: wanted.id, ...wish });
    host.heads = (wish) => live.wish("heads", { graph: wanted.id, ...wish });
  }
  document.title = data.story.headline;
  const app = await render(root, data, host);
  window.tlc = app;
  if (!app) return; // the page then says why
  if (live && data.unlabelled) live.labels(wanted.id, (labels) => app.relabel(labels)).catch((error) => { app.live.textContent = error.message; });
}

async function openServer() {
  const root = document.getElementById("graph"), live = root.dataset.live ? new Live() : null;
  try {
    await openGraph(new URLSearchParams(location.search).get("graph"), live, root);
  } catch (error) {
    root.replaceChildren(el("h1", {}, "This did not work"), el("p", {}, error.message), button("Try again", () => location.reload()));
  }
}

openServer();
