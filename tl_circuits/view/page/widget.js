// The page in a notebook cell. Selection and notes are the widget's attributes.
import { unpackJson } from "./unpack.js";
import { render } from "./page.js";
const FIELDS = ["groups", "pins", "names", "text"];

async function renderWidget({ model, el: cell }) {
  const data = await unpackJson(model.get("_data"));
  const notes = () => Object.fromEntries(FIELDS.map((field) => [field, model.get(field)]));
  // A change made here comes back as an event, which is not news; and what Python chose must not be sent back to it.
  let mine = false, hearing = false;
  const set = (changes) => {
    mine = true;
    for (const [field, value] of Object.entries(changes)) model.set(field, value);
    model.save_changes();
    mine = false;
  };
  const root = document.createElement("div");
  cell.append(root);
  const app = await render(root, data, {
    loadNotes: () => ({ graph: data.hash, ...notes() }),
    saveNotes: (given, fields) => set(Object.fromEntries(fields.map((field) => [field, given[field]]))),
    selected: (ids) => { if (!hearing) set({ selection: ids }); },
  });
  const heard = () => { if (!mine) app.book.replace(notes()); };
  const chosen = () => {
    if (mine) return;
    hearing = true;
    app.choose(model.get("selection"));
    hearing = false;
  };
  for (const field of FIELDS) model.on(`change:${field}`, heard);
  model.on("change:selection", chosen);
  return () => {
    for (const field of FIELDS) model.off(`change:${field}`, heard);
    model.off("change:selection", chosen);
  };
}

export default { render: renderWidget };
