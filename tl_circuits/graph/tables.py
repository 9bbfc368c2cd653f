"""A graph as other libraries' objects."""

from typing import Any

from tl_circuits.graph.graph import AttributionGraph


def to_networkx(graph: AttributionGraph) -> Any:
    """A ``networkx.DiGraph``: node ids as nodes, the nodes frame's columns as attributes.

    Raises ImportError naming the extra when networkx is not installed.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError("to_networkx needs networkx. Run: pip install 'tl_circuits[networkx]'") from error
    made = networkx.DiGraph(prompt=graph.info.prompt, model=graph.info.model)
    frame = graph.nodes.set_index("id")
    made.add_nodes_from((node, row) for node, row in frame.to_dict("index").items())
    made.add_weighted_edges_from(graph.edges.itertuples(index=False, name=None))
    return made
