"""Find things in a TransformerLens model: hook points, weights, devices.

Everything here works on ``HookedTransformer`` and ``TransformerBridge`` alike, because models are only reached through
hook names, ``cfg`` and weight properties. Where the two differ, or architectures do, it is dealt with here.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import ArchitectureError, UnknownHookError
from .softcap import soft_capped

Model = Any  # HookedTransformer | TransformerBridge | SAELens' subclasses of both


def find(model: Model, name: str) -> HookPoint | None:
    """The HookPoint called ``name``, or None.

    A bridge makes a new ``hook_dict`` on every access, which takes milliseconds. So a single name is looked up in its
    own table first, and then along the attributes.
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

    Use it before relying on a name: a TransformerBridge ignores unknown names without a word.

    Args:
        model: the model.
        name: a full hook name.

    Returns:
        The model's own HookPoint.

    Raises:
        UnknownHookError: there is none; the message lists the nearest names.

    Examples:
        >>> type(tlc.hooks.resolve(model, "blocks.0.hook_mlp_out")).__name__
        'HookPoint'
        >>> tlc.hooks.resolve(model, "blocks.0.hook_mlp")
        Traceback (most recent call last):
        ...
        tl_circuits.hooks.errors.UnknownHookError: the model has no hook point 'blocks.0.hook_mlp'. Nearest: ...
    """
    point = find(model, name)
    if point is not None:
        return point
    near = difflib.get_close_matches(name, model.hook_dict, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else " See model.hook_dict for the names."
    raise UnknownHookError(f"the model has no hook point {name!r}.{hint}")


def registry(model: Model) -> dict[str, HookPoint]:
    """The model's own table of hook points, which can be written to; a bridge's ``hook_dict`` is only a copy."""
    table = model.__dict__.get("_hook_registry")
    return table if table is not None else model.hook_dict


def mlp_module(model: Model, layer: int) -> Any:
    """A layer's MLP; raises ArchitectureError for a block without one."""
    mlp = getattr(blocks_of(model)[layer], "mlp", None)
    if mlp is None:
        raise ArchitectureError(
            f"layer {layer} has no MLP (attention only, or a state-space layer), so there is nothing that a dictionary "
            "could replace. Only models with attention and an MLP in every block can be explained."
        )
    return mlp


def is_parallel(model: Model) -> bool:
    """Whether attention and MLP both read the block's input (GPT-J, GPT-NeoX)."""
    return bool(getattr(model.cfg, "parallel_attn_mlp", False))


def context_length(model: Model) -> int:
    """The longest prompt the model takes, in tokens."""
    return int(model.cfg.n_ctx)


