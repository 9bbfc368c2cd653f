"""Dictionaries: transcoders of any origin, and neurons, behind one interface."""

from tl_circuits.dictionaries.base import Dictionary, LayerActive
from tl_circuits.dictionaries.cross_layer import CrossLayerTranscoders
from tl_circuits.dictionaries.load import load_transcoders
from tl_circuits.dictionaries.load_any import load_dictionary
from tl_circuits.dictionaries.neurons import Neurons, mlp_neurons
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.dictionaries.transcoders import TranscoderSet

__all__ = [
    "CrossLayerTranscoders",
    "Dictionary",
    "LayerActive",
    "Neurons",
    "Transcoder",
    "TranscoderSet",
    "load_dictionary",
    "load_transcoders",
    "mlp_neurons",
]
