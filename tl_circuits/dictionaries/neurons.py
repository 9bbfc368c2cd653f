"""The MLP's own neurons as features: nothing has to be trained, and there is no error term."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import Dictionary, LayerActive
from tl_circuits.dictionaries.matrices import take_rows
from tl_circuits.errors import ArchitectureError, DictionaryError
from tl_circuits.hooks import ACTIVATIONS, MLPWeights, mlp_site, mlp_weights, wholes
from tl_circuits.support.checked import checked, require_model


class Neurons(Dictionary):
    """The neurons of some layers' MLPs as features; :func:`mlp_neurons` makes one of a model.

    A graph needs features that read the stream linearly, and neurons do not. So on each prompt the ratio
    ``r = act(g)/g`` of the nonlinearity is frozen. An ungated neuron ``h = act(g)``, with ``g = x·W_in + b_in``, is
    then ``r · (x·W_in + b_in)``. A gated one ``h = act(g)·u``, with ``u = x·W_in + b_in`` and ``g = x·W_gate +
    b_gate``, is ``½ r · (u·g(x) + g·u(x))``: each of the two factors is held once while the other varies, so each gets
    half of the credit. At the prompt itself both are exactly ``h``. docs/method.md, "Neurons as features".
    """

    exact = True

    def __init__(self, weights: dict[int, MLPWeights], outputs: dict[int, str] | None = None):
        self.name = "mlp neurons"
        self._at, self._outputs = weights, outputs or {}
        act_fn = next(iter(weights.values())).act_fn
        if act_fn not in ACTIVATIONS:
            raise ArchitectureError(
                f"the MLP's activation {act_fn!r} is not one of {', '.join(ACTIVATIONS)}, so its "
                "neurons cannot serve as features. Attach transcoders instead."
            )
        self._act = ACTIVATIONS[act_fn]

    @property
    def layers(self) -> Sequence[int]:
        return tuple(self._at)

    def width(self, layer: int) -> int:
        return self._at[layer].W_in.shape[1]

    def input_hook(self, layer: int) -> str:
        return f"blocks.{layer}.mlp.hook_in"

    def output_hook(self, layer: int) -> str:
        return f"blocks.{layer}.{self._outputs.get(layer, 'mlp.hook_out')}"

    def check(self, model: Any) -> None:
        """Nothing to check: the weights are the model's own."""

    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """What the nonlinearity reads: the gate's value where there is a gate."""
        w = self._at[layer]
        if w.W_gate is None:
            return x.float() @ w.W_in.float() + w.b_in.float()
        g = x.float() @ w.W_gate.float()
        return g if w.b_gate is None else g + w.b_gate.float()

    def activate(
        self, layer: int, pre: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        w = self._at[layer]
        h = self._act(pre)
        return h if w.W_gate is None else h * (x.float() @ w.W_in.float() + w.b_in.float())

    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        w = self._at[layer]
        return acts[layer].float() @ w.W_out.float() + w.b_out.float()

    def active(self, layer: int, x: Float[Tensor, "pos d_in"]) -> LayerActive:
        acts = self.activate(layer, self.pre_activations(layer, x), x)
        position, feature = acts.nonzero(as_tuple=True)
        value = acts[position, feature]
        return LayerActive(position, feature, value, value)

    def activations_at(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, " n"]:
        w, x = self._at[layer], x.float()
        u = (x * _columns(w.W_in, features)).sum(-1) + take_rows(w.b_in, features)
        if w.W_gate is None:
            return self._act(u)
        g = (x * _columns(w.W_gate, features)).sum(-1)
        return self._act(g if w.b_gate is None else g + take_rows(w.b_gate, features)) * u

    def read_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        w, x = self._at[layer], x.float()
        into, b_in = _columns(w.W_in, features), take_rows(w.b_in, features)
        u = (x * into).sum(-1) + b_in
        if w.W_gate is None:
            r = self._ratio(u)
            return r[:, None] * into, r * b_in
        gate = _columns(w.W_gate, features)
        b_gate = b_in.new_zeros(b_in.shape) if w.b_gate is None else take_rows(w.b_gate, features)
        g = (x * gate).sum(-1) + b_gate
        half = 0.5 * self._ratio(g)
        vectors = half[:, None] * (u[:, None] * gate + g[:, None] * into)
        return vectors, half * (u * b_gate + g * b_in)

    def weighted_reads(
        self, layer: int, active: LayerActive, weight: Float[Tensor, " n"], x: Float[Tensor, "pos d_in"]
    ) -> Float[Tensor, "pos d_in"]:
        # Nearly all neurons are active, so products with whole matrices are faster than gathered columns.
        w, x = self._at[layer], x.float()
        dense = x.new_zeros(x.shape[0], self.width(layer)).index_put((active.position, active.feature), weight)
        u = x @ w.W_in.float() + w.b_in.float()
        if w.W_gate is None:
            return (dense * self._ratio(u)) @ w.W_in.float().T
        g = self.pre_activations(layer, x)
        half = 0.5 * dense * self._ratio(g)
        return (half * u) @ w.W_gate.float().T + (half * g) @ w.W_in.float().T

    def silent_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        """What the nonlinearity reads: a silent neuron's ratio is 0, which would say nothing about why."""
        w = self._at[layer]
        matrix, bias = (w.W_in, w.b_in) if w.W_gate is None else (w.W_gate, w.b_gate)
        vectors = _columns(matrix, features)
        return vectors, vectors.new_zeros(len(vectors)) if bias is None else take_rows(bias, features)

    def _ratio(self, g: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The ratio ``act(g)/g``, or 0 where ``g = 0``: every nonlinearity here is zero there, so nothing is lost."""
        return torch.where(g == 0, torch.zeros_like(g), self._act(g) / torch.where(g == 0, 1.0, g))

    def encoder_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """The gate's direction where there is a gate: it decides whether the neuron fires."""
        w = self._at[layer]
        return _columns(w.W_in if w.W_gate is None else w.W_gate, features)

    def decoder_vectors(self, layer: int, features: Int[Tensor, " n"], target: int) -> Float[Tensor, "n d_out"]:
        return take_rows(self._at[layer].W_out, features)

    def constant(self, layer: int) -> Float[Tensor, " d_out"]:
        return self._at[layer].b_out.float()


def _columns(matrix: Float[Tensor, "d d_mlp"], features: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Columns ``features`` of a matrix, as rows, in float32 and on the device of ``features``."""
    return matrix[:, features.to(matrix.device)].T.float().to(features.device)


@checked
def mlp_neurons(model: Any, layers: Iterable[int] | None = None) -> Neurons:
    """Use the neurons of a model's MLPs as features: a dictionary for any model, without training.

    Neurons rebuild every MLP exactly, so graphs have no error nodes; but more of them are active than features of a
    transcoder, and single neurons are harder to read.

    Args:
        model: any HookedTransformer or TransformerBridge.
        layers: whose neurons; None for all. The other MLPs become error nodes, or are passed
            (``attach(..., mlps="ratio")``).

    Returns:
        The dictionary, for ``tlc.attach``. Feature ``i`` of a layer is neuron ``i``.

    Raises:
        ArchitectureError: the MLPs are mixtures of experts, or have an activation function that is not known.
        DictionaryError: a layer does not exist.
        ArgumentError: ``model`` is not a TransformerLens model.

    Examples:
        >>> model = tlc.load_model("tiny-facts")
        >>> neurons = tlc.mlp_neurons(model)
        >>> neurons.layers, neurons.width(0)
        ((0, 1, 2, 3), 256)
        >>> with tlc.attach(model, neurons) as replacement:
        ...     graph = tlc.attribute(replacement, prompt, max_nodes=20)
        >>> graph.nodes.kind.value_counts().to_dict()  # no error nodes
        {'feature': 20, 'embedding': 9, 'logit': 1}
    """
    require_model("mlp_neurons", model)
    every = range(int(model.cfg.n_layers))
    chosen = sorted(set(every if layers is None else wholes(layers, "layers", DictionaryError)))
    unknown = [layer for layer in chosen if layer not in every]
    if unknown or not chosen:
        raise DictionaryError(
            f"layers={chosen} are not all among the model's layers, 0..{len(every) - 1}; give at least one of them."
        )
    return Neurons(
        {layer: mlp_weights(model, layer) for layer in chosen}, {layer: mlp_site(model, layer) for layer in chosen}
    )
