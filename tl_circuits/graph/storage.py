"""Graphs as files: one safetensors file each, with the metadata inside, written atomically. Never pickle."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import Example, GraphInfo, Label, Nodes, read_baselines
from tl_circuits.graph.notes_file import save_notes_beside, with_notes_beside
from tl_circuits.graph.scores import Edges
from tl_circuits.graph.validate import require_sound
from tl_circuits.hooks import Sample
from tl_circuits.support.checked import checked
from tl_circuits.support.files import atomic_file
from tl_circuits.support.outputs import output
from tl_circuits.support.reading import LARGEST_GRAPH_FILE, boundary, parse_json

FORMAT = "tl_circuits.graph"
FORMAT_VERSION = 1
SITES_VERSION = 2  # of graphs in which some layer has several dictionaries; earlier programs would mix their nodes up
_TUPLES = ("token_ids", "tokens", "target_names", "target_probabilities", "compared_with", "sites")


def save_graph(graph: AttributionGraph, path: Path, overwrite: bool) -> Path:
    """Write ``graph`` to ``path``, and its notes beside it. The same graph gives the same bytes."""
    tensors = {f"nodes.{name}": column.contiguous() for name, column in graph._nodes.columns().items()}
    tensors |= {
        "edges.source": graph._edges.source.to(torch.int32),
        "edges.target": graph._edges.target.to(torch.int32),
        "edges.weight": graph._edges.weight.contiguous(),
    }
    if graph.target_vectors is not None:
        tensors["targets.vector"] = graph.target_vectors.contiguous()
    labels = {str(i): asdict(label) for i, label in sorted(graph.labels.items())}
    info = asdict(graph.info)
    if not graph.info.sites:
        del info["sites"]  # files of graphs with one dictionary a layer stay as they were
    content = {
        "format_version": FORMAT_VERSION if not graph.info.sites else SITES_VERSION,
        "info": info,
        "labels": labels,
    }
    if graph.source_file:
        content["source_file"] = graph.source_file
    if graph.head_stories:
        content["head_stories"] = graph.head_stories
    # One key only: safetensors writes several in no fixed order, and same graph means same bytes.
    metadata = {FORMAT: json.dumps(content, ensure_ascii=False, sort_keys=True)}
    data = save(tensors, metadata)
    with atomic_file(path, overwrite) as file:
        file.write(data)
    save_notes_beside(graph, path)
    return path


@checked
def load_graph(path: str | Path, notes: bool = True) -> AttributionGraph:
    """Read a graph from a file.

    Files that :meth:`AttributionGraph.save` wrote, the JSON of Neuronpedia, circuit-tracer and llamascopium (plain or
    gzipped), and circuit-tracer's ``.pt``. Nothing in a file is ever run.

    Args:
        path: the file.
        notes: whether to take the notes beside the file, if they belong to this graph.

    Returns:
        The graph.

    Raises:
        GraphFileError: if the file is missing, cut off, damaged, or not a graph, or if the notes beside it are.

    Examples:
        >>> path = graph.save(folder / "why.graph.safetensors")
        >>> tlc.load_graph(path).info.prompt
        'the capital of the state containing Dallas is'
    """
    path = Path(path)
    if not path.is_file():
        raise GraphFileError(f"there is no graph file at {path}.")
    with boundary(GraphFileError, path):
        if path.stat().st_size > LARGEST_GRAPH_FILE:
            raise GraphFileError(f"{path} has more than {LARGEST_GRAPH_FILE:,} bytes, which no graph has.")
        graph = output("read another program's file")(path) if is_foreign(path) else _read_ours(path)
        require_sound(graph, str(path))
        return with_notes_beside(graph, path) if notes else graph


def _read_ours(path: Path) -> AttributionGraph:
    with opened(path) as file:
        content = description(file, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return _build(content, tensors)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file at ``path``, its tables not read yet.

    Raises:
        GraphFileError: if it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise GraphFileError(f"{path} is not a whole safetensors file ({error}). Was it cut off?") from error


def description(file: Any, path: Path) -> dict[str, Any]:
    """What one of our files says beside its tables.

    Raises:
        GraphFileError: if it is not a graph, or one of a newer format.
    """
    metadata = file.metadata() or {}
    if FORMAT not in metadata:
        raise GraphFileError(f"{path} is a safetensors file, but not an attribution graph of ours.")
    content = parse_json(metadata[FORMAT], f"{path}: its description", GraphFileError)
    if content["format_version"] > SITES_VERSION:
        raise GraphFileError(
            f"{path} was written by a newer tl_circuits (format {content['format_version']}, "
            f"this one reads up to {SITES_VERSION}). Upgrade tl_circuits."
        )
    return content


def is_foreign(path: Path) -> bool:
    """Whether the file is JSON, gzip or a torch file, rather than our own safetensors."""
    with path.open("rb") as file:
        head = file.read(64)
    # safetensors starts with the length of its header, eight bytes, then that header's brace.
    if head[8:9] == b"{" and head[:1] != b"{":
        return False
    return head.lstrip()[:1] == b"{" or head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x80"))  # gzip, zip, pickle


def read_sample(stored: Any) -> Sample:
    """The sample of weights that a graph's JSON holds.

    Raises:
        ValueError, TypeError: if ``stored`` is anything else.
    """
    return tuple((str(name), tuple(map(float, values))) for name, values in stored)


def info_of(content: dict[str, Any]) -> GraphInfo:
    """What the graph is of, from the description in its file."""
    info = content["info"]
    info |= {name: tuple(info[name]) for name in _TUPLES if name in info}
    info["sample"] = read_sample(info.get("sample", ()))
    if info.get("skip_positions") is not None:
        info["skip_positions"] = tuple(info["skip_positions"])
    if "baseline" in info:
        info["baseline"] = read_baselines(info["baseline"])
    return GraphInfo(**info)


def _build(content: dict[str, Any], tensors: dict[str, Any]) -> AttributionGraph:
    info = info_of(content)
    present = [f.name for f in fields(Nodes) if f.default is MISSING or f"nodes.{f.name}" in tensors]
    nodes = Nodes(**{name: tensors[f"nodes.{name}"] for name in present})
    edges = Edges(tensors["edges.source"].long(), tensors["edges.target"].long(), tensors["edges.weight"])
    n = len(nodes)
    sizes = {column.shape for column in nodes.columns().values()}
    if sizes != {(n,)} or not (edges.source.shape == edges.target.shape == edges.weight.shape):
        raise ValueError("its tables differ in length")
    if len(edges) and not (0 <= int(edges.source.min()) and int(torch.maximum(edges.source, edges.target).max()) < n):
        raise ValueError("an edge points to a node that does not exist")
    if bool((edges.target.diff() < 0).any()):
        raise ValueError("its edges are not in the order of their targets")
    vectors = tensors.get("targets.vector")
    if vectors is not None and (vectors.ndim != 2 or len(vectors) != len(info.target_names)):
        raise ValueError("it has another number of target vectors than of targets")
    labels = {}
    for index, label in content["labels"].items():
        label |= {name: tuple(label[name]) for name in ("promotes", "suppresses", "reads")}
        examples = label.get("examples", ())
        label["examples"] = tuple(Example(tuple(e["tokens"]), tuple(e["activations"])) for e in examples)
        labels[int(index)] = Label(**label)
    return AttributionGraph(
        info, nodes, edges, labels, source_file=content.get("source_file", {}),
        head_stories=tuple(content.get("head_stories", ())), target_vectors=vectors,
    )  # fmt: skip
