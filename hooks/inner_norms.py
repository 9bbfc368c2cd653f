"""Norms inside attention or an MLP's branch that have no hooks: found by what they compute, and given some.

A TransformerBridge has hooks on the modules that it knows by name. Others (the norm in front of BitNet's
second matrix, that of Gemma 4's router) run inside a Hugging Face module that it takes as a whole.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from .norms import acts_as_norm, has_matrices, is_inner_norm
from .sites import Model, blocks_of, register_point, walk

_WRAPPED = "_original_component"


def inner_norm_points(model: Model) -> ExitStack:
    """Make ``NORM.hook_in`` and ``NORM.hook_out`` exist for the norms in a bridge's blocks that have neither.

    They are gone when the stack that is returned closes.
    """
    with ExitStack() as stack:
        seen: set[int] = set()  # layers may share a module
        for layer, block in enumerate(blocks_of(model)):
            if hasattr(block, "original_component"):
                for name, norm in _without_hooks(model, f"blocks.{layer}", block, seen):
                    _give_points(model, name, norm, stack)
        return stack.pop_all()
    raise AssertionError("unreachable")


def _without_hooks(model: Model, path: str, module: Any, seen: set[int]) -> Iterator[tuple[str, torch.nn.Module]]:
    """The norms below a module that are no bridge's component, by name."""
    # What a component wraps comes last, so that modules go by TransformerLens' names.
    for part, child in sorted(module.named_children(), key=lambda item: item[0] == _WRAPPED):
        if isinstance(child, HookPoint) or id(child) in seen:
            continue
        seen.add(id(child))
        own = f"{path}.{part}"
        if hasattr(child, "original_component") and not has_matrices(child):
            continue  # at most a norm with hooks
        short = own.replace(f".{_WRAPPED}", "")
        name = short if walk(model, short) is child else own
        if is_inner_norm(name) and acts_as_norm(model, name, child):
            yield name, child
        else:
            yield from _without_hooks(model, own, child, seen)


def _give_points(model: Model, name: str, norm: torch.nn.Module, stack: ExitStack) -> None:
    for attribute in ("hook_in", "hook_out"):
        stack.callback(register_point(model, f"{name}.{attribute}", norm, attribute))
    stack.callback(norm.register_forward_pre_hook(_fire_input, with_kwargs=True).remove)
    stack.callback(norm.register_forward_hook(lambda module, args, output: module.hook_out(output)).remove)


def _fire_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (module.hook_in(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: module.hook_in(kwargs[first])}
