"""Check that a TransformerBridge computes what the Hugging Face modules under it compute.

A bridge has its own version of some modules (attention, norms), so that there are places for hooks. If it differs from
the original (another kind of rotation, another order of norm and gain), all hooks show a model that does not exist. So
each of these modules is run again in Hugging Face's version, on the same inputs.

Hooks of others must not decide what is compared: a module that carries some is run once more without them. And where
TransformerLens has processed weights (``enable_compatibility_mode``), queries, keys and values that Hugging Face keeps
in one matrix were processed beside it; then Hugging Face's version runs with a matrix that is put together from these.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformer_lens.hook_points import HookPoint

from .errors import ArchitectureError
from .owned import OwnHook, has_others_hooks, hooks_set_aside, put_module_hook
from .sites import Model
from .tolerances import largest_gap
from .turn import turn

_ATTENTION, _NORMS = ("attn",), ("ln1", "ln1_post", "ln2", "ln2_post")
_REST = (*_NORMS, "mlp")
# Allowed difference, from other kernels and orders of summation, by dtype, relative to a position's largest entry.
_PARITY_WITHIN = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")  # a second run must not add to them


class Seen:
    """Inputs and outputs, in one forward pass, of the modules that a bridge may have its own version of."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def keep(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember one call."""
        self._calls[name] = (module, args, dict(kwargs), _first(output))

    def compare(self, rows: int | None = None) -> None:
        """Raise ArchitectureError if an original gives another output, in the first ``rows`` of the batch."""
        with torch.no_grad():
            for name, (module, args, kwargs, output) in self._calls.items():
                plain = {key: None if key in _CACHES else value for key, value in kwargs.items()}
                if "use_cache" in plain:
                    plain["use_cache"] = False
                hooked = _hooked(module)
                # Hugging Face's version holds parts of the bridge, with their hooks, so both run without any.
                with hooks_set_aside(module) if hooked else nullcontext():
                    original = _original(module, args, plain)
                    if not isinstance(original, Tensor) or original.shape != output.shape:
                        continue
                    output = _first(module.forward(*args, **plain)) if hooked else output
                    if _gap(output[:rows], original[:rows]) is None:
                        continue
                    weights = _processed_weights(module)
                    if weights is not None:
                        original = _original(module, args, plain, weights)
                _require_same(name, output[:rows], original[:rows], _processed(module) and weights is None)


def _original(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> Any:
    """What Hugging Face's version gives, with its own weights or with these; None if it takes other arguments."""
    original = module.original_component
    try:
        return _first(
            original(*args, **kwargs) if weights is None else functional_call(original, weights, args, kwargs)
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _gap(bridge: Tensor, original: Tensor) -> float | None:
    """How far the two are apart, if that is more than rounding."""
    gap = float(largest_gap(bridge.float() - original.float(), original.float()))
    return None if gap <= _PARITY_WITHIN.get(original.dtype, 1e-3) else gap


def _require_same(name: str, bridge: Tensor, original: Tensor, processed: bool) -> None:
    gap = _gap(bridge, original)
    if gap is None:
        return
    if processed:
        raise ArchitectureError(
            f"{name}: TransformerLens has processed this module's weights (enable_compatibility_mode), and they do not "
            "fit into the Hugging Face module that it wraps, so the two cannot be compared. Open the model without "
            "enable_compatibility_mode()."
        )
    raise ArchitectureError(
        f"{name}: the TransformerBridge computes something else than the Hugging Face module it wraps (off by "
        f"{gap:.1%}), so its hooks would explain another model. This is an error in TransformerLens for this "
        "architecture; tl_circuits cannot correct it."
    )


def _hooked(module: Any) -> bool:
    """Whether hooks of others, on the module or on any point within it, may change what it gives."""
    points = (child for child in module.modules() if isinstance(child, HookPoint))
    on_it = any(not isinstance(hook, OwnHook) for hook in module._forward_hooks.values())
    return on_it or bool(module._forward_pre_hooks) or any(has_others_hooks(point) for point in points)


def _processed(module: Any) -> bool:
    """Whether queries, keys and values are kept beside Hugging Face's one matrix for them, and differ from it."""
    split = getattr(module, "split_qkv_matrix", None)
    if split is None:
        return False
    parts = zip(split(module.original_component), (module.q, module.k, module.v), strict=True)
    pairs = [(plain, part.original_component) for plain, part in parts]
    return not all(torch.equal(plain.weight, own.weight) and _same_bias(plain.bias, own.bias) for plain, own in pairs)


def _same_bias(plain: Tensor | None, own: Tensor | None) -> bool:
    if plain is None or own is None:
        return not any(bias is not None and bool(bias.any()) for bias in (plain, own))
    return torch.equal(plain, own)


def _processed_weights(module: Any) -> dict[str, Tensor] | None:
    """Parameters for Hugging Face's attention in which the bridge's own queries, keys and values are put together.

    Where each number belongs is found out by splitting a matrix of numbered entries. None if the module does not split
    one, or if what it split does not fit back (a bias that Hugging Face's matrix has not).
    """
    if not _processed(module):
        return None
    original, numbered, at = module.original_component, {}, 0
    given = dict(original.named_parameters())
    for name, parameter in given.items():
        numbers = torch.arange(at, at + parameter.numel(), dtype=torch.float64, device=parameter.device)
        numbered[f"original.{name}"] = numbers.view(parameter.shape)
        at += parameter.numel()
    where = functional_call(_Split(original, module.split_qkv_matrix), numbered, ())
    flat = torch.cat([parameter.detach().flatten() for parameter in given.values()])
    for (weight, bias), part in zip(where, (module.q, module.k, module.v), strict=True):
        own = part.original_component
        flat[weight.long().flatten()] = own.weight.detach().flatten()
        if own.bias is not None and bias is None and bool(own.bias.any()):
            return None
        if own.bias is not None and bias is not None:
            flat[bias.long().flatten()] = own.bias.detach().flatten()
    sizes = [parameter.numel() for parameter in given.values()]
    return {name: part.view(given[name].shape) for name, part in zip(given, flat.split(sizes), strict=True)}


class _Split(torch.nn.Module):
    """A bridge's function that splits a matrix, as a module, so that it can be called with other parameters."""

    def __init__(self, original: torch.nn.Module, split: Callable[..., Any]):
        super().__init__()
        self.original, self._split = original, split

    def forward(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(part.weight, getattr(part, "bias", None)) for part in self._split(self.original)]


@contextmanager
def watching(model: Model, attention_only: bool = False) -> Iterator[Seen]:
    """Collect the calls of these modules during one forward pass; with ``attention_only``, only of attention."""
    seen = Seen()
    ends = (0, int(model.cfg.n_layers) - 1)
    with turn(model), ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            # Attention may differ from layer to layer (rotation, window), so all layers' are compared. MLPs are alike
            # and expensive, so the first and the last must do.
            for part in _ATTENTION if attention_only else _ATTENTION + _REST if layer in ends else _ATTENTION + _NORMS:
                module = getattr(block, part, None)
                original, known = getattr(module, "original_component", None), getattr(module, "name", None)
                if isinstance(original, torch.nn.Module) and known is not None:
                    stack.callback(_watch(module, f"blocks.{layer}.{part}", seen))
        yield seen


def _watch(module: Any, name: str, seen: Seen) -> Callable[[], None]:
    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.keep(name, module, args, kwargs, output)

    return put_module_hook(module, keep, with_kwargs=True)
