"""Everything that touches a TransformerLens model: names, HookPoints, recording, freezing.

Works on a ``HookedTransformer``, a ``TransformerBridge`` and SAELens' subclasses of both. Imports
nothing from the rest of ``tl_circuits``.
"""

from .attach import Replacement, attach
from .collect import collect_sites
from .decode import CachedModel
from .edits import (
    Ablate,
    Add,
    Edit,
    ErrorEdit,
    Patch,
    PatternEdit,
    Plan,
    Scale,
    ScoreEdit,
    Set,
    TokenEdit,
    make_plan,
    positions_of,
)
from .freeze import added_hooks, differentiable_run, frozen_hooks
from .frozen_attention import FrozenAttention, frozen_attention
from .identity import Sample, first_difference, rounded, spread
from .intervene import FREEZE_MODES, CleanRun, HookList, clean_run, edit_hooks, require_freeze, run_edited
from .maps import (
    FrozenNorm,
    ReadMap,
    frozen_norm,
    read_map,
    read_stage,
    write_norm,
    write_stage,
)
from .numbers import is_whole, real, shown, whole, wholes
from .patterns import Pattern, Scores
from .queries_keys import FrozenScores, frozen_scores, held_head_norms, record_below
from .record import Recording, bos_positions, record, resid_mid, to_tokens
from .sites import (
    MLPWeights,
    Model,
    context_length,
    embed_weights,
    is_parallel,
    layer_device,
    mlp_weights,
    model_device,
    norm_weights,
    resolve,
    unembed_weights,
    with_its_layer,
)
from .takeover import carried_saes, lifted

__all__ = [
    "Ablate",
    "Add",
    "CachedModel",
    "CleanRun",
    "Edit",
    "ErrorEdit",
    "FREEZE_MODES",
    "FrozenAttention",
    "FrozenNorm",
    "FrozenScores",
    "HookList",
    "MLPWeights",
    "Model",
    "Patch",
    "Pattern",
    "PatternEdit",
    "Plan",
    "ReadMap",
    "Recording",
    "Replacement",
    "Sample",
    "Scale",
    "ScoreEdit",
    "Scores",
    "Set",
    "TokenEdit",
    "added_hooks",
    "attach",
    "bos_positions",
    "carried_saes",
    "clean_run",
    "collect_sites",
    "context_length",
    "differentiable_run",
    "edit_hooks",
    "embed_weights",
    "first_difference",
    "frozen_attention",
    "frozen_hooks",
    "frozen_norm",
    "frozen_scores",
    "held_head_norms",
    "is_parallel",
    "is_whole",
    "layer_device",
    "lifted",
    "make_plan",
    "mlp_weights",
    "model_device",
    "norm_weights",
    "positions_of",
    "read_map",
    "read_stage",
    "real",
    "record",
    "record_below",
    "require_freeze",
    "resid_mid",
    "resolve",
    "rounded",
    "run_edited",
    "shown",
    "spread",
    "to_tokens",
    "unembed_weights",
    "whole",
    "wholes",
    "with_its_layer",
    "write_norm",
    "write_stage",
]
