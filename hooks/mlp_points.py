"""The two points ``blocks.L.mlp.hook_in`` and ``.hook_out``, on models that do not have or do not fire them."""

from threading import get_ident

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .owned import put_lasting_hook, put_module_hook, register_point
from .sites import Model, find, mlp_module


def add_mlp_points(model: Model, layer: int) -> None:
    """Make ``blocks.L.mlp.hook_in`` and ``.hook_out`` exist and fire, until everything of ours is taken off the model.

    TransformerBridge has both points; but if the Hugging Face block has no MLP module and holds its two matrices itself
    (OPT, XGLM), neither fires, so they are fired by the input of the first matrix and the output of the second.
    HookedTransformer has neither (SAELens' subclass has ``hook_in``); what is missing is created and fired by the MLP
    module's own forward hooks.

    Raises:
        ArchitectureError: the block has no MLP.
    """
    prefix = f"blocks.{layer}.mlp"
    mlp = mlp_module(model, layer)
    missing = [end for end in ("hook_in", "hook_out") if find(model, f"{prefix}.{end}") is None]
    if not missing:
        inner = [find(model, f"{prefix}.{part}") for part in ("in.hook_in", "out.hook_out")]
        points = [point for point in inner if point is not None]
        # A bridge's placeholder, which never runs, has no name.
        if getattr(mlp, "name", prefix) is None and len(points) == len(inner):
            for point, outer in zip(points, (mlp.hook_in, mlp.hook_out), strict=True):
                _fire_along(outer, point)
        return
    for attribute in missing:
        register_point(model, f"{prefix}.{attribute}", mlp, attribute)
    if "hook_in" in missing:
        put_module_hook(mlp, lambda mod, args: (mod.hook_in(args[0]), *args[1:]), before=True, lasting=True)
    if "hook_out" in missing:
        put_module_hook(mlp, lambda mod, args, output: mod.hook_out(output), lasting=True)


def _fire_along(outer: HookPoint, inner: HookPoint) -> None:
    """Fire ``outer`` whenever ``inner`` fires, unless the model has just done so itself (transformer_lens 4)."""
    fired: set[int] = set()  # the threads in which it has; several may run the model at once

    def note(module: torch.nn.Module, args: object, output: Tensor) -> None:
        fired.add(get_ident())

    def fire(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        result = None if get_ident() in fired else outer(tensor)
        fired.discard(get_ident())
        return result

    put_module_hook(outer, note, lasting=True)
    put_lasting_hook(inner, fire)
