"""How much of the answer runs through some features: what the graph says would be lost without them."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.lookup import node_indices
from tl_circuits.graph.scores import Carried


def carried_by(graph: AttributionGraph, chosen: Iterable[str | int]) -> Carried:
    """What runs through chosen features; see :meth:`AttributionGraph.carried`."""
    return carried(graph, node_indices(graph, chosen))


def carried(graph: AttributionGraph, members: Sequence[int]) -> Carried:
    """What runs to the target of the largest weight through the features ``members`` (node indices).

    It is the signed sum over the graph's paths that pass any of them, each path once. ``predicted_effects`` of removing
    them all says the same.
    """
    nodes, edges = graph._nodes, graph._edges
    inside = torch.zeros(len(graph), dtype=torch.bool)
    inside[list(members)] = True
    counted = nodes.counted.double()
    passes = graph.is_kind("feature") & (counted != 0) & (nodes.activation != 0)
    # How each node changes without the members, as a share of what it counts; members themselves by -1.
    change = torch.where(inside, -1.0, 0.0).double()
    lost = torch.zeros(len(graph), dtype=torch.float64)  # of each node's value
    by_depth = torch.argsort(nodes.depth[edges.target], stable=True)
    counts = nodes.depth[edges.target[by_depth]].unique_consecutive(return_counts=True)[1]
    for rows in by_depth.split(counts.tolist()):
        target = edges.target[rows]
        lost.index_add_(0, target, edges.weight[rows].double() * change[edges.source[rows]])
        moved = target[passes[target] & ~inside[target]].unique()
        change[moved] = lost[moved] / counted[moved]
    first = int(nodes.weight.argmax())
    return Carried(float(nodes.value[first]), to_explain(graph, first), -float(lost[first]))


def answer_scale(graph: AttributionGraph, target: int) -> float:
    """The number that effects on ``target`` are divided by to give shares.

    It is what there is to explain about the target if that is positive, else the sum of its absolute inputs.
    """
    whole = to_explain(graph, target)
    return whole if whole > 0 else max(float(input_mass(graph)[target]), 1e-30)


def input_mass(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """The sum of all absolute inputs of each node, also of those from features outside the graph."""
    mass = graph._nodes.residue_mass.double()
    return mass.index_add(0, graph._edges.target, graph._edges.weight.double().abs())


def to_explain(graph: AttributionGraph, node: int) -> float:
    """The part of a node's value that sources of this prompt make: all but biases and what a baseline shares."""
    nodes = graph._nodes
    # The residue is what features without a node write. It is part of the bias, but to be explained as well.
    return float(nodes.value[node] - nodes.bias[node] + nodes.residue[node])
