"""One layer's training step: what a transcoder says of some tokens, its loss, and the gradient, written by hand.

With ``e`` the error of a token and ``w`` its weight, the loss is the mean of ``w |e|²``. Its gradient needs ``e`` and
the active features alone, so neither autograd nor a matrix of all features is needed. tests/test_training_step.py holds
it against autograd.

On some layers a few tokens have outputs far larger than all others. By their squares they would rule the loss, and the
features of all other tokens would learn little: a token counts for no more than HEAVIEST usual ones.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.training.sparse import decoded, largest, products, sums_by_feature

HEAVIEST = 10.0
"""How many usual tokens a token with a large output counts for at most."""


def token_weights(y: Float[Tensor, "token d_out"], usual: float = 1.0) -> Float[Tensor, " token"]:
    """How much each token's squared error counts: 1, or less for an output of mean square over HEAVIEST · ``usual``."""
    return (HEAVIEST * usual / y.square().mean(1).clamp_min(torch.finfo(y.dtype).tiny)).clamp_max(1.0)


@dataclass(frozen=True, eq=False)
class Weights:
    """A TopK transcoder's tensors, or the gradient of each.

    ``y = a W_dec + b_dec + x W_skipᵀ`` with ``a = topk(ReLU(x W_encᵀ + b_enc))``.
    """

    W_enc: Float[Tensor, "feature d_in"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None

    def named(self) -> dict[str, Tensor]:
        """The tensors there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class Read:
    """What a transcoder made of some tokens: active features, activations, and output minus what it should be."""

    ids: Int[Tensor, "token k"]
    acts: Float[Tensor, "token k"]
    error: Float[Tensor, "token d_out"]


def read(weights: Weights, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], k: int) -> Read:
    """Run a transcoder on inputs ``x``, to be compared with ``y``."""
    pre = torch.addmm(weights.b_enc, x, weights.W_enc.T)
    ids = largest(pre, k)
    acts = pre.gather(1, ids).relu_()
    error = decoded(ids, acts, weights.W_dec).add_(weights.b_dec).sub_(y)
    if weights.W_skip is not None:
        error.addmm_(x, weights.W_skip.T)
    return Read(ids, acts, error)


def gradient(
    weights: Weights, x: Float[Tensor, "token d_in"], found: Read, counts: Float[Tensor, " token"], skip: bool = True
) -> Weights:
    """The gradient of the mean over tokens of ``counts |error|²``.

    Args:
        weights: the transcoder.
        x: its inputs.
        found: what :func:`read` made of them.
        counts: each token's weight, of :func:`token_weights`.
        skip: whether the skip connection's gradient is wanted: it costs as much as a fifth of the encoder.

    Returns:
        A tensor for each of ``weights``; ``W_skip`` is None if there is none, or if it is not wanted.
    """
    g = found.error * (counts * (2.0 / len(x)))[:, None]
    slopes = products(g, weights.W_dec, found.ids) * (found.acts > 0)
    # Not index_add_ for b_enc: a GPU would add in no fixed order, and a resumed run would not be that without
    # interruption.
    pairs = [(found.acts, g), (slopes, x), (slopes, x.new_ones(len(x), 1))]
    W_dec, W_enc, b_enc = sums_by_feature(found.ids, pairs, len(weights.W_enc))
    return Weights(
        W_enc=W_enc,
        b_enc=b_enc[:, 0],
        W_dec=W_dec,
        b_dec=g.sum(0),
        W_skip=g.T @ x if skip and weights.W_skip is not None else None,
    )
