"""Neuronpedia's graph addresses: read the subgraph in one, and write one for our own groups and pins."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qs, parse_qsl, quote, unquote, urlsplit

from tl_circuits.dictionaries.source_sets import LAYERS_OF_MODEL
from tl_circuits.errors import ExportError, NeuronpediaError
from tl_circuits.feature_labels.feature_codes import feature_of_code
from tl_circuits.graph import kinds
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Edit, Replacement
from tl_circuits.interventions.node_edits import edit_of
from tl_circuits.neuronpedia.client import SITE
from tl_circuits.neuronpedia.ids import Place, parse_node_id
from tl_circuits.support.checked import checked

LONGEST_URL = 6000
UNKNOWN = "unknown"
_OWN = ("localhost", "127.0.0.1", "::1")  # circuit-tracer's page is served by the person's own computer
_HOSTS = ("neuronpedia.org", "www.neuronpedia.org", *_OWN)


@dataclass(frozen=True)
class Subgraph:
    """What the address of a Neuronpedia graph shows.

    Attributes:
        model: Neuronpedia's model id; ``"unknown"`` in an address of circuit-tracer's page.
        slug: the graph's name; None if the address has none.
        groups: places (``kind layer feature position``) by label.
        pins: all pinned places that are in no group.
        names: a person's names for features, by place.
        pruning_threshold: the page's setting; None if the address has none.
        density_threshold: the page's setting; None if the address has none.
        source_set: Neuronpedia's name of the dictionary; None if the address has none.
        subgraph: the id of a saved subgraph, which on the site replaces all of these.
        n_layers: the number of the model's layers, which tells outputs from features. None if it is not known; then
            places at ``highest``, the last layer of the address, may be either.
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
    n_layers: int | None = None

    @property
    def highest(self) -> int:
        """The last layer that the address names."""
        return max(
            (p.layer for p in (*self.pins, *self.names, *(q for group in self.groups.values() for q in group))),
            default=-1,
        )

    @checked
    def edits(
        self,
        label: str | None = None,
        factor: float = 0.0,
        *,
        n_layers: int | None = None,
        replacement: Replacement | None = None,
    ) -> list[Any]:
        """Edits for :func:`tl_circuits.intervene` that multiply the nodes of a group by ``factor``.

        Nodes that cannot be edited are left out: outputs, attention features and their errors, and biases.

        Args:
            label: the group; None for all groups and pins.
            factor: what to multiply by; 0 removes.
            n_layers: the model's number of layers, which tells outputs from features; needed if the address was read
                without.
            replacement: the model to edit, instead of ``n_layers``.

        Returns:
            One edit for each node. A feature gives Ablate (if ``factor`` is 0) or Scale, an error ErrorEdit, a token
            TokenEdit.

        Raises:
            KeyError: for an unknown label; it names the groups.
            NeuronpediaError: for places that the model does not have, or whose id could mean two things.

        Examples:
            >>> url = "https://www.neuronpedia.org/gemma-2-2b/graph?slug=dallas&pinnedIds=14_2268_9,E_26865_9"
            >>> tlc.from_neuronpedia_url(url).edits(factor=2.0)
            [Scale(layer=14, position=9, feature=2268, factor=2.0), TokenEdit(position=9, factor=2.0)]
        """
        if label is not None and label not in self.groups:
            raise KeyError(f"there is no group {label!r}; there are {list(self.groups)}.")
        everything = [*(p for group in self.groups.values() for p in group), *self.pins]
        places = everything if label is None else self.groups[label]
        if replacement is not None:
            n_layers = int(replacement.model.cfg.n_layers)
        known = self.n_layers if n_layers is None else n_layers
        edits = (_edit(self._sure(place, known), factor) for place in dict.fromkeys(places))
        return [edit for edit in edits if edit is not None]

    def _sure(self, place: Place, n_layers: int | None) -> Place:
        """``place`` with its kind decided.

        Raises:
            NeuronpediaError: if its id could mean two things.
        """
        if place.kind != "feature":
            if place.kind == "error" and n_layers is not None and place.layer >= n_layers:
                raise NeuronpediaError(
                    f"the address names an error of layer {place.layer}; the model has the layers 0..{n_layers - 1}."
                )
            return place
        said = f"{place.layer}_{place.feature}_{place.position}"
        if n_layers is None:
            if place.layer == self.highest:
                raise NeuronpediaError(
                    f"{said} may be a feature or an output: how many layers {self.model!r} has is not known. Give "
                    "n_layers=... or replacement=..."
                )
            n_layers = self.highest
        if place.layer >= n_layers:
            return _beyond(said, place, n_layers)
        if place.layer == 0 and place.feature < n_layers:
            raise NeuronpediaError(
                f"{said} is circuit-tracer's id of feature {place.feature} of layer 0 and of the error of layer "
                f"{place.feature}. Write the one that is meant: tlc.Ablate(0, {place.position}, {place.feature}) or "
                f"tlc.ErrorEdit({place.feature}, {place.position})."
            )
        return place


