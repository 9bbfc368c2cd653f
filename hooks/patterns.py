"""A recorded attention pattern without the zeros of causal masks and sliding windows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

QUERIES = 128  # query positions in one block


@dataclass(frozen=True)
class PatternBlock:
    """Consecutive queries from ``query`` on, with the keys from ``key`` on that any of them reaches."""

    query: int
    key: int
    weights: Float[Tensor, "n_heads queries keys"]

    @property
    def queries(self) -> slice:
        """The block's query positions."""
        return slice(self.query, self.query + self.weights.shape[1])

    @property
    def keys(self) -> slice:
        """The block's key positions."""
        return slice(self.key, self.key + self.weights.shape[2])


@dataclass(frozen=True)
class Pattern:
    """One layer's attention after softmax, as blocks of queries in order.

    A causal pattern takes half of ``[n_heads, pos, pos]`` this way, one with a sliding window only
    its band.
    """

    blocks: tuple[PatternBlock, ...]

    @classmethod
    def cut(cls, pattern: Float[Tensor, "n_heads pos pos"]) -> "Pattern":
        """Keep what is not exactly zero, to within whole blocks."""
        n_pos = pattern.shape[-1]
        if n_pos <= QUERIES:
            return cls((PatternBlock(0, 0, pattern),))
        blocks = []
        for query in range(0, n_pos, QUERIES):
            rows = pattern[:, query : query + QUERIES]
            reached = (rows != 0).any(0).any(0).nonzero()[:, 0]
            first, last = (int(reached[0]), int(reached[-1])) if reached.numel() else (0, 0)
            blocks.append(PatternBlock(query, first, rows[..., first : last + 1].clone()))
        return cls(tuple(blocks))

    @property
    def n_pos(self) -> int:
        """How many positions the pattern has."""
        return self.blocks[-1].queries.stop

    def dense(self) -> Float[Tensor, "n_heads pos pos"]:
        """The whole pattern, zeros included."""
        first = self.blocks[0].weights
        whole = first.new_zeros(first.shape[0], self.n_pos, self.n_pos)
        for block in self.blocks:
            whole[:, block.queries, block.keys] = block.weights
        return whole

    def sums(self) -> Float[Tensor, "n_heads pos"]:
        """Each query's total weight, in float32; below one where a model has attention sinks."""
        total = torch.zeros(self.blocks[0].weights.shape[0], self.n_pos, device=self.blocks[0].weights.device)
        for block in self.blocks:
            total[:, block.queries] = block.weights.float().sum(-1)
        return total
