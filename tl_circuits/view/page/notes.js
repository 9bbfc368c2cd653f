// A person's groups, pins, names and text, with undo. Every change is saved through the host at once.
export const NO_NOTES = { groups: [], pins: [], names: {}, text: "" };
const UNDO_STEPS = 100;

export class NoteBook {
  constructor(graph, host, changed) {
    this.graph = graph;
    this.host = host;
    this.changed = changed;
    this.notes = { ...NO_NOTES, ...graph.notes };
    this.past = [];
  }

  // Load the notes that the host kept. Notes of another graph are returned, to be offered, and not applied.
  async load() {
    const kept = await this.host.loadNotes?.();
    if (!kept) return null;
    if (![this.graph.hash, this.graph.earlier_hash].includes(kept.graph)) return kept;
    this.replace(kept);
    return null;
  }

  replace(notes) {
    this.notes = this.known(notes);
    this.changed();
  }

  // The part of the notes that is about nodes of this graph.
  known({ groups = [], pins = [], names = {}, text = "" }) {
    const has = (id) => this.graph.indexOf.has(id);
    return {
      groups: groups.map(([label, ...ids]) => [label, ...ids.filter(has)]).filter((g) => g.length > 1),
      pins: pins.filter(has),
      names: Object.fromEntries(Object.entries(names).filter(([id]) => has(id))),
      text,
    };
  }

  change(next) {
    this.past.push(this.notes);
    if (this.past.length > UNDO_STEPS) this.past.shift();
    this.notes = { ...this.notes, ...next };
    this.changed();
    this.host.saveNotes?.(this.file(), Object.keys(next));
  }

  undo() {
    const before = this.past.pop();
    if (!before) return false;
    const fields = Object.keys(NO_NOTES).filter((field) => JSON.stringify(before[field]) !== JSON.stringify(this.notes[field]));
    this.notes = before;
    this.changed();
    this.host.saveNotes?.(this.file(), fields);
    return true;
  }

  file() { return { version: 1, graph: this.graph.hash, ...this.notes }; }

  freeLabel(wished, except = null) {
    const used = new Set(this.notes.groups.map((g) => g[0]).filter((label) => label !== except));
    let label = wished.trim() || "group";
    for (let i = 2; used.has(label); i += 1) label = `${wished.trim()} (${i})`;
    return label;
  }

  group(label, ids) {
    const left = this.notes.groups.map(([name, ...old]) => [name, ...old.filter((id) => !ids.includes(id))]).filter((g) => g.length > 1);
    const used = new Set(left.map((g) => g[0]));
    let free = label;
    for (let i = 2; used.has(free); i += 1) free = `${label} (${i})`;
    this.change({ groups: [...left, [free, ...ids]] });
    return free;
  }

  ungroup(label) { this.change({ groups: this.notes.groups.filter((g) => g[0] !== label) }); }

  renameGroup(label, name) {
    const free = this.freeLabel(name, label);
    this.change({ groups: this.notes.groups.map((g) => (g[0] === label ? [free, ...g.slice(1)] : g)) });
    return free;
  }

  nameNode(id, name) {
    const names = { ...this.notes.names };
    if (name.trim()) names[id] = name.trim();
    else delete names[id];
    this.change({ names });
  }

  togglePins(ids) {
    const all = ids.every((id) => this.notes.pins.includes(id));
    const pins = all ? this.notes.pins.filter((id) => !ids.includes(id)) : [...new Set([...this.notes.pins, ...ids])];
    this.change({ pins });
    return !all;
  }
}
