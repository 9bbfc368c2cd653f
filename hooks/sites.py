"""Where things are in a TransformerLens model: hook names, norms and attention weights.

Everything here works alike on ``HookedTransformer`` and ``TransformerBridge``: the model is
only reached through hook names, ``cfg`` and weight properties.
"""

import difflib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import ArchitectureError, UnknownHookError

Model = Any  # HookedTransformer | TransformerBridge | SAELens' subclasses of both


def find(model: Model, name: str) -> HookPoint | None:
    """The HookPoint called ``name``, or None.

    A bridge builds ``hook_dict`` anew, aliases and all, whenever it is asked (milliseconds), so a
    single name is looked up in its own table first and then along the attributes.
    """
    point = registry(model).get(name)
    if point is not None:
        return point
    found = walk(model, name)
    return found if isinstance(found, HookPoint) else None


def walk(model: Model, name: str) -> Any:
    """The module at a dotted path such as ``blocks.3.ln1``, or None."""
    found = model
    for part in name.split("."):
        if part.isdigit():
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = getattr(found, part, None)
        if found is None:
            return None
    return found


def resolve(model: Model, name: str) -> HookPoint:
    """The HookPoint called ``name``.

    Raises UnknownHookError, with the nearest existing names, where there is none
    (a TransformerBridge would ignore the name in silence).
    """
    point = find(model, name)
    if point is not None:
        return point
    near = difflib.get_close_matches(name, model.hook_dict, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else " See model.hook_dict for the names."
    raise UnknownHookError(f"the model has no hook point {name!r}.{hint}")


def registry(model: Model) -> dict[str, HookPoint]:
    """The model's own, writable table of hook points (``hook_dict`` is a copy on a bridge)."""
    table = model.__dict__.get("_hook_registry")
    return table if table is not None else model.hook_dict


def register_point(model: Model, name: str, owner: torch.nn.Module, attribute: str) -> Callable[[], None]:
    """Make a HookPoint ``owner.attribute`` known to the model as ``name``; returns the undo."""
    point = HookPoint()
    point.name = name
    tables = [registry(model)]
    if isinstance(model.__dict__.get("mod_dict"), dict):
        tables.append(model.mod_dict)  # HookedTransformer.add_hook looks names up here
    owner.add_module(attribute, point)
    for table in tables:
        table[name] = point

    def undo() -> None:
        for table in tables:
            if table.get(name) is point:
                del table[name]
        if owner._modules.get(attribute) is point:
            del owner._modules[attribute]

    return undo


def mlp_points(model: Model, layer: int) -> AbstractContextManager[None]:
    """Make ``blocks.L.mlp.hook_in`` and ``.hook_out`` exist while the context is open.

    TransformerBridge has both. HookedTransformer has neither: there they are created and
    fired from the MLP module's own forward hooks.
    """
    stack = ExitStack()
    prefix = f"blocks.{layer}.mlp"
    if find(model, f"{prefix}.hook_in") is not None:
        return stack
    mlp = model.blocks[layer].mlp
    with stack:
        for attribute in ("hook_in", "hook_out"):
            stack.callback(register_point(model, f"{prefix}.{attribute}", mlp, attribute))
        before = mlp.register_forward_pre_hook(lambda mod, args: (mod.hook_in(args[0]), *args[1:]))
        stack.callback(before.remove)
        after = mlp.register_forward_hook(lambda mod, args, output: mod.hook_out(output))
        stack.callback(after.remove)
        return stack.pop_all()
    raise AssertionError("unreachable")


def is_parallel(model: Model) -> bool:
    """Whether attention and MLP both read the block's input (GPT-J, GPT-NeoX)."""
    return bool(getattr(model.cfg, "parallel_attn_mlp", False))


def context_length(model: Model) -> int:
    """The longest prompt the model takes, in tokens."""
    return int(model.cfg.n_ctx)


@dataclass(frozen=True)
class NormWeights:
    """A norm ``y = (x - centred·mean(x)) / scale · weight + bias``; ``scale`` is the model's own.

    ``name`` is the hook prefix (``blocks.3.ln1``), ``weight`` and ``bias`` are float32 ``[d_model]``.
    """

    name: str
    centred: bool
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]


