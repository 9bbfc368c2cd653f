"""How much of a large graph is drawn. The page and what is measured for the page use the same."""

from tl_circuits.graph.graph import AttributionGraph

MOST_NODES = 2500
LEVELS = (6, 12, 20)  # the most boxes at each stop of the detail slider; the page opens with the second
_NODE_THRESHOLDS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def page_graph(graph: AttributionGraph) -> AttributionGraph:
    """The graph itself, or pruned as far as needed to have at most :data:`MOST_NODES` nodes."""
    shown = graph
    for threshold in _NODE_THRESHOLDS:
        if len(shown) <= MOST_NODES:
            break
        shown = graph.prune(node_threshold=threshold, edge_threshold=1.0)
    return shown
