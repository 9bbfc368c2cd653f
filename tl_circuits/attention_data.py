"""Head loadings and QK attributions as plain data: for pages, for JSON, for Neuronpedia."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from beartype import beartype
from jaxtyping import jaxtyped

from tl_circuits.attribution.head_paths import Head, Paths
from tl_circuits.attribution.loadings import edge_paths, path_name
from tl_circuits.attribution.qk import QKAttribution, score_attribution
from tl_circuits.attribution.retrace import Retraced, node_indices, retrace
from tl_circuits.errors import TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement


@dataclass(frozen=True)
class EdgeStory:
    """Why one edge is there: the ways it went, and why each of its largest heads looked.

    ``scores`` are QK attributions of the heads with the largest loadings, from the target's position
    to the source's, in the order of ``heads``.
    """

    source: str
    target: str
    weight: float
    paths: Paths
    heads: tuple[Head, ...]
    scores: tuple[QKAttribution, ...]


@jaxtyped(typechecker=beartype)
def edge_stories(
    replacement: Replacement, graph: AttributionGraph, edges: Sequence[tuple[str | int, str | int]], heads: int = 3, top: int = 10
) -> list[EdgeStory]:
    """From edges to the heads that carried them to what made these heads look.

    Args:
        edges: pairs (source, target) of node ids or indices.
        heads: how many heads of each edge to explain; 0 for loadings alone.
        top: how many pairs and marginals to list for each head.

    Raises TargetError and ArchitectureError as :func:`tl_circuits.head_loadings` does.
    """
    indices = [_edge_index(graph, *edge) for edge in edges]
    local = retrace(replacement, graph)
    return [
        _story(local, graph, edge, paths, heads, top)
        for edge, paths in zip(indices, edge_paths(local, graph, indices, top), strict=True)
    ]


def strongest_edges(graph: AttributionGraph, count: int) -> list[tuple[str, str]]:
    """The edges with the largest absolute weight between different positions, which heads must have carried."""
    edges, position = graph._edges, graph._nodes.position
    moved = (position[edges.source] != position[edges.target]).nonzero()[:, 0]
    order = moved[edges.weight[moved].abs().argsort(descending=True, stable=True)[:count]].tolist()
    return [(graph.node_ids[int(edges.source[e])], graph.node_ids[int(edges.target[e])]) for e in order]


def _edge_index(graph: AttributionGraph, source: str | int, target: str | int) -> int:
    (a,), (b,) = node_indices(graph, source), node_indices(graph, target)
    found = ((graph._edges.source == a) & (graph._edges.target == b)).nonzero()
    if found.numel() == 0:
        raise TargetError(f"the graph has no edge from {graph.node_ids[a]} to {graph.node_ids[b]}; see graph.edges.")
    return int(found[0])


def _story(local: Retraced, graph: AttributionGraph, edge: int, paths: Paths, heads: int, top: int) -> EdgeStory:
    source, target = int(graph._edges.source[edge]), int(graph._edges.target[edge])
    query, key = (int(graph._nodes.position[i]) for i in (target, source))
    ordered = sorted(paths.heads, key=lambda head: -abs(paths.heads[head]))
    chosen = [head for head in ordered if paths.heads[head] != 0.0][:heads]
    scores = tuple(score_attribution(local, graph, *head, query, key, top=top) for head in chosen)
    weight = float(graph._edges.weight[edge])
    return EdgeStory(graph.node_ids[source], graph.node_ids[target], weight, paths, tuple(chosen), scores)


def story_data(graph: AttributionGraph, story: EdgeStory, top: int = 10) -> dict[str, Any]:
    """An :class:`EdgeStory` as JSON: what a page shows beside a link.

    ``heads``: ``layer head loading``, and where explained ``query key score pairs by_query by_key``;
    ``pairs`` are ``[query source, key source, weight]`` by id, with ``labels`` for every id that is a node of the graph.
    """
    ordered = sorted(story.paths.heads.items(), key=lambda item: -abs(item[1]))[:top]
    scores = dict(zip(story.heads, story.scores, strict=True))
    labels: dict[str, str] = {}
    index = {name: i for i, name in enumerate(graph.node_ids)}
    heads = []
    for (layer, head), loading in ordered:
        made: dict[str, Any] = {"layer": layer, "head": head, "loading": loading}
        qk = scores.get((layer, head))
        if qk is not None:
            made |= {"query": qk.query, "key": qk.key, "score": qk.score}
            made["pairs"] = [[q, k, float(w)] for q, k, w in qk.terms.itertuples(index=False, name=None)]
            for side in ("by_query", "by_key"):
                frame = getattr(qk, side)
                made[side] = [[name, float(w)] for name, w in zip(frame.source, frame.weight, strict=True)]
            for name in {*qk.terms.query_source, *qk.terms.key_source, *qk.by_query.source, *qk.by_key.source}:
                if name in index:
                    labels[name] = graph.label(index[name])
        heads.append(made)
    return {
        "source": story.source,
        "target": story.target,
        "weight": story.weight,
        "residual": story.paths.residual,
        "heads": heads,
        "chains": [[path_name(chain), value] for chain, value in story.paths.chains[:top]],
        "rest": story.paths.rest,
        "labels": labels,
    }


def qk_tracing_results(
    scores: Sequence[QKAttribution], node_id: Callable[[str], str | None], top: int = 20
) -> dict[str, list[list[Any]]]:
    """Neuronpedia's ``qk_tracing_results`` of one node, from the scores of the heads that reach it.

    Pairs and marginals of several heads are summed.
    ``node_id`` turns our ids into the ids of the exported JSON; sources for which it returns None (the
    bias, say) are left out, since every id there must be a node or a ``qk_only_nodes`` entry.
    """
    pairs: dict[tuple[str, str], float] = {}
    sides: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for qk in scores:
        for query, key, weight in qk.terms.itertuples(index=False, name=None):
            ids = node_id(query), node_id(key)
            if ids[0] is not None and ids[1] is not None:
                pairs[ids] = pairs.get(ids, 0.0) + float(weight)
        for side, frame in zip(sides, (qk.by_query, qk.by_key), strict=True):
            for name, weight in zip(frame.source, frame.weight, strict=True):
                made = node_id(name)
                if made is not None:
                    side[made] = side.get(made, 0.0) + float(weight)

    def largest(found: dict[Any, float]) -> list[tuple[Any, float]]:
        return sorted(found.items(), key=lambda item: -abs(item[1]))[:top]

    return {
        "pair_wise_contributors": [[*ids, weight] for ids, weight in largest(pairs)],
        "top_q_marginal_contributors": [[name, weight] for name, weight in largest(sides[0])],
        "top_k_marginal_contributors": [[name, weight] for name, weight in largest(sides[1])],
    }
