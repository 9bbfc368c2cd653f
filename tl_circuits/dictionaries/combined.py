"""Several dictionaries as one: transcoders, autoencoders and neurons, in layers of their own or at sites of one."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from tl_circuits.dictionaries.base import Dictionary
from tl_circuits.dictionaries.parts import Parts
from tl_circuits.dictionaries.several_sites import SeveralSites, require_apart
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import DictionaryError


def combined(parts: Sequence[Dictionary]) -> Dictionary:
    """One dictionary made of several, which may stand at several sites of one layer.

    Raises:
        DictionaryError: there is none, two stand at one site or for one MLP, or one is a cross-layer transcoder.
    """
    if not parts:
        raise DictionaryError("an empty list of dictionaries was given; give at least one.")
    for part in parts:
        if not isinstance(part, SeveralSites) and any(part.writers(layer) != (layer,) for layer in part.layers):
            raise DictionaryError(f"{part.name} is a cross-layer transcoder, which is taken whole: attach it alone.")
    if len(parts) == 1:
        return parts[0]
    each = [owned for part in parts for owned in _owned(part)]
    require_apart(each)
    name = " + ".join(dict.fromkeys(part.name for part in parts))
    rules = {part.prompt_rule for part in parts}
    sets = [part for part in parts if type(part) is TranscoderSet]
    if len({layer for layer, _ in each}) < len(each):
        made: Dictionary = SeveralSites(each, name)
    elif len(sets) == len(parts):
        layers: dict[int, Transcoder] = {layer: part[layer] for part in sets for layer in part.layers}
        made = TranscoderSet(layers, name, next((part.made_for for part in sets if part.made_for), None))
    else:
        made = Combined(dict(sorted(each)), name)
    # Where parts ask for different first tokens, that of a published set counts: it was trained so.
    rule = next((rule for rule in rules if rule.prepend), parts[0].prompt_rule)
    return made.with_prompt_rule(rule)


def _owned(part: Dictionary) -> list[tuple[int, Dictionary]]:
    """The layers of a dictionary, each with the dictionary itself; one made for several sites is taken apart."""
    return list(part.owned) if isinstance(part, SeveralSites) else [(layer, part) for layer in part.layers]


def one_a_layer(found: Iterable[tuple[int, Any]]) -> list[dict[int, Any]]:
    """Split ``(layer, thing)`` pairs into as few ``{layer: thing}`` as possible, none with a layer twice."""
    sets: list[dict[int, Any]] = []
    for layer, thing in found:
        free = next((one for one in sets if layer not in one), None)
        if free is None:
            sets.append(free := {})
        free[layer] = thing
    return [dict(sorted(one.items())) for one in sets]


def named(dictionary: Dictionary, name: str | None) -> Dictionary:
    """The dictionary under another name, if one is given."""
    if name is None or name == dictionary.name:
        return dictionary
    made = copy(dictionary)
    made.name = name
    return made


class Combined(Parts):
    """Dictionaries of several kinds, each for some layers; :func:`combined` makes one."""

    def __init__(self, parts: Mapping[int, Dictionary], name: str):
        self._parts = dict(parts)
        self.name = name
        self.exact = all(part.exact for part in self._parts.values())

    @property
    def layers(self) -> Sequence[int]:
        return tuple(self._parts)

    def _part(self, layer: int) -> tuple[Dictionary, int]:
        return self._parts[layer], layer

    def _all(self) -> Sequence[Dictionary]:
        return tuple(self._parts.values())

    def placed(self, devices: Mapping[int, torch.device]) -> "Combined":
        moved = {id(part): part.placed({layer: devices[layer] for layer in part.layers}) for part in self._each()}
        if all(moved[id(part)] is part for part in self._each()):
            return self
        made = Combined({layer: moved[id(part)] for layer, part in self._parts.items()}, self.name)
        made.prompt_rule, made.mlps = self.prompt_rule, self.mlps
        return made
