"""Find nodes by what people give: ids or indices, one or several."""

from collections.abc import Iterable, Mapping
from typing import Any

from tl_circuits.errors import TargetError, TLCircuitsError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import is_whole, shown, whole


def node_index(graph: AttributionGraph, node: Any, error: type[TLCircuitsError] = TargetError) -> int:
    """The index of a node given by id or index.

    Raises:
        TargetError: (or ``error``) if the graph has no such node.
    """
    if isinstance(node, str) and node in graph.node_numbers:
        return graph.node_numbers[node]
    if not isinstance(node, str) and is_whole(node) and 0 <= whole(node) < len(graph):
        return whole(node)
    looks = (
        f"ids look like {graph.node_ids[0]!r}, indices are 0..{len(graph) - 1}" if len(graph) else "it has none at all"
    )
    raise error(f"the graph has no node {shown(node)}; {looks}.")


def node_indices(graph: AttributionGraph, nodes: Any, error: type[TLCircuitsError] = TargetError) -> list[int]:
    """The indices of one node or of several, given as a list, an array or a column of a frame.

    Raises:
        TargetError: (or ``error``) if the graph lacks one of them, or the list is empty.
    """
    one = isinstance(nodes, (str, Mapping)) or not isinstance(nodes, Iterable) or getattr(nodes, "ndim", 1) == 0
    several = [nodes] if one else list(nodes)
    if not several:
        raise error("an empty list of nodes was given; name at least one.")
    return [node_index(graph, node, error) for node in several]
