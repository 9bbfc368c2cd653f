"""Norms as ``y = (x - centred·mean(x)) / scale · weight + bias``: which there are, and their weights.

How a model stores its gain differs (Gemma and Nemotron add one to it, folding moves it into the next
weights, OLMo has none), so on a TransformerBridge the gain is measured on the Hugging Face module
itself, and what is stored only sharpens it.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ArchitectureError
from .sites import Model, find, layer_device, layer_of, registry, walk

_STREAM_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
# Norms inside attention (of latent values, of values) scale what heads move. Those of queries and keys
# act on patterns alone, which are held as a whole.
_INNER_NORM = re.compile(r"blocks\.(\d+)\.attn\.(?:\w+\.)*(?!q_norm|k_norm|q_layernorm|k_layernorm)\w*norm\.hook_out$")
# How far a stored gain may be from the measured one: rounding of the module's own arithmetic.
_MEASURED_WITHIN = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_PROBE = 64.0  # large beside any epsilon under the root


@dataclass(frozen=True)
class NormWeights:
    """A norm ``y = (x - centred·mean(x)) / scale · weight + bias``; ``scale`` is the model's own.

    ``name`` is the hook prefix (``blocks.3.ln1``), ``weight`` and ``bias`` are float32 ``[d_model]``.
    """

    name: str
    centred: bool
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]

    def normalized(self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*any 1"]) -> Float[Tensor, "*batch d_model"]:
        """``x`` centred and divided, before gain and bias; float32."""
        x = x.float()
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / scale

    def output(self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*any 1"]) -> Float[Tensor, "*batch d_model"]:
        """The norm's output with its denominator given; float32."""
        return self.normalized(x, scale) * self.weight.to(x.device) + self.bias.to(x.device)

    def denominator(
        self, x: Float[Tensor, "*batch d_model"], y: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 1"]:
        """The denominator that makes :meth:`output` of ``x`` equal ``y`` (least squares)."""
        gain, moved = self.weight.to(x.device), y.float() - self.bias.to(x.device)
        wanted = self.normalized(x, torch.ones_like(x[..., :1]).float()) * gain
        return (wanted * wanted).sum(-1, keepdim=True) / (wanted * moved).sum(-1, keepdim=True)


def is_norm(model: Model, name: str) -> bool:
    """Whether the model has a norm called ``name``: a denominator to see, or an input and an output."""
    if find(model, f"{name}.hook_scale") is not None:
        return True
    return all(find(model, f"{name}.{end}") is not None for end in ("hook_in", "hook_out"))


def norm_names(model: Model, below: int | None = None) -> list[str]:
    """The hook prefixes of all norms that information passes through on its way to the logits.

    Those of the residual stream, blocks first, and those inside attention; with ``below``, up to layer
    ``below``'s attention.
    """
    n_layers = int(model.cfg.n_layers) if below is None else below
    inner: dict[int, list[str]] = {}
    for point in registry(model):
        match = _INNER_NORM.match(point)
        if match:
            inner.setdefault(int(match[1]), []).append(point.rsplit(".", 1)[0])
    names = []
    for layer in range(n_layers):
        names += [name for name in (f"blocks.{layer}.{norm}" for norm in _STREAM_NORMS) if is_norm(model, name)]
        names += inner.get(layer, [])
    last = "ln_final" if below is None else f"blocks.{below}.ln1"
    return [*names, last] if is_norm(model, last) else names


def norm_weights(model: Model, name: str, width: int | None = None) -> NormWeights | None:
    """Gain, bias and centring of a norm of ``width`` (default d_model), or None where the model has no norm of that name.

    Raises ArchitectureError where the module is not a norm of this form.
    """
    if not is_norm(model, name):
        return None
    module = walk(model, name)
    wrapped = getattr(module, "original_component", None)
    return _measured(model, name, wrapped, width) if isinstance(wrapped, torch.nn.Module) else _stored(model, name, module)


def was_folded(model: Model, name: str) -> bool:
    """Whether TransformerLens has moved a norm's gain into the weights behind it, so that its output lacks the gain.

    Seen by the gain itself, all ones on a model whose weights were processed: a bridge keeps
    ``normalization_type`` after folding, and a model may have had ones (or no gain) from the start.
    """
    weights = norm_weights(model, name)
    if weights is None or not bool((weights.weight == 1).all()):
        return False
    layer = layer_of(name)
    mlp = None if layer is None else getattr(model.blocks[layer], "mlp", None)
    processed = getattr(model, "compatibility_mode", False) or getattr(mlp, "_use_processed_weights", False)
    return bool(processed) or str(model.cfg.normalization_type).endswith("Pre")


def _stored(model: Model, name: str, module: Any) -> NormWeights:
    """A HookedTransformer's norm, whose weights are the gain and the bias themselves."""
    kind = str(model.cfg.normalization_type)
    if kind not in ("LN", "LNPre", "RMS", "RMSPre"):
        raise ArchitectureError(f"{name}: normalization_type {kind!r} is not one of LN, LNPre, RMS, RMSPre.")
    weight, bias = getattr(module, "w", None), None if kind.startswith("RMS") else getattr(module, "b", None)
    weight = torch.ones(int(model.cfg.d_model), device=_home_of(model, name)) if weight is None else weight.detach().float()
    bias = torch.zeros_like(weight) if bias is None else bias.detach().float()
    return NormWeights(name, kind.startswith("LN"), weight, bias)


def _measured(model: Model, name: str, module: torch.nn.Module, width: int | None) -> NormWeights:
    """Gain and bias of a Hugging Face norm, from what it makes of three vectors."""
    own = getattr(module, "weight", None)
    own = own.detach() if isinstance(own, Tensor) and own.ndim == 1 else None
    width = own.numel() if own is not None else width or int(model.cfg.d_model)
    first = own if own is not None else next(model.blocks[layer_of(name) or 0].parameters())
    device = first.device if own is not None else _home_of(model, name)
    dtype = first.dtype if first.is_floating_point() else torch.float32
    x = torch.full((width,), _PROBE, device=device)
    x[1::2] = -_PROBE
    with torch.no_grad(), torch.inference_mode(False):
        seen = torch.stack([x, -x, x + _PROBE / 2])[None].to(dtype)
        try:
            up, down, shifted = module(seen)[0].float()
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise ArchitectureError(f"{name}: {type(module).__name__} is not a norm of one vector at a time: {error}") from error
    tolerance = _MEASURED_WITHIN[dtype]
    centred = bool((shifted - up).abs().max() <= 4 * tolerance * up.abs().max())
    n = x - x.mean() if centred else x
    n = n / n.square().mean().sqrt()
    weight, bias = (up - down) / (2 * n), (up + down) / 2
    size = weight.abs().max()
    stored = [] if own is None else [own.float(), own.float() + 1.0]
    for candidate in (*stored, torch.ones_like(weight)):
        if (candidate - weight).abs().max() <= tolerance * size:
            weight = candidate
            break
    own_bias = getattr(module, "bias", None)
    candidates = [own_bias.detach().float()] if isinstance(own_bias, Tensor) else []
    for candidate in (*candidates, torch.zeros_like(bias)):
        if (candidate - bias).abs().max() <= tolerance * (size + bias.abs().max()):
            bias = candidate
            break
    return NormWeights(name, centred, weight, bias)


def _home_of(model: Model, name: str) -> torch.device:
    """Where what is called ``name`` lies: with its block, the last norm with the last block."""
    layer = layer_of(name)
    return layer_device(model, int(model.cfg.n_layers) - 1 if layer is None else layer)
