"""Several dictionaries as one: transcoders, autoencoders and neurons, each for layers of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import Dictionary, LayerActive, ranges
from tl_circuits.dictionaries.transcoders import Transcoder, TranscoderSet
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import Sample


def combined(parts: Sequence[Dictionary]) -> Dictionary:
    """One dictionary made of several that have no layer in common.

    Raises:
        DictionaryError: there is none, two have a layer in common, or one is a cross-layer transcoder.
    """
    if not parts:
        raise DictionaryError("an empty list of dictionaries was given; give at least one.")
    taken: dict[int, Dictionary] = {}
    for part in parts:
        if any(part.writers(layer) != (layer,) for layer in part.layers):
            raise DictionaryError(f"{part.name} is a cross-layer transcoder, which is taken whole: attach it alone.")
        for layer in part.layers:
            _require_free(taken, layer, part)
            taken[layer] = part
    if len(parts) == 1:
        return parts[0]
    name = " + ".join(dict.fromkeys(part.name for part in parts))
    rules = {part.prompt_rule for part in parts}
    sets = [part for part in parts if type(part) is TranscoderSet]
    if len(sets) == len(parts):
        layers: dict[int, Transcoder] = {layer: part[layer] for part in sets for layer in part.layers}
        made: Dictionary = TranscoderSet(layers, name, next((part.made_for for part in sets if part.made_for), None))
    else:
        made = Combined(dict(sorted(taken.items())), name)
    # Where parts ask for different first tokens, that of a published set counts: it was trained so.
    rule = next((rule for rule in rules if rule.prepend), parts[0].prompt_rule)
    return made.with_prompt_rule(rule)


def _require_free(taken: Mapping[int, Dictionary], layer: int, part: Dictionary) -> None:
    if layer not in taken:
        return
    ours, theirs = part.output_hook(layer), taken[layer].output_hook(layer)
    what = f"two dictionaries are at one site, {ours}" if ours == theirs else (
        f"layer {layer} would have two dictionaries, at {theirs} and {ours}, and a graph has one for each layer"
    )
    raise DictionaryError(f"{what}: {taken[layer].name!r} and {part.name!r}. Give layers= to take each for some layers only.")


class Combined(Dictionary):
    """Dictionaries of several kinds, each for some layers; :func:`combined` makes one."""

    def __init__(self, parts: Mapping[int, Dictionary], name: str):
        self._parts = dict(parts)
        self.name = name
        self.exact = all(part.exact for part in self._parts.values())

    def is_exact(self, layer: int) -> bool:
        return self._parts[layer].is_exact(layer)

    @property
    def layers(self) -> Sequence[int]:
        return tuple(self._parts)

    def width(self, layer: int) -> int:
        return self._parts[layer].width(layer)

    def input_hook(self, layer: int) -> str:
        return self._parts[layer].input_hook(layer)

    def output_hook(self, layer: int) -> str:
        return self._parts[layer].output_hook(layer)

    def check(self, model: Any) -> None:
        """Raise DictionaryError or NotFiniteError where a part does not fit ``model``."""
        for part in self._each():
            part.check(model)

    def _each(self) -> list[Dictionary]:
        return list({id(part): part for part in self._parts.values()}.values())

    def placed(self, devices: Mapping[int, torch.device]) -> "Combined":
        moved = {id(part): part.placed({layer: devices[layer] for layer in part.layers}) for part in self._each()}
        if all(moved[id(part)] is part for part in self._each()):
            return self
        made = Combined({layer: moved[id(part)] for layer, part in self._parts.items()}, self.name)
        made.prompt_rule, made.mlps = self.prompt_rule, self.mlps
        return made

    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        return self._parts[layer].pre_activations(layer, x)

    def activate(
        self, layer: int, pre: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        return self._parts[layer].activate(layer, pre, x)

    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        return self._parts[layer].decode(layer, acts, x)

    def active(self, layer: int, x: Float[Tensor, "pos d_in"]) -> LayerActive:
        return self._parts[layer].active(layer, x)

    def activations_at(self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
        return self._parts[layer].activations_at(layer, features, x)

    def read_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        return self._parts[layer].read_vectors(layer, features, x)

    def weighted_reads(
        self, layer: int, active: LayerActive, weight: Float[Tensor, " n"], x: Float[Tensor, "pos d_in"]
    ) -> Float[Tensor, "pos d_in"]:
        return self._parts[layer].weighted_reads(layer, active, weight, x)

    def silent_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        return self._parts[layer].silent_vectors(layer, features, x)

    def encoder_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        return self._parts[layer].encoder_directions(layer, features)

    def decoder_vectors(self, layer: int, features: Int[Tensor, " n"], target: int) -> Float[Tensor, "n d_out"]:
        return self._parts[layer].decoder_vectors(layer, features, target)

    def output_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
        return self._parts[layer].output_directions(layer, features)

    def constant(self, layer: int) -> Float[Tensor, " d_out"]:
        return self._parts[layer].constant(layer)

    def constant_on(self, layer: int, x: Float[Tensor, "pos d_in"]) -> Float[Tensor, "pos d_out"]:
        return self._parts[layer].constant_on(layer, x)

    def written_scale(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"] | None:
        return self._parts[layer].written_scale(layer, x)

    def skip(self, layer: int) -> Float[Tensor, "d_out d_in"] | None:
        return self._parts[layer].skip(layer)

    def sample(self) -> Sample:
        found: list[tuple[str, tuple[float, ...]]] = []
        for part in self._each():
            own: Callable[[], Sample] = part.sample
            found += own() or [(f"{part.name} of the layers {ranges(part.layers)}", ())]
        return tuple(found)
