"""What every graph must fulfil that was read from a file. A file that does not is refused when it is read, not
later."""

from collections.abc import Iterable
from dataclasses import fields
from sys import float_info
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind, is_site
from tl_circuits.graph.nodes import Label, Nodes
from tl_circuits.graph.scores import Edges
from tl_circuits.support.reading import LONGEST_TEXT, MOST_LAYERS, MOST_NODES, quoted, require_plain

LEVELS_PER_LAYER = 4  # attention features, biases, MLP features, errors
MOST_EXTRAS = 20_000_000  # values that another program's file says beyond our tables
_WHOLE = ("kind", "layer", "position", "feature", "site")
_MAY_BE_NAN = ("value",)
_STORY_TYPES = {"source": str, "target": str, "weight": float, "heads": list}


def require_sound(graph: AttributionGraph, where: str) -> AttributionGraph:
    """The graph, if its parts have the right types and agree with each other.

    Args:
        graph: a graph that was read from a file.
        where: the file, for messages.

    Raises:
        GraphFileError: for what does not fit; it says which field.
    """
    require_typed(graph.info, f"{where}: info")
    _tables(graph._nodes, graph._edges, where)
    _places(graph, where)
    for index, label in graph.labels.items():
        if not 0 <= index < len(graph):
            raise GraphFileError(f"{where}: there is a label for node {index}, and {len(graph)} nodes.")
        require_typed(label, f"{where}: label of node {index}")
        _finite_examples(label, f"{where}: label of node {index}")
    require_plain(
        graph.source_file, f"{where}: what it says beyond the graph", GraphFileError, MOST_EXTRAS, finite=True
    )
    _stories(graph, where)
    if graph.target_vectors is not None and not bool(torch.isfinite(graph.target_vectors).all()):
        raise GraphFileError(f"{where}: the vectors of its targets hold NaN or infinity.")
    _require_layered(graph._edges, len(graph), graph.info.n_layers * max(1, len(graph.info.sites)), where)
    return graph


def require_typed(value: Any, where: str) -> None:
    """Raise GraphFileError, which names the place ``where``, unless a dataclass's fields have the annotated types."""
    hints = get_type_hints(type(value))
    for field in fields(value):
        said = getattr(value, field.name)
        if not _fits(said, hints[field.name]):
            raise GraphFileError(
                f"{where}.{field.name} is {quoted(said)}, which does not fit {hints[field.name]} with finite numbers."
            )
        if any(len(text) > LONGEST_TEXT for text in ([said] if isinstance(said, str) else _texts(said))):
            raise GraphFileError(f"{where}.{field.name} has more than {LONGEST_TEXT:,} characters.")


def _texts(value: Any) -> Iterable[str]:
    return (text for text in value if isinstance(text, str)) if isinstance(value, tuple) else ()


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: text, numbers, None, tuples, dataclasses and choices of these."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        inner = [parts[0]] * len(value) if isinstance(value, tuple) and parts[1:] == (Ellipsis,) else parts
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is float:
        # finite
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _tables(nodes: Nodes, edges: Edges, where: str) -> None:
    n = len(nodes)
    if not 0 < n <= MOST_NODES:
        raise GraphFileError(f"{where} has {n:,} nodes; expected 1 to {MOST_NODES:,}.")
    for name, column in nodes.columns().items():
        if column.shape != (n,):
            raise GraphFileError(f"{where}: nodes.{name} has the shape {tuple(column.shape)}, expected ({n},).")
        wrong = column.is_floating_point() or column.is_complex() or column.dtype == torch.bool
        if wrong if name in _WHOLE else column.dtype != torch.float32:
            expected = "whole numbers" if name in _WHOLE else "float32"
            raise GraphFileError(f"{where}: nodes.{name} has the type {column.dtype}, expected {expected}.")
        checked = column[~column.isnan()] if name in _MAY_BE_NAN else column
        if name not in _WHOLE and not bool(torch.isfinite(checked).all()):
            raise GraphFileError(f"{where}: nodes.{name} holds NaN or infinity.")
    if edges.weight.dtype != torch.float32 or not bool(torch.isfinite(edges.weight).all()):
        raise GraphFileError(f"{where}: the weights of its edges must be finite numbers in float32.")
    if len(edges) and bool(((edges.target.diff() == 0) & (edges.source.diff() <= 0)).any()):
        raise GraphFileError(f"{where}: an edge is given twice, or edges are not in the order of target and source.")


