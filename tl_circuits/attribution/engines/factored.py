"""Gradients of targets that joined a sweep lately: a few vectors, and how much of each every position holds."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.hooks import FrozenAttention

WORTH = 0.5  # of the operations on full gradients: small products run at a lower rate


@dataclass(frozen=True)
class Factored:
    """Gradients ``g[p, n] = Σ_r shares[r, n, p] · vectors[r, n]``.

    A target reads one position, so where it joins its gradient is one vector there. Each layer's
    heads move such a vector to other positions as one new vector each, so the rank grows by a factor of
    ``1 + n_heads`` a layer. While it is small, heads need to see these vectors only, not every position.
    """

    shares: Float[Tensor, "rank n used"]
    vectors: Float[Tensor, "rank n d_model"]

    @classmethod
    def joining(cls, vectors: Float[Tensor, "n d_model"], at: Int[Tensor, " n"], used: int) -> "Factored":
        """Gradients of targets that read at positions ``at`` of ``used``."""
        shares = vectors.new_zeros(1, len(at), used)
        shares[0, torch.arange(len(at), device=at.device), at] = 1.0
        return cls(shares, vectors[None])

    @property
    def size(self) -> int:
        """How many rows of shares, ``rank · n``."""
        return self.shares.shape[0] * self.shares.shape[1]

    def to(self, device: torch.device) -> "Factored":
        """The same on another device."""
        return Factored(self.shares.to(device), self.vectors.to(device))

    def dense(self) -> Float[Tensor, "used n d_model"]:
        """The gradients themselves."""
        return torch.einsum("rnp,rnd->pnd", self.shares, self.vectors)

    def through(
        self, attention: FrozenAttention, carried: Float[Tensor, "n_heads size key"], first: int
    ) -> tuple["Factored", Float[Tensor, "kv first n d_head"]]:
        """The gradients below a layer's attention, and those at the values of the positions before ``first``.

        ``carried``: what the attention's :meth:`~FrozenAttention.mix_back` made of the shares.
        """
        rank, n = self.shares.shape[:2]
        kv = attention.W_V.shape[0]
        at_heads = attention.at_heads(self.vectors.flatten(0, 1))
        moved = attention.through_heads(at_heads).unflatten(1, (rank, n)).flatten(0, 1)
        shares = carried[:, :, first:].unflatten(1, (rank, n)).flatten(0, 1)
        below = Factored(torch.cat([self.shares, shares]), torch.cat([self.vectors, moved]))
        before, values = (
            x.unflatten(0, (kv, -1)).unflatten(2, (rank, n)) for x in (carried[:, :, :first], at_heads)
        )
        return below, torch.einsum("kgrnp,kgrne->kpne", before, values)

    def worth_another(self, attention: FrozenAttention) -> bool:
        """Whether a further layer's attention costs less on this form than on the gradients themselves."""
        rank, _, used = self.shares.shape
        n_heads, d_head, d_model = attention.W_O.shape
        kv, reach = attention.W_V.shape[0], attention.pattern.reach(used)
        factored = 2 * rank * n_heads * d_head * d_model + rank * (1 + n_heads) * used * d_model + rank * n_heads * reach
        dense = used * (n_heads + kv) * d_head * d_model + n_heads * d_head * reach
        return factored < WORTH * dense

