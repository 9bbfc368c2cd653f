"""Attention cut in two at its heads' outputs (``attn.hook_z``), where an autoencoder may sit."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import ArchitectureError
from .frozen_attention import FrozenAttention
from .maps import frozen_norm
from .norms import attention_norms
from .record import Recording
from .sites import Model, attention_weights


@dataclass(frozen=True)
class FrozenHeads:
    """One layer's attention as two maps: from the stream to ``z``, all heads one after the other, and from ``z`` on.

    ``into`` is a frozen attention that writes ``z`` itself. ``W_O`` has the gain and centring of the norm behind
    attention folded in, and ``after`` is that norm's denominator. ``const`` is what attention adds to the stream when
    ``z`` is zero.
    """

    into: FrozenAttention
    W_O: Float[Tensor, "z d_model"]
    after: Float[Tensor, "pos 1"] | None
    const: Float[Tensor, "pos d_model"]

    def out(self, z: Float[Tensor, "pos z"]) -> Float[Tensor, "pos d_model"]:
        """What attention adds to the stream."""
        added = z.float() @ self.W_O
        return (added if self.after is None else added / self.after) + self.const

    def back(self, g: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n z"]:
        """Gradients at ``z``, from gradients at what attention adds to the stream."""
        return (g if self.after is None else g / self.after[positions]) @ self.W_O.T


def frozen_heads(model: Model, recording: Recording, layer: int, attention: FrozenAttention) -> FrozenHeads:
    """The two halves of ``attention``, the frozen attention of ``layer``.

    Raises:
        ArchitectureError: ``attn.hook_z`` is not as wide as the heads together.
    """
    n_heads, d_head, _ = attention.W_O.shape
    width = recording.sites[f"blocks.{layer}.attn.hook_z"].shape[1]
    if width != n_heads * d_head:
        raise ArchitectureError(
            f"blocks.{layer}.attn.hook_z is {width} wide, but {n_heads} heads have {n_heads * d_head} entries."
        )
    weights = attention_weights(model, layer)
    before, after = (frozen_norm(model, recording, name) for name in attention_norms(model, layer))
    b_V = weights.b_V if before is None else weights.b_V + before.weights.bias @ weights.W_V
    shares = attention.pattern.sums().T  # [pos, n_heads]: how much each head reads in all
    of_bias = (shares[:, :, None] * b_V.repeat_interleave(n_heads // len(b_V), 0)).flatten(1)
    # Each head's W_O becomes a block of the identity, so that what this attention writes is z itself.
    own = torch.eye(width, device=of_bias.device).unflatten(0, (n_heads, d_head))
    into = replace(attention, W_O=own, after=None, const=of_bias)
    const = weights.b_O.expand(len(of_bias), -1)
    return FrozenHeads(
        into, attention.W_O.flatten(0, 1), attention.after, const if after is None else after.forward(const)
    )
