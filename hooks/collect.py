"""Tensors of named hooks for a batch of sequences, without running the model further than needed."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import HookFiringError
from .sites import Model, resolve


class _Enough(Exception):
    """Ends a forward pass from within a hook: all that was asked for is there."""


def collect_sites(
    model: Model, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch pos _"]]:
    """What the hooks ``names`` carry on ``tokens``; layers after the last of them are not run.

    Raises HookFiringError naming a hook that stays silent.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = output.detach()
            if len(seen) == len(names):
                raise _Enough

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(resolve(model, name).register_forward_hook(keep(name)).remove)
        try:
            model(tokens)
        except _Enough:
            return seen
    silent = [name for name in names if name not in seen]
    raise HookFiringError(f"the hook {silent[0]!r} did not fire in a forward pass.")
