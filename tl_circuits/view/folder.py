"""The graphs of a file or folder, by id. Files that cannot be read are listed with the reason."""

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.notes import Notes
from tl_circuits.graph.notes_file import belongs, find_notes, notes_json, parse_notes, replace_notes, with_notes_beside
from tl_circuits.graph.storage import load_graph
from tl_circuits.support.reading import boundary
from tl_circuits.view.page_data import page_data

ENDINGS = (".safetensors", ".json", ".pt")
FIELDS = ("groups", "pins", "names", "text")


@dataclass(frozen=True)
class Entry:
    """One file: its id, its path, and why it cannot be shown (empty if it can)."""

    id: str
    path: Path
    problem: str = ""

    @property
    def name(self) -> str:
        """The file's name as text that can be sent: names of files may hold bytes that are no text."""
        return self.path.name.encode("utf-8", "replace").decode()


class GraphFolder:
    """The graphs under one path. Pages ask for them by id, never by path."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise GraphFileError(f"there is no file or folder {path}.")
        self.path = path
        self.traced_here: set[str | None] = set()  # ids of graphs that this server made
        self._lock = threading.RLock()  # two tabs may save, or open graphs, at the same time
        self._loaded: dict[str, tuple[float, AttributionGraph, dict[str, Any]]] = {}

    def entries(self) -> list[Entry]:
        """All files that may hold a graph, sorted by name."""
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.iterdir() if p.suffix in ENDINGS)
        files = [p for p in files if not p.name.endswith(".notes.json") and not p.name.startswith(".")]
        return [self._entry(path) for path in files]

    def _entry(self, path: Path) -> Entry:
        made = Entry(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12], path)
        try:
            self._open(made)
        except GraphFileError as error:
            return Entry(made.id, path, str(error).replace(str(path), made.name))
        return made

    def _open(self, entry: Entry) -> tuple[AttributionGraph, dict[str, Any]]:
        with self._lock:
            with boundary(GraphFileError, entry.path):  # a link may lead nowhere
                changed = entry.path.stat().st_mtime
            if entry.id not in self._loaded or self._loaded[entry.id][0] != changed:
                if len(self._loaded) > 8:  # graphs are large, so only some are kept: drop the one loaded first
                    self._loaded.pop(next(iter(self._loaded)))
                # The notes beside it are read and judged when asked for: damaged ones must not hide the graph.
                self._loaded[entry.id] = (changed, load_graph(entry.path, notes=False), {})
            _, graph, data = self._loaded[entry.id]
            return graph, data

    def graphs(self) -> list[AttributionGraph]:
        """All graphs that can be read, sorted by name."""
        return [self._open(entry)[0] for entry in self.entries() if not entry.problem]

    def find(self, graph_id: str) -> Entry:
        """The readable file with this id.

        Raises:
            KeyError: if there is none.
        """
        for entry in self.entries():
            if entry.id == graph_id and not entry.problem:
                return entry
        raise KeyError(f"there is no graph {graph_id!r}.")

    def graph(self, graph_id: str) -> AttributionGraph:
        """The graph with this id.

        Raises:
            KeyError: if there is none.
        """
        return self._open(self.find(graph_id))[0]

    def keep_labels(self, graph_id: str, graph: AttributionGraph, write: bool) -> None:
        """Show the graph with the labels of this one from now on. ``write``: also put them into its file."""
        entry = self.find(graph_id)
        with self._lock:
            if write:
                with_notes_beside(graph, entry.path).save(entry.path, overwrite=True)
            self._loaded[graph_id] = (entry.path.stat().st_mtime, graph, {})

    def data(self, graph_id: str) -> dict[str, Any]:
        """What the page needs of a graph. It is made once and kept."""
        entry = self.find(graph_id)
        graph, data = self._open(entry)
        if not data:
            data.update(page_data(graph))
        return data

    def notes(self, graph_id: str) -> dict[str, Any] | None:
        """The notes beside a graph as JSON values; None if there are none."""
        entry = self.find(graph_id)
        graph = self._open(entry)[0]
        found = find_notes(graph, entry.path)
        if found is None:
            return None
        return json.loads(notes_json(found.notes, graph.fingerprint if belongs(found.made_for, graph) else found.made_for))

    def save_notes(self, graph_id: str, given: Any, fields: list[str]) -> None:
        """Write the named fields of the notes given. Other fields stay as they are, because another tab may have
        changed them.

        Raises:
            GraphFileError: if ``given`` are not notes.
            KeyError: for unknown ids and fields.
            ValueError: for notes of another graph.
        """
        entry = self.find(graph_id)
        graph = self.graph(graph_id)
        notes, made_for = parse_notes(given)
        if not belongs(made_for, graph):
            raise ValueError("these notes are of another graph.")
        unknown = set(fields) - set(FIELDS)
        if unknown:
            raise KeyError(f"notes have no field {sorted(unknown)[0]!r}.")
        with self._lock:
            found = find_notes(graph, entry.path)
            kept = found.notes if found is not None and belongs(found.made_for, graph) else Notes()
            merged = Notes(**{f: getattr(notes if f in fields else kept, f) for f in FIELDS})
            replace_notes(graph, graph.with_notes(merged).notes, entry.path)
