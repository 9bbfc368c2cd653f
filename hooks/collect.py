"""Collect the tensors of named hooks, without running the model further than needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import HookFiringError
from .owned import put_hook
from .repeatable import require_repeatable
from .sites import Model, model_device, resolve, with_its_layer
from .turn import in_turn


class _Enough(Exception):
    """Raised inside a hook to end the forward pass early, once everything asked for has been seen."""


@contextmanager
def stopping_at(model: Model, name: str) -> Iterator[None]:
    """Stop the forward pass when hook ``name`` fires, after hooks registered earlier.

    If it never fires, the pass runs to its end.
    """

    def stop(output: Tensor, hook: Any) -> None:
        raise _Enough

    undo = put_hook(resolve(model, name), stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        undo()


@in_turn
def collect_sites(
    model: Model, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch pos *_"]]:
    """The tensors of the hooks ``names`` on a batch of tokens; layers after the last of them are not run.

    Args:
        model: the model.
        tokens: ``[batch, pos]``.
        names: full hook names.

    Returns:
        The tensors by name, without gradients.

    Raises:
        UnknownHookError: the model does not have a hook.
        HookFiringError: a hook does not fire.

    Examples:
        >>> tokens = model.to_tokens(["Dallas is in", "Miami is in"])
        >>> seen = tlc.hooks.collect_sites(model, tokens, ["blocks.1.mlp.hook_in"])
        >>> seen["blocks.1.mlp.hook_in"].shape  # [batch, pos, d_model]
        torch.Size([2, 4, 96])
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def function(output: Tensor, hook: Any) -> None:
            seen[name] = with_its_layer(model, name, output.detach())
            if len(seen) == len(names):
                raise _Enough

        return function

    require_repeatable(model)
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(put_hook(resolve(model, name), keep(name)))
        try:
            model(tokens.to(model_device(model)))
        except _Enough:
            return seen
    silent = [name for name in names if name not in seen]
    raise HookFiringError(f"the hook {silent[0]!r} did not fire in a forward pass.")
