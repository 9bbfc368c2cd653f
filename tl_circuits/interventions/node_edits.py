"""From nodes of a graph to edits: which edit changes a feature, an error or a token."""

from tl_circuits.graph.kinds import Kind, Place
from tl_circuits.graph.nodes import GraphInfo
from tl_circuits.hooks import Ablate, Edit, ErrorEdit, Scale, TokenEdit


def edit_of(place: Place, factor: float = 0.0, of: GraphInfo | None = None) -> Edit | None:
    """The edit that multiplies what stands at a place by ``factor``; None if nothing can edit it, such as an output.

    Args:
        place: where the node stands.
        factor: 0 removes it.
        of: the graph that the place comes from. An edit that knows it is refused on another model or dictionary.

    Examples:
        >>> from tl_circuits.graph.kinds import Kind, Place
        >>> from tl_circuits.interventions.node_edits import edit_of
        >>> edit_of(Place(Kind.FEATURE, 14, 9, 2268), 2.0)
        Scale(layer=14, position=9, feature=2268, factor=2.0)
    """
    if place.kind == Kind.EMBEDDING:
        return TokenEdit(place.position, factor, of=of)
    if place.kind == Kind.ERROR:
        return ErrorEdit(place.layer, place.position, factor, site=place.site or None, of=of)
    if place.kind != Kind.FEATURE:
        return None
    where = (place.layer, place.position, place.feature)
    site = place.site or None
    return Ablate(*where, site=site, of=of) if factor == 0 else Scale(*where, factor, site=site, of=of)
