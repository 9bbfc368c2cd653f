"""Which words of the prompt mattered: what each token does to the answer, over all paths through the graph."""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind


def word_effects(graph: AttributionGraph) -> pd.DataFrame:
    """What each token of the prompt does to the answer, over all paths: a frame ``position token effect share``.

    ``effect`` is the signed total effect of the token's embedding on the targets, each weighted as in the graph, in
    logits if the targets are logits (in a contrast graph: of how the embedding differs from the baseline). ``share`` is
    the effect divided by the sum of all tokens' absolute effects. A graph from another program's file does not say
    total effects; then they are the signed sums over all paths that the graph has.
    """
    nodes = graph._nodes
    effects = path_effects(graph) if nodes.total_effect is None else nodes.total_effect.double()
    rows = graph.is_kind("embedding").nonzero()[:, 0]
    rows = rows[torch.argsort(nodes.position[rows], stable=True)]
    found = effects[rows]
    whole = found.abs().sum().clamp_min(1e-30)
    position = nodes.position[rows].tolist()
    return pd.DataFrame(
        {
            "position": position,
            "token": [graph.info.tokens[p] for p in position],
            "effect": found.tolist(),
            "share": (found / whole).tolist(),
        }
    )


def path_effects(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """The signed sum, over all paths of the graph, of what each node does to the targets.

    A feature hands on what reaches it in proportion to its activation (in a contrast graph: to how it differs from the
    baseline), so that what it brings to the targets is split over its inputs, error and bias included.
    """
    nodes, edges = graph._nodes, graph._edges
    effect = torch.zeros(len(graph), dtype=torch.float64)
    counted = nodes.counted.double()
    passes = (nodes.kind == Kind.FEATURE) & (counted != 0) & (nodes.activation != 0)
    depth = nodes.depth[edges.target]
    for at in depth.unique().flip(0).tolist():
        here = (depth == at).nonzero()[:, 0]
        target, weight = edges.target[here], edges.weight[here].double()
        # What one unit of the target's value brings: a target's weight, or a feature's effect for each unit it counts.
        unit = nodes.weight[target].double() + torch.where(
            passes[target], effect[target] / counted[target].where(passes[target], torch.ones(())), 0.0
        )
        effect.index_add_(0, edges.source[here], weight * unit)
    return effect
