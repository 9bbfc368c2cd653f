"""Where a batch's results are kept: at any fsspec address, each file written as a whole or not at all."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fsspec

from tl_circuits.errors import GraphFileError, OutputError
from tl_circuits.support.files import flush_to_disk, remove_if_old

if TYPE_CHECKING:
    import pandas as pd

    from tl_circuits.graph.graph import AttributionGraph

TRIES = 3
FIRST_PAUSE = 0.5  # seconds before the second try; doubled before each further one


class Store:
    """A folder with graphs, a JSON record beside each, and a summary table."""

    def __init__(self, out: str):
        try:
            self._fs, self._folder = fsspec.core.url_to_fs(out)
            self._fs.makedirs(self._folder, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise OutputError(f"cannot write to {out}: {error}. Give a folder, or an address fsspec knows.") from error
        self.out = out

    def require_writable(self) -> None:
        """Find out before hours of work whether results can be written.

        Raises:
            OutputError: if they cannot.
        """
        probe = self._at(f".{uuid4().hex}.part")
        try:
            self._fs.touch(probe)
            self._fs.rm_file(probe)
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot write to {self.out}: {error}. Give a folder that you may write to.") from error

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a finished prompt; None if it is not finished, or if record or graph are not whole."""
        try:
            record = json.loads(self._fs.cat_file(self._at(f"{key}.json")))
        except (OSError, ValueError, RecursionError):
            return None
        if not _is_whole(record, key):
            return None
        try:
            if "bytes" in record:
                whole = self._fs.size(self._at(record["file"])) == record["bytes"]
            else:  # written by an earlier version, which kept no size
                whole = self.graph(record) is not None
        except (OSError, GraphFileError):
            return None
        return record if whole else None

    def graph(self, record: dict[str, Any]) -> "AttributionGraph":
        """The graph of a finished prompt's record; raises GraphFileError if it is damaged."""
        from tl_circuits.graph.storage import load_graph

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.safetensors"
            content = self._fs.cat_file(self._at(record["file"]))
            if record.get("sha256", _hash(content)) != _hash(content):
                raise GraphFileError(
                    f"{self.out}/{record['file']} is not the file that was written (its hash differs). Remove it."
                )
            path.write_bytes(content)
            return load_graph(path)

    def write(self, key: str, record: dict[str, Any], graph: "AttributionGraph | None") -> None:
        """Write the graph and then its record, whose presence means "finished", with the graph's size and hash.

        Raises OSError after three tries.
        """
        if graph is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = graph.save(Path(folder) / "graph.safetensors")
                content = path.read_bytes()
            self._put(record["file"], content)
            record = record | {"bytes": len(content), "sha256": _hash(content)}
        self._put(f"{key}.json", json.dumps(record, ensure_ascii=False).encode())

    def write_table(self, frame: "pd.DataFrame") -> str:
        """Write the summary table; returns its address."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "summary.parquet"
            frame.to_parquet(path, index=False)
            self._put("summary.parquet", path.read_bytes())
        return f"{self.out.rstrip('/')}/summary.parquet"

    def _at(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"

    def _collect(self, name: str) -> None:
        """Remove what killed runs left of a file. Younger parts may be of a run that still writes them."""
        if "file" not in self._protocols():  # elsewhere a file appears as a whole, and lists cost time
            return
        for part in Path(self._folder).glob(f".{name}.*.part"):
            remove_if_old(part)

    def _protocols(self) -> tuple[str, ...]:
        names = self._fs.protocol
        return (names,) if isinstance(names, str) else tuple(names)

    def _put(self, name: str, content: bytes) -> None:
        part = self._at(f".{name}.{uuid4().hex}.part")
        self._collect(name)

        def put() -> None:
            try:
                self._fs.pipe_file(part, content)
                if "file" in self._protocols():
                    flush_to_disk(Path(part))
                self._fs.mv(part, self._at(name))
            except BaseException:  # Ctrl-C included: no part is left behind
                if self._fs.exists(part):
                    self._fs.rm_file(part)
                raise

        _tried(put)


def graph_file(key: str) -> str:
    """The name of the graph's file that belongs to a key."""
    return f"{key}.graph.safetensors"


def _is_whole(record: Any, key: str) -> bool:
    """Whether a record that was read has everything that a finished prompt's has."""
    if not isinstance(record, dict) or record.get("status") != "done" or record.get("file") != graph_file(key):
        return False
    texts = all(isinstance(record.get(name), str) for name in ("id", "key", "prompt"))
    counts = all(type(record.get(name)) is int for name in ("nodes", "edges"))
    shares = ("seconds", "replacement_score", "completeness_score", "coverage")
    return texts and counts and all(isinstance(record.get(name), (int, float)) for name in shares)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tried(action: Callable[[], None]) -> None:
    for attempt in range(TRIES):
        try:
            action()
            return
        except OSError:
            if attempt == TRIES - 1:
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
