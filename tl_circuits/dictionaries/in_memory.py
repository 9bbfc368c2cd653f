"""Apply the options of :func:`load_transcoders` to dictionaries that are in memory already."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from tl_circuits.dictionaries.base import Dictionary
from tl_circuits.dictionaries.cross_layer import CrossLayerTranscoders
from tl_circuits.dictionaries.formats import LayerWeights
from tl_circuits.dictionaries.residency import choose_residency, place
from tl_circuits.dictionaries.saelens import AUTOENCODERS, from_saelens, is_saelens
from tl_circuits.dictionaries.selection import wanted_layers
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import PromptRule, whole


@dataclass(frozen=True)
class Options:
    """The options that a caller gave; None where nothing was given."""

    layers: Iterable[int] | None = None
    input_hook: str | None = None
    output_hook: str | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    residency: str = "auto"
    name: str | None = None
    prompt_rule: PromptRule | None = None

    @property
    def about_weights(self) -> tuple[str, ...]:
        """Those options that only dictionaries made of :class:`Transcoder` can follow."""
        asked = {n: getattr(self, n) is not None for n in ("input_hook", "output_hook", "device", "dtype")}
        asked["residency"] = self.residency != "auto"
        return tuple(name for name, wanted in asked.items() if wanted)


def refuse_publishing_options(what: str, **options: Any) -> None:
    """Raise DictionaryError if an option was given that chooses among published files, since ``what`` is in memory."""
    asked = next((name for name, value in options.items() if value is not None), None)
    if asked is not None:
        raise DictionaryError(
            f"{asked}={options[asked]!r} is about published files, and {what} is in memory already: leave {asked}= out."
        )


def from_layers(source: Mapping[Any, Any], options: Options) -> Dictionary:
    """The dictionary of layers given as SAELens objects or as :class:`Transcoder`."""
    given = {_layer_number(key): value for key, value in source.items()}
    anywhere = all(map(_is_autoencoder, given.values()))
    chosen = {
        layer: given[layer]
        for layer in wanted_layers(options.name or "the set", sorted(given), options.layers, anywhere)
    }
    layers = {layer: _one(layer, value, options) for layer, value in chosen.items()}
    return with_options(TranscoderSet(layers, options.name or "transcoders"), replace(options, layers=None, name=None))


def with_options(dictionary: Dictionary, options: Options) -> Dictionary:
    """``dictionary`` with the options applied; the same object if there are none.

    Raises:
        DictionaryError: an option cannot be applied to it; the message names the option.
    """
    layers = (
        None
        if options.layers is None
        else wanted_layers(dictionary.name, list(dictionary.layers), options.layers, False)
    )
    whole_set = layers is None or list(layers) == list(dictionary.layers)
    if isinstance(dictionary, TranscoderSet) and type(dictionary) in (TranscoderSet, CrossLayerTranscoders):
        if not whole_set and isinstance(dictionary, CrossLayerTranscoders):
            raise DictionaryError(
                f"{dictionary.name} is a cross-layer transcoder, which is taken whole: leave layers= out."
            )
        if not whole_set or options.about_weights:
            dictionary = _remade(dictionary, list(dictionary.layers if layers is None else layers), options)
    elif not whole_set or options.about_weights:
        asked = "layers" if not whole_set else options.about_weights[0]
        raise DictionaryError(
            f"{asked}= cannot be honoured for {dictionary!r}, which is not made of transcoders' tensors: leave it out."
        )
    if options.name is not None and options.name != dictionary.name:
        dictionary = copy(dictionary)
        dictionary.name = options.name
    return dictionary if options.prompt_rule is None else dictionary.with_prompt_rule(options.prompt_rule)


def _remade(dictionary: TranscoderSet, layers: list[int], options: Options) -> TranscoderSet:
    made: dict[int, Transcoder] = {}
    decoders = {}
    for layer in layers:
        hooks = {n: getattr(options, n) or getattr(dictionary[layer], n) for n in ("input_hook", "output_hook")}
        read = LayerWeights(replace(dictionary[layer], **hooks), dictionary.decoder(layer))
        put = _put(dictionary.name, read, options)
        made[layer] = put.transcoder
        if put.decoder is not None:
            decoders[layer] = put.decoder
    remade = TranscoderSet(made, dictionary.name, dictionary.made_for)
    if decoders:
        remade = CrossLayerTranscoders(made, decoders, dictionary.name, dictionary.made_for)
    remade.prompt_rule, remade.mlps = dictionary.prompt_rule, dictionary.mlps
    return remade


def _put(name: str, weights: LayerWeights, options: Options) -> LayerWeights:
    """Weights moved as ``residency`` and ``device`` ask, in ``dtype``; unchanged if none of the three is given."""
    if options.device is None and options.dtype is None and options.residency == "auto":
        return weights
    t = weights.transcoder
    if options.residency == "disk":
        raise DictionaryError(
            f'residency="disk" needs a file to read from, and {name} is in memory: save it, or leave residency= out.'
        )
    device = t.b_enc.device if options.device is None else torch.device(options.device)
    if options.device is None and options.residency == "device" and torch.cuda.is_available():
        device = torch.device("cuda")
    stay = options.residency
    if stay == "auto":  # do not move it, unless another device is asked for
        stay = "cpu" if options.device is None and t.W_enc.device.type == "cpu" else "device"
    return place(weights, (), choose_residency(stay, device, 0), device, options.dtype)


def _layer_number(key: Any) -> int:
    number = whole(key, "a transcoder's key, its layer,", DictionaryError)
    if number < 0:
        raise DictionaryError(f"a transcoder's key is its layer, a whole number from 0, got {key!r}.")
    return number


def _is_autoencoder(value: Any) -> bool:
    if isinstance(value, Transcoder):
        return value.input_hook == value.output_hook
    return is_saelens(value) and value.cfg.architecture() in AUTOENCODERS


def _one(layer: int, value: Any, options: Options) -> Transcoder:
    if isinstance(value, Transcoder):
        return value
    if is_saelens(value):
        return from_saelens(layer, value, options.input_hook, options.output_hook)
    raise DictionaryError(f"layer {layer}: expected a SAELens object or tlc.Transcoder, got {type(value).__name__}.")
