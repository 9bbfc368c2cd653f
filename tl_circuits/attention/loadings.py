"""Which attention heads carried an edge: head loadings of a graph's edges, as frames."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attention.head_paths import EdgeParts, Head, HeadPaths, Reader, Writer, sum_parts
from tl_circuits.attention.retrace import Columns, Retraced, columns_of, retrace
from tl_circuits.attention.site_paths import SitePaths, SiteWriter
from tl_circuits.attribution.engines.site_sweep import SiteEngine
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets, as_targets, kept_vector, resolve_logits
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.errors import TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.graph.lookup import node_indices
from tl_circuits.hooks import Replacement, frozen_norm, in_turn, rounding_within
from tl_circuits.support.checked import checked

_AT_ONCE = 32  # targets in one sweep when edges are computed again
_IN_SUPERNODES = 200  # chains of heads found for each edge between supernodes, before the edges are summed

Node = str | int


@checked
@in_turn
def head_loadings(
    replacement: Replacement,
    graph: AttributionGraph,
    source: Node | Sequence[Node],
    target: Node | Sequence[Node],
    *,
    chains: int = 10,
    targets: Any = None,
) -> pd.DataFrame:
    """How much of the direct effect from ``source`` to ``target`` went through each attention head.

    The loading of a head is the part of the edge that passes this head and no other ("Tracing Attention Computation
    Through Feature Interactions", Anthropic 2025; the equation is in docs/method.md, "Attention").

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        source: a node id or index, or a list of them (a supernode); then all edges between the two lists are summed.
        target: as ``source``.
        chains: how many chains of several heads to list. All chains of two and of three heads are compared; longer ones
            are in the rest. With skip connections, autoencoders or passed MLPs, only chains of two heads are compared.
        targets: what the graph was traced for, as given to :func:`tl_circuits.attribute`. Only needed if the edge's
            target is a LogitDifference or LogitDirection and the graph comes from another program's file, which does
            not say what such a target reads.

    Returns:
        A frame ``layer head loading kind path`` whose ``loading`` sums to the edge, in the edge's unit (logits into an
        output, units of pre-activation into a feature). Rows of kind ``"head"`` are single heads, largest first.
        ``"chain"`` are chains of several heads, largest first; their layer and head are -1, and ``path`` names the
        heads. ``"rest"`` are all other chains together. The last row, ``"residual"``, is what passed no head: what the
        residual stream, skip connections and passed MLPs carried.

    Raises:
        TargetError: for an unknown node, a pair without an edge, or an edge that comes out differently on this model.
        BelongingError: for a graph of another model or dictionary.
        BaselineError: for a graph against a baseline made from texts, which the graph does not keep.
        ArchitectureError: where only the autograd engine can trace the model; it does not know single heads.
        ValueError: for negative ``chains``.
        AttachError: if the replacement was detached.

    Examples:
        >>> loadings = tlc.head_loadings(replacement, graph, "token@7", "logit:0")
        >>> loadings.head(2).round(2)
           layer  head  loading  kind   path
        0      2     1     0.41  head  L2/H1
        1      1     3     0.40  head  L1/H3
        >>> round(float(loadings.loading.sum()), 2)        # the weight of the edge
        1.48
    """
    if chains < 0:
        raise ValueError(f"chains must not be negative, got {chains}.")
    ends = [node_indices(graph, nodes) for nodes in (source, target)]
    edges = _edges_between(graph, *ends)
    if not edges:
        names = [", ".join(graph.node_ids[i] for i in part[:3]) for part in ends]
        raise TargetError(f"the graph has no edge from {names[0]} to {names[1]}; see graph.edges.")
    several = len(edges) > 1
    found = edge_paths(
        retrace(replacement, graph, contrast=True),
        graph,
        edges,
        _IN_SUPERNODES if several and chains else chains,
        targets,
    )
    return _frame(sum_parts(found, chains) if several else found[0])


@checked
@in_turn
def top_head_loadings(
    replacement: Replacement,
    graph: AttributionGraph,
    edges: int = 100,
    *,
    chains: int = 3,
    targets: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The head loadings of a graph's strongest edges, in one frame.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        edges: how many edges, largest absolute weight first.
        chains: how many chains of several heads to list for each edge.
        targets: as for :func:`head_loadings`.
        progress: show a progress bar on stderr.

    Returns:
        The frames of ``head_loadings`` below each other, with the columns ``source`` and ``target`` in front.

    Raises:
        ValueError: for ``edges`` below 1 or negative ``chains``.
        TargetError, BelongingError, BaselineError, ArchitectureError, AttachError: as :func:`head_loadings` raises
            them.

    Examples:
        >>> loadings = tlc.top_head_loadings(replacement, graph, edges=2)
        >>> loadings.groupby(["source", "target"], sort=False).loading.sum().round(2).tolist()
        [3.33, 3.25]
    """
    if edges < 1 or chains < 0:
        raise ValueError(f"edges must be at least 1 and chains not negative, got {edges} and {chains}.")
    order = graph._edges.weight.abs().argsort(descending=True, stable=True)[:edges].tolist()
    found = edge_paths(retrace(replacement, graph, contrast=True), graph, order, chains, targets, progress)
    parts = []
    for edge, paths in zip(order, found, strict=True):
        part = _frame(paths)
        part.insert(0, "target", graph.node_ids[int(graph._edges.target[edge])])
        part.insert(0, "source", graph.node_ids[int(graph._edges.source[edge])])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def edge_paths(
    local: Retraced,
    graph: AttributionGraph,
    edges: Sequence[int],
    chains: int,
    targets: Any = None,
    progress: bool = False,
) -> list[EdgeParts]:
    """The parts of some edges by heads, on a prompt that is already retraced.

    Args:
        local: the retraced prompt.
        graph: the graph.
        edges: indices of edges.
        chains: how many chains of several heads to list for each.
        targets: as for :func:`head_loadings`.
        progress: show a progress bar on stderr.
    """
    with torch.no_grad():
        columns, reads = columns_of(local.sources), _Reads(local, graph, targets)
        # Positions that a file leaves out without saying so would give other edges: compare before explaining.
        _require_same(local, graph, columns, edges, reads)
        if isinstance(local.engine, SiteEngine):
            return _site_parts(local, graph, columns, edges, chains, reads)
        heads, leaving, found = HeadPaths(local), {}, {}
        arriving, last = None, None
        ordered = sorted(edges, key=lambda edge: int(graph._edges.target[edge]))  # one target at a time
        for edge in tqdm(ordered, desc="which heads", unit="edge", disable=not progress):
            source, target = int(graph._edges.source[edge]), int(graph._edges.target[edge])
            if source not in leaving:
                leaving[source] = heads.leave(_source(local, graph, columns, source))
            if arriving is None or target != last:
                arriving, last = heads.arrive(reads.on_stream(target)), target
            found[edge] = heads.paths(leaving[source], arriving, float(graph._edges.weight[edge]), chains)
        return [found[edge] for edge in edges]


