"""The links of a graph file as edges. A file with a wrong link is refused as a whole."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.kinds import Kind
from tl_circuits.graph.scores import Edges
from tl_circuits.support.reading import quoted

_ERRORS = (Kind.ERROR, Kind.ATTENTION_ERROR)


def read_links(
    links: Any, ids: Sequence[str], kinds: Sequence[int], layers: Sequence[int], order: Sequence[int], where: str
) -> Edges:
    """Edges between nodes, numbered by their place in ``order``. ``ids``, ``kinds`` and ``layers`` are in the file's
    order.

    Raises:
        GraphFileError: for ids used twice, links to missing nodes, links given twice or without a number.
    """
    index, shared = _index(ids, kinds, where)
    if not isinstance(links, list):
        raise GraphFileError(f"{where}: 'links' is {type(links).__name__}, expected a list.")
    try:
        sources = [index[link["source"]] for link in links]
        targets = [index[link["target"]] for link in links]
        weights = [float(link["weight"]) for link in links]
    except (KeyError, TypeError, ValueError) as error:
        raise _bad_link(links, index, where) from error
    bad = next((i for i, w in enumerate(weights) if not math.isfinite(w)), None)
    if bad is not None:
        raise GraphFileError(f"{where}: links[{bad}] has the weight {weights[bad]}, expected a finite number.")
    if 0.0 in weights:  # circuit-tracer writes links without weight when nothing is pruned
        links, sources, targets, weights = (
            [x for x, w in zip(column, weights, strict=True) if w != 0] for column in (links, sources, targets, weights)
        )
    if shared:
        _separate(sources, targets, index, shared, layers, kinds, where)
    place = torch.empty(len(ids), dtype=torch.long)
    place[torch.tensor(order, dtype=torch.long)] = torch.arange(len(ids))
    source, target = place[torch.tensor(sources, dtype=torch.long)], place[torch.tensor(targets, dtype=torch.long)]
    weight = torch.tensor(weights, dtype=torch.float32)
    key = target * len(ids) + source
    sorted_keys, by = key.sort()
    twice = (sorted_keys[1:] == sorted_keys[:-1]).nonzero()[:, 0]
    if len(twice):
        link = links[int(by[int(twice[0]) + 1])]
        raise GraphFileError(
            f"{where}: the link from {quoted(link['source'])!r} to {quoted(link['target'])!r} is given twice."
        )
    return Edges(source[by], target[by], weight[by])  # storage.load_graph then refuses circles


def _index(ids: Sequence[str], kinds: Sequence[int], where: str) -> tuple[dict[str, int], dict[str, int]]:
    """Where each id stands, and the errors that share an id with a feature; the id then stands for the feature.

    circuit-tracer 0.5.0 gives the error of layer 5 and feature 5 of layer 0 the same id.
    """
    index: dict[str, int] = {}
    shared: dict[str, int] = {}
    for i, name in enumerate(ids):
        if name not in index:
            index[name] = i
        elif name not in shared and (kinds[i] in _ERRORS) != (kinds[index[name]] in _ERRORS):
            feature, error = (index[name], i) if kinds[i] in _ERRORS else (i, index[name])
            index[name], shared[name] = feature, error
        else:
            raise GraphFileError(
                f"{where}: nodes[{i}] has the id {quoted(name)!r}, as nodes[{index[name]}] has. Ids must differ, or "
                "links cannot say which node they mean."
            )
    return index, shared


def _bad_link(links: list[Any], index: dict[str, int], where: str) -> GraphFileError:
    for i, link in enumerate(links):
        for end in ("source", "target", "weight"):
            if not isinstance(link, dict) or end not in link:
                return GraphFileError(f"{where}: links[{i}] has no {end!r}.")
        for end in ("source", "target"):
            if not isinstance(link[end], str) or link[end] not in index:
                return GraphFileError(
                    f"{where}: links[{i}] has the {end} {quoted(link[end])!r}, and no node has that id."
                )
        if not isinstance(link["weight"], (int, float)):
            return GraphFileError(f"{where}: links[{i}] has the weight {quoted(link['weight'])!r}, expected a number.")
    return GraphFileError(f"{where}: its links cannot be read.")


def _separate(
    sources: list[int],
    targets: list[int],
    index: dict[str, int],
    shared: dict[str, int],
    layers: Sequence[int],
    kinds: Sequence[int],
    where: str,
) -> None:
    """Decide which links of a shared id belong to the error, and change them in place.

    Nothing flows into an error, or from it to its own or an earlier layer. And circuit-tracer lists a target's links in
    the order of the nodes, so a link's neighbours say on which side of the features it stands.
    """
    error_of = {index[name]: error for name, error in shared.items()}
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source not in error_of:
            continue
        error = error_of[source]
        before = sources[i - 1] if i and targets[i - 1] == target else -1
        after = sources[i + 1] if i + 1 < len(sources) and targets[i + 1] == target else len(kinds)
        if kinds[target] != Kind.LOGIT and layers[target] <= layers[error]:
            continue
        if before >= source:
            sources[i] = error
        elif after >= error:
            name = next(name for name, e in shared.items() if e == error)
            raise GraphFileError(
                f"{where}: links[{i}] comes from {name!r}, which is a feature of layer {layers[source]} and the "
                f"error of layer {layers[error]}, and nothing tells which. Load circuit-tracer's .pt of the graph "
                "instead."
            )
