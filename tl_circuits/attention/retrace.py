"""The local replacement model of a graph's prompt once more, to ask what the graph does not store."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.sources import Sources, find_sources
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.errors import ArchitectureError, TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import KINDS
from tl_circuits.hooks import (
    FrozenScores,
    Recording,
    Replacement,
    frozen_scores,
    read_prompt,
    record,
    record_below,
)

_NODE_ID = re.compile(
    r"^(?:(?P<token>token)|L(?P<layer>\d+)/(?:(?P<error>error)|F(?P<feature>\d+)))@(?P<position>\d+)$"
)


@dataclass(frozen=True)
class Retraced:
    """What one prompt's attribution was made of: recording, sources and the linear engine."""

    replacement: Replacement
    recording: Recording
    sources: Sources
    engine: LinearEngine
    _scores: dict[int, FrozenScores] = field(default_factory=dict, repr=False, compare=False)

    def scores(self, layer: int) -> FrozenScores:
        """Queries and keys of one layer, kept for the next question about it."""
        if layer not in self._scores:
            self._scores[layer] = frozen_scores(self.model, self.recording, layer)
        return self._scores[layer]

    @property
    def model(self) -> Any:
        """The model the dictionary is attached to."""
        return self.replacement.model

    @property
    def n_pos(self) -> int:
        """The prompt's length in tokens."""
        return self.sources.n_pos


def retrace(replacement: Replacement, graph: AttributionGraph, below: int | None = None) -> Retraced:
    """Record the graph's prompt again and build the frozen maps; with ``below``, only what decides that layer's scores.

    The positions that the graph leaves out are left out again.
    Raises BelongingError when the graph is of another model or dictionary, ArchitectureError where
    only the autograd engine can trace: it has no map of single heads.
    """
    replacement.require_attached()
    require_belonging(replacement, graph)
    model, dictionary = replacement.model, replacement.dictionary
    prompt = read_prompt(model, dictionary, graph)
    tokens = prompt.tokens
    layers = [layer for layer in dictionary.layers if below is None or layer < below]
    sites = [f(layer) for layer in layers for f in (dictionary.input_hook, dictionary.output_hook)]
    scores: dict[int, FrozenScores] = {}
    replacement.holds(tokens)  # refuses a model whose hooks do not show what it computes
    with torch.no_grad():
        if below is None:
            recording = record(model, tokens, tokens.numel() - 1, sites)
        else:
            recording, scores[below] = record_below(model, tokens, below, sites)
        sources = find_sources(model, dictionary, recording, prompt.skipped)
        try:
            engine = LinearEngine(model, recording, sources)
        except ArchitectureError as error:
            raise ArchitectureError(f"{error} That engine does not tell heads apart.") from error
    return Retraced(replacement, recording, sources, engine, scores)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of :class:`Sources`, as graphs name their nodes."""

    kind: Int[Tensor, " column"]  # 0 feature, 1 error, 2 token
    layer: Int[Tensor, " column"]
    position: Int[Tensor, " column"]
    feature: Int[Tensor, " column"]

    def name(self, column: int) -> str:
        """The node id of a column; the column after the last is the bias."""
        if column == len(self.kind):
            return "bias"
        kind, layer = int(self.kind[column]), int(self.layer[column])
        position, feature = int(self.position[column]), int(self.feature[column])
        return (f"L{layer}/F{feature}@{position}", f"L{layer}/error@{position}", f"token@{position}")[kind]

    def column(self, name: str) -> int:
        """The column of a node id; raises TargetError if nothing of that name is active."""
        place = parse_source(name)
        if place is None:
            raise TargetError(f"{name!r} is no source; sources look like 'L14/F2268@9', 'L3/error@2' or 'token@4'.")
        kind, *where = place
        return self.find(KINDS.index(kind), *where)

    def find(self, kind: int, layer: int, position: int, feature: int) -> int:
        """The column of a node; raises TargetError if nothing there is active on the prompt."""
        found = (self.kind == kind) & (self.layer == layer) & (self.position == position)
        if kind == 0:
            found &= self.feature == feature
        where = found.nonzero()
        if where.numel() == 0:
            what = ("feature", "error", "token")[kind]
            raise TargetError(
                f"the attached dictionary has no active {what} at layer {layer}, position {position}"
                f"{f', feature {feature}' if kind == 0 else ''} on this prompt."
            )
        return int(where[0])


def parse_source(name: str) -> tuple[str, int, int, int] | None:
    """Kind, layer, position and feature (-1 where there is none) of a source's node id; None for anything else."""
    match = _NODE_ID.match(name)
    if match is None:
        return None
    kind = "embedding" if match["token"] else ("error" if match["error"] else "feature")
    return kind, int(match["layer"] or -1), int(match["position"]), int(match["feature"] or -1)


def columns_of(sources: Sources, below: int | None = None) -> Columns:
    """Kind, layer, position and feature of every column, or of those before layer ``below``."""
    width, n_pos = sources.before(len(sources.layers) if below is None else below), sources.n_pos
    columns = Columns(*(torch.full((width,), fill) for fill in (2, -1, 0, -1)))
    columns.position[:n_pos] = torch.arange(n_pos)
    for layer, source in enumerate(sources.layers[:below]):
        features = slice(source.features_at, source.errors_at)
        columns.kind[features], columns.layer[features] = 0, layer
        columns.position[features] = source.active.position.cpu()
        columns.feature[features] = source.active.feature.cpu()
        if source.error is not None:
            errors = slice(source.errors_at, source.errors_at + n_pos)
            columns.kind[errors], columns.layer[errors] = 1, layer
            columns.position[errors] = torch.arange(n_pos)
    return columns