def _site_parts(
    local: Retraced, graph: AttributionGraph, columns: Columns, edges: Sequence[int], chains: int, reads: "_Reads"
) -> list[EdgeParts]:
    """The parts of edges in a graph with autoencoders or passed MLPs. Chains of more than two heads are in the rest."""
    assert isinstance(local.engine, SiteEngine)
    paths, at = SitePaths(local.engine), node_places(local.sources.dictionary, graph).tolist()
    found: dict[int, EdgeParts] = {}
    into: dict[int, list[int]] = {}
    for edge in edges:
        into.setdefault(int(graph._edges.target[edge]), []).append(edge)
    for target, some in into.items():
        sources = graph._edges.source[some].tolist()
        writers = [_site_writer(local, graph, columns, source, at[source]) for source in sources]
        parts = paths.parts(writers, paths.arrive(reads.targets(target)), graph._edges.weight[some].tolist(), chains)
        found |= dict(zip(some, parts, strict=True))
    return [found[edge] for edge in edges]


def _site_writer(local: Retraced, graph: AttributionGraph, columns: Columns, node: int, place: int) -> SiteWriter:
    """What a node writes at its site, whose place has the number ``place``; for a token, at the first block's input."""
    sources, position = local.sources, int(graph._nodes.position[node])
    kind = int(graph._nodes.kind[node])
    if kind == Kind.EMBEDDING:
        return SiteWriter(-1, position, sources.tokens[position])
    if kind == Kind.ERROR:
        error = sources.layers[place].error
        assert error is not None  # a node of an error that exists
        return SiteWriter(place, position, error[position])
    at = _column(graph, columns, node) - sources.layers[place].features_at
    active = sources.layers[place].active
    row = sources.dictionary.decoder_vectors(place, active.feature[at : at + 1], place)[0]
    return SiteWriter(place, position, row * active.counted[at])


