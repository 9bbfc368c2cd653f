"""Keep the part of a graph that carries most of the influence on its targets."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuits.graph.scores import Edges, influence, input_shares


def smallest_kept(values: Float[Tensor, " n"], threshold: float) -> float:
    """The smallest of the largest values that together make up the share ``threshold`` of the sum."""
    if values.numel() == 0:
        return 0.0
    descending = values.sort(descending=True).values
    share = descending.cumsum(0) / descending.sum().clamp_min(1e-30)
    index = int(torch.searchsorted(share, torch.tensor(threshold, dtype=share.dtype, device=share.device)))
    return float(descending[min(index, descending.numel() - 1)])


def prune_masks(
    edges: Edges,
    weights: Float[Tensor, " node"],
    is_feature: Bool[Tensor, " node"],
    always: Bool[Tensor, " node"],
    node_threshold: float,
    edge_threshold: float,
) -> tuple[Bool[Tensor, " node"], Bool[Tensor, " edge"]]:
    """Which nodes and edges stay when a graph is pruned.

    It gives the same as circuit-tracer's ``prune_graph`` on the same matrix. First, the fewest nodes that carry the
    share ``node_threshold`` of the influence stay. Of the edges among them, the fewest that carry the share
    ``edge_threshold`` of the edge scores stay. Then features without an input, and features and errors without an
    output, are removed until there are none.

    Args:
        edges: the direct effects.
        weights: the targets' weights, 0 for all other nodes.
        is_feature: which nodes are features.
        always: tokens and targets, which stay.
        node_threshold: 0 to 1.
        edge_threshold: 0 to 1.

    Returns:
        The masks of kept nodes and of kept edges.

    Raises:
        ValueError: for a threshold outside 0 to 1.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {value}.")
    n_nodes = weights.numel()
    reach = influence(edges, input_shares(edges, n_nodes), weights)
    nodes = (reach >= smallest_kept(reach, node_threshold)) | always
    kept_edges = nodes[edges.source] & nodes[edges.target]
    kept = edges[kept_edges]
    shares = input_shares(kept, n_nodes)
    edge_scores = shares * (influence(kept, shares, weights) + weights.double())[kept.target]
    stays = kept_edges.clone()
    stays[kept_edges] = edge_scores >= smallest_kept(edge_scores, edge_threshold)
    while True:
        has_output = torch.zeros_like(nodes)
        has_output[edges.source[stays]] = True
        has_input = torch.zeros_like(nodes)
        has_input[edges.target[stays]] = True
        remain = nodes & (always | has_output) & (always | ~is_feature | has_input)
        if torch.equal(remain, nodes):
            return nodes, stays
        nodes = remain
        stays = stays & nodes[edges.source] & nodes[edges.target]
