"""Attribution graphs and interventions for any TransformerLens model, as hooks.

Names are imported when first used: TransformerLens alone takes seconds to import, and the command
line should answer ``--help`` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

from tl_circuits.support.outputs import fill

if TYPE_CHECKING:
    from tl_circuits.attention.loadings import head_loadings, top_head_loadings
    from tl_circuits.attention.qk import QKAttribution, qk_attribution
    from tl_circuits.attention.stories import explain_heads
    from tl_circuits.attribution import (
        Baseline,
        FeatureTarget,
        LogitDifference,
        LogitDirection,
        attribute,
        make_baseline,
    )
    from tl_circuits.batch import trace_many
    from tl_circuits.dictionaries import (
        CrossLayerTranscoders,
        Transcoder,
        TranscoderSet,
        load_dictionary,
        load_transcoders,
        mlp_neurons,
    )
    from tl_circuits.dictionaries.attaching import attach, detach
    from tl_circuits.dictionaries.quality import dictionary_quality, hook_hint
    from tl_circuits.dictionaries.training.train import train_transcoders
    from tl_circuits.feature_labels.dashboards import make_dashboards
    from tl_circuits.feature_labels.naming import name_features
    from tl_circuits.feature_labels.vocabulary import label_features
    from tl_circuits.graph import AttributionGraph, Label, Notes, Scores, load_graph
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
    from tl_circuits.interventions.box_effects import box_ablations
    from tl_circuits.interventions.circuit_quality import CircuitQuality, circuit_quality, common_circuit
    from tl_circuits.interventions.edit_text import parse_edit
    from tl_circuits.interventions.faithfulness import FaithfulnessReport, faithfulness
    from tl_circuits.interventions.generation import generate
    from tl_circuits.interventions.intervene import (
        InterventionResult,
        edits_of,
        intervene,
        intervene_many,
        intervention_hooks,
    )
    from tl_circuits.interventions.patching import circuit_curve, feature_patching
    from tl_circuits.models import load_model
    from tl_circuits.neuronpedia.features import search_features
    from tl_circuits.neuronpedia.labelling import add_labels
    from tl_circuits.neuronpedia.urls import from_neuronpedia_url
    from tl_circuits.recurring.aggregate import RecurringCircuit, aggregate
    from tl_circuits.recurring.contrast import contrast
    from tl_circuits.view.widget import Widget

_HOMES = {
    "Ablate": "hooks",
    "Add": "hooks",
    "AttributionGraph": "graph",
    "Baseline": "attribution",
    "CircuitQuality": "interventions.circuit_quality",
    "CrossLayerTranscoders": "dictionaries",
    "ErrorEdit": "hooks",
    "FaithfulnessReport": "interventions.faithfulness",
    "FeatureTarget": "attribution",
    "InterventionResult": "interventions.intervene",
    "Label": "graph",
    "LogitDifference": "attribution",
    "LogitDirection": "attribution",
    "Notes": "graph",
    "Patch": "hooks",
    "PatternEdit": "hooks",
    "PromptRule": "hooks",
    "QKAttribution": "attention.qk",
    "RecurringCircuit": "recurring.aggregate",
    "Replacement": "hooks",
    "Scale": "hooks",
    "ScoreEdit": "hooks",
    "Scores": "graph",
    "Set": "hooks",
    "TokenEdit": "hooks",
    "Transcoder": "dictionaries",
    "TranscoderSet": "dictionaries",
    "Widget": "view.widget",
    "add_labels": "neuronpedia.labelling",
    "aggregate": "recurring.aggregate",
    "attach": "dictionaries.attaching",
    "attribute": "attribution",
    "box_ablations": "interventions.box_effects",
    "circuit_curve": "interventions.patching",
    "circuit_quality": "interventions.circuit_quality",
    "common_circuit": "interventions.circuit_quality",
    "contrast": "recurring.contrast",
    "detach": "dictionaries.attaching",
    "dictionary_quality": "dictionaries.quality",
    "edits_of": "interventions.intervene",
    "explain_heads": "attention.stories",
    "faithfulness": "interventions.faithfulness",
    "feature_patching": "interventions.patching",
    "from_neuronpedia_url": "neuronpedia.urls",
    "generate": "interventions.generation",
    "head_loadings": "attention.loadings",
    "hook_hint": "dictionaries.quality",
    "intervene": "interventions.intervene",
    "intervene_many": "interventions.intervene",
    "intervention_hooks": "interventions.intervene",
    "label_features": "feature_labels.vocabulary",
    "load_dictionary": "dictionaries",
    "load_graph": "graph",
    "load_model": "models",
    "load_transcoders": "dictionaries",
    "make_baseline": "attribution",
    "make_dashboards": "feature_labels.dashboards",
    "mlp_neurons": "dictionaries",
    "name_features": "feature_labels.naming",
    "parse_edit": "interventions.edit_text",
    "qk_attribution": "attention.qk",
    "search_features": "neuronpedia.features",
    "top_head_loadings": "attention.loadings",
    "trace_many": "batch",
    "train_transcoders": "dictionaries.training.train",
}

# What a graph and other results can be turned into; see tl_circuits.support.outputs.
_OUTPUTS = {
    "attention figure": "tl_circuits.view.attention_figure:plot_score",
    "dot": "tl_circuits.graph.exports:to_dot",
    "figure": "tl_circuits.view.figure:plot_story",
    "graph file": "tl_circuits.graph.storage:save_graph",
    "graphml": "tl_circuits.graph.exports:to_graphml",
    "html": "tl_circuits.view.page_file:write_page",
    "intervention figure": "tl_circuits.view.figure:plot_intervention",
    "networkx": "tl_circuits.graph.exports:to_networkx",
    "neuronpedia": "tl_circuits.neuronpedia.export:export",
    "neuronpedia address": "tl_circuits.neuronpedia.urls:neuronpedia_url",
    "parquet": "tl_circuits.graph.exports:to_parquet",
    "carried": "tl_circuits.graph.carried:carried_by",
    "pinned scores": "tl_circuits.graph.pinned:pinned_scores",
    "read another program's file": "tl_circuits.neuronpedia.read:read_foreign",
    "read the beginning of another program's file": "tl_circuits.neuronpedia.read_beginning:read_beginning",
    "supernodes": "tl_circuits.graph.supernodes:supernodes",
    "upload": "tl_circuits.neuronpedia.upload:upload_graph",
    "words": "tl_circuits.graph.words:word_effects",
}
fill(_OUTPUTS)

# Former names, which warn and go on working for one release.
_RENAMED = {"labels": "add_labels"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warn(f"tl_circuits.{name} is called tl_circuits.{new} now; the old name will go.", FutureWarning, stacklevel=2)
        name = new
    if name not in _HOMES:
        raise AttributeError(f"module 'tl_circuits' has no attribute {name!r}")
    return getattr(import_module(f"tl_circuits.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
