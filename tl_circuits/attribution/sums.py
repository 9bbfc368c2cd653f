"""Does a finished graph add up? Every node with a row, by itself."""

import torch

from tl_circuits.errors import ArchitectureError
from tl_circuits.graph.graph import AttributionGraph

# Rounding of the model's own tensors, relative to a node's value, and of float32 sums, relative to what is summed.
_SUMS_WITHIN = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SUM_ROUNDING = 2e-6


def require_sums(graph: AttributionGraph, dtype: torch.dtype) -> None:
    """Raise ArchitectureError unless edges and bias add up to every node's value.

    Each node is judged by its own value, or the median node's where its own is smaller, so that a node at a
    position with huge activations hides no other.
    """
    nodes, edges = graph._nodes, graph._edges
    sums = torch.zeros(len(graph), dtype=torch.float64).index_add_(0, edges.target, edges.weight.double())
    mass = torch.zeros_like(sums).index_add_(0, edges.target, edges.weight.double().abs())
    known = (~nodes.value.isnan()).nonzero()[:, 0]
    if not len(known):
        return
    value, bias = nodes.value[known].double(), nodes.bias[known].double()
    gap = (sums[known] + bias - value).abs()
    size = value.abs().clamp_min(float(value.abs().median()))
    allowed = _SUMS_WITHIN[dtype] * size + _SUM_ROUNDING * (mass[known] + bias.abs())
    worst = int((gap - allowed).argmax())
    if not gap[worst] <= allowed[worst]:
        name = graph.node_ids[int(known[worst])]
        raise ArchitectureError(
            f"the graph does not add up: edges and bias of {name} give {float(value[worst] + gap[worst]):.4g} or "
            f"{float(value[worst] - gap[worst]):.4g}, its value is {float(value[worst]):.4g}. The frozen model is not what this "
            "prompt's run was, so the graph is not returned."
        )
