"""Attribution graphs and interventions for any TransformerLens model, as hooks."""

from tl_circuits.attribution import FeatureTarget, LogitDifference, LogitDirection, attribute
from tl_circuits.attaching import attach
from tl_circuits.dictionaries import Transcoder, TranscoderSet, load_transcoders, mlp_neurons
from tl_circuits.graph import AttributionGraph, Label, Scores, load_graph
from tl_circuits.hooks import Replacement
from tl_circuits.labels import label_features
from tl_circuits.models import load_model

__all__ = [
    "AttributionGraph",
    "FeatureTarget",
    "Label",
    "LogitDifference",
    "LogitDirection",
    "Replacement",
    "Scores",
    "Transcoder",
    "TranscoderSet",
    "attach",
    "attribute",
    "label_features",
    "load_graph",
    "load_model",
    "load_transcoders",
    "mlp_neurons",
]
