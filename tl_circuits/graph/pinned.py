"""The scores of a subgraph: what is not in it counts as unexplained."""

from collections.abc import Iterable

import torch

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.graph.lookup import node_indices
from tl_circuits.graph.scores import Edges, Scores, scores


def pinned_scores(graph: AttributionGraph, only: Iterable[str | int]) -> Scores:
    """Replacement and completeness with only some features explained; see :meth:`AttributionGraph.scores`.

    What another feature writes is added to the error of its dictionary and position (if there is none, it is left out),
    and what drives it is left out. This is the definition of Neuronpedia's page.
    """
    given = list(only)
    nodes, edges = graph._nodes, graph._edges
    kept = torch.zeros(len(graph), dtype=torch.bool)
    if given:
        kept[node_indices(graph, given)] = True
    gone = (nodes.kind == Kind.FEATURE) & ~kept
    errors = {
        (int(nodes.depth[i]), int(nodes.position[i])): i for i in (nodes.kind == Kind.ERROR).nonzero()[:, 0].tolist()
    }
    becomes = torch.arange(len(graph))
    for i in gone.nonzero()[:, 0].tolist():
        becomes[i] = errors.get((int(nodes.depth[i]), int(nodes.position[i])), -1)
    source = becomes[edges.source]
    stays = (source >= 0) & ~gone[edges.target]
    keys, where = (edges.target[stays] * len(graph) + source[stays]).unique(return_inverse=True)
    weight = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, where, edges.weight[stays].double())
    merged = Edges(keys % len(graph), keys // len(graph), weight.float())
    is_error = graph.is_kind("error") | graph.is_kind("attention error")
    return scores(merged, nodes.weight, is_error, graph.is_kind("embedding"))