def norm_module(model: Model, name: str) -> Any:
    """The norm called ``name`` (``blocks.3.ln2_post``, ``ln_final``), or None if there is none."""
    return None if find(model, f"{name}.hook_scale") is None else walk(model, name)


def norm_weights(model: Model, name: str) -> NormWeights | None:
    """Gain, bias and centring of a norm, or None where the model has no norm of that name.

    Gemma stores its gain as an offset from one (``cfg.rmsnorm_uses_offset`` on a bridge; a
    HookedTransformer has the one added already).
    """
    module = norm_module(model, name)
    if module is None:
        return None
    kind = str(model.cfg.normalization_type)
    if kind not in ("LN", "LNPre", "RMS", "RMSPre"):
        raise ArchitectureError(
            f"{name}: normalization_type {kind!r} is not one of LN, LNPre, RMS, RMSPre."
        )
    weight = _parameter(module, "weight", "w")
    bias = None if kind.startswith("RMS") else _parameter(module, "bias", "b")
    if weight is None:
        weight = torch.ones(int(model.cfg.d_model), device=_home_of(model, name))
    weight = weight.detach().float()
    if getattr(model.cfg, "rmsnorm_uses_offset", False) and _parameter(module, "weight") is not None:
        weight = weight + 1.0
    bias = torch.zeros_like(weight) if bias is None else bias.detach().float()
    return NormWeights(name, kind.startswith("LN"), weight, bias)


def _home_of(model: Model, name: str) -> torch.device:
    """Where what is called ``name`` lies: with its block, the last norm with the last block."""
    layer = layer_of(name)
    return layer_device(model, int(model.cfg.n_layers) - 1 if layer is None else layer)


def _parameter(module: Any, *names: str) -> Tensor | None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            return value
    return None


