"""Does a TransformerBridge compute what the Hugging Face module under it computes?

A bridge writes some modules anew (attention, norms) to have places for hooks. Where the copy differs
from the original (a rotation of another kind, a norm in another order), every hook shows a model that
does not exist. So each such module is run once more as Hugging Face has it, on the same inputs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import ArchitectureError
from .sites import Model

_ATTENTION, _NORMS = ("attn",), ("ln1", "ln1_post", "ln2", "ln2_post")
_REST = (*_NORMS, "mlp")
# Other kernels and orders of summation, by dtype, relative to the largest entry of a position.
_PARITY_WITHIN = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")  # a second run must not add to them


class Seen:
    """One forward pass's inputs and outputs of the modules that a bridge may have written anew."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def keep(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember one call."""
        self._calls[name] = (module, args, dict(kwargs), _first(output))

    def compare(self, rows: int | None = None) -> None:
        """Raise ArchitectureError naming the first module whose original gives something else in the first ``rows`` runs."""
        with torch.no_grad():
            for name, (module, args, kwargs, output) in self._calls.items():
                plain = {key: None if key in _CACHES else value for key, value in kwargs.items()}
                if "use_cache" in plain:
                    plain["use_cache"] = False
                try:
                    original = _first(module.original_component(*args, **plain))
                except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
                    continue  # the bridge hands its module other arguments than Hugging Face's takes
                if isinstance(original, Tensor) and original.shape == output.shape:
                    _require_same(name, output[:rows], original[:rows])


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _require_same(name: str, bridge: Tensor, original: Tensor) -> None:
    size = original.float().abs().amax(-1).clamp_min(1e-6 * float(original.abs().max()) + 1e-30)
    gap = float(((bridge.float() - original.float()).abs().amax(-1) / size).max())
    if not gap <= _PARITY_WITHIN.get(original.dtype, 1e-3):
        raise ArchitectureError(
            f"{name}: the TransformerBridge computes something else than the Hugging Face module it wraps (off by {gap:.1%}), "
            "so its hooks would explain another model. This is a fault of TransformerLens for this architecture; "
            "nothing on this side can mend it."
        )


@contextmanager
def watching(model: Model, attention_only: bool = False) -> Iterator[Seen]:
    """Collect the calls of one forward pass, those of attention alone with ``attention_only``."""
    seen = Seen()
    ends = (0, int(model.cfg.n_layers) - 1)
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            # Attention differs from layer to layer (rotation, window). MLPs do not, and cost most of a pass.
            for part in _ATTENTION if attention_only else _ATTENTION + _REST if layer in ends else _ATTENTION + _NORMS:
                module = getattr(block, part, None)
                if isinstance(getattr(module, "original_component", None), torch.nn.Module) and module.name is not None:
                    stack.callback(_watch(module, f"blocks.{layer}.{part}", seen).remove)
        yield seen


def _watch(module: Any, name: str, seen: Seen) -> Any:
    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.keep(name, module, args, kwargs, output)

    return module.register_forward_hook(keep, with_kwargs=True)