def _places(graph: AttributionGraph, where: str) -> None:
    info, nodes = graph.info, graph._nodes
    if not 0 < info.n_layers <= MOST_LAYERS:
        raise GraphFileError(f"{where}: info.n_layers is {info.n_layers}, expected 1 to {MOST_LAYERS:,}.")
    n_tokens, is_logit = len(info.tokens), nodes.kind == Kind.LOGIT
    _within(nodes.kind, 0, len(Kind) - 1, f"{where}: nodes.kind")
    _within(nodes.layer, -1, info.n_layers, f"{where}: nodes.layer")
    # A node other than a target stands at one token; -1 would be taken for the last one.
    _within(nodes.position[~is_logit], 0, n_tokens - 1, f"{where}: nodes.position")
    _within(nodes.position, -1, n_tokens - 1, f"{where}: nodes.position")
    _within(nodes.feature, -1, 2**62, f"{where}: nodes.feature")
    if (nodes.site is None) != (not info.sites):
        raise GraphFileError(f"{where}: nodes.site and info.sites belong together, and the file has one of them only.")
    if nodes.site is not None:
        _within(nodes.site, -1, len(info.sites) - 1, f"{where}: nodes.site")
        if len(set(info.sites)) < len(info.sites) or not all(map(is_site, info.sites)):
            raise GraphFileError(
                f"{where}: info.sites is {quoted(info.sites)}, expected different names such as 'resid_post'."
            )
        with_site = (nodes.site >= 0) & (nodes.kind != Kind.FEATURE) & (nodes.kind != Kind.ERROR)
        if bool(with_site.any()):
            raise GraphFileError(f"{where}: nodes.site is for features and errors, and another kind of node has one.")
    n_targets = int(is_logit.sum())
    if not len(info.target_names) == len(info.target_probabilities) == n_targets:
        raise GraphFileError(
            f"{where} has {n_targets} target nodes, {len(info.target_names)} names of targets and "
            f"{len(info.target_probabilities)} probabilities; expected as many of each."
        )
    if len(info.token_ids) != n_tokens:
        raise GraphFileError(f"{where} has {n_tokens} tokens and {len(info.token_ids)} token ids.")
    if len(set(graph.node_ids)) < len(graph):
        raise GraphFileError(f"{where}: two of its nodes are the same.")


def _within(column: Tensor, low: int, high: int, what: str) -> None:
    if column.numel() and not low <= int(column.min()) <= int(column.max()) <= high:
        raise GraphFileError(
            f"{what} reaches from {int(column.min())} to {int(column.max())}, expected {low} to {high}."
        )


def _finite_examples(label: Label, where: str) -> None:
    for example in label.examples:
        if len(example.tokens) != len(example.activations) or not all(
            abs(a) < float("inf") for a in example.activations
        ):
            raise GraphFileError(f"{where}: an example needs one finite activation for each token.")


def _stories(graph: AttributionGraph, where: str) -> None:
    require_plain(list(graph.head_stories), f"{where}: head_stories", GraphFileError, MOST_EXTRAS, finite=True)
    for i, story in enumerate(graph.head_stories):
        for key, wanted in _STORY_TYPES.items():
            if not isinstance(story, dict) or not _fits(story.get(key), wanted):
                raise GraphFileError(f"{where}: head_stories[{i}] has no right {key!r}.")
        if not all(isinstance(head, dict) and {"layer", "head", "loading"} <= head.keys() for head in story["heads"]):
            raise GraphFileError(f"{where}: head_stories[{i}] has a head without layer, head or loading.")


def _require_layered(edges: Edges, n_nodes: int, n_layers: int, where: str) -> None:
    """Raise GraphFileError if influence could run in a circle, or in more steps than the layers allow.

    Each step removes the nodes without inputs and visits their outgoing edges once, so the work is one pass over the
    edges, whatever the file says.
    """
    order = torch.argsort(edges.source, stable=True)
    first = torch.searchsorted(edges.source[order], torch.arange(n_nodes + 1))
    inputs = torch.bincount(edges.target, minlength=n_nodes)
    free, done = (inputs == 0).nonzero()[:, 0], 0
    for _ in range(LEVELS_PER_LAYER * (n_layers + 2)):
        done += len(free)
        counts = first[free + 1] - first[free]
        starts = torch.repeat_interleave(first[free] - (counts.cumsum(0) - counts), counts)
        reached = edges.target[order[starts + torch.arange(int(counts.sum()))]]
        inputs.index_add_(0, reached, torch.full_like(reached, -1))
        free = torch.unique(reached)
        free = free[inputs[free] == 0]
        if not len(free):
            break
    if done < n_nodes:
        why = "in a circle" if not len(free) else f"through more steps than {n_layers} layers allow"
        raise GraphFileError(f"{where}: its links run {why}, so it is not an attribution graph.")
