"""Find a model's norms and their weights: ``y = (x - centred·mean(x)) / scale · weight + bias``.

Models store a norm's gain in different ways: Gemma and Nemotron add one to the stored number, folding moves it into the
next weights, OLMo has none. So on a TransformerBridge the gain is measured, by running the Hugging Face module on a few
vectors. If a stored tensor agrees with the measurement, it is used instead, because it has no rounding.
"""

import re
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ArchitectureError
from .sites import Model, find, is_parallel, layer_device, layer_of, registry, walk

_STREAM_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
_STREAM_NORM = re.compile(rf"blocks\.\d+\.(?:{'|'.join(_STREAM_NORMS)})$|ln_final$")
# Norms inside attention that scale what heads move: of values, or of latent vectors that values are made from. Norms of
# queries and keys only affect patterns, which are held as a whole, so they are left out.
_ATTENTION_NORM = re.compile(r"blocks\.\d+\.attn\.(?:\w+\.)*(?!q_norm|k_norm|qk_norm|q_layernorm|k_layernorm)\w*norm$")
_BLOCK_POINT = re.compile(r"(blocks\.(\d+)\.\w+(?:\.\w+)*)\.hook_(out|scale)$")
# A stored gain may differ this much from the measured one, by the rounding of the module's own computation.
_MEASURED_WITHIN = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_PROBE = 64.0  # entries of the vectors for measuring: so large that a norm's epsilon does not matter
# What modules raise that do not take one tensor of vectors.
_NOT_A_NORM = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class NormWeights:
    """A norm ``y = (x - centred·mean(x)) / scale · weight + bias``, without its denominator ``scale``.

    ``name`` is the prefix of its hooks, such as ``blocks.3.ln1``. ``weight`` and ``bias`` are in float32.
    """

    name: str
    centred: bool
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]

    def normalized(
        self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*any 1"]
    ) -> Float[Tensor, "*batch d_model"]:
        """``x`` centred and divided by ``scale``, before gain and bias; in float32."""
        x = x.float()
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / scale

    def output(
        self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*any 1"]
    ) -> Float[Tensor, "*batch d_model"]:
        """The norm's output on ``x`` with the denominator ``scale``; in float32."""
        return self.normalized(x, scale) * self.weight.to(x.device) + self.bias.to(x.device)

    def denominator(
        self, x: Float[Tensor, "*batch d_model"], y: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 1"]:
        """The denominator that makes :meth:`output` of ``x`` equal ``y`` (least squares)."""
        gain, moved = self.weight.to(x.device), y.float() - self.bias.to(x.device)
        wanted = self.normalized(x, torch.ones_like(x[..., :1]).float()) * gain
        return (wanted * wanted).sum(-1, keepdim=True) / (wanted * moved).sum(-1, keepdim=True)


def is_norm(model: Model, name: str) -> bool:
    """Whether the model has a norm called ``name``, which shows its denominator, or its input and output."""
    if find(model, f"{name}.hook_scale") is not None:
        return True
    return all(find(model, f"{name}.{end}") is not None for end in ("hook_in", "hook_out"))


def norm_names(model: Model, below: int | None = None) -> list[str]:
    """The names of all norms that information passes on its way to the logits, layer by layer.

    These are the norms on the residual stream and those inside attention and MLPs. With ``below``, only those up to the
    attention of that layer.
    """
    n_layers = int(model.cfg.n_layers) if below is None else below
    inner = _inner_norms(model)
    names = []
    for layer in range(n_layers):
        names += [name for name in (f"blocks.{layer}.{norm}" for norm in _STREAM_NORMS) if is_norm(model, name)]
        names += inner.get(layer, [])
    last = "ln_final" if below is None else attention_norms(model, below)[0]
    return [*names, last] if last is not None and is_norm(model, last) else names


def mlp_norms(model: Model, layer: int) -> tuple[str | None, str | None]:
    """The names of the norms before and after a layer's MLP, None for those that it does not have.

    Usually ``ln2`` and ``ln2_post``. OLMo 2 and EXAONE 4 have only one after the MLP, which is called ``ln2``; a block
    with parallel attention and MLP may have one norm for both, ``ln1``.
    """
    before, after = _around(model, layer, "ln2", "hook_mlp_out")
    if before is None and after is None and is_parallel(model):
        shared = f"blocks.{layer}.ln1"
        before = shared if is_norm(model, shared) else None
    return before, after


def attention_norms(model: Model, layer: int) -> tuple[str | None, str | None]:
    """The names of the norms before and after a layer's attention, None for those that it does not have."""
    return _around(model, layer, "ln1", "hook_attn_out")


def _around(model: Model, layer: int, norm: str, added: str) -> tuple[str | None, str | None]:
    first, second = f"blocks.{layer}.{norm}", f"blocks.{layer}.{norm}_post"
    if is_norm(model, second):
        return first if is_norm(model, first) else None, second
    if not is_norm(model, first):
        return None, None
    out = find(model, f"{first}.hook_out")
    is_last = out is not None and out is find(model, f"blocks.{layer}.{added}")
    return (None, first) if is_last else (first, None)


def is_inner_norm(name: str) -> bool:
    """Whether the name is that of a norm inside attention (but not of queries or keys) or inside an MLP."""
    return bool(_ATTENTION_NORM.match(name)) if ".attn." in name else not _STREAM_NORM.match(name)


def is_mlp_norm(name: str) -> bool:
    """Whether the name is that of a norm inside an MLP."""
    return is_inner_norm(name) and ".attn." not in name


def _inner_norms(model: Model) -> dict[int, list[str]]:
    """The names of the norms inside attention and MLPs, by layer."""
    found: dict[int, dict[str, None]] = {}
    for point in registry(model):
        match = _BLOCK_POINT.match(point)
        if match and is_inner_norm(match[1]) and is_norm(model, match[1]):
            # Inside attention the name is enough, and elsewhere a hook for the denominator. Any other module must be
            # seen to compute a norm.
            known = ".attn." in match[1] or match[3] == "scale"
            if known or acts_as_norm(model, match[1], _native(walk(model, match[1]))):
                found.setdefault(int(match[2]), {})[match[1]] = None
    return {layer: list(names) for layer, names in found.items()}


def _native(module: Any) -> Any:
    """The Hugging Face module that a bridge's component stands for, or the module itself."""
    wrapped = getattr(module, "original_component", None)
    return wrapped if isinstance(wrapped, torch.nn.Module) else module


def acts_as_norm(model: Model, name: str, module: Any) -> bool:
    """Whether a Hugging Face module computes a norm as :class:`NormWeights` describes; tried once for each module."""
    if not isinstance(module, torch.nn.Module):
        return False
    if module not in _ACTS:
        _ACTS[module] = not has_matrices(module) and _acts_as_norm(model, name, module)
    return _ACTS[module]


_ACTS: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def has_matrices(module: torch.nn.Module) -> bool:
    """Whether a module has weight matrices, itself or inside; a norm has none."""
    return any(p.ndim > 1 for p in module.parameters())


def _acts_as_norm(model: Model, name: str, module: torch.nn.Module) -> bool:
    """Try a module on two vectors of different length: a norm gives the same for both, and what its weights predict."""
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
    if not (y[0, 1] - y[0, 0]).abs().max() <= within * size:  # most activation functions fail here
        return False
    try:
        weights = _measured(model, name, module, None)
    except ArchitectureError:
        return False
    off = (weights.output(x, weights.denominator(x, y)) - y).abs().max()
    return bool(off <= within * size)


def norm_weights(model: Model, name: str, width: int | None = None) -> NormWeights | None:
    """Gain, bias and centring of a norm; None if the model has no norm of that name.

    Args:
        model: the model.
        name: the norm's name, such as ``blocks.3.ln1``.
        width: the length of its vectors, if they are shorter than d_model and the norm has no weights to tell.

    Raises:
        ArchitectureError: the module is not a norm as :class:`NormWeights` describes.
    """
    if not is_norm(model, name):
        return None
    module = walk(model, name)
    native = _native(module)
    # HookedTransformer's own norms show their denominators; Hugging Face's do not.
    stored = native is module and hasattr(module, "hook_scale")
    return _stored(model, name, module) if stored else _measured(model, name, native, width)


def require_norm_weights(model: Model, name: str, width: int | None = None) -> NormWeights:
    """As :func:`norm_weights`, for a norm that the model must have.

    Args:
        model: the model.
        name: the norm's name.
        width: the length of its vectors, as for :func:`norm_weights`.

    Raises:
        ArchitectureError: the model has no norm of that name, or it is not a norm as :class:`NormWeights` describes.
    """
    found = norm_weights(model, name, width)
    if found is None:
        raise ArchitectureError(f"expected a norm at {name!r}, but the model has none there.")
    return found


def was_folded(model: Model, name: str) -> bool:
    """Whether TransformerLens has moved a norm's gain into the weights after it, so that its output lacks the gain.

    The sign is a gain of ones on a model whose weights were processed. ``normalization_type`` alone does not tell, as a
    bridge keeps it when it folds; nor does the gain alone, as a model may have had ones (or no gain) from the start.
    """
    weights = norm_weights(model, name)
    if weights is None or not bool((weights.weight == 1).all()):
        return False
    layer = layer_of(name)
    mlp = None if layer is None else getattr(model.blocks[layer], "mlp", None)
    processed = getattr(model, "compatibility_mode", False) or getattr(mlp, "_use_processed_weights", False)
    return bool(processed) or str(model.cfg.normalization_type).endswith("Pre")


def _stored(model: Model, name: str, module: Any) -> NormWeights:
    """The weights of a HookedTransformer's norm: there the stored tensors are gain and bias themselves."""
    kind = str(model.cfg.normalization_type)
    if kind not in ("LN", "LNPre", "RMS", "RMSPre"):
        raise ArchitectureError(f"{name}: normalization_type {kind!r} is not one of LN, LNPre, RMS, RMSPre.")
    weight, bias = getattr(module, "w", None), None if kind.startswith("RMS") else getattr(module, "b", None)
    weight = (
        torch.ones(int(model.cfg.d_model), device=_home_of(model, name)) if weight is None else weight.detach().float()
    )
    bias = torch.zeros_like(weight) if bias is None else bias.detach().float()
    return NormWeights(name, kind.startswith("LN"), weight, bias)


def _measured(model: Model, name: str, module: torch.nn.Module, width: int | None) -> NormWeights:
    """Measure gain and bias of a Hugging Face norm from its outputs on three vectors: ``x``, ``-x``, and ``x`` shifted.

    The bias is half the sum of the first two outputs, the gain half their difference over the normed ``x``; and the
    norm is centred if the shift changes nothing.
    """
    x, dtype = _probe(model, name, module, width)
    with torch.no_grad(), torch.inference_mode(False):
        seen = torch.stack([x, -x, x + _PROBE / 2])[None].to(dtype)
        try:
            out = module.forward(seen)  # `forward`, not a call: hooks must not run, as one of them may be asking
            up, down, shifted = out.reshape(seen.shape)[0].float()
        except _NOT_A_NORM as error:
            what = type(module).__name__
            raise ArchitectureError(f"{name}: {what} is not a norm of one vector at a time: {error}") from error
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
    """A vector of mean zero for measuring a module, on its device, and the module's dtype.

    Its length is that of the module's own gain, if it has one, else ``width`` or d_model.
    """
    own = _own_gain(module)
    width = own.numel() if own is not None else width or int(model.cfg.d_model)
    first = own if own is not None else next(model.blocks[layer_of(name) or 0].parameters())
    x = torch.full((width,), _PROBE, device=first.device if own is not None else _home_of(model, name))
    x[1::2] = -_PROBE
    return x, first.dtype if first.is_floating_point() else torch.float32


def _home_of(model: Model, name: str) -> torch.device:
    """The device of the norm's block; the final norm counts to the last block."""
    layer = layer_of(name)
    return layer_device(model, int(model.cfg.n_layers) - 1 if layer is None else layer)
