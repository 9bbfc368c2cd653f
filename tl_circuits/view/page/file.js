// The page as a file: data inside, notes in the browser's own storage.
import { el } from "./dom.js";
import { unpackJson } from "./unpack.js";
import { render } from "./page.js";


function browserHost(data) {
  const name = `tl_circuits:${data.hash}`;
  const ofThisGraph = (kept) => ([data.hash, data.earlier_hash].includes(kept?.graph) ? { ...kept, graph: data.hash } : {});
  return {
    keys: document,
    loadNotes() {
      try { return JSON.parse(localStorage.getItem(name) ?? localStorage.getItem(`tl_circuits:${data.earlier_hash}`)); } catch { return null; } // storage may be switched off
    },
    saveNotes(notes, fields) { // other fields stay as another tab may have left them
      const changed = Object.fromEntries(fields.map((field) => [field, notes[field]]));
      try { localStorage.setItem(name, JSON.stringify({ ...notes, ...ofThisGraph(this.loadNotes()), ...changed })); } catch { /* the download button still works */ }
    },
  };
}

async function openFile() {
  const root = document.getElementById("graph");
  if (typeof DecompressionStream === "undefined") {
    root.replaceChildren(el("p", {}, "This browser cannot unpack the graph (it has no DecompressionStream). Any browser from 2023 on can."));
    return;
  }
  const data = await unpackJson(document.getElementById("data").textContent.trim());
  window.tlc = await render(root, data, browserHost(data));
}

openFile();
