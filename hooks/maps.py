"""The affine maps that remain of a model once patterns and norm denominators are frozen.

With attention patterns ``A`` and norm denominators ``s`` fixed at their recorded values, a block is
affine in the residual stream (Ameisen et al. 2025, "Circuit Tracing", section on the local
replacement model). These are the pieces, each as a function and as its transpose.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import UnknownHookError
from .record import Recording
from .sites import Model, NormWeights, attention_weights, is_parallel, norm_weights


@dataclass(frozen=True)
class FrozenNorm:
    """``y = (x - centred·mean(x)) / scale · weight + bias`` with ``scale`` as recorded."""

    weights: NormWeights
    scale: Float[Tensor, "pos 1"]

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The norm's output."""
        return self.linear(x) * self.weights.weight + self.weights.bias

    def linear(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """``hook_normalized``: centred and divided, before gain and bias."""
        x = x.float()
        return (x - x.mean(-1, keepdim=True) if self.weights.centred else x) / self.scale

    def transpose(
        self, g: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"], gain: bool = True
    ) -> Float[Tensor, "n d_model"]:
        """Gradients at the norm's input, from gradients at its output (or before the gain)."""
        g = (g * self.weights.weight if gain else g) / self.scale[positions]
        return g - g.mean(-1, keepdim=True) if self.weights.centred else g

    def push(
        self, x: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """What rows written at the norm's input add to its output (the linear part)."""
        x = x - x.mean(-1, keepdim=True) if self.weights.centred else x
        return x / self.scale[positions] * self.weights.weight

    def fold(self, W: Float[Tensor, "*heads d_model _"]) -> Float[Tensor, "*heads d_model _"]:
        """``W`` reading the norm's output, rewritten to read ``x / scale``."""
        W = self.weights.weight[:, None] * W
        return W - W.mean(-2, keepdim=True) if self.weights.centred else W


def frozen_norm(model: Model, recording: Recording, name: str) -> FrozenNorm | None:
    """The norm called ``name`` with its recorded denominator, or None where there is none."""
    weights = norm_weights(model, name)
    if weights is None:
        return None
    return FrozenNorm(weights, recording.scales[name].float())


@dataclass(frozen=True)
class ReadMap:
    """How a dictionary's input hangs on the residual stream its block's MLP reads.

    ``stage``: ``"residual"`` the stream itself, ``"normalized"`` after the division, ``"normed"``
    after gain and bias.
    """

    stage: str
    norm: FrozenNorm | None

    def forward(self, resid: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The tensor at the read site, from the residual stream."""
        if self.norm is None or self.stage == "residual":
            return resid.float()
        return self.norm.linear(resid) if self.stage == "normalized" else self.norm.forward(resid)

    def transpose(
        self, vectors: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
        """Vectors at the read site as vectors on the residual stream, plus what the norm's bias adds."""
        if self.norm is None or self.stage == "residual":
            return vectors, vectors.new_zeros(vectors.shape[0])
        normed = self.stage == "normed"
        bias = vectors @ self.norm.weights.bias if normed else vectors.new_zeros(vectors.shape[0])
        return self.norm.transpose(vectors, positions, gain=normed), bias


_READ_STAGES = {
    "hook_resid_mid": "residual",
    "hook_mlp_in": "residual",
    "ln2.hook_in": "residual",
    "ln2.hook_normalized": "normalized",
    "ln2.hook_out": "normed",
    "mlp.hook_in": "normed",
}
_WRITES_BEFORE_POST_NORM = ("mlp.hook_out", "ln2_post.hook_in")
_WRITES = ("hook_mlp_out", "ln2_post.hook_out", *_WRITES_BEFORE_POST_NORM)


def _short(layer: int, hook: str) -> str:
    prefix = f"blocks.{layer}."
    return hook[len(prefix) :] if hook.startswith(prefix) else hook


def read_stage(model: Model, layer: int, hook: str) -> str:
    """Which stage of the MLP's input ``hook`` shows; raises UnknownHookError for any other hook."""
    stages = dict(_READ_STAGES)
    if is_parallel(model):
        stages["hook_resid_pre"] = "residual"
        del stages["hook_resid_mid"]
    short = _short(layer, hook)
    if short not in stages:
        raise UnknownHookError(
            f"layer {layer}: a transcoder can read {', '.join(stages)} of its own block, not {hook!r}."
        )
    return stages[short]


def write_stage(layer: int, hook: str) -> str:
    """``"mlp"`` for a site before the post-norm, ``"residual"`` for one after it."""
    short = _short(layer, hook)
    if short not in _WRITES:
        raise UnknownHookError(
            f"layer {layer}: a transcoder can write to {', '.join(_WRITES)} of its own block, not {hook!r}."
        )
    return "mlp" if short in _WRITES_BEFORE_POST_NORM else "residual"


def read_map(model: Model, recording: Recording, layer: int, hook: str) -> ReadMap:
    """The frozen map from the residual stream to the tensor at a dictionary's input hook."""
    return ReadMap(read_stage(model, layer, hook), frozen_norm(model, recording, f"blocks.{layer}.ln2"))


def write_norm(model: Model, recording: Recording, layer: int, hook: str) -> FrozenNorm | None:
    """The frozen post-norm between a dictionary's output hook and the residual stream, if any."""
    if write_stage(layer, hook) == "residual":
        return None
    return frozen_norm(model, recording, f"blocks.{layer}.ln2_post")


@dataclass(frozen=True)
class FrozenAttention:
    """One layer's attention with its pattern frozen: ``out[p] = Σ_q A[p,q] x[q] W_V W_O + const[p]``.

    The norm before it and the one after it (Gemma) are folded in: gains and centring into the
    weights, denominators into the pattern.
    """

    W_V: Float[Tensor, "kv d_model d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    mixing: Float[Tensor, "kv key group_query"]
    const: Float[Tensor, "pos d_model"]

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The attention's contribution to the residual stream."""
        return self.linear(x) + self.const

    def linear(self, x: Float[Tensor, "used d_model"]) -> Float[Tensor, "used d_model"]:
        """The part of it that depends on ``x``, which holds the first positions."""
        kv, total = self.mixing.shape[:2]
        group, used = self.W_O.shape[0] // kv, x.shape[0]
        v = x.float() @ self.W_V  # [kv, pos, d_head]
        mixing = self.mixing.transpose(1, 2).reshape(kv, group, total, total)[:, :, :used, :used]
        return torch.einsum("kgpe,kged->pd", mixing @ v[:, None], self.W_O.unflatten(0, (kv, group)))

    def mix_back(
        self,
        g: Float[Tensor, "used n d_model"],
        fresh: Float[Tensor, "new d_model"],
        fresh_at: Int[Tensor, " new"],
        first: int,
    ) -> Float[Tensor, "kv key all d_head"]:
        """Gradients at the values of every key position, from gradients at the attention's output.

        ``g`` holds positions ``first``, ``first + 1``, ... of targets already spread out; ``fresh``
        targets stand at one position each, which needs one row of ``W_O`` products, not one for
        every position. Multiply the result with ``W_V`` (see :meth:`to_stream`).
        """
        used, n, d_model = g.shape
        kv, heads, d_head = self.mixing.shape[0], self.W_O.shape[0], self.W_O.shape[1]
        group, total = heads // kv, self.mixing.shape[1]
        last = first + used
        mixing = self.mixing.unflatten(2, (group, total))[:, :last]
        W_O = self.W_O.transpose(1, 2)
        # [heads, pos·n, d_head]: each head's gradient at its output, laid out so that heads of a
        # group stand one after the other along the summed axis of the next product.
        at_z = torch.matmul(g.reshape(1, used * n, d_model), W_O)
        mixed = torch.bmm(
            mixing[..., first:last].reshape(kv, last, group * used), at_z.reshape(kv, group * used, n * d_head)
        ).reshape(kv, last, n, d_head)
        if fresh_at.numel() == 0:
            return mixed
        at_z = torch.matmul(fresh[None], W_O).reshape(kv, group, -1, d_head)
        weights = mixing[..., fresh_at]  # [kv, key, group, new]
        spread = sum(weights[:, :, h, :, None] * at_z[:, None, h] for h in range(group))
        return torch.cat([mixed, spread], dim=2)

    def to_stream(self, mixed: Float[Tensor, "kv key n d_head"]) -> Float[Tensor, "key n d_model"]:
        """Gradients at the block's input, from gradients at the values."""
        kv, keys, n, d_head = mixed.shape
        out = torch.matmul(mixed.reshape(kv, keys * n, d_head), self.W_V.transpose(1, 2))
        return (out[0] if kv == 1 else out.sum(0)).reshape(keys, n, self.W_V.shape[1])


def frozen_attention(model: Model, recording: Recording, layer: int) -> FrozenAttention:
    """Layer ``layer``'s attention as an affine map, from weights and one recording."""
    weights = attention_weights(model, layer)
    pattern = recording.patterns[layer].float()
    W_V, b_V, W_O, b_O = weights.W_V, weights.b_V, weights.W_O, weights.b_O
    kv, heads = W_V.shape[0], W_O.shape[0]
    before = frozen_norm(model, recording, f"blocks.{layer}.ln1")
    after = frozen_norm(model, recording, f"blocks.{layer}.ln1_post")
    if before is not None:
        b_V = b_V + before.weights.bias @ W_V
        W_V = before.fold(W_V)
    per_head = torch.einsum("he,hed->hd", b_V.repeat_interleave(heads // kv, 0), W_O)
    const = pattern.sum(-1).T @ per_head + b_O  # [pos, d_model]; a pattern with sinks sums below one
    if after is not None:
        const = after.forward(const)
        W_O = (W_O - W_O.mean(-1, keepdim=True) if after.weights.centred else W_O) * after.weights.weight
        pattern = pattern / after.scale  # by query position
    if before is not None:
        pattern = pattern / before.scale.T  # by key position
    n_pos = pattern.shape[-1]
    mixing = pattern.reshape(kv, (heads // kv) * n_pos, n_pos).transpose(1, 2).contiguous()
    return FrozenAttention(W_V, W_O, mixing, const)
