"""At which dictionary each node of a graph stands: numbers of places, as hooks and engines count them."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.hooks import place_number


def node_places(dictionary: Any, graph: AttributionGraph) -> Int[Tensor, " node"]:
    """The number of the place (:mod:`tl_circuits.hooks.places`) of each feature and error; -1 for all other nodes.

    Args:
        dictionary: the attached dictionary.
        graph: a graph made with it.

    Raises:
        DictionaryError: a layer has several dictionaries and the node does not say at which it stands, or the
            dictionary has none there.
    """
    nodes = graph._nodes
    has_place = (nodes.kind == Kind.FEATURE) | (nodes.kind == Kind.ERROR)
    found = torch.full_like(nodes.layer, -1)
    known: dict[tuple[int, str], int] = {}
    for i in has_place.nonzero()[:, 0].tolist():
        at = int(nodes.layer[i]), graph.sites[i]
        if at not in known:
            known[at] = place_number(dictionary, at[0], at[1] or None)
        found[i] = known[at]
    return found
