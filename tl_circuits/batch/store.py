"""Where a batch's results are kept: at any fsspec address, each file written as a whole or not at all."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fsspec

from tl_circuits.errors import OutputError

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

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a finished prompt; None if it is not finished."""
        try:
            record = json.loads(self._fs.cat_file(self._at(f"{key}.json")))
        except (OSError, ValueError):
            return None
        return record if record.get("status") == "done" and self._fs.exists(self._at(record["file"])) else None

    def graph(self, record: dict[str, Any]) -> "AttributionGraph":
        """The graph of a finished prompt's record; raises GraphFileError if it is damaged."""
        from tl_circuits.graph.storage import load_graph

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.safetensors"
            path.write_bytes(self._fs.cat_file(self._at(record["file"])))
            return load_graph(path)

    def write(self, key: str, record: dict[str, Any], graph: "AttributionGraph | None") -> None:
        """Write the graph and then its record, whose presence means "finished". Raises OSError after three tries."""
        if graph is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = graph.save(Path(folder) / "graph.safetensors")
                self._put(record["file"], path.read_bytes())
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

    def _put(self, name: str, content: bytes) -> None:
        part = self._at(f".{name}.{uuid4().hex}.part")

        def put() -> None:
            try:
                self._fs.pipe_file(part, content)
                self._fs.mv(part, self._at(name))
            except BaseException:
                if self._fs.exists(part):
                    self._fs.rm_file(part)
                raise

        _tried(put)


def _tried(action: Callable[[], None]) -> None:
    for attempt in range(TRIES):
        try:
            action()
            return
        except OSError:
            if attempt == TRIES - 1:
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
