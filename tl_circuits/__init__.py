"""Attribution graphs and interventions for any TransformerLens model, as hooks.

Names are imported when first used: TransformerLens alone takes seconds to import, and the command
line should answer ``--help`` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_circuits.attaching import attach
    from tl_circuits.attribution import FeatureTarget, LogitDifference, LogitDirection, attribute
    from tl_circuits.dictionaries import CrossLayerTranscoders, Transcoder, TranscoderSet, load_transcoders, mlp_neurons
    from tl_circuits.batch import trace_many
    from tl_circuits.edit_text import parse_edit
    from tl_circuits.faithfulness_report import FaithfulnessReport, faithfulness
    from tl_circuits.generation import generate
    from tl_circuits.graph import AttributionGraph, Label, Scores, load_graph
    from tl_circuits.graph.recurring import RecurringCircuit, aggregate, contrast
    from tl_circuits.hooks import Ablate, Add, ErrorEdit, Patch, Replacement, Scale, Set, TokenEdit
    from tl_circuits.interventions import (
        InterventionResult,
        edits_of,
        intervene,
        intervene_many,
        intervention_hooks,
    )
    from tl_circuits.labels import label_features
    from tl_circuits.models import load_model
    from tl_circuits.sweeps import circuit_curve, feature_patching

_HOMES = {
    "Ablate": "hooks",
    "Add": "hooks",
    "AttributionGraph": "graph",
    "CrossLayerTranscoders": "dictionaries",
    "ErrorEdit": "hooks",
    "FaithfulnessReport": "faithfulness_report",
    "FeatureTarget": "attribution",
    "InterventionResult": "interventions",
    "Label": "graph",
    "LogitDifference": "attribution",
    "LogitDirection": "attribution",
    "Patch": "hooks",
    "RecurringCircuit": "graph.recurring",
    "Replacement": "hooks",
    "Scale": "hooks",
    "Scores": "graph",
    "Set": "hooks",
    "TokenEdit": "hooks",
    "Transcoder": "dictionaries",
    "TranscoderSet": "dictionaries",
    "aggregate": "graph.recurring",
    "attach": "attaching",
    "attribute": "attribution",
    "circuit_curve": "sweeps",
    "contrast": "graph.recurring",
    "edits_of": "interventions",
    "faithfulness": "faithfulness_report",
    "feature_patching": "sweeps",
    "generate": "generation",
    "intervene": "interventions",
    "intervene_many": "interventions",
    "intervention_hooks": "interventions",
    "label_features": "labels",
    "load_graph": "graph",
    "load_model": "models",
    "load_transcoders": "dictionaries",
    "mlp_neurons": "dictionaries",
    "parse_edit": "edit_text",
    "trace_many": "batch",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tl_circuits' has no attribute {name!r}")
    return getattr(import_module(f"tl_circuits.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
