"""Freeze a model's patterns and norm denominators, so that gradients are direct effects."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .record import Listener, norm_names
from .sites import Model, resolve


def _detach(tensor: Tensor, hook: HookPoint) -> Tensor:
    return tensor.detach()


def frozen_hooks(model: Model) -> list[tuple[str, Callable[[Tensor, HookPoint], Tensor]]]:
    """Hooks that cut every gradient path through attention patterns and norm denominators."""
    names = [f"{name}.hook_scale" for name in norm_names(model)]
    names += [f"blocks.{layer}.attn.hook_pattern" for layer in range(int(model.cfg.n_layers))]
    return [(name, _detach) for name in names]


@contextmanager
def added_hooks(model: Model, hooks: list[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Put TransformerLens hooks on a model and take exactly these off again."""
    with ExitStack() as stack:
        for name, function in hooks:
            point = resolve(model, name)
            before = list(point.fwd_hooks)
            point.add_hook(function)
            handle = next(h for h in point.fwd_hooks if h not in before)
            stack.callback(_remove, point, handle)
        yield


def _remove(point: HookPoint, handle: Any) -> None:
    handle.hook.remove()
    if handle in point.fwd_hooks:
        point.fwd_hooks.remove(handle)


def differentiable_run(
    model: Model,
    tokens: Int[Tensor, " pos"],
    replaced: list[tuple[str, Callable[[Tensor], Tensor]]],
    wanted: list[str],
) -> tuple[dict[str, Float[Tensor, "pos _"]], Float[Tensor, "pos d_vocab"]]:
    """One forward pass with gradients through the frozen model.

    ``replaced`` lists hook names with functions of the tensor there ``[1, pos, d]``, applied in
    order; the tensors of the ``wanted`` hooks come back, batch removed, with the logits. Works inside ``no_grad`` and
    ``inference_mode``.
    """
    hooks = frozen_hooks(model)
    hooks += [(name, lambda tensor, hook, f=f: f(tensor)) for name, f in replaced]
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        # The bridge warns that an edited denominator leaves the native norm: that is the purpose.
        warnings.simplefilter("ignore", UserWarning)
        with added_hooks(model, hooks), Listener(model, wanted) as listener:
            logits = model(tokens.clone()[None])
        listener.check()
        return {name: tensor[0] for name, tensor in listener.seen.items()}, logits[0]
