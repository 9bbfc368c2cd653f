"""Everything that touches a TransformerLens model: names, HookPoints, recording, freezing.

Works on a ``HookedTransformer``, a ``TransformerBridge`` and SAELens' subclasses of both. Imports
nothing from the rest of ``tl_circuits``.
"""

from .attach import Replacement, attach
from .freeze import added_hooks, differentiable_run, frozen_hooks
from .maps import (
    FrozenAttention,
    FrozenNorm,
    ReadMap,
    frozen_attention,
    frozen_norm,
    read_map,
    read_stage,
    write_norm,
    write_stage,
)
from .record import Recording, bos_positions, record, resid_mid, to_tokens
from .sites import (
    MLPWeights,
    Model,
    embed_weights,
    is_parallel,
    mlp_weights,
    model_device,
    model_dtype,
    norm_weights,
    resolve,
    unembed_weights,
)
from .takeover import carried_saes, lifted

__all__ = [
    "FrozenAttention",
    "FrozenNorm",
    "MLPWeights",
    "Model",
    "ReadMap",
    "Recording",
    "Replacement",
    "added_hooks",
    "attach",
    "bos_positions",
    "carried_saes",
    "differentiable_run",
    "embed_weights",
    "frozen_attention",
    "frozen_hooks",
    "frozen_norm",
    "is_parallel",
    "lifted",
    "mlp_weights",
    "model_device",
    "model_dtype",
    "norm_weights",
    "read_map",
    "read_stage",
    "record",
    "resid_mid",
    "resolve",
    "to_tokens",
    "unembed_weights",
    "write_norm",
    "write_stage",
]
