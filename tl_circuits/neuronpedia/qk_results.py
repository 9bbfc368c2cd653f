"""Head stories as Neuronpedia's ``qk_tracing_results``, and the nodes that these need besides the graph's own."""

from collections.abc import Iterable
from typing import Any

from tl_circuits.attention.stories import qk_tracing_results
from tl_circuits.errors import GraphFileError
from tl_circuits.feature_labels.feature_codes import cantor_pair
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind, parse_node_id
from tl_circuits.neuronpedia import ids


def tracing_results(graph: AttributionGraph, their: dict[str, str]) -> dict[str, dict[str, list[list[Any]]]]:
    """The contributors to each node that a head story explains, by our node id; the contributors have the file's ids.

    ``their`` maps our ids to those of the file. Sources that are not nodes of the graph get the id that they would
    have.
    """
    heads: dict[str, list[dict[str, Any]]] = {}
    for story in graph.head_stories:
        heads.setdefault(story["target"], []).extend(story["heads"])

    def named(source: str) -> str | None:
        place = None if source in their else parse_node_id(source)
        if place is None:
            return their.get(source)
        kind, layer, position, feature = place[:4]
        number = graph.info.token_ids[position] if kind == Kind.EMBEDDING else feature
        return ids.node_id(kind.text, layer, number, position, graph.info.n_layers)

    explained = {name: rows for name, rows in heads.items() if any("pairs" in row for row in rows)}
    return {name: qk_tracing_results(rows, named) for name, rows in explained.items() if name in their}


def pruned_contributors(results: Iterable[dict[str, list[list[Any]]]], known: set[str]) -> dict[str, dict[str, Any]]:
    """Entries for ``qk_only_nodes``: the contributors that are not among the ``known`` nodes of the file."""
    ids = {x for rows in results for listed in rows.values() for row in listed for x in row if isinstance(x, str)}
    return {name: _entry(name) for name in sorted(ids - known)}


def _entry(name: str) -> dict[str, Any]:
    place = ids.parse_node_id(name)
    if place is None:
        raise GraphFileError(f"{name!r}, a contributor to an attention score, is no node id of Neuronpedia's.")
    made = {"node_id": name, "feature": place.position, "layer": "E", "ctx_idx": place.position, "clerp": ""}
    made |= {"feature_type": ids.FEATURE_TYPES[place.kind], "jsNodeId": f"E_{place.feature}-{place.position}"}
    if place.kind != "embedding":
        code = cantor_pair(place.layer, place.feature) if place.kind == "feature" else -1
        made |= {"feature": code, "layer": str(place.layer), "jsNodeId": f"{name.rsplit('_', 1)[0]}-0"}
    return made
