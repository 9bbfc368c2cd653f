"""Find norms inside attention and MLPs that have no hooks, by what they compute, and give them hooks.

A TransformerBridge has hooks on the modules that it knows by name. Other norms (the one before BitNet's second matrix,
the one of Gemma 4's router) run inside a Hugging Face module that the bridge uses as a whole.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from .norms import acts_as_norm, has_matrices, is_inner_norm
from .owned import put_module_hook, register_point
from .sites import Model, blocks_of, walk

_WRAPPED = "_original_component"


def add_inner_norm_points(model: Model) -> None:
    """Make ``NORM.hook_in`` and ``NORM.hook_out`` exist for the norms in a bridge's blocks that have no hooks.

    They stay until everything of ours is taken off the model.
    """
    seen: set[int] = set()  # layers may share a module
    for layer, block in enumerate(blocks_of(model)):
        if hasattr(block, "original_component"):
            for name, norm in _without_hooks(model, f"blocks.{layer}", block, seen):
                _give_points(model, name, norm)


def _without_hooks(model: Model, path: str, module: Any, seen: set[int]) -> Iterator[tuple[str, torch.nn.Module]]:
    """The norms inside a module that the bridge has no component for, with their names."""
    # Wrapped Hugging Face modules come last, so that a module found both ways gets TransformerLens' name.
    for part, child in sorted(module.named_children(), key=lambda item: item[0] == _WRAPPED):
        if isinstance(child, HookPoint) or id(child) in seen:
            continue
        seen.add(id(child))
        own = f"{path}.{part}"
        if hasattr(child, "original_component") and not has_matrices(child):
            continue  # a component without matrices can only be a norm, which has hooks already
        short = own.replace(f".{_WRAPPED}", "")
        name = short if walk(model, short) is child else own
        if is_inner_norm(name) and acts_as_norm(model, name, child):
            yield name, child
        else:
            yield from _without_hooks(model, own, child, seen)


def _give_points(model: Model, name: str, norm: torch.nn.Module) -> None:
    for attribute in ("hook_in", "hook_out"):
        register_point(model, f"{name}.{attribute}", norm, attribute)
    put_module_hook(norm, _fire_input, before=True, with_kwargs=True, lasting=True)
    put_module_hook(norm, lambda module, args, output: module.hook_out(output), lasting=True)


def _fire_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the module's first argument, positional or by name, through its ``hook_in``."""
    if args:
        return (module.hook_in(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: module.hook_in(kwargs[first])}
