"""Norms with frozen denominators, and how dictionaries read and write through them.

With attention patterns and norm denominators fixed at their recorded values, a block is affine in
the residual stream (Ameisen et al. 2025, "Circuit Tracing", section on the local replacement
model). These are the pieces, each as a function and as its transpose.
"""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from .errors import UnknownHookError
from .record import Recording
from .sites import Model, NormWeights, is_parallel, norm_weights


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
    scale = recording.scales[name].float()
    where = {"weight": weights.weight.to(scale.device), "bias": weights.bias.to(scale.device)}
    return FrozenNorm(replace(weights, **where), scale)


@dataclass(frozen=True)
class ReadMap:
    """How a dictionary's input hangs on the residual stream its block's MLP reads.

    ``stage``: ``"residual"`` the stream itself, ``"normalized"`` after the division, ``"normed"``
    after gain and bias. ``rounding``: what the model's own tensor there has beyond ``forward``, where
    that is to be counted (half precision).
    """

    stage: str
    norm: FrozenNorm | None
    rounding: Float[Tensor, "pos d_model"] | None = None

    def forward(self, resid: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The tensor at the read site, from the residual stream."""
        if self.norm is None or self.stage == "residual":
            return resid.float()
        return self.norm.linear(resid) if self.stage == "normalized" else self.norm.forward(resid)

    def transpose(
        self, vectors: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
        """Vectors at the read site as vectors on the residual stream, plus what the norm's bias and rounding add."""
        bias = vectors.new_zeros(vectors.shape[0])
        if self.rounding is not None:
            bias = bias + (vectors * self.rounding[positions]).sum(-1)
        if self.norm is None or self.stage == "residual":
            return vectors, bias
        normed = self.stage == "normed"
        bias = bias + vectors @ self.norm.weights.bias if normed else bias
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
