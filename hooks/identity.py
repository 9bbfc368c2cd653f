"""A few numbers out of a model's weights, by which it is known again whatever program opened it.

Names do not tell: one checkpoint is opened under several, and two versions of one share theirs. What is taken
does not depend on dtype, nor on what TransformerLens folds, centres and scales when it opens a checkpoint: rows
of what writes to the residual stream (embedding, MLP outputs), less their mean, over their length.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ArchitectureError
from .sites import Model, embed_weights, mlp_weights

Sample = tuple[tuple[str, tuple[float, ...]], ...]
"""Names of what was looked at, each with the numbers found."""

_ROWS, _COLUMNS = 2, 6
_TOLERANCE = 0.01  # of the largest number beside it; bfloat16 keeps each to 0.4 %, other weights differ by far more


def model_sample(model: Model) -> Sample:
    """Numbers from the embedding and the first, middle and last MLP of ``model``, as far as it has such."""
    n_layers = int(model.cfg.n_layers)
    wanted: list[tuple[str, Callable[[], Tensor]]] = [("W_E", lambda: embed_weights(model))]
    for layer in sorted({0, n_layers // 2, n_layers - 1}):
        wanted.append((f"blocks.{layer} W_out", lambda layer=layer: mlp_weights(model, layer).W_out))
    found = []
    for name, read in wanted:
        try:
            found.append((f"model {name}", _directions(read())))
        except (ArchitectureError, AttributeError, NotImplementedError):  # a mixture of experts, or no MLP: the rest must do
            continue
    return rounded(found)


def _directions(matrix: Float[Tensor, "row d"]) -> Float[Tensor, " n"]:
    rows = matrix[spread(matrix.shape[0], _ROWS).to(matrix.device)].detach().float()
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return rows[:, spread(matrix.shape[1], _COLUMNS).to(rows.device)].flatten()


def spread(size: int, count: int) -> Tensor:
    """``count`` indices below ``size``, apart from each other."""
    return (torch.arange(1, count + 1) * size) // (count + 1)


def rounded(found: list[tuple[str, Tensor]]) -> Sample:
    """Tensors as a sample, to five digits."""
    return tuple((name, tuple(float(f"{x:.5g}") for x in part.flatten().tolist())) for name, part in found)


def first_difference(a: Sample, b: Sample) -> str | None:
    """The first thing that is in both samples and not the same in both; None if all agree."""
    other = dict(b)
    for name, values in a:
        if name in other and not _agree(values, other[name]):
            return name
    return None


def _agree(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    if len(a) != len(b):
        return False
    most = _TOLERANCE * max(map(abs, (*a, *b)), default=0.0)
    return all(abs(x - y) <= most for x, y in zip(a, b, strict=True))
