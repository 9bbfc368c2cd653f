"""Attribution graphs and interventions for any TransformerLens model, as hooks.

Names are imported when first used: TransformerLens alone takes seconds to import, and the command
line should answer ``--help`` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_circuits.attaching import attach
    from tl_circuits.attention_data import explain_heads
    from tl_circuits.attribution import FeatureTarget, LogitDifference, LogitDirection, attribute
    from tl_circuits.attribution.loadings import head_loadings, top_head_loadings
    from tl_circuits.attribution.qk import QKAttribution, qk_attribution
    from tl_circuits.batch import trace_many
    from tl_circuits.dictionaries import CrossLayerTranscoders, Transcoder, TranscoderSet, load_transcoders, mlp_neurons
    from tl_circuits.edit_text import parse_edit
    from tl_circuits.faithfulness_report import FaithfulnessReport, faithfulness
    from tl_circuits.generation import generate
    from tl_circuits.graph import AttributionGraph, Label, Notes, Scores, load_graph
    from tl_circuits.graph.recurring import RecurringCircuit, aggregate, contrast
    from tl_circuits.hooks import (
        Ablate,
        Add,
        ErrorEdit,
        Patch,
        PatternEdit,
        PromptRule,
        Replacement,
        Scale,
        ScoreEdit,
        Set,
        TokenEdit,
    )
    from tl_circuits.interventions import (
        InterventionResult,
        edits_of,
        intervene,
        intervene_many,
        intervention_hooks,
    )
    from tl_circuits.models import load_model
    from tl_circuits.neuronpedia.dashboards import make_dashboards
    from tl_circuits.neuronpedia.features import search_features
    from tl_circuits.neuronpedia.labelling import labels
    from tl_circuits.neuronpedia.urls import from_neuronpedia_url
    from tl_circuits.quality import dictionary_quality, hook_hint
    from tl_circuits.sweeps import circuit_curve, feature_patching
    from tl_circuits.training import train_transcoders
    from tl_circuits.view.box_effects import box_ablations
    from tl_circuits.view.widget import Widget
    from tl_circuits.vocabulary_labels import label_features

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
    "Notes": "graph",
    "Patch": "hooks",
    "PatternEdit": "hooks",
    "PromptRule": "hooks",
    "QKAttribution": "attribution.qk",
    "RecurringCircuit": "graph.recurring",
    "Replacement": "hooks",
    "Scale": "hooks",
    "ScoreEdit": "hooks",
    "Scores": "graph",
    "Set": "hooks",
    "TokenEdit": "hooks",
    "Transcoder": "dictionaries",
    "TranscoderSet": "dictionaries",
    "Widget": "view.widget",
    "aggregate": "graph.recurring",
    "attach": "attaching",
    "attribute": "attribution",
    "box_ablations": "view.box_effects",
    "circuit_curve": "sweeps",
    "contrast": "graph.recurring",
    "dictionary_quality": "quality",
    "edits_of": "interventions",
    "explain_heads": "attention_data",
    "faithfulness": "faithfulness_report",
    "feature_patching": "sweeps",
    "from_neuronpedia_url": "neuronpedia.urls",
    "generate": "generation",
    "head_loadings": "attribution.loadings",
    "hook_hint": "quality",
    "intervene": "interventions",
    "intervene_many": "interventions",
    "intervention_hooks": "interventions",
    "label_features": "vocabulary_labels",
    "labels": "neuronpedia.labelling",
    "load_graph": "graph",
    "load_model": "models",
    "load_transcoders": "dictionaries",
    "make_dashboards": "neuronpedia.dashboards",
    "mlp_neurons": "dictionaries",
    "parse_edit": "edit_text",
    "qk_attribution": "attribution.qk",
    "search_features": "neuronpedia.features",
    "top_head_loadings": "attribution.loadings",
    "trace_many": "batch",
    "train_transcoders": "training",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tl_circuits' has no attribute {name!r}")
    return getattr(import_module(f"tl_circuits.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
