"""Influence and the two scores of a graph, as Ameisen et al. (2025) and circuit-tracer define them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """``replacement``: of the influence that starts in tokens or errors, the tokens' share.

    ``completeness``: the influence-weighted share of nodes' inputs that are not errors. Both lie
    between 0 and 1.
    """

    replacement: float
    completeness: float


@dataclass(frozen=True)
class Edges:
    """Direct effects as a list: ``weight[i]`` is the effect of ``source[i]`` on ``target[i]``.

    Sorted by target, then source; no pair twice, no weight zero.
    """

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]

    def __len__(self) -> int:
        return self.weight.numel()

    def __getitem__(self, index: Tensor) -> "Edges":
        return Edges(self.source[index], self.target[index], self.weight[index])


def input_shares(edges: Edges, n_nodes: int) -> Float[Tensor, " edge"]:
    """Each edge's absolute weight as a share of its target's inputs (float64)."""
    absolute = edges.weight.double().abs()
    sums = absolute.new_zeros(n_nodes).index_add_(0, edges.target, absolute)
    return absolute / sums.clamp_min(1e-10)[edges.target]


def influence(
    edges: Edges, shares: Float[Tensor, " edge"], weights: Float[Tensor, " node"]
) -> Float[Tensor, " node"]:
    """Total influence of every node on the weighted targets: ``w (A + A² + …)``, ``A`` the shares.

    The graph has no cycles, so the series ends after its longest path.
    """
    current = weights.double()
    total = torch.zeros_like(current)
    for _ in range(weights.numel()):
        current = torch.zeros_like(current).index_add_(0, edges.source, current[edges.target] * shares)
        if not current.any():
            break
        total = total + current
    return total


def scores(
    edges: Edges,
    weights: Float[Tensor, " node"],
    is_error: Bool[Tensor, " node"],
    is_token: Bool[Tensor, " node"],
) -> Scores:
    """Replacement and completeness score of a graph."""
    shares = input_shares(edges, weights.numel())
    reach = influence(edges, shares, weights)
    from_tokens, from_errors = reach[is_token].sum(), reach[is_error].sum()
    replacement = float(from_tokens / (from_tokens + from_errors).clamp_min(1e-30))
    from_error = shares * is_error[edges.source]
    explained = 1 - torch.zeros_like(reach).index_add_(0, edges.target, from_error)
    output = reach + weights.double()
    completeness = float((explained * output).sum() / output.sum().clamp_min(1e-30))
    return Scores(replacement, completeness)
