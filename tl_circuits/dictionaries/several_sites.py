"""Several dictionaries in one layer, such as autoencoders of what attention and the MLP add and of the stream.

Asked about a layer, such a dictionary answers where the layer has one dictionary, and refuses where it has several.
What computes over places (:mod:`tl_circuits.hooks.places`) asks :meth:`SeveralSites.by_place`, which answers to their
numbers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tl_circuits.dictionaries.base import Dictionary, ranges
from tl_circuits.dictionaries.parts import Parts
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import SITES, BlockPlace, Sample, by_place, find, own_site, short_site, sites_of

Owned = tuple[int, Dictionary]
"""A layer, and the dictionary of which it is that layer."""


def _rank(owned: Owned) -> int:
    """Where a layer's dictionary stands in the order of the forward pass; transcoders and neurons stand at the MLP."""
    layer, part = owned
    site = own_site(part, layer) or "hook_mlp_out"
    return SITES.index(site) if site in SITES else len(SITES)  # other sites are refused when the dictionary is attached


def _site(owned: Owned) -> str:
    layer, part = owned
    return short_site(part.output_hook(layer).split(".", 2)[2])


def require_apart(each: Sequence[Owned]) -> None:
    """Raise DictionaryError where two dictionaries stand at one site, or two stand for one MLP."""
    taken: dict[tuple[int, int], Dictionary] = {}
    for layer, part in each:
        other = taken.setdefault((layer, _rank((layer, part))), part)
        if other is part:
            continue
        ours, theirs = part.output_hook(layer), other.output_hook(layer)
        mlp = own_site(part, layer) is None or own_site(other, layer) is None
        what = (
            f"layer {layer} would have two dictionaries of its MLP, at {theirs} and {ours}"
            if mlp
            else (f"two dictionaries are at one site, {ours}")
        )
        raise DictionaryError(
            f"{what}: {other.name!r} and {part.name!r}. Give layers= to take each for some layers only."
        )


def refuse_several(dictionary: Dictionary, what: str) -> None:
    """Raise DictionaryError if some layer of ``dictionary`` has several; ``what`` was asked for, with its verb."""
    if by_place(dictionary) is not dictionary:
        raise DictionaryError(
            f"{what} layer by layer, and layers of {dictionary.name!r} have several dictionaries. Attach one for "
            "each layer."
        )


class SeveralSites(Parts):
    """Dictionaries of which several may be of one layer; :func:`combined` makes one.

    ``owned``: each layer of each dictionary. ``places``: where they stand, in the order of the forward pass; layers
    without a dictionary have a place too, so that a place's index is its number.
    """

    def __init__(self, owned: Sequence[Owned], name: str):
        self.owned: tuple[Owned, ...] = tuple(sorted(owned, key=lambda one: (one[0], _rank(one))))
        self.name = name
        self.exact = all(part.exact for _, part in self.owned)
        counts = Counter(layer for layer, _ in self.owned)
        self._at: dict[int, Owned] = {}
        found: list[BlockPlace] = []
        for layer, part in self.owned:
            found += [BlockPlace(free, "") for free in range(found[-1].layer + 1 if found else 0, layer)]
            self._at[len(found)] = layer, part
            found.append(BlockPlace(layer, _site((layer, part)) if counts[layer] > 1 else ""))
        self.places: tuple[BlockPlace, ...] = tuple(found)

    def by_place(self) -> "ByPlace":
        """The same dictionaries, answering to numbers of places instead of layers."""
        return ByPlace(self, self._at)

    @property
    def layers(self) -> Sequence[int]:
        return tuple(dict.fromkeys(layer for layer, _ in self.owned))

    def _part(self, layer: int) -> tuple[Dictionary, int]:
        here = [part for at, part in self.owned if at == layer]
        if not here:
            raise DictionaryError(f"layer {layer} has no dictionary; {self.name} has {ranges(self.layers)}.")
        if len(here) > 1:
            raise DictionaryError(
                f"layer {layer} has several dictionaries ({', '.join(sites_of(self, layer))}), and this works only for "
                f"layers with one. Attach a single dictionary for layer {layer}."
            )
        return here[0], layer

    def _all(self) -> Sequence[Dictionary]:
        return tuple(part for _, part in self.owned)

    def check(self, model: Any) -> None:
        """Raise DictionaryError or NotFiniteError where a part does not fit ``model``, or two meet at one hook."""
        super().check(model)
        taken: dict[int, str] = {}
        for layer, part in self.owned:
            for name in dict.fromkeys((part.output_hook(layer), part.input_hook(layer))):
                point = find(model, name)
                if id(point) in taken:
                    raise DictionaryError(
                        f"{taken[id(point)]} and {name} are the same hook point of this model, and only one dictionary "
                        "can use it. Leave one out."
                    )
                if point is not None:
                    taken[id(point)] = name

    def placed(self, devices: Mapping[int, torch.device]) -> "SeveralSites":
        moved = {id(part): part.placed({layer: devices[layer] for layer in part.layers}) for part in self._each()}
        if all(moved[id(part)] is part for part in self._each()):
            return self
        made = SeveralSites([(layer, moved[id(part)]) for layer, part in self.owned], self.name)
        made.prompt_rule, made.mlps = self.prompt_rule, self.mlps
        return made

    def sample(self) -> Sample:
        found: list[tuple[str, tuple[float, ...]]] = []
        for number, (layer, part) in self._at.items():
            at = f" at {self.places[number].site}" if self.places[number].site else ""
            entries = (
                part.layer_sample(layer)
                if isinstance(part, TranscoderSet)
                else ((f"{part.name} of layer {layer}", ()),)
            )
            found += [(name + at, values) for name, values in entries]
        return tuple(found)


class ByPlace(Parts):
    """The dictionaries of a :class:`SeveralSites`; ``layers`` and all questions are numbers of places."""

    def __init__(self, whole: SeveralSites, at: Mapping[int, Owned]):
        self._whole, self._at, self._numbers = whole, at, tuple(at)
        self.name, self.exact, self.places = whole.name, whole.exact, whole.places
        self.prompt_rule, self.mlps = whole.prompt_rule, whole.mlps

    @property
    def layers(self) -> Sequence[int]:
        return self._numbers

    def _part(self, layer: int) -> tuple[Dictionary, int]:
        own, part = self._at[layer]
        return part, own

    def _all(self) -> Sequence[Dictionary]:
        return tuple(part for _, part in self._at.values())

    def check(self, model: Any) -> None:
        """As :meth:`SeveralSites.check`."""
        self._whole.check(model)

    def sample(self) -> Sample:
        return self._whole.sample()
