"""An MLP with its activation ratios held: an affine map of its input, exact on the prompt.

With ``r = act(g)/g`` held, an ungated neuron is ``r (x·W_in + b_in)``. A gated neuron ``act(g)·u`` is
``½ r (u·g(x) + g·u(x))``: each factor is held once while the other varies, so each gets half of the credit. These are
the rules by which :class:`tl_circuits.dictionaries.neurons.Neurons` reads neurons (docs/method.md, "Neurons as
features"); here the neurons are no nodes, and what they carry goes on to whatever wrote the MLP's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import ArchitectureError
from .sites import ACTIVATIONS, MLPWeights, Model, mlp_weights
from .tolerances import largest_gap, rounding_within

FLOATS_AT_ONCE = 2**24  # of the neurons' gradients, 64 MB
_SMALLEST = 1e-5  # positions smaller than this share of the largest are compared with it


@dataclass(frozen=True, eq=False)
class HeldMLP:
    """One MLP on one prompt: ``y[p] = (a[p] · (x W_gate) + c[p] · (x W_in)) W_out`` plus a constant.

    ``by_gate`` is ``a = ½ r u`` (None without a gate) and ``by_in`` is ``c = ½ r g`` (``r`` without a gate). Both are
    zero at skipped positions, where the whole output is a constant.
    """

    weights: MLPWeights
    by_gate: Float[Tensor, "pos d_mlp"] | None
    by_in: Float[Tensor, "pos d_mlp"]

    def linear(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """The part of the output that is linear in the input."""
        w, x = self.weights, x.float()
        hidden = self.by_in * (x @ w.W_in.float())
        if self.by_gate is not None and w.W_gate is not None:
            hidden = hidden + self.by_gate * (x @ w.W_gate.float())
        return hidden @ w.W_out.float()

    def linear_at(self, x: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """The same for single vectors; row ``i`` stands at ``positions[i]``."""
        w = self.weights
        hidden = self.by_in[positions] * (x @ w.W_in.float())
        if self.by_gate is not None and w.W_gate is not None:
            hidden = hidden + self.by_gate[positions] * (x @ w.W_gate.float())
        return hidden @ w.W_out.float()

    def transpose(self, g: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Gradients at the input, from gradients at the output; row ``i`` stands at ``positions[i]``."""
        w = self.weights
        out, W_in = w.W_out.float(), w.W_in.float()
        W_gate = None if w.W_gate is None else w.W_gate.float()
        parts = []
        step = max(1, FLOATS_AT_ONCE // out.shape[0])
        for some, where in zip(g.split(step), positions.split(step), strict=True):
            hidden = some @ out.T
            below = (hidden * self.by_in[where]) @ W_in.T
            if self.by_gate is not None and W_gate is not None:
                below.addmm_(hidden * self.by_gate[where], W_gate.T)
            parts.append(below)
        return torch.cat(parts) if parts else g


def held_mlp(
    model: Model,
    layer: int,
    x: Float[Tensor, "pos d_model"],
    output: Float[Tensor, "pos d_model"],
    skipped: Sequence[int],
) -> HeldMLP:
    """The MLP of ``layer`` with the ratios that it has on ``x``, compared with its own ``output``.

    Args:
        model: the model.
        layer: the layer.
        x: what the MLP reads (``mlp.hook_in``), without a batch axis.
        output: what its last matrix gives.
        skipped: positions at which the whole output counts as constant.

    Raises:
        ArchitectureError: the MLP is a mixture of experts, or its formula gives another output than the model.
    """
    w, x = mlp_weights(model, layer), x.float()
    if w.act_fn not in ACTIVATIONS:
        raise ArchitectureError(
            f"layer {layer}: the MLP's activation {w.act_fn!r} is not one of {', '.join(ACTIVATIONS)}, so the MLP "
            "cannot be passed with its ratios held. Attach a transcoder for this layer."
        )
    act = ACTIVATIONS[w.act_fn]
    u = x @ w.W_in.float() + w.b_in.float()
    g = u if w.W_gate is None else x @ w.W_gate.float() + (0.0 if w.b_gate is None else w.b_gate.float())
    hidden = act(g) if w.W_gate is None else act(g) * u
    _require_same(layer, hidden @ w.W_out.float() + w.b_out.float(), output)
    # Every nonlinearity here is zero at zero, so nothing is lost where the ratio is not defined.
    ratio = torch.where(g == 0, 0.0, act(g) / torch.where(g == 0, 1.0, g))
    kept = torch.ones(len(x), 1, device=x.device)
    kept[list(skipped)] = 0.0
    if w.W_gate is None:
        return HeldMLP(w, None, ratio * kept)
    half = 0.5 * ratio * kept
    return HeldMLP(w, half * u, half * g)


def _require_same(layer: int, ours: Tensor, models: Tensor) -> None:
    gap = largest_gap(ours - models.float(), models.float(), _SMALLEST)
    if not gap <= rounding_within(models.dtype):
        raise ArchitectureError(
            f"layer {layer}: the MLP's weights give another output than the model (off by {gap:.1%}), so this MLP is "
            "not of a form that can be passed with its ratios held. Attach a transcoder for this layer."
        )
