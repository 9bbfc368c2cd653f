"""Attention with its pattern frozen, as an affine map of the residual stream and its transpose."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .maps import attention_norms, frozen_norm
from .patterns import Pattern, PatternBlock
from .record import Recording
from .sites import Model, attention_weights

ROWS_AT_ONCE = 1024  # targets x queries on the way to the values, whose sums then stay in the processor's cache


@dataclass(frozen=True)
class FrozenAttention:
    """One layer's attention with its pattern frozen: ``out[p] = Σ_q A[p,q] x[q] W_V W_O + const[p]``.

    The norm before it and the one after it (Gemma) are folded in: gains and centring into the
    weights, their denominators stand beside the pattern, one for each query (``after``) and one
    for each key (``before``).
    """

    W_V: Float[Tensor, "kv d_model d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    pattern: Pattern
    before: Float[Tensor, "pos 1"] | None
    after: Float[Tensor, "pos 1"] | None
    const: Float[Tensor, "pos d_model"]

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The attention's contribution to the residual stream."""
        return self.linear(x) + self.const

    def linear(self, x: Float[Tensor, "used d_model"]) -> Float[Tensor, "used d_model"]:
        """The part of it that depends on ``x``, which holds the first positions."""
        used = x.shape[0]
        v = x.float() @ self.W_V  # [kv, pos, d_head]
        W_O = self.W_O.flatten(0, 1)  # heads one after the other, as along z's last axis below
        out = torch.zeros(used, self.W_O.shape[2], device=x.device)
        for block in self.pattern.blocks:
            queries = slice(block.queries.start, min(block.queries.stop, used))
            if queries.start >= used:
                break
            weights = self._mixing(block, queries)[..., : used - block.keys.start]  # [kv, group, query, key]
            z = weights @ v[:, None, block.keys.start : block.keys.start + weights.shape[-1]]
            out[queries] = z.flatten(0, 1).transpose(0, 1).flatten(1) @ W_O
        return out

    def mixing(self) -> Float[Tensor, "n_heads query key"]:
        """How streams at all keys enter all queries, denominators included."""
        blocks = self.pattern.blocks
        scaled = (PatternBlock(b.queries, b.keys, self._mixing(b, b.queries).flatten(0, 1)) for b in blocks)
        return Pattern(tuple(scaled)).dense()

    def _mixing(self, block: PatternBlock, queries: slice) -> Float[Tensor, "kv group query key"]:
        """How the streams at a block's keys enter its ``queries``, denominators included."""
        start = block.queries.start
        weights = block.weights[:, queries.start - start : queries.stop - start].float()
        if self.after is not None:
            weights = weights / self.after[queries]
        if self.before is not None:
            weights = weights / self.before[block.keys].T
        return weights.unflatten(0, (self.W_V.shape[0], -1))

    def mix_back(
        self, g: Float[Tensor, "used n d_model"], shares: Float[Tensor, "m used"], first: int
    ) -> tuple[Float[Tensor, "kv key n d_head"], Float[Tensor, "n_heads m key"]]:
        """From queries to keys: gradients at the attention's output and shares of them, both of positions from ``first`` on.

        Gradients ``g`` become gradients at the values of every key position; multiply them with ``W_V``
        (see :meth:`add_to_stream`). ``shares`` say how much of some vector each position's gradient
        holds; through head ``h`` every key's gradient holds ``shares[h]`` of what :meth:`through_heads` makes of it.
        """
        kv, d_head = self.W_V.shape[0], self.W_V.shape[2]
        used, n = g.shape[:2]
        last = first + used
        mixed = g.new_zeros(kv, last, n * d_head)
        carried = shares.new_zeros(self.W_O.shape[0], shares.shape[0], last)
        for block in self.pattern.blocks:
            queries = slice(max(block.queries.start, first), min(block.queries.stop, last))
            if queries.start >= queries.stop:
                continue
            keys = slice(block.keys.start, min(block.keys.stop, last))
            weights = self._mixing(block, queries)[..., : keys.stop - keys.start]
            here = slice(queries.start - first, queries.stop - first)
            # Heads of a group stand one after the other along the summed axis of the product.
            from_queries = weights.flatten(1, 2).transpose(1, 2)
            step = max(1, ROWS_AT_ONCE // (queries.stop - queries.start))
            for some in range(0, n, step):
                stop = min(some + step, n)
                at_queries = self.at_heads(g[here, some:stop].reshape(-1, g.shape[2]))
                into = mixed[:, keys, some * d_head : stop * d_head]
                into.baddbmm_(from_queries, at_queries.reshape(kv, -1, (stop - some) * d_head))
            if carried.numel():
                carried[:, :, keys].baddbmm_(shares[:, here].expand(carried.shape[0], -1, -1), weights.flatten(0, 1))
        return mixed.reshape(kv, last, n, d_head), carried

    def at_heads(self, vectors: Float[Tensor, "m d_model"]) -> Float[Tensor, "n_heads m d_head"]:
        """Gradients at every head's mixed values, from gradients at the attention's output."""
        return vectors @ self.W_O.transpose(1, 2)

    def through_heads(self, at_heads: Float[Tensor, "n_heads m d_head"]) -> Float[Tensor, "n_heads m d_model"]:
        """Gradients at the block's input, head by head, from those of :meth:`at_heads`."""
        grouped = at_heads.reshape(self.W_V.shape[0], -1, at_heads.shape[2])
        return (grouped @ self.W_V.transpose(1, 2)).reshape(*at_heads.shape[:2], -1)

    def add_to_stream(
        self, mixed: Float[Tensor, "kv key n d_head"], g: Float[Tensor, "key n d_model"]
    ) -> None:
        """Add gradients at the block's input to ``g``, from gradients at the values."""
        flat = g.view(-1, g.shape[2])
        for values, W_V in zip(mixed, self.W_V, strict=True):
            flat.addmm_(values.reshape(-1, values.shape[2]), W_V.T)


def frozen_attention(model: Model, recording: Recording, layer: int) -> FrozenAttention:
    """Layer ``layer``'s attention as an affine map, from weights and one recording."""
    weights = attention_weights(model, layer)
    pattern = recording.patterns[layer]
    W_V, b_V, W_O, b_O = weights.W_V, weights.b_V, weights.W_O, weights.b_O
    group = W_O.shape[0] // W_V.shape[0]
    before, after = (frozen_norm(model, recording, name) for name in attention_norms(model, layer))
    if before is not None:
        b_V = b_V + before.weights.bias @ W_V
        W_V = before.fold(W_V)
    per_head = torch.einsum("he,hed->hd", b_V.repeat_interleave(group, 0), W_O)
    const = pattern.sums().T @ per_head + b_O
    if after is not None:
        const = after.forward(const)
        W_O = (W_O - W_O.mean(-1, keepdim=True) if after.weights.centred else W_O) * after.weights.weight
    return FrozenAttention(
        W_V=W_V,
        W_O=W_O,
        pattern=pattern,
        before=None if before is None else before.scale,
        after=None if after is None else after.scale,
        const=const,
    )
