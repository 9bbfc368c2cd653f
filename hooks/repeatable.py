"""Whether the model gives the same numbers twice. Graphs and edits compare several runs of it."""

from itertools import chain
from typing import Any

import torch

from .errors import ArchitectureError

_RATES = ("attention_dropout", "dropout", "activation_dropout", "dropout_p", "hidden_dropout")


def require_repeatable(model: Any) -> None:
    """Make sure that runs of the model agree: no values dropped at random, no types other than its weights'.

    Args:
        model: a TransformerLens model.

    Raises:
        ArchitectureError: for dropout in training mode, for autocast, and for a default type other than float32.
    """
    # A TransformerBridge keeps the network that it wraps outside of its own modules, with dropout after the embedding.
    network = getattr(model, "original_model", None)
    for name, module in chain(
        model.named_modules(), network.named_modules() if isinstance(network, torch.nn.Module) else ()
    ):
        if module.training and (rate := _dropout(module)):
            raise ArchitectureError(
                f"the model is in training mode, and {name or 'the model'} drops {rate:.0%} of its values at random, "
                "so no two runs agree. Call model.eval() first."
            )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ArchitectureError(
            "autocast is on, which rounds between the model's own steps, so the sums of a graph would not hold. "
            "Leave the autocast block, or open the model with dtype=torch.bfloat16."
        )
    if torch.get_default_dtype() != torch.float32:
        raise ArchitectureError(
            f"torch's default type is {torch.get_default_dtype()}, expected torch.float32. Call "
            "torch.set_default_dtype(torch.float32); a model may be in float64 all the same."
        )


def _dropout(module: Any) -> float:
    """The share of values that a module drops in training mode; 0 for none."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p
    found = [value for rate in _RATES if isinstance(value := getattr(module, rate, None), float)]
    return max(found, default=0.0)
