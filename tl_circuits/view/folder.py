"""The graphs of a file or folder, by id. Files that cannot be read are listed with the reason."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuits.errors import GraphFileError, OutputError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.header import read_header
from tl_circuits.graph.nodes import GraphInfo
from tl_circuits.graph.notes import Notes
from tl_circuits.graph.notes_file import belongs, find_notes, notes_json, parse_notes, replace_notes, with_notes_beside
from tl_circuits.support.endings import OURS
from tl_circuits.view.kept_graphs import KeptGraphs, Version, version_of

ENDINGS = (".safetensors", ".json", ".pt")
FIELDS = ("groups", "pins", "names", "text")


@dataclass(frozen=True)
class Entry:
    """One file: its id and path, why it cannot be shown (empty if it can), and whether this server traced it."""

    id: str
    path: Path
    problem: str = ""
    traced_here: bool = False

    @property
    def name(self) -> str:
        """The file's name as text that can be sent: names of files may hold bytes that are no text."""
        return sendable(self.path.name)


@dataclass(frozen=True)
class _Known:
    """What is known of a file in one state: what it is of, if its beginning says so, and why it cannot be shown."""

    version: Version
    info: GraphInfo | None = None
    problem: str = ""


class GraphFolder:
    """The graphs under one path. Pages ask for them by id, never by path.

    Listing reads the beginnings of files, and each only once while the file stays as it is. A graph is read when it is
    asked for; if that shows that the file is damaged, it is listed with the reason from then on.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise GraphFileError(f"there is no file or folder {path}.")
        self.path = path
        self.kept = KeptGraphs()
        self._known: dict[Path, _Known] = {}
        self._traced: list[Path] = []  # graphs that this server made, in this order
        self._lock = threading.Lock()  # held for moments, over the two above
        self._writing = threading.RLock()  # two tabs may save at the same time

    @property
    def home(self) -> Path:
        """The folder that new graphs are saved in: the one shown, or the one of the file shown."""
        return self.path if self.path.is_dir() else self.path.parent

    def _paths(self) -> list[Path]:
        """All files that may hold a graph: sorted by name, or the file given and then those traced since."""
        with self._lock:
            traced = list(self._traced)
        if not self.path.is_dir():
            return [self.path, *(p for p in traced if p.exists())]
        files = sorted(p for p in self.path.iterdir() if p.suffix in ENDINGS)
        return [p for p in files if not p.name.endswith(".notes.json") and not p.name.startswith(".")]

    def entries(self) -> list[Entry]:
        """All files that may hold a graph, in the order in which the page lists them."""
        return [self._entry(path) for path in self._paths()]

    def _entry(self, path: Path) -> Entry:
        problem = self._known_of(path).problem
        with self._lock:
            return Entry(_id(path), path, problem, path in self._traced)

    def _known_of(self, path: Path) -> _Known:
        try:
            version = version_of(path)
            with self._lock:
                known = self._known.get(path)
            if known is None or known.version != version:
                known = self._learn(path, _Known(version, read_header(path)))
        except GraphFileError as error:
            known = self._learn(path, _Known(_version_if_any(path), problem=_told(error, path)))
        return known

    def _learn(self, path: Path, known: _Known) -> _Known:
        with self._lock:
            self._known[path] = known
        return known

    def infos(self) -> Iterator[tuple[Entry, GraphInfo]]:
        """What each readable graph is of. Files that say it only at their end are read as a whole, the first time."""
        for entry in self.entries():
            known = self._known_of(entry.path)
            if known.problem:
                continue
            info = known.info
            if info is None:
                try:
                    info = self._opened(entry).info
                except GraphFileError:
                    continue  # it is listed with the reason now
                self._learn(entry.path, _Known(known.version, info))
            yield entry, info

    def find(self, graph_id: str) -> Entry:
        """The file with this id.

        Raises:
            KeyError: if there is none.
            GraphFileError: if it cannot be read.
        """
        path = next((p for p in self._paths() if _id(p) == graph_id), None)
        if path is None:
            raise KeyError(f"there is no graph {graph_id!r}.")
        entry = self._entry(path)
        if entry.problem:
            raise GraphFileError(entry.problem)
        return entry

    def _opened(self, entry: Entry) -> AttributionGraph:
        try:
            return self.kept.graph(entry.path)
        except GraphFileError as error:
            known = self._learn(entry.path, _Known(_version_if_any(entry.path), problem=_told(error, entry.path)))
            raise GraphFileError(known.problem) from error

    def graph(self, graph_id: str) -> AttributionGraph:
        """The graph with this id.

        Raises:
            KeyError: if there is none.
            GraphFileError: if it cannot be read.
        """
        return self._opened(self.find(graph_id))

    def data(self, graph_id: str) -> dict[str, Any]:
        """What the page needs of a graph. It is made once and kept.

        Raises:
            KeyError: if there is none.
            GraphFileError: if it cannot be read.
        """
        entry = self.find(graph_id)
        self._opened(entry)  # says what is wrong with the file, if anything is
        return self.kept.data(entry.path)

    def require_writable(self) -> None:
        """Raise OutputError if a new graph could not be saved. Tracing takes a while, so this is asked before it."""
        if not os.access(self.home, os.W_OK):
            raise OutputError(f"new graphs are saved in {self.home}, and nothing may be written there.")

    def add(self, graph: AttributionGraph, stem: str) -> Entry:
        """Save a new graph beside the others, and list it.

        It is called ``STEM.graph.safetensors``, or ``STEM-2.graph.safetensors`` and so on where that is taken.

        Raises:
            OutputError: if it cannot be saved.
        """
        with self._writing:
            path, number = self.home / f"{stem}{OURS}", 2
            while os.path.lexists(path):
                path, number = self.home / f"{stem}-{number}{OURS}", number + 1
            graph.save(path)
            with self._lock:
                self._traced.append(path)
            self.kept.keep(path, graph)
        return self._entry(path)

    def keep_labels(self, graph_id: str, graph: AttributionGraph, write: bool) -> None:
        """Show the graph with the labels of this one from now on. ``write``: also put them into its file."""
        entry = self.find(graph_id)
        with self._writing:
            if write:
                with_notes_beside(graph, entry.path).save(entry.path, overwrite=True)
            self.kept.keep(entry.path, graph)

    def notes(self, graph_id: str) -> dict[str, Any] | None:
        """The notes beside a graph as JSON values; None if there are none."""
        entry = self.find(graph_id)
        graph = self._opened(entry)
        found = find_notes(graph, entry.path)
        if found is None:
            return None
        return json.loads(
            notes_json(found.notes, graph.fingerprint if belongs(found.made_for, graph) else found.made_for)
        )

    def save_notes(self, graph_id: str, given: Any, fields: list[str]) -> None:
        """Write the named fields of the notes given. Other fields stay as they are, because another tab may have
        changed them.

        Raises:
            GraphFileError: if ``given`` are not notes.
            KeyError: for unknown ids and fields.
            ValueError: for notes of another graph.
        """
        entry = self.find(graph_id)
        graph = self._opened(entry)
        notes, made_for = parse_notes(given)
        if not belongs(made_for, graph):
            raise ValueError("these notes are of another graph.")
        unknown = set(fields) - set(FIELDS)
        if unknown:
            raise KeyError(f"notes have no field {sorted(unknown)[0]!r}.")
        with self._writing:
            found = find_notes(graph, entry.path)
            kept = found.notes if found is not None and belongs(found.made_for, graph) else Notes()
            merged = Notes(**{f: getattr(notes if f in fields else kept, f) for f in FIELDS})
            replace_notes(graph, graph.with_notes(merged).notes, entry.path)


def sendable(text: str) -> str:
    """Text that JSON can carry: half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _id(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]


def _told(error: GraphFileError, path: Path) -> str:
    """The error as the page may show it: with the file's name, without its folder."""
    return sendable(str(error).replace(str(path), path.name))


def _version_if_any(path: Path) -> Version:
    try:
        return version_of(path)
    except GraphFileError:
        return (0, 0, 0)
