"""The attribution graph and what can be asked of it."""

from tl_circuits.graph.graph import AttributionGraph, GraphInfo, Label, Nodes
from tl_circuits.graph.notes import Notes
from tl_circuits.graph.scores import Edges, Scores
from tl_circuits.graph.storage import load_graph

__all__ = ["AttributionGraph", "Edges", "GraphInfo", "Label", "Nodes", "Notes", "Scores", "load_graph"]
