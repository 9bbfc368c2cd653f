"""Feature files: examples, histograms and logits of the features of your own dictionary, on disk.

The layout is the one that circuit-tracer's page fetches from a hub. ``index.json.gz`` names for each layer a file and
the offsets of its records. A record is a little-endian length of four bytes and a zlib stream of JSON. Served locally,
the page reads a graph's features from loose JSON files instead; see :meth:`FeatureFiles.write_loose`.
"""

import gzip
import json
import struct
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_circuits.dictionaries.belonging import Origin, require_made_of
from tl_circuits.errors import BelongingError, GraphFileError
from tl_circuits.feature_labels.feature_codes import cantor_pair
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import Example, Label
from tl_circuits.graph.one_a_layer import require_one_a_layer
from tl_circuits.graph.storage import read_sample
from tl_circuits.support.files import atomic_file
from tl_circuits.support.reading import (
    LARGEST_CONFIG,
    LARGEST_JSON,
    LARGEST_RECORD,
    boundary,
    gunzip,
    parse_json,
    quoted,
    read_bytes,
)

ORIGIN = "features.origin.json"  # beside the folder of the records, whose files other programs read
TOKENS_KEPT, EXAMPLES_KEPT, WINDOW = 5, 3, 24


class FeatureFiles:
    """A folder of feature files, read one record at a time.

    Raises:
        GraphFileError: if the folder holds no feature files.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "features" if (folder / "features" / "index.json.gz").is_file() else folder
        if not (self.folder / "index.json.gz").is_file():
            raise GraphFileError(
                f"{folder} holds no feature files: there is no index.json.gz (tl-circuits dashboards makes them)."
            )

    @cached_property
    def origin(self) -> Origin | None:
        """The model and dictionary that the records are about; None if nothing says so."""
        path = self.folder.parent / ORIGIN
        if not path.is_file():
            return None
        with boundary(GraphFileError, path):
            said = parse_json(read_bytes(path, LARGEST_CONFIG, GraphFileError), path, GraphFileError)
            return Origin(
                str(said["model"]), str(said["dictionary"]), int(said["n_layers"]), read_sample(said["sample"])
            )

    def require_of(self, graph: AttributionGraph) -> None:
        """Make sure that the records can be about the graph's features.

        Raises:
            BelongingError: they are known to be of another model or dictionary, or cannot tell its features apart.
        """
        require_one_a_layer(graph.info, "feature files tell", BelongingError)
        if self.origin is not None:
            require_made_of(self.origin, graph.info, f"the feature files in {self.folder.parent.name}")

    @cached_property
    def _index(self) -> dict[str, Any]:
        path = self.folder / "index.json.gz"
        with boundary(GraphFileError, path):
            index = parse_json(gunzip(path, LARGEST_JSON, GraphFileError), path, GraphFileError)
            entries = enumerate(index) if isinstance(index, list) else index.items()
            return {str(int(layer)): entry for layer, entry in entries if entry}

    @property
    def layers(self) -> list[int]:
        """The layers that there are files for."""
        return sorted(map(int, self._index))

    def read(self, layer: int, feature: int) -> dict[str, Any] | None:
        """The record of one feature; None if there is none.

        Raises:
            GraphFileError: if it is damaged.
        """
        entry = self._index.get(str(layer))
        with boundary(GraphFileError, f"{self.folder}/index.json.gz"):
            if entry is None or not 0 <= feature < len(entry["offsets"]) - 1:
                return None
            name, (start, stop) = entry["filename"], entry["offsets"][feature : feature + 2]
            if Path(name).name != name:  # the index may name files of its own folder only
                raise GraphFileError(
                    f"{self.folder}/index.json.gz names the file {quoted(name)}, which is not in its folder."
                )
            path = self.folder / name
        if start == stop:
            return None
        with boundary(GraphFileError, f"{path}: feature {feature}"):
            if not 0 < stop - start <= LARGEST_RECORD:
                raise GraphFileError(f"{path}: feature {feature} is damaged: its record has {stop - start:,} bytes.")
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
            (length,) = struct.unpack("<I", data[:4])
            unpacked = zlib.decompressobj().decompress(data[4 : 4 + length], LARGEST_RECORD)
            record = parse_json(unpacked, f"{path}: feature {feature} is damaged: its record", GraphFileError)
            if not isinstance(record, dict):
                raise GraphFileError(f"{path}: feature {feature} is damaged: its record is a {type(record).__name__}.")
            return record

    def label(self, layer: int, feature: int) -> Label | None:
        """The record of one feature as a label with examples; None if there is none."""
        record = self.read(layer, feature)
        if record is None:
            return None
        with boundary(GraphFileError, f"{self.folder}: the record of feature {feature} of layer {layer}"):
            return self._label(record, layer, feature)

    @staticmethod
    def _label(record: dict[str, Any], layer: int, feature: int) -> Label:
        promotes, suppresses = (
            tuple(map(str, record.get(name, ())[:TOKENS_KEPT])) for name in ("top_logits", "bottom_logits")
        )
        rows = [e for quantile in record.get("examples_quantiles", ()) for e in quantile["examples"]][:EXAMPLES_KEPT]
        short = (
            "say " + ", ".join(f"“{token}”" for token in promotes[:2])
            if promotes
            else f"feature {feature} of layer {layer}"
        )
        return Label(short, promotes, suppresses, (), "feature files", tuple(map(example_of, rows)))

    def write_loose(self, graph: AttributionGraph, folder: Path) -> int:
        """Write ``<code>.json`` for each of the graph's features, as circuit-tracer's page reads them.

        Returns:
            How many files were written.
        """
        self.require_of(graph)
        n, written = graph._nodes, set()
        folder.mkdir(parents=True, exist_ok=True)
        for i in graph.is_kind("feature").nonzero()[:, 0].tolist():
            place = (int(n.layer[i]), int(n.feature[i]))
            record = self.read(*place) if place not in written else None
            if record is None:
                continue
            with atomic_file(folder / f"{cantor_pair(*place)}.json", overwrite=True) as file:
                file.write(json.dumps(record, ensure_ascii=False).encode())
            written.add(place)
        return len(written)


def example_of(row: dict[str, Any]) -> Example:
    """A record's example as a label has it: the tokens around the strongest one."""
    values = [float(v) for v in row["tokens_acts_list"]]
    top = max(range(len(values)), key=lambda i: abs(values[i]), default=0)
    cut = slice(max(0, top - WINDOW), top + WINDOW)
    return Example(tuple(map(str, row["tokens"][cut])), tuple(values[cut]))


def write_layer(folder: Path, layer: int, records: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """Write one layer's records as they come; returns the layer's entry of the index."""
    name, offsets = f"layer_{layer}.bin", [0]
    with atomic_file(folder / name, overwrite=True) as file:
        for record in records:
            if record is not None:
                data = zlib.compress(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(), 6)
                file.write(struct.pack("<I", len(data)) + data)
            offsets.append(file.tell())
    return {"filename": name, "offsets": offsets}


def write_origin(folder: Path, origin: Origin) -> None:
    """Write beside the ``folder`` of the records which model and dictionary they are about."""
    with atomic_file(folder.parent / ORIGIN, overwrite=True) as file:
        file.write(json.dumps(origin._asdict(), ensure_ascii=False).encode())


def write_index(folder: Path, entries: dict[int, dict[str, Any]]) -> None:
    """Write the index. Readers find the layers' files through it, so it is written last, when all of them are whole."""
    with atomic_file(folder / "index.json.gz", overwrite=True) as file:
        file.write(gzip.compress(json.dumps({str(k): v for k, v in sorted(entries.items())}).encode(), mtime=0))
