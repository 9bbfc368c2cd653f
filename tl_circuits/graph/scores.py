"""Influence and the two scores of a graph, as Ameisen et al. (2025) and circuit-tracer define them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained by features rather than left to errors: two shares between 0 and 1.

    Both are defined by Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
    Their equations are in docs/method.md, "Which nodes".

    Attributes:
        replacement: of the influence that starts in tokens or errors, the share that starts in tokens.
        completeness: the share of nodes' inputs that are not errors, each node weighted by its influence.

    Examples:
        >>> scores = graph.scores()
        >>> round(scores.replacement, 3), round(scores.completeness, 3)
        (0.967, 0.988)
    """

    replacement: float
    completeness: float


@dataclass(frozen=True)
class Carried:
    """What some features bring to the answer together; :meth:`AttributionGraph.carried` gives it.

    It is about one target, that of the largest weight: the likeliest of the tokens that are explained.

    Attributes:
        value: the target's value, in logits: the token's logit minus the mean logit of all tokens or, in a contrast
            graph against other prompts, of the tokens that are likeliest there. For a :class:`FeatureTarget` or a
            :class:`LogitDirection`, this and the next two are in the target's own units.
        whole: the part of ``value`` that is to be explained, in logits: without biases, which are the same on any
            prompt, and without what a baseline shares.
        by: what runs through the features, in logits. Without them, the value in the replacement model would be
            ``value - by``.

    Examples:
        >>> found = graph.carried(["L3/F667@8"])
        >>> found.share == found.by / found.whole
        True
    """

    value: float
    whole: float
    by: float

    @property
    def share(self) -> float:
        """``by`` as a share of ``whole``; NaN if there is nothing to explain.

        It is below 0 or above 1 if what runs past the features has the other sign.

        Examples:
            >>> round(graph.carried(["L0/F308@7", "L3/F667@8"]).share, 2)
            0.35
        """
        return self.by / self.whole if self.whole else float("nan")


@dataclass(frozen=True, eq=False)
class Edges:
    """Direct effects as a list: ``weight[i]`` is the effect of node ``source[i]`` on node ``target[i]``.

    Sorted by target, then source. No pair stands twice, and no weight is zero.
    """

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]

    def __len__(self) -> int:
        return self.weight.numel()

    def __getitem__(self, index: Tensor) -> "Edges":
        return Edges(self.source[index], self.target[index], self.weight[index])


def input_shares(edges: Edges, n_nodes: int) -> Float[Tensor, " edge"]:
    """Each edge's absolute weight as a share of all absolute inputs of its target (float64 ``[edge]``)."""
    absolute = edges.weight.double().abs()
    sums = absolute.new_zeros(n_nodes).index_add_(0, edges.target, absolute)
    return absolute / sums.clamp_min(1e-10)[edges.target]


def influence(edges: Edges, shares: Float[Tensor, " edge"], weights: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """Total influence of every node on the weighted targets: ``w (A + A² + …)`` with ``A`` the shares.

    One pass goes from the targets down and takes every edge once: a node hands its influence on to its sources as soon
    as all nodes that it feeds have handed theirs to it.

    Args:
        edges: the direct effects.
        shares: each edge's share of its target's inputs (:func:`input_shares`).
        weights: the targets' weights, 0 for all other nodes.

    Returns:
        A float64 tensor ``[node]``.

    Raises:
        ValueError: if the edges close a cycle; the pass would never end.
    """
    n_nodes, weights = weights.numel(), weights.double()
    total = torch.zeros_like(weights)
    start = torch.searchsorted(edges.target.contiguous(), torch.arange(n_nodes + 1, device=edges.target.device))
    n_inputs = start.diff()
    feeds = torch.bincount(edges.source, minlength=n_nodes)  # how many of each node's outputs are still to come
    ready, passed = (feeds == 0).nonzero()[:, 0], 0
    while ready.numel():
        count = n_inputs[ready]
        first = (start[ready] - count.cumsum(0) + count).repeat_interleave(count)
        edge = first + torch.arange(first.numel(), device=first.device)
        source = edges.source[edge]
        handed = (total + weights)[ready].repeat_interleave(count) * shares[edge]
        total.index_add_(0, source, handed)
        seen = torch.bincount(source, minlength=n_nodes)
        feeds -= seen
        ready = ((feeds == 0) & (seen > 0)).nonzero()[:, 0]
        passed += edge.numel()
    if passed < len(edges):
        raise ValueError("the edges close a cycle, so influence is not defined; an attribution graph has none.")
    return total


def scores(
    edges: Edges,
    weights: Float[Tensor, " node"],
    is_error: Bool[Tensor, " node"],
    is_token: Bool[Tensor, " node"],
) -> Scores:
    """Replacement and completeness score of a graph, with the definitions of circuit-tracer's ``compute_graph_scores``.

    Args:
        edges: the direct effects.
        weights: the targets' weights, 0 for all other nodes.
        is_error: which nodes are errors.
        is_token: which nodes are tokens.

    Returns:
        The two scores, each a share of 1.
    """
    shares = input_shares(edges, weights.numel())
    reach = influence(edges, shares, weights)
    from_tokens, from_errors = reach[is_token].sum(), reach[is_error].sum()
    replacement = float(from_tokens / (from_tokens + from_errors).clamp_min(1e-30))
    from_error = shares * is_error[edges.source]
    explained = 1 - torch.zeros_like(reach).index_add_(0, edges.target, from_error)
    output = reach + weights.double()
    completeness = float((explained * output).sum() / output.sum().clamp_min(1e-30))
    return Scores(replacement, completeness)
