"""Attention with a frozen pattern: an affine map of the residual stream, forwards and (for gradients) backwards."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .maps import frozen_norm
from .norms import attention_norms
from .patterns import Pattern, PatternBlock
from .record import Recording
from .sites import Model, attention_weights

ROWS_AT_ONCE = 1024  # targets x queries in one product of mix_back, so that its sums stay in the processor's cache
ROWS_OF_A_GPU = 2**15  # the same on a GPU, which waits for every launch


@dataclass(frozen=True)
class FrozenAttention:
    """One layer's attention with its pattern frozen: ``out[p] = Σ_q A[p,q] x[q] W_V W_O + const[p]``.

    The norm before attention and the one after it (Gemma has one) are included: their gains and centring are folded
    into the weights, and their frozen denominators divide the pattern's weights, ``before`` by key and ``after`` by
    query position. ``d_out`` is ``d_model``, except where the output is ``attn.hook_z`` (:mod:`.frozen_heads`).
    """

    W_V: Float[Tensor, "kv d_model d_head"]
    W_O: Float[Tensor, "n_heads d_head d_out"]
    pattern: Pattern
    before: Float[Tensor, "pos 1"] | None
    after: Float[Tensor, "pos 1"] | None
    const: Float[Tensor, "pos d_out"]

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_out"]:
        """The attention's contribution to the residual stream."""
        return self.linear(x) + self.const

    def linear(self, x: Float[Tensor, "used d_model"]) -> Float[Tensor, "used d_out"]:
        """The contribution without the constant, for a stream ``x`` of the first positions only."""
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
        """The pattern's weights divided by the norms' denominators, for all queries and keys."""
        blocks = self.pattern.blocks
        scaled = (PatternBlock(b.queries, b.keys, self._mixing(b, b.queries).flatten(0, 1)) for b in blocks)
        return Pattern(tuple(scaled)).dense()

    def _mixing(self, block: PatternBlock, queries: slice) -> Float[Tensor, "kv group query key"]:
        """The pattern's weights of a block for ``queries``, divided by the norms' denominators."""
        start = block.queries.start
        weights = block.weights[:, queries.start - start : queries.stop - start].float()
        if self.after is not None:
            weights = weights / self.after[queries]
        if self.before is not None:
            weights = weights / self.before[block.keys].T
        return weights.unflatten(0, (self.W_V.shape[0], -1))

    def mix_back(
        self, g: Float[Tensor, "used n d_out"], shares: Float[Tensor, "m used"], first: int
    ) -> tuple[Float[Tensor, "kv key n d_head"], Float[Tensor, "n_heads m key"]]:
        """Take gradients at the attention's output back from the query positions to the key positions.

        Args:
            g: gradients in full, at positions from ``first`` on.
            shares: gradients in compact form: how much of some vector the gradient holds at each position.
            first: the first position in ``g`` and ``shares``.

        Returns:
            Gradients at the values of every key position, which :meth:`add_to_stream` takes on to the stream; and for
            each head the new shares, now of the vectors that :meth:`through_heads` makes of the old ones.
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
            # Query heads that share a value head are summed: they are laid out along the product's inner axis.
            from_queries = weights.flatten(1, 2).transpose(1, 2)
            rows = ROWS_AT_ONCE if g.device.type == "cpu" else ROWS_OF_A_GPU
            step = max(1, rows // (queries.stop - queries.start))
            for some in range(0, n, step):
                stop = min(some + step, n)
                at_queries = self.at_heads(g[here, some:stop].reshape(-1, g.shape[2]))
                into = mixed[:, keys, some * d_head : stop * d_head]
                into.baddbmm_(from_queries, at_queries.reshape(kv, -1, (stop - some) * d_head))
            if carried.numel():
                carried[:, :, keys].baddbmm_(shares[:, here].expand(carried.shape[0], -1, -1), weights.flatten(0, 1))
        return mixed.reshape(kv, last, n, d_head), carried

    def at_heads(self, vectors: Float[Tensor, "m d_out"]) -> Float[Tensor, "n_heads m d_head"]:
        """Gradients at every head's output, before ``W_O``, from gradients at the attention's output."""
        return vectors @ self.W_O.transpose(1, 2)

    def through_heads(self, at_heads: Float[Tensor, "n_heads m d_head"]) -> Float[Tensor, "n_heads m d_model"]:
        """Gradients at the stream, head by head, from those of :meth:`at_heads`; positions are not mixed."""
        grouped = at_heads.reshape(self.W_V.shape[0], -1, at_heads.shape[2])
        return (grouped @ self.W_V.transpose(1, 2)).reshape(*at_heads.shape[:2], -1)

    def add_to_stream(self, mixed: Float[Tensor, "kv key n d_head"], g: Float[Tensor, "key n d_model"]) -> None:
        """Turn gradients at the values into gradients at the stream, and add them to ``g``."""
        flat = g.view(-1, g.shape[2])
        for values, W_V in zip(mixed, self.W_V, strict=True):
            flat.addmm_(values.reshape(-1, values.shape[2]), W_V.T)


def frozen_attention(model: Model, recording: Recording, layer: int) -> FrozenAttention:
    """The frozen attention of ``layer``, from its weights and a recording.

    Raises:
        ArchitectureError: the layer has no plain value and output weights.
    """
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
