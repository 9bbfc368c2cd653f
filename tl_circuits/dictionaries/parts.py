"""What all dictionaries made of several have in common: each question goes to the part that knows the answer."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import Dictionary, LayerActive, ranges
from tl_circuits.hooks import Sample


class Parts(Dictionary):
    """A dictionary made of others. None of them is cross-layer."""

    @abstractmethod
    def _part(self, layer: int) -> tuple[Dictionary, int]:
        """The part that answers about ``layer``, and the layer by which the part knows it."""

    @abstractmethod
    def _all(self) -> Sequence[Dictionary]:
        """All parts, one for each question that may be asked; a part may stand several times."""

    def _each(self) -> list[Dictionary]:
        return list({id(part): part for part in self._all()}.values())

    def sample(self) -> Sample:
        found: list[tuple[str, tuple[float, ...]]] = []
        for part in self._each():
            own: Callable[[], Sample] = part.sample
            found += own() or [(f"{part.name} of the layers {ranges(part.layers)}", ())]
        return tuple(found)

    def is_exact(self, layer: int) -> bool:
        part, own = self._part(layer)
        return part.is_exact(own)

    def width(self, layer: int) -> int:
        part, own = self._part(layer)
        return part.width(own)

    def input_hook(self, layer: int) -> str:
        part, own = self._part(layer)
        return part.input_hook(own)

    def output_hook(self, layer: int) -> str:
        part, own = self._part(layer)
        return part.output_hook(own)

    def check(self, model: Any) -> None:
        """Raise DictionaryError or NotFiniteError where a part does not fit ``model``."""
        for part in self._each():
            part.check(model)

    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        part, own = self._part(layer)
        return part.pre_activations(own, x)

    def activate(
        self, layer: int, pre: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        part, own = self._part(layer)
        return part.activate(own, pre, x)

    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        part, own = self._part(layer)
        return part.decode(own, {own: acts[layer]}, x)

    def active(self, layer: int, x: Float[Tensor, "pos d_in"]) -> LayerActive:
        part, own = self._part(layer)
        return part.active(own, x)

    def activations_at(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, " n"]:
        part, own = self._part(layer)
        return part.activations_at(own, features, x)

    def read_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        part, own = self._part(layer)
        return part.read_vectors(own, features, x)

    def weighted_reads(
        self, layer: int, active: LayerActive, weight: Float[Tensor, " n"], x: Float[Tensor, "pos d_in"]
    ) -> Float[Tensor, "pos d_in"]:
        part, own = self._part(layer)
        return part.weighted_reads(own, active, weight, x)

    def silent_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        part, own = self._part(layer)
        return part.silent_vectors(own, features, x)

    def encoder_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        part, own = self._part(layer)
        return part.encoder_directions(own, features)

    def decoder_vectors(self, layer: int, features: Int[Tensor, " n"], target: int) -> Float[Tensor, "n d_out"]:
        part, own = self._part(layer)
        return part.decoder_vectors(own, features, own)

    def output_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
        part, own = self._part(layer)
        return part.output_directions(own, features)

    def constant(self, layer: int) -> Float[Tensor, " d_out"]:
        part, own = self._part(layer)
        return part.constant(own)

    def constant_on(self, layer: int, x: Float[Tensor, "pos d_in"]) -> Float[Tensor, "pos d_out"]:
        part, own = self._part(layer)
        return part.constant_on(own, x)

    def written_scale(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"] | None:
        part, own = self._part(layer)
        return part.written_scale(own, x)

    def skip(self, layer: int) -> Float[Tensor, "d_out d_in"] | None:
        part, own = self._part(layer)
        return part.skip(own)