@dataclass(frozen=True)
class AttentionWeights:
    """Value and output weights of one layer, in float32. With grouped heads, ``n_kv`` is smaller than ``n_heads``."""

    W_V: Float[Tensor, "n_kv d_model d_head"]
    b_V: Float[Tensor, "n_kv d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_O: Float[Tensor, " d_model"]


def attention_weights(model: Model, layer: int) -> AttentionWeights:
    """The weights through which layer ``layer`` moves information between positions."""
    attn = model.blocks[layer].attn
    grouped = getattr(attn, "_W_V", None)  # HookedTransformer's W_V repeats grouped heads
    try:
        W_V = (grouped if isinstance(grouped, Tensor) else attn.W_V).detach().float()
        W_O = attn.W_O.detach().float()
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        raise ArchitectureError(
            f"blocks.{layer}.attn has no plain W_V and W_O for each head (latent attention, or a mixture of heads), "
            f"so it has no closed form. TransformerLens says: {str(error).splitlines()[0]}"
        ) from error
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
    # Granite's blocks multiply what attention and MLP give; hook_attn_out shows the product.
    share = float(getattr(model.blocks[layer], "residual_contribution_scale", 1.0))
    return (
        AttentionWeights(W_V, b_V, W_O, b_O) if share == 1.0 else AttentionWeights(W_V, b_V, W_O * share, b_O * share)
    )


def scores_scale(model: Model, layer: int, d_head: int) -> float:
    """The factor by which the model multiplies ``q·k``."""
    attn = model.blocks[layer].attn
    own = getattr(attn, "attn_scale", None)  # HookedTransformer divides by it
    if isinstance(own, (int, float)):
        return 1.0 / float(own)
    native = getattr(attn, "original_component", None)
    scaling = getattr(native, "scaling", None)
    if isinstance(scaling, (int, float)):
        return float(scaling)
    if type(native).__name__ == "GPTNeoSelfAttention":  # it multiplies by nothing, and its config does not say so
        return 1.0
    by_layer = layer + 1 if getattr(model.cfg, "scale_attn_by_inverse_layer_idx", False) else 1
    return d_head**-0.5 / by_layer


def scores_softcap(model: Model) -> float | None:
    """The soft cap of attention scores (Gemma-2); None if the model has none."""
    cap = float(getattr(model.cfg, "attn_scores_soft_cap", -1.0) or -1.0)
    return cap if cap > 0 else None


@dataclass(frozen=True)
class MLPWeights:
    """One MLP: ``h W_out + b_out``, where ``h = act(x W_in + b_in)``.

    With a gate, ``h = act(x W_gate + b_gate) · (x W_in + b_in)``.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    b_gate: Float[Tensor, " d_mlp"] | None
    act_fn: str


def mlp_weights(model: Model, layer: int) -> MLPWeights:
    """The weights of layer ``layer``'s MLP, as the model holds them (no copy, own dtype)."""
    mlp = mlp_module(model, layer)
    W_in, W_out = getattr(mlp, "W_in", None), getattr(mlp, "W_out", None)
    if not isinstance(W_in, Tensor) or not isinstance(W_out, Tensor) or W_in.ndim != 2:
        raise ArchitectureError(
            f"blocks.{layer}.mlp has no plain W_in and W_out (a mixture of experts?), so its neurons cannot serve as "
            "features, and nothing can be passed through it. Attach transcoders for this layer."
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
        # HookedTransformer's gated MLP adds b_in after the product, so it is really a bias of the output.
        b_in, b_out = torch.zeros_like(b_in), b_out + b_in @ W_out.detach()
    return MLPWeights(
        W_in=W_in.detach(),
        b_in=b_in,
        W_out=W_out.detach(),
        b_out=b_out,
        W_gate=None if W_gate is None else W_gate.detach(),
        b_gate=None if b_gate is None or W_gate is None else b_gate.detach(),
        act_fn=_activation(model, mlp),
    )


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": _relu_squared,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def _activation(model: Model, mlp: Any) -> str:
    """The name of an MLP's nonlinearity, found by trying what the Hugging Face module computes.

    The config is not to be trusted: ``cfg.act_fn`` says ReLU for models that do not name theirs (BLOOM, Falcon, MPT).
    """
    wrapped = getattr(mlp, "original_component", None)
    x = torch.linspace(-4.0, 4.0, 81)
    for attribute in ("act_fn", "act", "activation_fn", "activation", "gelu_impl"):
        function = getattr(wrapped, attribute, None)
        if callable(function):
            with torch.no_grad():
                try:
                    y = function(x)
                except (TypeError, ValueError, RuntimeError):
                    continue  # not a function of one tensor on the CPU
            known = (name for name, ours in ACTIVATIONS.items() if torch.allclose(y, ours(x), atol=1e-5))
            return next(known, f"{type(function).__name__} (of no known form)")
    return str(model.cfg.act_fn)


@dataclass(frozen=True)
class UnembedWeights:
    """The unembedding: ``logits = scale · (x W_U + b_U)``, then ``softcap · tanh(logits / softcap)`` if there is a cap.

    ``scale``: some models multiply their logits by it (Cohere, Granite); for others it is 1.
    """

    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]
    softcap: float | None
    scale: float = 1.0

    def logits(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """The model's logits, in float32, from what its unembedding reads."""
        logits = (x.to(self.W_U) @ self.W_U + self.b_U).float()
        logits = logits if self.scale == 1.0 else logits * self.scale
        return soft_capped(logits, self.softcap)

    def columns(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "d_model n"]:
        """The vectors whose products with ``x`` are some tokens' logits, before bias and soft cap; float32."""
        return self.W_U[:, tokens.to(self.W_U.device)].float() * self.scale

    def some(self, tokens: Int[Tensor, " n"] | slice) -> "UnembedWeights":
        """The same for a part of the vocabulary."""
        tokens = tokens if isinstance(tokens, slice) else tokens.to(self.W_U.device)
        return UnembedWeights(self.W_U[:, tokens], self.b_U[tokens], self.softcap, self.scale)


def unembed_weights(model: Model) -> UnembedWeights:
    """The unembedding as the model holds it (own dtype), its soft cap and its scale, if any."""
    W_U = model.W_U.detach()
    b_U = getattr(model, "b_U", None)
    cap = float(getattr(model.cfg, "output_logits_soft_cap", -1.0) or -1.0)
    return UnembedWeights(
        W_U=W_U,
        b_U=W_U.new_zeros(W_U.shape[1]) if b_U is None else b_U.detach(),
        softcap=cap if cap > 0 else None,
        scale=_logit_scale(model),
    )


def _logit_scale(model: Model) -> float:
    """The factor by which the Hugging Face model under a bridge multiplies its logits.

    A model that keeps it under yet another name is not explained wrongly: every trace compares the logits that follow
    with the model's own, and refuses the model if they differ.
    """
    wrapped = getattr(model, "original_model", None)
    own = getattr(wrapped, "logit_scale", None)  # Cohere; set to 1 once TransformerLens has folded it into W_U
    if isinstance(own, (int, float)):
        return float(own)
    config = getattr(wrapped, "config", None)
    for name, inverse in (("logits_scaling", True), ("lm_head_multiplier", False)):  # Granite; Falcon-H1
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value:
            return 1.0 / float(value) if inverse else float(value)
    return 1.0


def embed_weights(model: Model) -> Float[Tensor, "d_vocab d_model"]:
    """The token embedding as the model holds it."""
    return model.W_E.detach()


def blocks_of(model: Model) -> Any:
    """The model's transformer blocks; ArchitectureError if it has no single row of them (an encoder-decoder)."""
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise ArchitectureError(
            "the model has no single row of transformer blocks (model.blocks), as an encoder-decoder has not, so it "
            "cannot be explained."
        )
    return blocks


def weights_state(model: Model) -> int:
    """A number that changes when weights are replaced or written to, for example by TransformerLens' weight folding.

    PyTorch counts what is written to a tensor, but not through its ``.data``. So vectors (gains, biases) are summed,
    and of matrices a few entries are.
    """
    parameters = list(model.parameters())
    state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
    by_device: dict[torch.device, list[Tensor]] = {}
    for p in parameters:
        step = 1 if p.ndim < 2 else max(1, p.numel() // 64)
        by_device.setdefault(p.device, []).append(p.detach().reshape(-1)[::step].double().sum())
    seen = tuple(x for some in by_device.values() for x in torch.stack(some).tolist())
    return hash((tuple(state), seen, bool(getattr(model, "compatibility_mode", False))))


def model_device(model: Model) -> torch.device:
    """The device of the model's first weights."""
    return next(model.parameters()).device


def layer_device(model: Model, layer: int) -> torch.device:
    """The device of a block's weights; a model may be spread over several devices."""
    first = next(blocks_of(model)[layer].parameters(), None)
    return model_device(model) if first is None else first.device


def with_its_layer(model: Model, name: str, seen: Tensor) -> Tensor:
    """The tensor that hook ``name`` showed, on its layer's device: a block's input is seen before it is moved there."""
    # A model is never spread over the CPU and accelerators, so a tensor on the CPU needs no (slow) lookup.
    layer = None if seen.device.type == "cpu" else layer_of(name)
    return seen if layer is None else seen.to(layer_device(model, layer))


def layer_of(name: str) -> int | None:
    """The block a hook or module belongs to by its full name (``blocks.3.ln1``), or None."""
    parts = name.split(".", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit() else None
