"""Norms with frozen denominators, and how dictionaries read and write the residual stream through them.

With attention patterns and norm denominators frozen at their recorded values, a block is affine in the residual stream
(Ameisen et al. 2025, "Circuit tracing": the local replacement model). Here are its parts outside of attention, each as
a function of the stream (``forward``) and as its transpose, which takes gradients back.
"""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from .errors import ArchitectureError, UnknownHookError
from .norms import NormWeights, mlp_norms, norm_weights
from .record import Recording
from .sites import Model, find, is_parallel
from .tolerances import largest_gap, rounding_within


@dataclass(frozen=True)
class FrozenNorm:
    """A norm ``y = (x - centred·mean(x)) / scale · weight + bias`` with its recorded ``scale``."""

    weights: NormWeights
    scale: Float[Tensor, "pos 1"]

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The norm's output."""
        return self.weights.output(x, self.scale)

    def linear(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The tensor at ``hook_normalized``: centred and divided, before gain and bias."""
        return self.weights.normalized(x, self.scale)

    def transpose(
        self, g: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"], gain: bool = True
    ) -> Float[Tensor, "n d_model"]:
        """Gradients at the norm's input, from gradients at its output (or before the gain)."""
        g = (g * self.weights.weight if gain else g) / self.scale[positions]
        return g - g.mean(-1, keepdim=True) if self.weights.centred else g

    def push(self, x: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """What vectors added to the norm's input add to its output, without the bias."""
        x = x - x.mean(-1, keepdim=True) if self.weights.centred else x
        return x / self.scale[positions] * self.weights.weight

    def fold(self, W: Float[Tensor, "*heads d_model _"]) -> Float[Tensor, "*heads d_model _"]:
        """A matrix that gives the same on ``x / scale`` as ``W`` on the norm's output, up to a constant."""
        W = self.weights.weight[:, None] * W
        return W - W.mean(-2, keepdim=True) if self.weights.centred else W


def frozen_norm(model: Model, recording: Recording, name: str | None) -> FrozenNorm | None:
    """The norm called ``name`` with its recorded denominator; None if there is no such norm."""
    if name is None:
        return None
    weights = norm_weights(model, name)
    if weights is None:
        return None
    scale = recording.scales[name].float()
    here = replace(weights, weight=weights.weight.to(scale.device), bias=weights.bias.to(scale.device))
    return FrozenNorm(here, scale)


@dataclass(frozen=True)
class ReadMap:
    """How a dictionary's input depends on the residual stream.

    ``stage``: which tensor is read: ``"residual"``, the stream itself; ``"normalized"``, after the norm's division;
    ``"normed"``, after its gain and bias. ``rounding``: for models in half precision, the model's own tensor minus what
    ``forward`` gives.
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
        """Turn vectors that read this tensor into vectors that read the stream, with the constants that this leaves."""
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
    """Which stage of the MLP's input a hook shows (see :class:`ReadMap`); raises UnknownHookError if none."""
    stages = dict(_READ_STAGES)
    if is_parallel(model):
        stages["hook_resid_pre"] = "residual"
        del stages["hook_resid_mid"]
        if str(mlp_norms(model, layer)[0]).endswith("ln1"):
            stages |= {"ln1.hook_normalized": "normalized", "ln1.hook_out": "normed"}
    if mlp_norms(model, layer)[0] != f"blocks.{layer}.ln2":  # no norm before the MLP; OLMo 2 has one after it
        stages = {name: stage for name, stage in stages.items() if not name.startswith("ln2.")}
    short = _short(layer, hook)
    if short not in stages:
        raise UnknownHookError(
            f"layer {layer}: a transcoder can read {', '.join(stages)} of its own block, not {hook!r}."
        )
    return stages[short]


def write_stage(layer: int, hook: str) -> str:
    """``"mlp"`` if a hook shows the MLP's output before the post-norm, ``"residual"`` if after it."""
    short = _short(layer, hook)
    if short not in _WRITES:
        raise UnknownHookError(
            f"layer {layer}: a transcoder can write to {', '.join(_WRITES)} of its own block, not {hook!r}."
        )
    return "mlp" if short in _WRITES_BEFORE_POST_NORM else "residual"


def read_map(model: Model, recording: Recording, layer: int, hook: str) -> ReadMap:
    """The frozen map from the residual stream to the tensor at a dictionary's input hook."""
    before, _ = mlp_norms(model, layer)
    return ReadMap(read_stage(model, layer, hook), frozen_norm(model, recording, before))


def mlp_site(model: Model, layer: int) -> str:
    """The hook, by its name within the block, that shows the output of an MLP's last matrix and nothing else.

    It is ``mlp.hook_out``, unless the Hugging Face module adds the residual stream itself (BLOOM, MPT); then it is
    ``hook_mlp_out``, which refers to another point there.
    """
    last = find(model, f"blocks.{layer}.mlp.out.hook_out")
    adds_stream = last is not None and last is find(model, f"blocks.{layer}.hook_mlp_out")
    return "hook_mlp_out" if adds_stream else "mlp.hook_out"


def written_share(model: Model, recording: Recording, layer: int, hook: str) -> float:
    """The factor by which the block multiplies what a dictionary's output hook shows, before adding it to the stream.

    It is 1, except on Granite.

    Raises:
        ArchitectureError: the hook does not show the MLP's output. On BLOOM and MPT, ``mlp.hook_out`` holds the
            residual stream as well.
    """
    norm = write_norm(model, recording, layer, hook)
    site = recording.sites[hook].float()
    site = site if norm is None else norm.forward(site)
    added = recording.mlp_out[layer].float().to(site.device)
    size = float((site * site).sum())
    share = float((added * site).sum()) / size if size else 1.0  # an MLP that writes nothing
    within = rounding_within(recording.dtype)
    share = 1.0 if abs(share - 1.0) < within else share
    gap = largest_gap(added - share * site, added)
    if not gap <= within:
        raise ArchitectureError(
            f"{hook} is not this model's MLP output (off by {gap:.0%} of hook_mlp_out, the tensor that is added to the "
            f"residual stream; on some architectures it holds the stream as well). Use output_hook='hook_mlp_out'."
        )
    return share


def write_norm(model: Model, recording: Recording, layer: int, hook: str) -> FrozenNorm | None:
    """The frozen post-norm between a dictionary's output hook and the residual stream, if any."""
    if write_stage(layer, hook) == "residual":
        return None
    _, after = mlp_norms(model, layer)
    return frozen_norm(model, recording, after)
