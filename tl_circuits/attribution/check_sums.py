"""Check a finished graph: the incoming edges and the bias of each node must add up to its value."""

import torch

from tl_circuits.errors import ArchitectureError, NotFiniteError
from tl_circuits.graph.graph import AttributionGraph

# Allowed error from the rounding of the model's own tensors, by its dtype, relative to a node's value ...
_SUMS_WITHIN = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# ... and from adding edges up in float32, relative to the sum of their absolute values.
_SUM_ROUNDING = 2e-6


def require_sums(graph: AttributionGraph, dtype: torch.dtype) -> None:
    """Raise ArchitectureError unless edges and bias add up to every node's value.

    The allowed error is relative to each node's own value (or to the median node's, if that is larger), so a node
    with a huge activation does not excuse errors of the others.

    Args:
        graph: the finished graph.
        dtype: the model's, which says how exactly it computes.
    """
    nodes, edges = graph._nodes, graph._edges
    sums = torch.zeros(len(graph), dtype=torch.float64).index_add_(0, edges.target, edges.weight.double())
    mass = torch.zeros_like(sums).index_add_(0, edges.target, edges.weight.double().abs())
    known = (~nodes.value.isnan()).nonzero()[:, 0]
    if not len(known):
        return
    value, bias = nodes.value[known].double(), nodes.bias[known].double()
    if not bool(edges.weight.isfinite().all()):
        raise NotFiniteError("some edges of the graph are NaN or infinite, so the graph is not returned.")
    off = sums[known] + bias - value
    gap = off.abs()
    size = value.abs().clamp_min(float(value.abs().median()))
    allowed = _SUMS_WITHIN[dtype] * size + _SUM_ROUNDING * (mass[known] + bias.abs())
    worst = int((gap - allowed).argmax())
    if not gap[worst] <= allowed[worst]:
        name = graph.node_ids[int(known[worst])]
        raise ArchitectureError(
            f"the graph does not add up: edges and bias of {name} sum to {float(value[worst] + off[worst]):.4g}, but "
            f"its value is {float(value[worst]):.4g}. So the frozen model does not compute what the model computed on "
            "this prompt, and the graph is not returned."
        )