def _beyond(said: str, place: Place, n_layers: int) -> Place:
    """The output at a place after the last layer.

    Raises:
        NeuronpediaError: for a layer that is still further out.
    """
    if place.layer > n_layers + 1:
        raise NeuronpediaError(
            f"{said} is at layer {place.layer}; the model has {n_layers} layers, with outputs at {n_layers + 1}."
        )
    return Place("logit", n_layers, place.feature, place.position)


def _edit(place: Place, factor: float) -> Edit | None:
    return edit_of(kinds.Place(kinds.Kind.of(place.kind), place.layer, place.position, place.feature), factor)


@checked
def from_neuronpedia_url(url: str, n_layers: int | None = None) -> Subgraph:
    """The subgraph in the address of a Neuronpedia graph: model, slug, groups, pins and names.

    Addresses of the page that circuit-tracer serves (``http://localhost:8032/index.html?slug=...``) are read as well.
    They name no model, so :meth:`Subgraph.edits` needs ``n_layers`` or ``replacement`` where an id may be an output.

    Args:
        url: the address.
        n_layers: the model's number of layers, which tells outputs from features. It is known for many models on
            Neuronpedia; otherwise :meth:`Subgraph.edits` asks for it.

    Returns:
        A ``Subgraph`` with the fields ``model``, ``slug``, ``groups`` (places by label), ``pins`` (places that are in
        no group), ``names`` (by place), ``pruning_threshold``, ``density_threshold``, ``source_set``, ``subgraph`` (the
        id of a saved one) and ``n_layers``. Its method ``edits`` makes edits of a group, or of all groups and pins.

    Raises:
        NeuronpediaError: for addresses of other sites and pages, addresses that are cut off or encoded twice (it says
            which part), and places beyond the model's layers.

    Examples:
        >>> url = "https://www.neuronpedia.org/gemma-2-2b/graph?slug=dallas&pinnedIds=14_2268_9"
        >>> shown = tlc.from_neuronpedia_url(url)
        >>> shown.model, shown.slug, shown.edits()
        ('gemma-2-2b', 'dallas', [Ablate(layer=14, position=9, feature=2268)])
    """
    if n_layers is not None and n_layers < 1:
        raise NeuronpediaError(f"n_layers must be at least 1, got {n_layers}.")
    parts = urlsplit(url.strip())
    way = [unquote(step) for step in parts.path.split("/") if step]
    model = _model_of(parts, way)
    # The raw query is split first: labels may hold & and # once decoded.
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
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
        n_layers,
    )


def neuronpedia_url(graph: AttributionGraph, model: str, slug: str, embed: bool = False) -> str:
    """The address that shows a graph uploaded as ``slug``, with our groups, pins and names.

    Raises:
        ExportError: if it would be longer than servers take.
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


def _model_of(parts: SplitResult, way: list[str]) -> str:
    """The model that an address names; "unknown" for the page that circuit-tracer serves, whose address names none.

    Raises:
        NeuronpediaError: for an address that is neither of Neuronpedia nor of circuit-tracer's page.
    """
    if parts.scheme in ("http", "https") and parts.hostname in _HOSTS:
        if len(way) == 2 and way[1] == "graph":
            return way[0]
        if parts.hostname in _OWN and way in ([], ["index.html"]):
            return UNKNOWN
        raise NeuronpediaError(
            f"{_short(parts.geturl())} is not the address of a graph; expected {SITE}/<model>/graph?slug=..."
        )
    if (
        parts.scheme in ("http", "https")
        and way[-1:] == ["index.html"]
        and {"slug", "pinnedIds", "supernodes"} & set(parse_qs(parts.query))
    ):
        return UNKNOWN
    raise NeuronpediaError(
        f"{_short(parts.geturl())} is not an address of {SITE}, nor of circuit-tracer's page (…/index.html?slug=...)."
    )


def _rows(query: dict[str, str], key: str) -> Sequence[list[str]]:
    text = query.get(key, "")
    if not text:
        return []
    try:
        rows = json.loads(text)
    except ValueError as error:
        hint = (
            " It is encoded twice; decode the address once."
            if "%5B" in text or "%22" in text
            else " Was the address cut off?"
        )
        raise NeuronpediaError(f"the address's {key} is not JSON ({error}).{hint}") from error
    good = isinstance(rows, list) and all(
        isinstance(row, list) and row and all(isinstance(item, str) for item in row) for row in rows
    )
    if not good:
        raise NeuronpediaError(f"the address's {key} is {_short(text)}, expected a list of lists of texts.")
    return rows


def _place(text: str, n_layers: int | None, key: str) -> Place:
    place = parse_node_id(text, n_layers)
    if place is None:
        raise NeuronpediaError(
            f"the address's {key} holds {_short(text)}, which is not a node id (these look like 14_2268_9 or "
            "E_26865_9)."
        )
    if n_layers is not None and place.kind == "logit":
        _beyond(text, Place("logit", int(text.split("_")[0]), place.feature, place.position), n_layers)
    return place


def _named_place(text: str, n_layers: int | None) -> Place | None:
    """The feature in ``layer_code_position``; None if it is not a feature."""
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
