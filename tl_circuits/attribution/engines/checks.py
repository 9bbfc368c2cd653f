"""Checks of the closed form: every frozen map must give what the model computed on this prompt."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.sources import LayerSources
from tl_circuits.errors import ArchitectureError
from tl_circuits.hooks import LOGITS_COMPARED, ReadMap, Recording, largest_gap, rounding_within, unembed_weights

# Rounding of float32 sums over everything written to the stream, relative to the largest entry at any position.
_ROUNDING = 1e-5


def require_same(what: str, ours: Tensor, models: Tensor, dtype: torch.dtype) -> None:
    """Raise ArchitectureError unless a frozen map, called ``what``, gives the model's own tensor, up to rounding."""
    models = models.float()
    gap, within = largest_gap(ours.to(models.device) - models, models, _ROUNDING), rounding_within(dtype)
    if not gap <= within:
        raise ArchitectureError(
            f"{what}: the frozen linear map is off by {gap:.2%} of the model's own value (tolerance {within:.2%}), "
            'so this architecture is not one the linear engine knows. Use engine="autograd".'
        )


def require_same_streams(recording: Recording) -> None:
    """Raise ArchitectureError unless attention and MLPs add up to the recorded residual streams."""
    stream = recording.streams[0].float()
    for layer, (attention, mlp) in enumerate(zip(recording.attn_out, recording.mlp_out, strict=True)):
        stream = stream.to(attention.device) + attention.float() + mlp.float()
        require_same(f"residual stream after layer {layer}", stream, recording.streams[layer + 1], recording.dtype)


def require_full_share(layer: int, source: LayerSources) -> None:
    """Raise ArchitectureError if the model multiplies a layer's MLP output on its way to the stream."""
    if source.share != 1.0:
        raise ArchitectureError(
            f"layer {layer} multiplies its MLP's output by {source.share:.4g} on its way to the residual stream, "
            'which the closed form does not know. Use engine="autograd", or output_hook="hook_mlp_out".'
        )


def require_same_logits(model: Any, recording: Recording, final: ReadMap) -> None:
    """Raise ArchitectureError unless some logits, evenly spread over the vocabulary, come out as recorded."""
    logits = recording.logits
    assert logits is not None  # callers ask for it only where the recording goes to the end
    some = slice(None, None, max(1, logits.numel() // LOGITS_COMPARED))
    require_same("logits", explained_logits(model, recording, final, some), logits[some], recording.dtype)


def explained_logits(model: Any, recording: Recording, final: ReadMap, tokens: slice) -> Float[Tensor, " some"]:
    """Logits of some tokens of the vocabulary, computed with the frozen final norm and the unembedding."""
    return unembed_weights(model).some(tokens).logits(final.forward(recording.resid_final)[recording.position])
