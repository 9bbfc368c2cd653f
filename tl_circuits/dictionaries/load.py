"""Turn what people have into a dictionary: SAELens objects or tensors, layer by layer."""

from collections.abc import Mapping
from typing import Any

from tl_circuits.dictionaries.base import Dictionary
from tl_circuits.dictionaries.saelens import is_saelens, transcoder_from_saelens
from tl_circuits.dictionaries.transcoders import Transcoder, TranscoderSet
from tl_circuits.errors import DictionaryError
from tl_circuits.models import BUILTIN


def load_transcoders(source: Any, *, name: str | None = None) -> Dictionary:
    """Open a dictionary.

    ``source``: ``{layer: SAELens transcoder}``, ``{layer: Transcoder}`` (tensors), a list of
    either, index = layer, or ``"tiny-facts"``, those of the built-in model. Raises DictionaryError for anything else, for missing layers, and for
    tensors that contradict each other.
    """
    if isinstance(source, Dictionary):
        return source
    if isinstance(source, str) and source == BUILTIN:
        from tl_circuits.builtin.files import open_transcoders

        return open_transcoders()
    if isinstance(source, (list, tuple)):
        source = dict(enumerate(source))
    if isinstance(source, Mapping):
        layers = {_layer_number(key): _one(key, value) for key, value in source.items()}
        return TranscoderSet(layers, name or "transcoders")
    raise DictionaryError(
        f"cannot load transcoders from {source!r}: give {{layer: SAELens transcoder}}, {{layer: tlc.Transcoder}} or {BUILTIN!r}."
    )


def _layer_number(key: Any) -> int:
    if not isinstance(key, int) or isinstance(key, bool) or key < 0:
        raise DictionaryError(f"a transcoder's key is its layer, a whole number from 0, got {key!r}.")
    return key


def _one(layer: int, value: Any) -> Transcoder:
    if isinstance(value, Transcoder):
        return value
    if is_saelens(value):
        return transcoder_from_saelens(layer, value)
    raise DictionaryError(
        f"layer {layer}: expected a SAELens transcoder or tlc.Transcoder, got {type(value).__name__}."
    )
