"""Where features fire, remembered on this computer, so that a text runs through a model and dictionary only once."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tl_circuits.dictionaries.belonging import origin_of
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.errors import OutputError
from tl_circuits.feature_labels.firing import CONTEXT, Firing, Pieces, where_features_fire
from tl_circuits.feature_labels.top_firing import BYTES_A_FEATURE, TopFiring
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement, by_place
from tl_circuits.support.cache import cache_dir
from tl_circuits.support.files import atomic_file

logger = logging.getLogger(__name__)

_VERSION = 1  # of what is stored; a new number makes older files unused
_MOST_BYTES = 2**28  # a dictionary whose lists are larger is searched for the graph's own features only
_PIECES = ("piece_tokens", "piece_lengths", "first")


def firing_of(
    replacement: Replacement, graph: AttributionGraph, nodes: list[int], pieces: Pieces, progress: bool = False
) -> Firing:
    """Where the features of some nodes fire in a text: from the cache folder, or by running the text.

    All features of the dictionary are looked for at once and stored under what identifies model, dictionary and text,
    so that the next graph needs no run. If that would take more than 256 MB, only the features of ``nodes`` are looked
    for, and nothing is stored.

    Args:
        replacement: the model with its dictionary.
        graph: the graph.
        nodes: indices of feature nodes.
        pieces: the text.
        progress: show a progress bar on stderr.
    """
    dictionary = by_place(replacement.dictionary)
    widths = {place: dictionary.width(place) for place in dictionary.layers}
    if sum(widths.values()) * BYTES_A_FEATURE > _MOST_BYTES:
        at, of = node_places(replacement.dictionary, graph)[nodes], graph._nodes.feature[nodes]
        return where_features_fire(replacement, pieces, {int(i): of[at == i].unique() for i in at.unique()}, progress)
    path = cache_dir() / "firing" / f"{_key(replacement, pieces)}.safetensors"
    known = _read(path)
    if known is not None:
        return known
    made = where_features_fire(
        replacement, pieces, {place: torch.arange(width) for place, width in widths.items()}, progress
    )
    try:
        _write(made, path)
    except (OSError, OutputError) as error:  # a cache that cannot be written costs time, nothing else
        logger.warning("cannot remember where features fire: %s", error)
    return made


def _key(replacement: Replacement, pieces: Pieces) -> str:
    rule, parameter = replacement.dictionary.prompt_rule, next(iter(replacement.model.parameters()))
    settings: dict[str, Any] = {
        "version": _VERSION,
        "origin": origin_of(replacement)._asdict(),
        "rule": str(rule),
        "dtype": str(parameter.dtype),
        "context": CONTEXT,
        "first": pieces.first,
        "pieces": pieces.ids,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _write(firing: Firing, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = firing.pieces.ids
    tensors = {
        f"{layer}.{name}": t.contiguous() for layer, top in firing.layers.items() for name, t in top.tensors().items()
    }
    tensors["piece_tokens"] = torch.tensor([i for piece in ids for i in piece], dtype=torch.int32)
    tensors["piece_lengths"] = torch.tensor([len(piece) for piece in ids], dtype=torch.int32)
    tensors["first"] = torch.tensor(firing.pieces.first, dtype=torch.int32)
    with atomic_file(path, overwrite=True) as file:
        file.write(save(tensors))


def _read(path: Path) -> Firing | None:
    """What is stored, or None if nothing is, or if it is damaged."""
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        tokens, lengths, first = (tensors.pop(name) for name in _PIECES)
        pieces = Pieces(tuple(tuple(piece.tolist()) for piece in tokens.split(lengths.tolist())), tuple(first.tolist()))
        columns: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            layer, _, column = name.partition(".")
            columns.setdefault(int(layer), {})[column] = tensor
        return Firing(pieces, {layer: TopFiring(**parts) for layer, parts in sorted(columns.items())})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        logger.warning("%s is damaged (%s); the text is run again.", path, error)
        return None
