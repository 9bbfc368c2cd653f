"""Pins, supernodes and names in the ``qParams`` of a graph file, as notes."""

import json
from typing import Any

from tl_circuits.feature_labels.feature_codes import cantor_pair
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import NUMBERED
from tl_circuits.graph.notes import Groups, Notes


def notes_from_params(
    graph: AttributionGraph, q_params: dict[str, Any], own: dict[str, Any], ours: dict[str, str]
) -> tuple[Notes, dict[str, Any]]:
    """The notes in a graph file, and what else its ``qParams`` say.

    ``own`` are the notes as we wrote them, which tell pins from members of groups; ``qParams`` do not. Where the two
    differ, a page has changed the file since, and ``qParams`` count. ``ours`` maps node ids of the file to ours. Ids
    that no node has are dropped, as the pages drop them.
    """
    pinned = [ours[i] for i in _listed(q_params.get("pinnedIds")) if i in ours]
    groups = group_ids(_parsed(q_params.get("supernodes")), ours)
    members = {i for _, ids in groups for i in ids}
    before = set(own.get("pins", ()))
    pins = tuple(i for i in dict.fromkeys(pinned) if i in before or i not in members)
    known = set(graph.node_ids)
    names = {i: text for i, text in (own.get("names") or {}).items() if i in known}
    names |= _names(graph, _parsed(q_params.get("clerps")), names)
    kept = {k: v for k, v in q_params.items() if k not in ("pinnedIds", "supernodes", "clerps", "clickedId")}
    if q_params.get("sg_pos") == "":
        kept.pop("sg_pos")
    if kept.get("linkType") == "both":
        kept.pop("linkType")
    return Notes(groups, pins, names, str(own.get("text", ""))), kept


def group_ids(supernodes: Any, ours: dict[str, str]) -> Groups:
    """``[[label, id, ...], ...]`` as groups. A node stays in its first group, and a label that is used again gets a
    number.
    """
    groups: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    used: dict[str, int] = {}  # how often a label came before, so that a thousand groups of one label take no longer
    for row in supernodes if isinstance(supernodes, list) else ():
        if not isinstance(row, list) or not row:
            continue
        ids = tuple(dict.fromkeys(ours[i] for i in row[1:] if i in ours and ours[i] not in taken))
        if not ids:
            continue
        wished = label = str(row[0]).strip() or "group"
        while label in groups:
            used[wished] = used.get(wished, 1) + 1
            label = f"{wished} ({used[wished]})"
        groups[label] = ids
        taken.update(ids)
    return tuple(groups.items())


def _names(graph: AttributionGraph, clerps: Any, known: dict[str, str]) -> dict[str, str]:
    """Names by ``layer_code_position`` (Neuronpedia) or by ``code`` alone, for every position (circuit-tracer)."""
    pairs = dict(p for p in clerps if isinstance(p, list) and len(p) == 2) if isinstance(clerps, list) else {}
    if not pairs:
        return {}
    named = {}
    n = graph._nodes
    same_feature = _by_feature(graph)
    for i, name in enumerate(graph.node_ids):
        if int(n.kind[i]) not in NUMBERED:
            continue
        layer, feature, position = int(n.layer[i]), int(n.feature[i]), int(n.position[i])
        code = cantor_pair(layer, feature)
        # circuit-tracer names a feature at all positions. If our own notes gave this name to one position, keep it
        # there.
        elsewhere = (
            any(known.get(other) == pairs.get(str(code)) for other in same_feature[_feature(graph, i)] if other != name)
            and name not in known
        )
        text = pairs.get(f"{layer}_{code}_{position}") or (None if elsewhere else pairs.get(str(code)))
        if text:
            named[name] = str(text)
    return named


def _feature(graph: AttributionGraph, index: int) -> tuple[int, int, int]:
    n = graph._nodes
    return int(n.kind[index]), int(n.layer[index]), int(n.feature[index])


def _by_feature(graph: AttributionGraph) -> dict[tuple[int, int, int], list[str]]:
    """The ids of the nodes of each feature, at all positions."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for i, name in enumerate(graph.node_ids):
        found.setdefault(_feature(graph, i), []).append(name)
    return found


def translated(results: Any, ids: dict[str, str]) -> Any:
    """QK contributors with other node ids; ids that ``ids`` does not have stay as they are."""
    if not isinstance(results, dict):
        return results
    return {
        key: [[ids.get(x, x) if isinstance(x, str) else x for x in row] for row in rows]
        if isinstance(rows, list)
        else rows
        for key, rows in results.items()
    }


def _listed(value: Any) -> list[str]:
    """The ids in ``pinnedIds``: a list, or one text with commas."""
    return value.split(",") if isinstance(value, str) else [str(v) for v in value or ()]


def _parsed(value: Any) -> Any:
    """The value; circuit-tracer saves lists as JSON inside a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None
