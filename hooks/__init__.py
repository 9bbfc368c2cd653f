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
from .freeze import differentiable_run
from .frozen_attention import FrozenAttention, frozen_attention
from .holding import Holds, HookList, hold_hooks
from .intervene import FREEZE_MODES, CleanRun, clean_run, edit_hooks, require_freeze, run_edited
from .maps import (
    FrozenNorm,
    ReadMap,
    attention_norms,
    frozen_norm,
    mlp_norms,
    mlp_site,
    read_map,
    read_stage,
    write_norm,
    write_stage,
    written_share,
)
from .norms import NormWeights, norm_names, norm_weights, was_folded
from .patterns import Pattern, Scores
from .proof import prove
from .queries_keys import FrozenScores, frozen_scores, held_head_norms, record_below
from .record import Recording, bos_positions, final_hook, final_stream, record, resid_mid, to_tokens
from .sites import (
    ACTIVATIONS,
    MLPWeights,
    Model,
    added_hooks,
    context_length,
    embed_weights,
    is_parallel,
    layer_device,
    mlp_weights,
    model_device,
    resolve,
    unembed_weights,
    with_its_layer,
)
from .takeover import carried_saes, lifted

__all__ = [
    "ACTIVATIONS",
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
    "Holds",
    "MLPWeights",
    "Model",
    "NormWeights",
    "Patch",
    "Pattern",
    "PatternEdit",
    "Plan",
    "ReadMap",
    "Recording",
    "Replacement",
    "Scale",
    "ScoreEdit",
    "Scores",
    "Set",
    "TokenEdit",
    "added_hooks",
    "attach",
    "attention_norms",
    "bos_positions",
    "carried_saes",
    "clean_run",
    "collect_sites",
    "context_length",
    "differentiable_run",
    "edit_hooks",
    "final_hook",
    "final_stream",
    "embed_weights",
    "frozen_attention",
    "frozen_norm",
    "frozen_scores",
    "held_head_norms",
    "hold_hooks",
    "is_parallel",
    "layer_device",
    "lifted",
    "make_plan",
    "mlp_norms",
    "mlp_site",
    "mlp_weights",
    "model_device",
    "norm_names",
    "norm_weights",
    "positions_of",
    "prove",
    "read_map",
    "read_stage",
    "record",
    "record_below",
    "require_freeze",
    "resid_mid",
    "resolve",
    "run_edited",
    "to_tokens",
    "unembed_weights",
    "was_folded",
    "with_its_layer",
    "write_norm",
    "write_stage",
    "written_share",
]
