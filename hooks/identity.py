"""Recognise a model by a few numbers from its weights, whichever program opened it.

Its name is not enough: one checkpoint is opened under several names, and two versions may share one. The numbers must
not depend on the dtype, nor on what TransformerLens folds, centres and scales when it opens a checkpoint. So they are
taken from rows of matrices that write to the residual stream (embedding, MLP outputs), minus each row's mean and
divided by its length.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ArchitectureError
from .sites import Model, embed_weights, mlp_weights

Sample = tuple[tuple[str, tuple[float, ...]], ...]
"""Names of matrices, each with the numbers taken from it."""

_ROWS, _COLUMNS = 2, 6
# Numbers are equal within this share of the largest; bfloat16 rounds to 0.4 %, other weights differ by far more.
_TOLERANCE = 0.01


def model_sample(model: Model) -> Sample:
    """Numbers from the embedding and from the first, middle and last MLP of ``model``, as far as it has them."""
    n_layers = int(model.cfg.n_layers)
    wanted: list[tuple[str, Callable[[], Tensor]]] = [("W_E", lambda: embed_weights(model))]
    for layer in sorted({0, n_layers // 2, n_layers - 1}):
        wanted.append((f"blocks.{layer} W_out", partial(_mlp_out, model, layer)))
    found = []
    for name, read in wanted:
        try:
            found.append((f"model {name}", _directions(read())))
        except (ArchitectureError, AttributeError, NotImplementedError):
            continue  # a mixture of experts, or no MLP: the other matrices must do
    return rounded(found)


def _mlp_out(model: Model, layer: int) -> Tensor:
    return mlp_weights(model, layer).W_out


def _directions(matrix: Float[Tensor, "row d"]) -> Float[Tensor, " n"]:
    rows = matrix[spread(matrix.shape[0], _ROWS).to(matrix.device)].detach().float()
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return rows[:, spread(matrix.shape[1], _COLUMNS).to(rows.device)].flatten()


def spread(size: int, count: int) -> Tensor:
    """``count`` evenly spaced indices below ``size``."""
    return (torch.arange(1, count + 1) * size) // (count + 1)


def rounded(found: list[tuple[str, Tensor]]) -> Sample:
    """Tensors as a sample, to five digits."""
    return tuple((name, tuple(float(f"{x:.5g}") for x in part.flatten().tolist())) for name, part in found)


def first_difference(a: Sample, b: Sample) -> str | None:
    """The name of the first matrix that is in both samples with different numbers; None if there is none."""
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
