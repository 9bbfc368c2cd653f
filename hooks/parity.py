"""Check that a TransformerBridge computes what the Hugging Face modules under it compute.

A bridge has its own version of some modules (attention, norms), so that there are places for hooks. If it differs from
the original (another kind of rotation, another order of norm and gain), all hooks show a model that does not exist. So
each of these modules is run again in Hugging Face's version, on the same inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import ArchitectureError
from .owned import has_others_hooks, put_module_hook
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
                try:
                    original = _first(module.original_component(*args, **plain))
                except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
                    continue  # the two versions take different arguments, so they cannot be compared
                if isinstance(original, Tensor) and original.shape == output.shape:
                    _require_same(name, output[:rows], original[:rows])


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _require_same(name: str, bridge: Tensor, original: Tensor) -> None:
    gap = largest_gap(bridge.float() - original.float(), original.float())
    if not gap <= _PARITY_WITHIN.get(original.dtype, 1e-3):
        raise ArchitectureError(
            f"{name}: the TransformerBridge computes something else than the Hugging Face module it wraps (off by "
            f"{gap:.1%}), so its hooks would explain another model. This is a fault of TransformerLens for this "
            "architecture; nothing on this side can mend it."
        )


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
                if isinstance(getattr(module, "original_component", None), torch.nn.Module) and _comparable(module):
                    stack.callback(_watch(module, f"blocks.{layer}.{part}", seen))
        yield seen


def _comparable(module: Any) -> bool:
    """Whether a module stands for one of Hugging Face's, and carries no hooks of others that may change its output."""
    points = (child for child in module.children() if isinstance(child, HookPoint))
    return module.name is not None and not any(has_others_hooks(point) for point in points)


def _watch(module: Any, name: str, seen: Seen) -> Callable[[], None]:
    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.keep(name, module, args, kwargs, output)

    return put_module_hook(module, keep, with_kwargs=True)