def _edges_between(graph: AttributionGraph, sources: list[int], targets: list[int]) -> list[int]:
    here = torch.isin(graph._edges.source, torch.tensor(sources)) & torch.isin(
        graph._edges.target, torch.tensor(targets)
    )
    return here.nonzero()[:, 0].tolist()


def _source(local: Retraced, graph: AttributionGraph, columns: Columns, node: int) -> Writer:
    """What a node writes to the residual stream, block by block."""
    nodes, sources = graph._nodes, local.sources
    kind, layer, position, feature = (
        int(getattr(nodes, name)[node]) for name in ("kind", "layer", "position", "feature")
    )
    nothing = torch.zeros_like(sources.tokens[0])
    if kind == Kind.EMBEDDING:
        return Writer(position, {}, sources.tokens[position])
    if kind == Kind.ERROR:
        error = sources.layers[layer].error
        if error is None:
            raise TargetError(
                f"{graph.node_ids[node]!r} is an error node, but the dictionary rebuilds layer {layer} exactly."
            )
        return Writer(position, {layer: _on_stream(sources, layer, error[position], position)}, nothing)
    column = columns.find(Kind.FEATURE, layer, position, feature)
    active = sources.layers[layer].active
    activation = active.counted[column - sources.layers[layer].features_at]
    dictionary, one = sources.dictionary, torch.tensor([feature], device=activation.device)
    writes = {}
    for at in dictionary.layers:
        if layer in dictionary.writers(at):
            row = dictionary.decoder_vectors(layer, one, at)[0] * activation
            writes[at] = _on_stream(sources, at, row, position)
    return Writer(position, writes, nothing)


def _on_stream(sources: Sources, layer: int, row: Float[Tensor, " d_out"], position: int) -> Float[Tensor, " d_model"]:
    """What a row at a layer's output site adds to the residual stream, on the device of the first layer."""
    norm, device = sources.layers[layer].norm, sources.devices[layer]
    if norm is None:
        return row.to(sources.home)
    return norm.push(row[None].to(device), torch.tensor([position], device=device))[0].to(sources.home)


class _Reads:
    """What target nodes read: as targets of the engine, and as vectors on the stream."""

    def __init__(self, local: Retraced, graph: AttributionGraph, targets: Any):
        self._local, self._graph = local, graph
        self._given = None if targets is None else as_targets(targets)
        self._places = node_places(local.sources.dictionary, graph)

    def targets(self, node: int) -> Targets:
        """A node as a target of the engine."""
        nodes = self._graph._nodes
        kind, position = (int(getattr(nodes, name)[node]) for name in ("kind", "position"))
        if kind not in (Kind.FEATURE, Kind.LOGIT):
            raise TargetError(f"{self._graph.node_ids[node]!r} has no incoming edges; name a feature or an output.")
        place = len(self._local.sources.places) if kind == Kind.LOGIT else int(self._places[node])
        vector = self._logit(node, position) if kind == Kind.LOGIT else self._feature(node, place, position)
        return Targets(torch.tensor([place]), torch.tensor([position]), vector[None], torch.zeros(1)).to(
            self._local.sources.home
        )

    def on_stream(self, node: int) -> Reader:
        """A node as a vector on the stream that it reads."""
        made = self.targets(node)
        layer, position = int(made.place[0]), int(made.position[0])
        there = made.to(self._local.linear.devices[layer])
        vectors, _ = self._local.linear.reads[layer].transpose(there.vector, there.position)
        return Reader(position, layer, vectors[0].to(made.vector.device))

    def _feature(self, node: int, place: int, position: int) -> Tensor:
        dictionary = self._local.sources.dictionary
        x = self._local.recording.sites[dictionary.input_hook(place)][position][None]
        feature = self._graph._nodes.feature[node : node + 1].to(x.device)
        silent = float(self._graph._nodes.activation[node]) == 0
        return (dictionary.silent_vectors if silent else dictionary.read_vectors)(place, feature, x)[0][0]

    def _logit(self, node: int, position: int) -> Tensor:
        local, graph = self._local, self._graph
        kept = kept_vector(local.replacement, graph, node)
        if kept is not None:
            return kept
        index = node - int(graph.is_kind("logit").nonzero()[0])
        if self._given is None:
            raise TargetError(
                f"{graph.node_ids[node]!r} is not a single token, and this graph's file does not say what it reads. "
                "Give targets=[...] as to tlc.attribute."
            )
        if len(self._given) != len(graph.info.target_names):
            raise TargetError(
                f"targets has {len(self._given)} entries, the graph was traced for {len(graph.info.target_names)}."
            )
        final = frozen_norm(local.model, local.recording, "ln_final")
        stream = local.recording.resid_final.float()
        x = (stream if final is None else final.forward(stream))[position]
        return resolve_logits(local.replacement, [self._given[index]], x, local.recording.whole_logits).vector[0]


