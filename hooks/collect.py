"""Tensors of named hooks for a batch of sequences, without running the model further than needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import HookFiringError
from .sites import Model, put_hook, resolve, with_its_layer


class _Enough(Exception):
    """Ends a forward pass from within a hook: all that was asked for is there."""


@contextmanager
def stopping_at(model: Model, name: str) -> Iterator[None]:
    """End the forward pass inside at the hook ``name``, behind hooks registered there before; whole if it stays silent."""

    def stop(output: Tensor, hook: Any) -> None:
        raise _Enough

    undo = put_hook(resolve(model, name), stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        undo()


def collect_sites(
    model: Model, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch pos _"]]:
    """What the hooks ``names`` carry on ``tokens``; layers after the last of them are not run.

    Raises HookFiringError naming a hook that stays silent.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def function(output: Tensor, hook: Any) -> None:
            seen[name] = with_its_layer(model, name, output.detach())
            if len(seen) == len(names):
                raise _Enough

        return function

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(put_hook(resolve(model, name), keep(name)))
        try:
            model(tokens)
        except _Enough:
            return seen
    silent = [name for name in names if name not in seen]
    raise HookFiringError(f"the hook {silent[0]!r} did not fire in a forward pass.")
