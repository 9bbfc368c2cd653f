"""In a contrast graph: for which prompts of the family a feature fires."""

from collections.abc import Mapping, Sequence

from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.feature_labels.firing import Firing, Pieces, where_features_fire
from tl_circuits.feature_labels.firing_names import quoted
from tl_circuits.feature_labels.top_firing import EXAMPLES
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement

_SHOWN = 3


def family_firing(replacement: Replacement, graph: AttributionGraph, nodes: Sequence[int]) -> Firing | None:
    """Where features of a contrast graph fire in its prompt and in those it is compared with.

    Args:
        replacement: the model with its dictionary.
        graph: the graph.
        nodes: indices of feature nodes.

    Returns:
        None if the graph was not compared with prompts, or there are no nodes.
    """
    others = [ids for ids, _ in graph.info.baseline]
    if not others or not nodes:
        return None
    place, feature = node_places(replacement.dictionary, graph)[list(nodes)], graph._nodes.feature[list(nodes)]
    wanted = {int(at): feature[place == at].unique() for at in place.unique()}
    return where_features_fire(replacement, Pieces((tuple(graph.prompt_tokens()), *others)), wanted)


def family_name(firing: Firing, layer: int, row: int, side: int, texts: Mapping[int, str]) -> str | None:
    """Name a feature by the prompts for which it fires at least half as strongly as it does for any.

    Prompts are told apart by the words that they do not share.

    Args:
        firing: where features fire in the family.
        layer: the number of the feature's place: its layer, unless some layer has several dictionaries.
        row: its row in the place's columns.
        side: 0 if it is active above zero, 1 below.
        texts: by token, its text.

    Returns:
        Such as ``for “ France, Italy” (2 of 16 prompts)``; None if it fires for more than half of them, or for none.
    """
    prompts, top = firing.pieces.ids, firing.layers[layer]
    strength = top.strength[side, :, row]
    strong = [
        int(p) for p, s in zip(top.piece[side, :, row], strength, strict=True) if s > 0 and s >= 0.5 * strength[0]
    ]
    # If all examples that are kept are strong ones, there may be more.
    if not strong or len(strong) > len(prompts) / 2 or (len(strong) == EXAMPLES and len(prompts) > EXAMPLES):
        return None
    shared = set.intersection(*map(set, prompts))
    words = ["".join(texts[t] for t in prompts[p] if t not in shared) for p in strong]
    named = list(dict.fromkeys(word for word in words if word.strip()))
    return f"for {quoted(named[:_SHOWN])} ({len(strong)} of {len(prompts)} prompts)" if named else None
