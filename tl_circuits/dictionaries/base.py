"""The interface of all dictionaries: features that read and write the residual stream linearly."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from tl_circuits.errors import DictionaryError, NotFiniteError
from tl_circuits.hooks import MODELS_OWN, PromptRule, Sample


def rows_at_once(d: int, device: torch.device) -> int:
    """How many rows of ``d`` numbers to gather at once: 4 MB on a CPU, 256 MB on a GPU.

    The former stay in a processor's cache; a GPU waits for every launch.
    """
    return max(1, (2**20 if device.type == "cpu" else 2**26) // d)


def add_by_position(
    total: Float[Tensor, "pos d"], position: Int[Tensor, " n"], rows: Float[Tensor, "n d"], weight: Float[Tensor, " n"]
) -> None:
    """Add each row, times its weight, to ``total`` at its position; positions are in ascending order.

    On a GPU, ``index_add_`` sums in whatever order threads come, and the last bits differ from run to run. There the
    rows of a position are summed as a bag, which has an order.
    """
    if total.device.type == "cpu":
        total.index_add_(0, position, rows * weight[:, None])
        return
    starts = torch.searchsorted(position.contiguous(), torch.arange(len(total), device=position.device))
    numbers = torch.arange(len(rows), device=rows.device)
    total += embedding_bag(numbers, rows, starts, per_sample_weights=weight.to(rows.dtype), mode="sum")


@dataclass(frozen=True)
class LayerActive:
    """The active features of one layer on one prompt, sorted by position, then feature.

    ``pre`` is what a graph's edges to the feature add up to: its pre-activation (for a neuron, the activation itself).
    ``activation`` is what its decoder vector is multiplied by. ``baseline`` is the mean activation on other prompts, if
    the graph is a contrast with them; features that are active only there are listed as well, with activation 0.
    ``scale``: a further factor of what each writes, for autoencoders that normalise their input; None if there is none.
    """

    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    pre: Float[Tensor, " n"]
    activation: Float[Tensor, " n"]
    baseline: Float[Tensor, " n"] | None = None
    scale: Float[Tensor, " n"] | None = None

    @property
    def counted(self) -> Float[Tensor, " n"]:
        """The activation that counts as the feature's own: all of it, or what differs from the baseline.

        Times this, its decoder vector is what the feature writes.
        """
        counted = self.activation if self.baseline is None else self.activation - self.baseline
        return counted if self.scale is None else counted * self.scale

    def to(self, device: torch.device) -> "LayerActive":
        """The same on another device."""
        return self._each(lambda column: column.to(device))

    def __getitem__(self, index: Tensor) -> "LayerActive":
        return self._each(lambda column: column[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "LayerActive":
        baseline, scale = (None if column is None else change(column) for column in (self.baseline, self.scale))
        found = change(self.position), change(self.feature), change(self.pre), change(self.activation)
        return LayerActive(*found, baseline, scale)


class Dictionary(ABC):
    """Features that replace the MLPs of some layers, or (autoencoders) tensors at other sites of the model.

    ``exact``: whether the features rebuild the MLPs exactly, so that there are no error terms. ``prompt_rule``: which
    special token is put before a text, and which first positions get no features. ``mlps``: what becomes of MLPs that
    no dictionary replaces: an ``"error"`` node at each position, or passed with their activation ``"ratio"`` held.
    """

    name: str
    exact: bool = False
    prompt_rule: PromptRule = MODELS_OWN
    mlps: Literal["error", "ratio"] = "error"

    def with_prompt_rule(self, rule: PromptRule) -> "Dictionary":
        """The same dictionary with another prompt rule (see :class:`PromptRule`)."""
        made = copy(self)
        made.prompt_rule = rule
        return made

    def with_mlps(self, mlps: Literal["error", "ratio"]) -> "Dictionary":
        """The same dictionary with another rule for MLPs that no dictionary replaces; itself if it has that rule."""
        if mlps == self.mlps:
            return self
        made = copy(self)
        made.mlps = mlps
        return made

    def by_place(self) -> "Dictionary":
        """The same dictionary, answering to numbers of places (see :mod:`tl_circuits.hooks.places`) instead of layers.

        These are the same unless some layer has several dictionaries.
        """
        return self

    @property
    @abstractmethod
    def layers(self) -> Sequence[int]:
        """The layers that have features, ascending."""

    def is_exact(self, layer: int) -> bool:
        """Whether the features of a layer rebuild its MLP exactly, so that there is no error term."""
        return self.exact

    @abstractmethod
    def width(self, layer: int) -> int:
        """How many features layer ``layer`` has."""

    @abstractmethod
    def input_hook(self, layer: int) -> str:
        """Full name of the hook whose tensor the encoder reads."""

    @abstractmethod
    def output_hook(self, layer: int) -> str:
        """Full name of the hook whose tensor the decoders write to."""

    def writers(self, layer: int) -> Sequence[int]:
        """The layers whose features write to the output of ``layer``: itself, or several if cross-layer."""
        return (layer,)

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise DictionaryError or NotFiniteError where the dictionary does not fit ``model``."""

    def placed(self, devices: Mapping[int, torch.device]) -> "Dictionary":
        """The same dictionary with each layer on its device; itself if everything is there already."""
        return self

    @abstractmethod
    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Pre-activations of every feature of a layer."""

    @abstractmethod
    def activate(
        self, layer: int, pre: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        """Activations of every feature of a layer, from pre-activations and the encoder's input."""

    @abstractmethod
    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction at layer ``layer`` from its writers' activations, skip and bias included."""

    @abstractmethod
    def active(self, layer: int, x: Float[Tensor, "pos d_in"]) -> LayerActive:
        """The features of a layer that are active on ``x``."""

    def activations_at(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, " n"]:
        """The activation of ``features[i]`` at input ``x[i]``, without computing the other features if possible."""
        acts = self.activate(layer, self.pre_activations(layer, x), x)
        return acts[torch.arange(len(features), device=acts.device), features]

    @abstractmethod
    def read_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        """Vectors ``v`` and biases ``b`` such that ``v·x + b`` is the feature's ``pre`` at input ``x``."""

    def weighted_reads(
        self, layer: int, active: LayerActive, weight: Float[Tensor, " n"], x: Float[Tensor, "pos d_in"]
    ) -> Float[Tensor, "pos d_in"]:
        """The sum at each position of what active features read (:meth:`read_vectors`), times ``weight``."""
        total = torch.zeros_like(x, dtype=torch.float32)
        step = rows_at_once(x.shape[1], x.device)
        for start in range(0, active.feature.numel(), step):
            part = slice(start, start + step)
            position = active.position[part]
            vectors, _ = self.read_vectors(layer, active.feature[part], x[position])
            add_by_position(total, position, vectors, weight[part])
        return total

    def silent_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        """As :meth:`read_vectors`, for features that are silent at ``x``: the linear function that kept them silent."""
        return self.read_vectors(layer, features, x)

    @abstractmethod
    def encoder_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """The direction of the input to which each feature responds, the same on all prompts."""

    @abstractmethod
    def decoder_vectors(self, layer: int, features: Int[Tensor, " n"], target: int) -> Float[Tensor, "n d_out"]:
        """What one unit of activation of each feature writes to layer ``target``'s output."""

    def output_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
        """What one unit of activation of each feature writes in all, summed over the layers it writes to."""
        return self.decoder_vectors(layer, features, layer)

    @abstractmethod
    def constant(self, layer: int) -> Float[Tensor, " d_out"]:
        """What is written to the output of ``layer`` on every input: the decoder bias."""

    def constant_on(self, layer: int, x: Float[Tensor, "pos d_in"]) -> Float[Tensor, "pos d_out"]:
        """What is written on the inputs ``x`` whatever the features do: :meth:`constant`, at each position."""
        constant = self.constant(layer)
        return constant.expand(len(x), len(constant))

    def written_scale(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"] | None:
        """The factor of all that features write at inputs ``x``; None, for 1, unless the input is normalised."""
        return None

    def skip(self, layer: int) -> Float[Tensor, "d_out d_in"] | None:
        """The linear skip from a layer's input to its output, if it has one."""
        return None

    def sample(self) -> Sample:
        """A few numbers from the weights, by which the dictionary is recognised; empty if it has no own weights."""
        return ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, layers {ranges(self.layers)})"


def require_layers(layers: Sequence[int], n_layers: int) -> None:
    """Raise DictionaryError unless all of ``layers`` are in the model."""
    if layers[-1] >= n_layers:
        raise DictionaryError(f"layer {layers[-1]} does not exist: the model has layers 0..{n_layers - 1}.")


def gaps(layers: Sequence[int]) -> list[int]:
    """The layers that are missing between the first and the last."""
    return sorted(set(range(min(layers), max(layers))) - set(layers))


def ranges(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0..2, 5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}" if len(p) == 1 else f"{p[0]}..{p[-1]}" for p in parts)


def require_shape(layer: int, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise DictionaryError naming layer and both shapes unless they agree."""
    if tuple(tensor.shape) != expected:
        raise DictionaryError(f"layer {layer}: {name} has shape {tuple(tensor.shape)}, expected {expected}.")


def require_finite(layer: int, name: str, tensor: Tensor) -> None:
    """Raise NotFiniteError naming layer and tensor if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NotFiniteError(f"layer {layer}: {name} holds NaN or infinity.")
