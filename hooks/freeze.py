"""A differentiable forward pass with attention patterns and norm denominators held: gradients are direct effects."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .expected_warnings import edits_expected
from .holding import Holds, hold_hooks
from .record import Listener
from .sites import Model, model_device
from .turn import added_hooks, in_turn


@in_turn
def differentiable_run(
    model: Model,
    tokens: Int[Tensor, " pos"],
    holds: Holds,
    values: Mapping[str, Tensor],
    replaced: list[tuple[str, Callable[[Tensor], Tensor]]],
    wanted: list[str],
) -> dict[str, Float[Tensor, "pos _"]]:
    """Run the model with gradients, while attention patterns and norm denominators are held fixed.

    Between MLPs the model is linear then, so the gradient of a later tensor by an earlier one is the direct effect of
    the earlier one, per unit (Ameisen et al. 2025). It works inside ``torch.no_grad`` and ``torch.inference_mode``.

    Args:
        model: the model.
        tokens: ``[pos]``.
        holds: how patterns and denominators can be held on this model, from ``replacement.holds(tokens)``.
        values: what they are held at, by hook name, such as ``Recording.held``.
        replaced: hook names with functions of the tensor there, ``[1, pos, d]``, applied in order.
        wanted: the hooks whose tensors are returned.

    Returns:
        The tensors of the wanted hooks, ``[pos, d]``.

    Examples:
        >>> import torch
        >>> tokens = tlc.hooks.to_tokens(model, prompt)
        >>> recording = tlc.hooks.record(model, tokens, position=-1)
        >>> leaf = recording.mlp_out[0][None].clone().requires_grad_()  # in place of layer 0's MLP output
        >>> seen = tlc.hooks.differentiable_run(
        ...     model, tokens, replacement.holds(tokens), recording.held,
        ...     replaced=[("blocks.0.hook_mlp_out", lambda tensor: leaf)], wanted=["ln_final.hook_in"],
        ... )
        >>> (gradient,) = torch.autograd.grad(seen["ln_final.hook_in"][-1, 0], leaf)
        >>> gradient.shape  # how the last stream's first entry depends on that output, at each position
        torch.Size([1, 9, 96])
    """
    with torch.inference_mode(False), torch.enable_grad(), edits_expected():
        # Clones, because autograd refuses tensors made in inference mode.
        held = {name: value.clone() for name, value in values.items()}
        hooks = hold_hooks(model, holds, held)
        hooks += [(name, _on_tensor(f)) for name, f in replaced]
        with added_hooks(model, hooks), Listener(model, wanted) as listener:
            model(tokens.clone()[None].to(model_device(model)))
        listener.check()
        return {name: tensor[0] for name, tensor in listener.seen.items()}


def _on_tensor(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, HookPoint], Tensor]:
    return lambda tensor, hook: function(tensor)
