"""A compact form for the gradients of targets whose sweep has just begun.

A target reads the stream at one position, so there its gradient is a single vector. Each layer of attention below adds
one new vector a head, moved to earlier positions with known weights. So for a few layers a gradient at *all* positions
is made of a few vectors and, for each, how much of it every position holds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.hooks import FrozenAttention

WORTH = 0.5  # the compact form must need less than half the operations: its small products run at a lower rate


@dataclass(frozen=True)
class Factored:
    """Gradients of ``n`` targets at all positions ``p``: ``g[p, n] = Σ_r shares[r, n, p] · vectors[r, n]``.

    The rank (the number of vectors ``r`` a target) is 1 where a target joins, and grows by a factor of
    ``1 + n_heads`` a layer, as every head moves every vector. While it is small, the products with the heads' weights
    are done for these vectors only instead of for every position.
    """

    shares: Float[Tensor, "rank n used"]
    vectors: Float[Tensor, "rank n d_model"]

    @classmethod
    def joining(cls, vectors: Float[Tensor, "n d_model"], at: Int[Tensor, " n"], used: int) -> "Factored":
        """Gradients of targets that read with ``vectors`` at positions ``at``, among ``used`` positions in all."""
        shares = vectors.new_zeros(1, len(at), used)
        shares[0, torch.arange(len(at), device=at.device), at] = 1.0
        return cls(shares, vectors[None])

    @property
    def size(self) -> int:
        """The number of rows of shares: rank times targets."""
        return self.shares.shape[0] * self.shares.shape[1]

    def to(self, device: torch.device) -> "Factored":
        """The same on another device."""
        return Factored(self.shares.to(device), self.vectors.to(device))

    def dense(self) -> Float[Tensor, "used n d_model"]:
        """The gradients in full, at every position."""
        return torch.einsum("rnp,rnd->pnd", self.shares, self.vectors)

    def through(
        self, attention: FrozenAttention, carried: Float[Tensor, "n_heads size key"], first: int
    ) -> tuple["Factored", Float[Tensor, "kv first n d_head"]]:
        """Take the gradients through one layer's attention, from its output to the stream it reads.

        Args:
            attention: the layer's frozen attention.
            carried: the shares after :meth:`FrozenAttention.mix_back`, which moves them from queries to keys.
            first: the first position that the sweep visits.

        Returns:
            The gradients at the stream below, and those at the attention's values of the positions before ``first``.
        """
        rank, n = self.shares.shape[:2]
        kv = attention.W_V.shape[0]
        at_heads = attention.at_heads(self.vectors.flatten(0, 1))
        moved = attention.through_heads(at_heads).unflatten(1, (rank, n)).flatten(0, 1)
        shares = carried[:, :, first:].unflatten(1, (rank, n)).flatten(0, 1)
        below = Factored(torch.cat([self.shares, shares]), torch.cat([self.vectors, moved]))
        before, values = (x.unflatten(0, (kv, -1)).unflatten(2, (rank, n)) for x in (carried[:, :, :first], at_heads))
        return below, torch.einsum("kgrnp,kgrne->kpne", before, values)

    def worth_another(self, attention: FrozenAttention) -> bool:
        """Whether going through ``attention`` in this form needs less work than with the gradients in full."""
        rank, _, used = self.shares.shape
        n_heads, d_head, d_model = attention.W_O.shape
        kv, reach = attention.W_V.shape[0], attention.pattern.reach(used)
        factored = (
            2 * rank * n_heads * d_head * d_model + rank * (1 + n_heads) * used * d_model + rank * n_heads * reach
        )
        dense = used * (n_heads + kv) * d_head * d_model + n_heads * d_head * reach
        return factored < WORTH * dense
