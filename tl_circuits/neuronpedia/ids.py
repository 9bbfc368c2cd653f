"""How Neuronpedia and circuit-tracer number features and name nodes."""

import math
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


def cantor_pair(layer: int, feature: int) -> int:
    """Layer and feature index as one number (Cantor's pairing; graph schema 1)."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def cantor_unpair(code: int) -> tuple[int, int]:
    """Layer and feature index of :func:`cantor_pair`'s number, in whole numbers throughout."""
    diagonal = (math.isqrt(8 * code + 1) - 1) // 2
    feature = code - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def feature_of_code(layer: int, code: int) -> int:
    """The feature index in an encoded ``feature`` whose layer is known.

    Graph schema 1 pairs; before it, the layer's digits stood in front of the zero-padded index
    (five digits for 16,384 features); before that the index stood alone.
    """
    if cantor_unpair(code)[0] == layer:
        return cantor_unpair(code)[1]
    for digits in (5, 6, 7, 4):
        if layer > 0 and code // 10**digits == layer:
            return code % 10**digits
    return code


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


_ID = re.compile(r"^(?P<layer>E|\d+)_(?:(?P<word>cro|lor|error_mlp|error_attn|error)_?)?(?P<feature>-?\d+)?_(?P<position>\d+)$")
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
