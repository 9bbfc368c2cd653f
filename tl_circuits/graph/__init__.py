"""The attribution graph and what can be asked of it."""

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import Example, GraphInfo, Label, Nodes
from tl_circuits.graph.notes import Notes
from tl_circuits.graph.scores import Edges, Scores
from tl_circuits.graph.storage import load_graph

__all__ = [
    "AttributionGraph",
    "Edges",
    "Example",
    "GraphInfo",
    "Label",
    "Nodes",
    "Notes",
    "Scores",
    "load_graph",
]
