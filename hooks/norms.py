"""Norms as ``y = (x - centred·mean(x)) / scale · weight + bias``: which there are, and their weights.

How a model stores its gain differs (Gemma and Nemotron add one to it, folding moves it into the next
weights, OLMo has none), so on a TransformerBridge the gain is measured on the Hugging Face module
itself, and what is stored only sharpens it.
"""

import re
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ArchitectureError
from .sites import Model, find, layer_device, layer_of, registry, walk

_STREAM_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
_STREAM_NORM = re.compile(rf"blocks\.\d+\.(?:{'|'.join(_STREAM_NORMS)})$|ln_final$")
# Norms inside attention (of latent values, of values) scale what heads move. Those of queries and keys
# act on patterns alone, which are held as a whole.
_ATTENTION_NORM = re.compile(r"blocks\.\d+\.attn\.(?:\w+\.)*(?!q_norm|k_norm|qk_norm|q_layernorm|k_layernorm)\w*norm$")
_BLOCK_POINT = re.compile(r"(blocks\.(\d+)\.\w+(?:\.\w+)*)\.hook_(out|scale)$")
# How far a stored gain may be from the measured one: rounding of the module's own arithmetic.
_MEASURED_WITHIN = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_PROBE = 64.0  # large beside any epsilon under the root
# What a module raises that wants something else than one tensor of vectors.
_NOT_A_NORM = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


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

    Those of the residual stream, blocks first, and those inside attention and MLPs' branches; with ``below``,
    up to layer ``below``'s attention.
    """
    n_layers = int(model.cfg.n_layers) if below is None else below
    inner = _inner_norms(model)
    names = []
    for layer in range(n_layers):
        names += [name for name in (f"blocks.{layer}.{norm}" for norm in _STREAM_NORMS) if is_norm(model, name)]
        names += inner.get(layer, [])
    last = "ln_final" if below is None else f"blocks.{below}.ln1"
    return [*names, last] if is_norm(model, last) else names


def is_inner_norm(name: str) -> bool:
    """Whether a norm called ``name`` would be inside attention or an MLP's branch, and no norm of queries or keys."""
    return bool(_ATTENTION_NORM.match(name)) if ".attn." in name else not _STREAM_NORM.match(name)


def is_mlp_norm(name: str) -> bool:
    """Whether a norm called ``name`` is inside an MLP's branch: what it does there is seen by no block's output."""
    return is_inner_norm(name) and ".attn." not in name


def _inner_norms(model: Model) -> dict[int, list[str]]:
    """The hook prefixes of the norms inside attention and MLPs' branches, by layer."""
    found: dict[int, dict[str, None]] = {}
    for point in registry(model):
        match = _BLOCK_POINT.match(point)
        if match and is_inner_norm(match[1]) and is_norm(model, match[1]):
            # A name alone says it of attention's, a denominator of others'; the rest must act as one.
            known = ".attn." in match[1] or match[3] == "scale"
            if known or acts_as_norm(model, match[1], _native(walk(model, match[1]))):
                found.setdefault(int(match[2]), {})[match[1]] = None
    return {layer: list(names) for layer, names in found.items()}


def _native(module: Any) -> Any:
    """The Hugging Face module that a bridge's component stands for, or the module itself."""
    wrapped = getattr(module, "original_component", None)
    return wrapped if isinstance(wrapped, torch.nn.Module) else module


def acts_as_norm(model: Model, name: str, module: Any) -> bool:
    """Whether a Hugging Face module computes a norm of the form of :class:`NormWeights`; found out once for each."""
    if not isinstance(module, torch.nn.Module):
        return False
    if module not in _ACTS:
        _ACTS[module] = not has_matrices(module) and _acts_as_norm(model, name, module)
    return _ACTS[module]


_ACTS: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def has_matrices(module: torch.nn.Module) -> bool:
    """Whether a module, or one inside it, has weights that no norm has."""
    return any(p.ndim > 1 for p in module.parameters())


def _acts_as_norm(model: Model, name: str, module: torch.nn.Module) -> bool:
    probe, dtype = _probe(model, name, module, None)
    x = torch.randn(probe.shape, generator=torch.Generator().manual_seed(0)).to(probe.device)
    x = torch.stack([4 * x, 32 * x])[None].to(dtype)
    within = 4 * _MEASURED_WITHIN[dtype]
    with torch.no_grad(), torch.inference_mode(False):
        try:
            y = module.forward(x).reshape(x.shape).float()
        except _NOT_A_NORM:
            return False
    size = y.abs().max()
    if not (y[0, 1] - y[0, 0]).abs().max() <= within * size:  # most activations end here
        return False
    try:
        weights = _measured(model, name, module, None)
    except ArchitectureError:
        return False
    off = (weights.output(x, weights.denominator(x, y)) - y).abs().max()
    return bool(off <= within * size)


def norm_weights(model: Model, name: str, width: int | None = None) -> NormWeights | None:
    """Gain, bias and centring of a norm of ``width`` (default d_model), or None where the model has no norm of that name.

    Raises ArchitectureError where the module is not a norm of this form.
    """
    if not is_norm(model, name):
        return None
    module = walk(model, name)
    native = _native(module)
    # HookedTransformer's own norms show their denominators; Hugging Face's do not.
    stored = native is module and hasattr(module, "hook_scale")
    return _stored(model, name, module) if stored else _measured(model, name, native, width)


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
    x, dtype = _probe(model, name, module, width)
    with torch.no_grad(), torch.inference_mode(False):
        seen = torch.stack([x, -x, x + _PROBE / 2])[None].to(dtype)
        try:
            out = module.forward(seen)  # without its hooks: one of them may be what asks
            up, down, shifted = out.reshape(seen.shape)[0].float()
        except _NOT_A_NORM as error:
            raise ArchitectureError(f"{name}: {type(module).__name__} is not a norm of one vector at a time: {error}") from error
    tolerance = _MEASURED_WITHIN[dtype]
    centred = bool((shifted - up).abs().max() <= 4 * tolerance * up.abs().max())
    n = x - x.mean() if centred else x
    n = n / n.square().mean().sqrt()
    weight, bias = (up - down) / (2 * n), (up + down) / 2
    size = weight.abs().max()
    own = _own_gain(module)
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


def _own_gain(module: torch.nn.Module) -> Tensor | None:
    own = getattr(module, "weight", None)
    return own.detach() if isinstance(own, Tensor) and own.ndim == 1 else None


def _probe(
    model: Model, name: str, module: torch.nn.Module, width: int | None
) -> tuple[Float[Tensor, " width"], torch.dtype]:
    """A vector of mean zero of a module's own width (else ``width``, else d_model) on its device, and its dtype."""
    own = _own_gain(module)
    width = own.numel() if own is not None else width or int(model.cfg.d_model)
    first = own if own is not None else next(model.blocks[layer_of(name) or 0].parameters())
    x = torch.full((width,), _PROBE, device=first.device if own is not None else _home_of(model, name))
    x[1::2] = -_PROBE
    return x, first.dtype if first.is_floating_point() else torch.float32


def _home_of(model: Model, name: str) -> torch.device:
    """Where what is called ``name`` lies: with its block, the last norm with the last block."""
    layer = layer_of(name)
    return layer_device(model, int(model.cfg.n_layers) - 1 if layer is None else layer)
