"""Recorded attention patterns, stored without the zeros of causal masks and sliding windows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .softcap import soft_capped

QUERIES = 64  # query positions in a block: with more, much of it is zeros above the diagonal; fewer are slow
_RECOMPUTED_WITHIN = 1e-5  # a recomputed weight may differ by this much, as float32 sums depend on their order


@dataclass(frozen=True)
class AttentionScores:
    """A layer's queries and keys (after norms and rotation), from which its pattern can be computed again.

    ``first[p]``: the first key that the mask lets query ``p`` attend to.
    """

    q: Float[Tensor, "n_heads pos d_head"]
    k: Float[Tensor, "n_kv pos d_head"]
    scale: float
    softcap: float | None
    first: Int[Tensor, " pos"]

    def softmax(self, queries: slice, keys: slice) -> Float[Tensor, "n_heads queries keys"]:
        """The pattern's weights of ``queries`` on ``keys``, which must include every key that these attend to."""
        grouped = self.q[:, queries].unflatten(0, (len(self.k), -1))
        scores = (grouped @ self.k[:, None, keys].mT).flatten(0, 1) * self.scale
        scores = soft_capped(scores, self.softcap)
        at = torch.arange(keys.start, keys.stop, device=scores.device)
        query = torch.arange(queries.start, queries.stop, device=scores.device)[:, None]
        reached = (at <= query) & (at >= self.first[queries, None])
        return scores.masked_fill_(~reached, -torch.inf).softmax(-1)


@dataclass(frozen=True)
class PatternBlock:
    """Consecutive queries with all keys that any of them attends to; weights are stored, or computed from scores."""

    queries: slice
    keys: slice
    held: Float[Tensor, "n_heads queries keys"] | AttentionScores

    @property
    def weights(self) -> Float[Tensor, "n_heads queries keys"]:
        """How much each query attends to each key."""
        return self.held if isinstance(self.held, Tensor) else self.held.softmax(self.queries, self.keys)


@dataclass(frozen=True)
class Pattern:
    """One layer's attention after softmax, as blocks of queries in order.

    This saves memory: a causal pattern takes half of ``[n_heads, pos, pos]``, one with a sliding window only the band
    within it, and a recomputed one only its queries and keys.
    """

    blocks: tuple[PatternBlock, ...]

    @classmethod
    def cut(cls, pattern: Float[Tensor, "n_heads pos pos"]) -> "Pattern":
        """The blocks of a whole pattern, without keys that no query of a block attends to."""
        n_pos = pattern.shape[-1]
        if n_pos <= QUERIES:
            return cls((PatternBlock(slice(0, n_pos), slice(0, n_pos), pattern),))
        return cls(tuple(PatternBlock(q, k, pattern[:, q, k].clone()) for q, k in _reach(pattern)))

    @classmethod
    def recomputed(
        cls,
        pattern: Float[Tensor, "n_heads pos pos"],
        q: Float[Tensor, "n_heads pos d_head"],
        k: Float[Tensor, "n_kv pos d_head"],
        scale: float,
        softcap: float | None,
    ) -> "Pattern | None":
        """The pattern as queries and keys, to be recomputed; None if they do not give the same pattern again."""
        if pattern.dtype != torch.float32:
            return None  # the model rounded its scores
        first = (pattern != 0).any(0).int().argmax(-1)
        scores = AttentionScores(q, k, scale, softcap, first)
        blocks = tuple(PatternBlock(queries, keys, scores) for queries, keys in _reach(pattern))
        for block in blocks:
            if not (block.weights - pattern[:, block.queries, block.keys]).abs().max() <= _RECOMPUTED_WITHIN:
                return None
        return cls(blocks)

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

    def reach(self, used: int) -> int:
        """How many pairs of query and key the blocks of the first ``used`` queries have: a measure of work."""
        kept = [block for block in self.blocks if block.queries.start < used]
        return sum(
            (min(b.queries.stop, used) - b.queries.start) * (min(b.keys.stop, used) - b.keys.start) for b in kept
        )

    def sums(self) -> Float[Tensor, "n_heads pos"]:
        """Each query's total weight, in float32; it is below one if the model has attention sinks."""
        return torch.cat([block.weights.float().sum(-1) for block in self.blocks], dim=-1)


def _reach(pattern: Float[Tensor, "n_heads pos pos"]) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the range of keys that its queries attend to."""
    found = []
    for start in range(0, pattern.shape[-1], QUERIES):
        rows = pattern[:, start : start + QUERIES]
        reached = (rows != 0).any(0).any(0).nonzero()[:, 0]
        first, last = (int(reached[0]), int(reached[-1])) if reached.numel() else (0, 0)
        found.append((slice(start, start + rows.shape[1]), slice(first, last + 1)))
    return found
