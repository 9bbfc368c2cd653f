"""A few graphs in memory: those that were asked for last. All others are read again from their files."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.storage import load_graph
from tl_circuits.support.reading import boundary
from tl_circuits.view.page_data import page_data

MOST_KEPT = 8  # graphs; one of 4,000 features with its page takes some hundred megabytes

Version = tuple[int, int, int]
"""What tells one state of a file from another: time of the last change, size, and the file's number on its disk."""


def version_of(path: Path) -> Version:
    """The state that a file is in.

    Raises:
        GraphFileError: if it is not there, such as a link that leads nowhere.
    """
    with boundary(GraphFileError, path):
        found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


@dataclass(frozen=True)
class Kept:
    """A graph in memory: the state of the file it was read from, and the page's data once someone asked for it."""

    version: Version
    graph: AttributionGraph
    data: dict[str, Any] = field(default_factory=dict)


class KeptGraphs:
    """Graphs by path, read when asked for. Many threads may ask at the same time."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self.most = most
        self._kept: OrderedDict[Path, Kept] = OrderedDict()
        self._lock = threading.Lock()  # held for moments, over the table above
        # Held while a file is read or a page's data made: one at a time, because graphs are large. A graph in memory
        # is answered meanwhile.
        self._working = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def graph(self, path: Path) -> AttributionGraph:
        """The graph in a file as it is now.

        Raises:
            GraphFileError: if it cannot be read.
        """
        return self._opened(path).graph

    def data(self, path: Path) -> dict[str, Any]:
        """What the page needs of the graph in a file. It is made once for each state of the file.

        Raises:
            GraphFileError: if the file cannot be read.
        """
        kept = self._opened(path)
        if not kept.data:
            with self._working:
                if not kept.data:  # another thread may have made it meanwhile
                    kept.data.update(page_data(kept.graph))
        return kept.data

    def keep(self, path: Path, graph: AttributionGraph) -> None:
        """Answer with this graph until the file changes."""
        self._put(path, Kept(version_of(path), graph))

    def _put(self, path: Path, made: Kept) -> None:
        with self._lock:
            self._kept[path] = made
            self._kept.move_to_end(path)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)

    def _found(self, path: Path, version: Version) -> Kept | None:
        with self._lock:
            found = self._kept.get(path)
            if found is None or found.version != version:
                return None
            self._kept.move_to_end(path)
            return found

    def _opened(self, path: Path) -> Kept:
        version = version_of(path)
        found = self._found(path, version)
        if found is not None:
            return found
        with self._working:
            found = self._found(path, version)  # another thread may have read it meanwhile
            if found is not None:
                return found
            # The notes beside it are read and judged when asked for: damaged ones must not hide the graph.
            made = Kept(version, load_graph(path, notes=False))
            self._put(path, made)
            return made
