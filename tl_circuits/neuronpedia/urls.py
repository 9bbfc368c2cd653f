"""Neuronpedia's graph URLs: the subgraph in them, and URLs for subgraphs of ours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tl_circuits.errors import ExportError, NeuronpediaError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Ablate, Edit, ErrorEdit, Scale, TokenEdit
from tl_circuits.neuronpedia.ids import Place, feature_of_code, parse_node_id
from tl_circuits.neuronpedia.registry import LAYERS_OF_MODEL

SITE = "https://www.neuronpedia.org"
LONGEST_URL = 6000
_HOSTS = ("neuronpedia.org", "www.neuronpedia.org", "localhost", "127.0.0.1")


@dataclass(frozen=True)
class Subgraph:
    """What a Neuronpedia graph URL shows.

    ``groups``: places by label; ``pins``: all pinned places that are in no group; ``names``: a
    person's names for features, by place. ``subgraph``: the id of a saved subgraph, which on the
    site replaces all of these.
    """

    model: str
    slug: str | None
    groups: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    pins: tuple[Place, ...] = ()
    names: dict[Place, str] = field(default_factory=dict)
    pruning_threshold: float | None = None
    density_threshold: float | None = None
    source_set: str | None = None
    subgraph: str | None = None

    def edits(self, label: str | None = None, factor: float = 0.0) -> list[Edit]:
        """Edits for :func:`tl_circuits.intervene`: multiply a group's nodes (or all pinned ones) by ``factor``.

        Outputs are left out, having nothing to edit. Raises KeyError naming the groups there are.
        """
        if label is not None and label not in self.groups:
            raise KeyError(f"there is no group {label!r}; there are {list(self.groups)}.")
        everything = [*(p for group in self.groups.values() for p in group), *self.pins]
        places = everything if label is None else self.groups[label]
        edits = (_edit(place, factor) for place in dict.fromkeys(places))
        return [edit for edit in edits if edit is not None]


def _edit(place: Place, factor: float) -> Edit | None:
    if place.kind == "embedding":
        return TokenEdit(place.position, factor)
    if place.kind == "error":
        return ErrorEdit(place.layer, place.position, factor)
    if place.kind != "feature":
        return None
    at = (place.layer, place.position, place.feature)
    return Ablate(*at) if factor == 0 else Scale(*at, factor=factor)


def from_neuronpedia_url(url: str, n_layers: int | None = None) -> Subgraph:
    """The subgraph in a graph's URL: model, slug, and features by group, ready for ``intervene``.

    ``n_layers``: the model's, which tells outputs from features; known for the models whose graphs
    Neuronpedia shows. Raises NeuronpediaError for other sites, other pages, and addresses cut off or
    encoded twice, saying which part.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or parts.hostname not in _HOSTS:
        raise NeuronpediaError(f"{_short(url)} is no address of {SITE}.")
    way = [unquote(step) for step in parts.path.split("/") if step]
    if len(way) != 2 or way[1] != "graph":
        raise NeuronpediaError(f"{_short(url)} is no graph: expected {SITE}/<model>/graph?slug=...")
    # The raw query is split first: labels may hold & and # once decoded.
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    model = way[0]
    n_layers = n_layers if n_layers is not None else LAYERS_OF_MODEL.get(model)
    groups: dict[str, tuple[Place, ...]] = {}
    for row in _rows(query, "supernodes"):
        label, number = row[0], 2
        while label in groups:
            label, number = f"{row[0]} ({number})", number + 1
        groups[label] = tuple(_place(i, n_layers, "supernodes") for i in row[1:])
    grouped = {p for group in groups.values() for p in group}
    pinned = [_place(i, n_layers, "pinnedIds") for i in query.get("pinnedIds", "").split(",") if i]
    names = {}
    for row in _rows(query, "clerps"):
        place = _named_place(row[0], n_layers)
        if place is not None and len(row) > 1:
            names[place] = row[1]
    return Subgraph(
        model,
        query.get("slug") or None,
        groups,
        tuple(dict.fromkeys(p for p in pinned if p not in grouped)),
        names,
        _number(query, "pruningThreshold"),
        _number(query, "densityThreshold"),
        query.get("sourceSet") or None,
        query.get("subgraph") or None,
    )


def neuronpedia_url(graph: AttributionGraph, model: str, slug: str, embed: bool = False) -> str:
    """The address that shows a graph uploaded as ``slug`` with our groups, pins and names.

    Raises ExportError when it would be longer than servers take; save a subgraph there instead.
    """
    from tl_circuits.neuronpedia.export import check_name, clerp_pairs, their_ids

    their = dict(zip(graph.node_ids, their_ids(graph), strict=True))
    members = [i for _, ids in graph.groups for i in ids]
    query = {"slug": check_name("slug", slug)}
    if graph.pins or members:
        query["pinnedIds"] = ",".join(their[i] for i in dict.fromkeys((*graph.pins, *members)))
    if graph.groups:
        query["supernodes"] = _json([[label, *(their[i] for i in ids)] for label, ids in graph.groups])
    clerps = clerp_pairs(graph, "neuronpedia")
    if clerps:
        query["clerps"] = _json(clerps)
    if embed:
        query["embed"] = "true"
    address = f"{SITE}/{check_name('model id', model)}/graph?"
    url = address + "&".join(f"{key}={quote(value, safe='')}" for key, value in query.items())
    if len(url) > LONGEST_URL:
        raise ExportError(
            f"the address would be {len(url)} characters long, more than {LONGEST_URL}. Group or pin fewer nodes, or "
            "save a subgraph on the site."
        )
    return url


def _rows(query: dict[str, str], key: str) -> Sequence[list[str]]:
    text = query.get(key, "")
    if not text:
        return []
    try:
        rows = json.loads(text)
    except ValueError as error:
        hint = " It is encoded twice; decode the address once." if "%5B" in text or "%22" in text else " Was the address cut off?"
        raise NeuronpediaError(f"the address's {key} is no JSON ({error}).{hint}") from error
    good = isinstance(rows, list) and all(
        isinstance(row, list) and row and all(isinstance(item, str) for item in row) for row in rows
    )
    if not good:
        raise NeuronpediaError(f"the address's {key} is {_short(text)}, expected a list of lists of texts.")
    return rows


def _place(text: str, n_layers: int | None, key: str) -> Place:
    place = parse_node_id(text, n_layers)
    if place is None:
        raise NeuronpediaError(f"the address's {key} holds {_short(text)}, which is no node id such as 14_2268_9 or E_26865_9.")
    return place


def _named_place(text: str, n_layers: int | None) -> Place | None:
    """The feature in ``layer_code_position``; None for what is no feature."""
    said = parse_node_id(text, n_layers)
    if said is None or said.kind != "feature":
        return said
    return Place("feature", said.layer, feature_of_code(said.layer, said.feature), said.position)


def _number(query: dict[str, str], key: str) -> float | None:
    text = query.get(key)
    if not text:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise NeuronpediaError(f"the address's {key} is {_short(text)}, expected a number.") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
