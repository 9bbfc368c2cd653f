"""One differentiable forward pass with patterns and denominators held, so that gradients are direct effects."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .holding import Holds, edits_expected, hold_hooks
from .record import Listener
from .sites import Model, added_hooks


def differentiable_run(
    model: Model,
    tokens: Int[Tensor, " pos"],
    holds: Holds,
    values: Mapping[str, Tensor],
    replaced: list[tuple[str, Callable[[Tensor], Tensor]]],
    wanted: list[str],
) -> dict[str, Float[Tensor, "pos _"]]:
    """One forward pass with gradients through the model, patterns and denominators held at ``values``.

    ``replaced`` lists hook names with functions of the tensor there ``[1, pos, d]``, applied in order; the
    tensors of the ``wanted`` hooks come back, batch removed. Works inside ``no_grad`` and ``inference_mode``.
    """
    with torch.inference_mode(False), torch.enable_grad(), edits_expected():
        held = {name: value.clone() for name, value in values.items()}  # tensors of inference mode cannot be used here
        hooks = hold_hooks(model, holds, held)
        hooks += [(name, lambda tensor, hook, f=f: f(tensor)) for name, f in replaced]
        with added_hooks(model, hooks), Listener(model, wanted) as listener:
            model(tokens.clone()[None])
        listener.check()
        return {name: tensor[0] for name, tensor in listener.seen.items()}
