"""How Neuronpedia and circuit-tracer number features and name nodes."""

import re
from dataclasses import dataclass

FEATURE_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
    "attention feature": "lorsa",
    "attention error": "lorsa error",
    "bias": "bias",
}
"""Our kinds of nodes, as ``feature_type`` says them."""

KIND_OF = {written: kind for kind, written in FEATURE_TYPES.items()} | {
    "unexplored node": "feature",
    "unknown": "bias",
}


@dataclass(frozen=True)
class Place:
    """What a node id says: ``layer`` is -1 for embeddings, ``feature`` -1 for errors."""

    kind: str
    layer: int
    feature: int
    position: int


def node_id(kind: str, layer: int, feature: int, position: int, n_layers: int) -> str:
    """The id of a node. Errors are ``L_-1_p``: the ``0_L_p`` of circuit-tracer 0.5.0 is also feature L of layer 0."""
    if kind == "embedding":
        return f"E_{feature}_{position}"
    if kind == "logit":
        return f"{n_layers + 1}_{feature}_{position}"
    if kind == "error":
        return f"{layer}_-1_{position}"
    middle = {"feature": "", "attention feature": "lor_", "attention error": "error_attn", "bias": "bias_"}[kind]
    return f"{layer}_{middle}{'' if kind == 'attention error' else feature}_{position}"


_ID = re.compile(
    r"^(?P<layer>E|\d+)_(?:(?P<word>cro|lor|error_mlp|error_attn|error)_?)?(?P<feature>-?\d+)?_(?P<position>\d+)$"
)
_WORDS = {None: "feature", "cro": "feature", "lor": "attention feature", "error_attn": "attention error"}


def parse_node_id(text: str, n_layers: int | None = None) -> Place | None:
    """What an id says by itself, None where it says nothing we know.

    Handles ``L_i_p``, ``L_cro_i_p``, ``L_lor_i_p``, ``L_-1_p``, ``L_error_mlp_p``, ``L_error_attn_p``,
    ``E_vocab_p``, and logits where ``n_layers`` is given.
    """
    match = _ID.match(text)
    if match is None:
        return None
    word, position = match["word"], int(match["position"])
    feature = int(match["feature"]) if match["feature"] else -1
    if match["layer"] == "E":
        return Place("embedding", -1, feature, position)
    layer = int(match["layer"])
    if word is None and match["feature"] is None:
        return None
    if n_layers is not None and layer >= n_layers and word is None:
        return Place("logit", n_layers, feature, position)
    kind = _WORDS.get(word, "error")
    if kind == "feature" and feature < 0:
        kind = "error"
    return Place(kind, layer, feature, position)
