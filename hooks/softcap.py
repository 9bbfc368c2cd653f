"""The soft cap of attention scores and of logits, and its inverse."""

import torch
from jaxtyping import Float
from torch import Tensor


def soft_capped(scores: Float[Tensor, "*shape"], cap: float | None) -> Float[Tensor, "*shape"]:
    """Scores or logits after a soft cap, ``cap · tanh(scores / cap)`` (Gemma-2); unchanged if there is none.

    Examples:
        >>> import torch
        >>> tlc.hooks.soft_capped(torch.tensor([0.0, 1000.0]), 30.0).tolist()
        [0.0, 30.0]
    """
    return scores if cap is None else cap * torch.tanh(scores / cap)


def without_soft_cap(scores: Float[Tensor, "*shape"], cap: float | None) -> Float[Tensor, "*shape"]:
    """The inverse of :func:`soft_capped`; give float64, because near the cap little of the score is left.

    Examples:
        >>> import torch
        >>> capped = tlc.hooks.soft_capped(torch.tensor([-20.0, 3.0], dtype=torch.float64), 50.0)
        >>> [round(score, 6) for score in tlc.hooks.without_soft_cap(capped, 50.0).tolist()]
        [-20.0, 3.0]
    """
    return scores if cap is None else torch.atanh((scores / cap).clamp(-1, 1)) * cap
