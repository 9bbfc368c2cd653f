"""The local replacement model of a graph's prompt, made again to answer what the graph does not store."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuits.attribution.contrast import compare_again
from tl_circuits.attribution.engines.closed_form import ClosedForm, closed_form
from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.same_values import require_same_features
from tl_circuits.attribution.sources import Sources, find_sources, recorded_sites
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.errors import ArchitectureError, TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import SOURCE_EXAMPLES, Kind, Place, node_id, parse_node_id
from tl_circuits.hooks import (
    FrozenScores,
    Recording,
    Replacement,
    frozen_scores,
    own_sites,
    read_prompt,
    record,
    record_below,
)


@dataclass(frozen=True)
class Retraced:
    """What the attribution of one prompt is made of: the recording, the sources and the linear engine."""

    replacement: Replacement
    recording: Recording
    sources: Sources
    engine: ClosedForm
    _scores: dict[int, FrozenScores] = field(default_factory=dict, repr=False, compare=False)

    def scores(self, layer: int) -> FrozenScores:
        """Queries and keys of one layer. They are kept for the next question about the layer."""
        if layer not in self._scores:
            self._scores[layer] = frozen_scores(self.model, self.recording, layer)
        return self._scores[layer]

    @property
    def model(self) -> Any:
        """The model the dictionary is attached to."""
        return self.replacement.model

    @property
    def linear(self) -> LinearEngine:
        """The engine, in a graph without autoencoders and passed MLPs."""
        assert isinstance(self.engine, LinearEngine)
        return self.engine

    @property
    def n_pos(self) -> int:
        """The prompt's length in tokens."""
        return self.sources.n_pos


def retrace(
    replacement: Replacement, graph: AttributionGraph, scores_of: int | None = None, contrast: bool = False
) -> Retraced:
    """Record a graph's prompt again and build the frozen linear maps.

    The positions that the graph leaves out are left out again.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        scores_of: build only what decides this layer's attention scores: the layers below it, and it too if it rebuilds
            the stream that its heads read. By default everything.
        contrast: count sources as the graph does, by their difference from its baseline, if it has one.

    Raises:
        BelongingError: if the graph is of another model or dictionary, or its features have other activations now.
        BaselineError: with ``contrast``, if the graph's baseline is not kept in it (it was made from texts).
        ArchitectureError: where only the autograd engine can trace the model; it has no map of single heads.
    """
    replacement.require_attached()
    require_belonging(replacement, graph)
    model, dictionary = replacement.model, replacement.dictionary
    prompt = read_prompt(model, dictionary, graph)
    tokens = prompt.tokens
    rebuilt = scores_of is not None and f"blocks.{scores_of}.hook_resid_pre" in own_sites(dictionary)
    below = None if scores_of is None or (rebuilt and scores_of == int(model.cfg.n_layers) - 1) else scores_of + rebuilt
    sites = recorded_sites(model, dictionary, below)
    scores: dict[int, FrozenScores] = {}
    replacement.holds(tokens)  # refuses a model whose hooks do not show what it computes
    with torch.no_grad():
        if scores_of is None or rebuilt:
            recording = record(model, tokens, tokens.numel() - 1, sites, below)
        else:
            recording, scores[scores_of] = record_below(model, tokens, scores_of, sites)
        sources = find_sources(model, dictionary, recording, prompt.skipped)
        require_same_features(graph, sources)
        if contrast:
            sources = compare_again(replacement, sources, recording, graph.info)
        try:
            engine = closed_form(model, recording, sources)
        except ArchitectureError as error:
            raise ArchitectureError(f"{error} That engine does not tell heads apart.") from error
    return Retraced(replacement, recording, sources, engine, scores)


@dataclass(frozen=True)
class Columns:
    """The node of each column of :class:`Sources`."""

    kind: Int[Tensor, " column"]  # numbers of Kind: features, errors, embeddings; -1 for what a baseline shares
    layer: Int[Tensor, " column"]
    position: Int[Tensor, " column"]
    feature: Int[Tensor, " column"]
    site: Int[Tensor, " column"]  # as an index of ``sites``; -1 for none
    sites: tuple[str, ...]

    def name(self, column: int) -> str:
        """The node id of a column; ``"bias"`` for the column after the last."""
        if column == len(self.kind):
            return "bias"
        return node_id(*self.place(column))

    def place(self, column: int) -> Place:
        """Where the node of a column stands."""
        layer, position, feature, site = (int(c[column]) for c in (self.layer, self.position, self.feature, self.site))
        return Place(Kind(int(self.kind[column])), layer, position, feature, self.sites[site] if site >= 0 else "")

    def column(self, name: str) -> int:
        """The column of a node id.

        Raises:
            TargetError: if the id is not that of a source, or it is not active on the prompt.
        """
        place = parse_node_id(name)
        if place is None or place.kind == Kind.LOGIT:
            raise TargetError(f"{name!r} is not a source; sources look like {SOURCE_EXAMPLES}.")
        return self.find(*place)

    def find(self, kind: int, layer: int, position: int, feature: int, site: str = "") -> int:
        """The column of a node.

        Raises:
            TargetError: if nothing there is active on the prompt.
        """
        at = self.sites.index(site) if site in self.sites else -1
        found = (self.kind == kind) & (self.layer == layer) & (self.position == position) & (self.site == at)
        if kind == Kind.FEATURE:
            found &= self.feature == feature
        where = found.nonzero()
        if where.numel() == 0:
            what = "token" if kind == Kind.EMBEDDING else Kind(kind).text
            raise TargetError(
                f"the attached dictionary has no active {what} at layer {layer}{f', {site}' if site else ''}, "
                f"position {position}{f', feature {feature}' if kind == Kind.FEATURE else ''} on this prompt."
            )
        return int(where[0])


def columns_of(sources: Sources, stop: int | None = None) -> Columns:
    """Kind, layer, position, feature and site of every column, or of those before place ``stop``."""
    stop = len(sources.places) if stop is None else stop
    width, n_pos = sources.before(stop), sources.n_pos
    kind, layer, position, feature, at_site = (
        torch.full((width,), fill) for fill in (int(Kind.EMBEDDING), -1, 0, -1, -1)
    )
    columns = Columns(kind, layer, position, feature, at_site, sources.sites)
    columns.position[:n_pos] = torch.arange(n_pos)
    if sources.shared_column is not None:
        columns.kind[sources.shared_column] = -1
    for place, source in zip(sources.places[:stop], sources.layers, strict=False):
        site = sources.sites.index(place.site) if place.site else -1
        features = slice(source.features_at, source.errors_at)
        columns.kind[features], columns.layer[features], columns.site[features] = Kind.FEATURE, place.layer, site
        columns.position[features] = source.active.position.cpu()
        columns.feature[features] = source.active.feature.cpu()
        if source.error is not None:
            errors = slice(source.errors_at, source.errors_at + n_pos)
            columns.kind[errors], columns.layer[errors], columns.site[errors] = Kind.ERROR, place.layer, site
            columns.position[errors] = torch.arange(n_pos)
    return columns