@dataclass(frozen=True)
class AttentionWeights:
    """Value and output weights of one layer, float32, grouped heads not repeated."""

    W_V: Float[Tensor, "n_kv d_model d_head"]
    b_V: Float[Tensor, "n_kv d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_O: Float[Tensor, " d_model"]


def attention_weights(model: Model, layer: int) -> AttentionWeights:
    """The weights through which layer ``layer`` moves information between positions."""
    attn = model.blocks[layer].attn
    grouped = getattr(attn, "_W_V", None)  # HookedTransformer's W_V repeats grouped heads
    W_V = (grouped if isinstance(grouped, Tensor) else attn.W_V).detach().float()
    W_O = attn.W_O.detach().float()
    if W_V.ndim != 3 or W_O.ndim != 3 or W_O.shape[0] % W_V.shape[0]:
        raise ArchitectureError(
            f"blocks.{layer}.attn: expected W_V [n_kv, d_model, d_head] and W_O [n_heads, d_head, "
            f"d_model] with n_heads a multiple of n_kv, got {tuple(W_V.shape)} and {tuple(W_O.shape)}."
        )
    grouped_bias = getattr(attn, "_b_V", None)
    b_V = grouped_bias if isinstance(grouped_bias, Tensor) else getattr(attn, "b_V", None)
    b_O = getattr(attn, "b_O", None)
    b_V = W_V.new_zeros(W_V.shape[0], W_V.shape[2]) if b_V is None else b_V.detach().float()
    b_O = W_O.new_zeros(W_O.shape[2]) if b_O is None else b_O.detach().float()
    return AttentionWeights(W_V, b_V, W_O, b_O)


def scores_scale(model: Model, layer: int, d_head: int) -> float:
    """What the model multiplies ``q·k`` by."""
    attn = model.blocks[layer].attn
    own = getattr(attn, "attn_scale", None)  # HookedTransformer divides by it
    if isinstance(own, (int, float)):
        return 1.0 / float(own)
    scaling = getattr(getattr(attn, "original_component", None), "scaling", None)
    if isinstance(scaling, (int, float)):
        return float(scaling)
    by_layer = layer + 1 if getattr(model.cfg, "scale_attn_by_inverse_layer_idx", False) else 1
    return d_head**-0.5 / by_layer


def scores_softcap(model: Model) -> float | None:
    """Where attention scores saturate (Gemma-2); None where they do not."""
    cap = float(getattr(model.cfg, "attn_scores_soft_cap", -1.0) or -1.0)
    return cap if cap > 0 else None


@dataclass(frozen=True)
class MLPWeights:
    """One MLP: ``act(x W_gate + b_gate) · (x W_in + b_in)`` or, ungated, ``act(x W_in + b_in)``."""

    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    b_gate: Float[Tensor, " d_mlp"] | None
    act_fn: str


def mlp_weights(model: Model, layer: int) -> MLPWeights:
    """The weights of layer ``layer``'s MLP, as the model holds them (no copy, own dtype)."""
    mlp = model.blocks[layer].mlp
    W_in, W_out = getattr(mlp, "W_in", None), getattr(mlp, "W_out", None)
    if not isinstance(W_in, Tensor) or not isinstance(W_out, Tensor) or W_in.ndim != 2:
        raise ArchitectureError(
            f"blocks.{layer}.mlp has no plain W_in and W_out (a mixture of experts?), so its "
            "neurons cannot serve as features. Attach transcoders for this layer instead."
        )
    W_gate, b_gate = getattr(mlp, "W_gate", None), getattr(mlp, "b_gate", None)
    b_in, b_out = (
        weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()
        for weight, bias in (
            (W_in.detach(), getattr(mlp, "b_in", None)),
            (W_out.detach(), getattr(mlp, "b_out", None)),
        )
    )
    if W_gate is not None and not hasattr(mlp, "b_gate"):
        # HookedTransformer's gated MLP adds b_in behind the product, so it belongs to the output.
        b_in, b_out = torch.zeros_like(b_in), b_out + b_in @ W_out.detach()
    return MLPWeights(
        W_in=W_in.detach(),
        b_in=b_in,
        W_out=W_out.detach(),
        b_out=b_out,
        W_gate=None if W_gate is None else W_gate.detach(),
        b_gate=None if b_gate is None or W_gate is None else b_gate.detach(),
        act_fn=str(model.cfg.act_fn),
    )


@dataclass(frozen=True)
class UnembedWeights:
    """``logits = x W_U + b_U``, then ``softcap · tanh(logits / softcap)`` where there is a cap."""

    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]
    softcap: float | None


def unembed_weights(model: Model) -> UnembedWeights:
    """The unembedding as the model holds it (own dtype) and its soft cap, if any."""
    W_U = model.W_U.detach()
    b_U = getattr(model, "b_U", None)
    cap = float(getattr(model.cfg, "output_logits_soft_cap", -1.0) or -1.0)
    return UnembedWeights(
        W_U=W_U,
        b_U=W_U.new_zeros(W_U.shape[1]) if b_U is None else b_U.detach(),
        softcap=cap if cap > 0 else None,
    )


def embed_weights(model: Model) -> Float[Tensor, "d_vocab d_model"]:
    """The token embedding as the model holds it."""
    return model.W_E.detach()


def model_device(model: Model) -> torch.device:
    """Where the model's first weights lie."""
    return next(model.parameters()).device


def layer_device(model: Model, layer: int) -> torch.device:
    """Where a block's weights lie; on a model spread over several devices each block has its own."""
    first = next(model.blocks[layer].parameters(), None)
    return model_device(model) if first is None else first.device


def with_its_layer(model: Model, name: str, seen: Tensor) -> Tensor:
    """What the hook ``name`` showed, on its layer's device: a block's input is seen before it is brought there."""
    # TransformerLens does not spread a model over the CPU and accelerators, and looking it up takes time.
    layer = None if seen.device.type == "cpu" else layer_of(name)
    return seen if layer is None else seen.to(layer_device(model, layer))


def layer_of(name: str) -> int | None:
    """The block a hook or module belongs to by its full name (``blocks.3.ln1``), or None."""
    parts = name.split(".", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit() else None
