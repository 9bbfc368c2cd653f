"""How far two computations of the same tensor may be apart before they count as different.

The model's own tensors are rounded to its dtype, and other kernels add up in another order. So a gap is compared with
the size of the values, and the allowed share depends on the dtype.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Half precision rounds each number by up to 2^-11 (float16) or 2^-8 (bfloat16), and a tensor is the result of many
# such roundings. Float32 and finer dtypes get the share that sums of float32 products of any order keep well below.
_HALF = {torch.float16: 2e-2, torch.bfloat16: 6e-2}
_SINGLE = 1e-3
SMALLEST = 1e-6  # of the largest entry at any position: positions smaller than this are compared with it instead


def rounding_within(dtype: torch.dtype) -> float:
    """The allowed gap between two computations of the same values, as a share of their size, by the model's dtype.

    Args:
        dtype: the model's.

    Examples:
        >>> import torch
        >>> tlc.hooks.rounding_within(torch.float32), tlc.hooks.rounding_within(torch.bfloat16)
        (0.001, 0.06)
    """
    return _HALF.get(dtype, _SINGLE)


def largest_gap(
    difference: Float[Tensor, "*pos d"], models: Float[Tensor, "*pos d"], smallest: float = SMALLEST
) -> float:
    """The largest difference at any position, as a share of the largest entry of the model's tensor there.

    Each position is compared by itself, so that a first position with huge activations does not hide the others.

    Args:
        difference: one computation minus the other, ``[..., d]``.
        models: the model's own tensor.
        smallest: positions whose largest entry is below this share of the whole tensor's count as if they were as
            large.

    Examples:
        >>> import torch
        >>> models = torch.tensor([[1000.0, 0.0], [1.0, 2.0]])
        >>> tlc.hooks.largest_gap(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), models)  # a quarter, at the second position
        0.25
    """
    size = models.abs().amax(-1).clamp_min(smallest * float(models.abs().max()) + 1e-30)
    return float((difference.abs().amax(-1) / size).max())
