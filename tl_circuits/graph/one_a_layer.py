"""Refuse graphs in which a layer has several dictionaries, where features are told apart by layer and number."""

from tl_circuits.graph.nodes import GraphInfo


def require_one_a_layer(info: GraphInfo, what: str, error: type[Exception]) -> None:
    """Raise ``error`` if some layer of the graph has several dictionaries.

    Args:
        info: what the graph is of.
        what: what was asked for, with its verb, such as ``"Neuronpedia's format tells"``.
        error: the type of the error.
    """
    if info.sites:
        raise error(
            f"{what} features apart by layer and number, and layers of this graph have several dictionaries, at "
            f"{', '.join(info.sites)}. Trace the prompt with one dictionary in each layer."
        )