def _require_same(
    local: Retraced, graph: AttributionGraph, columns: Columns, edges: Sequence[int], reads: _Reads
) -> None:
    """Raise TargetError unless the edges come out as in the graph when they are computed again."""
    by_target: dict[int, list[int]] = {}
    for edge in edges:
        by_target.setdefault(int(graph._edges.target[edge]), []).append(edge)
    wanted = list(by_target)
    # of an edge, as a share of its target's largest edge
    tolerance = rounding_within(local.recording.whole_logits.dtype)
    for start in range(0, len(wanted), _AT_ONCE):
        part = wanted[start : start + _AT_ONCE]
        made = [reads.targets(node) for node in part]
        width = max(t.vector.shape[1] for t in made)  # shorter vectors end with zeros
        padded = [replace(t, vector=torch.nn.functional.pad(t.vector, (0, width - t.vector.shape[1]))) for t in made]
        fields = [torch.cat([getattr(t, name) for t in padded]) for name in ("place", "position", "vector", "bias")]
        rows, _ = local.engine.rows(Targets(*fields))
        for row, node in zip(rows, part, strict=True):
            scale = float(row.abs().max().clamp_min(1e-30))
            for edge in by_target[node]:
                gap = abs(
                    float(row[_column(graph, columns, int(graph._edges.source[edge]))])
                    - float(graph._edges.weight[edge])
                )
                if not gap <= tolerance * scale:
                    raise TargetError(
                        f"the edge into {graph.node_ids[node]} comes out differently on the attached model and "
                        "dictionary. Trace the prompt again with them. (Files of other programs do not say which "
                        "positions they leave out.)"
                    )


def _column(graph: AttributionGraph, columns: Columns, node: int) -> int:
    kind, layer, position, feature = (
        int(getattr(graph._nodes, name)[node]) for name in ("kind", "layer", "position", "feature")
    )
    return columns.find(kind, layer, position, feature, graph.sites[node])


def path_name(heads: Sequence[Head]) -> str:
    """Heads as text, such as ``L3/H2 > L7/H0``."""
    return " > ".join(f"L{layer}/H{head}" for layer, head in heads)


def _frame(paths: EdgeParts) -> pd.DataFrame:
    ordered = sorted(paths.heads.items(), key=lambda item: -abs(item[1]))
    rows = [
        (layer, head, value, "head", path_name([(layer, head)])) for (layer, head), value in ordered if value != 0.0
    ]
    rows += [(-1, -1, value, "chain", path_name(chain)) for chain, value in paths.chains]
    rows += [(-1, -1, paths.rest, "rest", "other chains"), (-1, -1, paths.residual, "residual", "residual stream")]
    return pd.DataFrame(rows, columns=["layer", "head", "loading", "kind", "path"])
