"""Check that a graph was made with the model and dictionary that are attached, before the model is asked about it.

Graphs traced by this package hold a few numbers from the weights of both (:mod:`tl_circuits.hooks.identity`); these
decide, whatever the two are called. For older files and those of other programs, what they say is compared: names, the
number of layers, and whether the dictionary has the features.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from tl_circuits.dictionaries.base import ranges
from tl_circuits.dictionaries.references import SHORT_NAMES, parse_reference
from tl_circuits.errors import BelongingError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.graph.nodes import GraphInfo
from tl_circuits.hooks import Replacement, Sample, by_place, first_difference, place_number, sites_of

_OUR_ENGINES = ("linear", "autograd", "mean of graphs")
_UNSAID = ("", "unknown", "transcoders")  # dictionary names in files that do not know theirs


class Origin(NamedTuple):
    """The model and dictionary that something was made with."""

    model: str
    dictionary: str
    n_layers: int
    sample: Sample


def origin_of(replacement: Replacement) -> Origin:
    """The attached model and dictionary, to be stored with what is made with them."""
    model, dictionary = replacement.model, replacement.dictionary
    return Origin(
        str(getattr(model.cfg, "model_name", "unknown")), dictionary.name, int(model.cfg.n_layers), replacement.sample
    )


def require_belonging(replacement: Replacement, graph: AttributionGraph | GraphInfo) -> None:
    """Raise BelongingError unless ``graph`` was made with the attached model and dictionary."""
    info = graph if isinstance(graph, GraphInfo) else graph.info
    origin = origin_of(replacement)
    why = _other(origin, info, _imported(info))
    if why is None and isinstance(graph, AttributionGraph):
        why = _absent(replacement, graph)
    if why is not None:
        raise BelongingError(
            f"the graph was made with the dictionary {info.dictionary!r} on the model {info.model!r}, but "
            f"{origin.dictionary!r} is attached to {origin.model!r}: {why}. Attach what the graph was made with, or "
            "trace the prompt again."
        )


def difference_of(origin: Origin, other: Origin) -> str | None:
    """How the model or dictionary of ``other`` differs from those of ``origin``; None if no difference is found."""
    return _other(origin, other, imported=False)


def require_made_of(origin: Origin, info: GraphInfo, what: str) -> None:
    """Raise BelongingError unless ``what`` (its name, for the message), made with ``origin``, fits a graph."""
    why = _other(origin, info, _imported(info))
    if why is not None:
        raise BelongingError(
            f"{what} were made with the dictionary {origin.dictionary!r} on the model {origin.model!r}, and the graph "
            f"with {info.dictionary!r} on {info.model!r}: {why}."
        )


def require_edits_belong(replacement: Replacement, edits: Iterable[Any]) -> None:
    """Raise BelongingError if an edit was made from a graph of another model or dictionary than the attached ones."""
    infos = {id(edit.of): edit.of for edit in edits if isinstance(getattr(edit, "of", None), GraphInfo)}
    for info in infos.values():
        require_belonging(replacement, info)


def _imported(info: GraphInfo) -> bool:
    """Whether the graph is from another program's file."""
    return info.engine not in _OUR_ENGINES


def _other(origin: Origin, info: GraphInfo | Origin, imported: bool) -> str | None:
    """How the model or dictionary of ``info`` differs from those of ``origin``; None if no difference is found."""
    if info.n_layers != origin.n_layers:
        return f"its model has {info.n_layers} layers, the other one has {origin.n_layers}"
    if not info.sample or not origin.sample:
        return _other_names(origin, info, imported)
    found = first_difference(info.sample, origin.sample)
    if found is not None:
        what = found.removeprefix("model ")
        return f"the weights of the two models differ ({what})" if what != found else f"{found} has other weights"
    theirs, ours = (_of_dictionary(sample) for sample in (info.sample, origin.sample))
    if theirs != ours:
        only = min(theirs ^ ours)
        own = "graph" if isinstance(info, GraphInfo) else "first"
        return f"only the {own if only in theirs else 'other dictionary'} has {only}"
    return None if theirs or info.dictionary == origin.dictionary else "the dictionaries are called differently"


def _of_dictionary(sample: Any) -> set[str]:
    return {name for name, _ in sample if not name.startswith("model ")}


def _other_names(origin: Origin, info: GraphInfo | Origin, imported: bool) -> str | None:
    model, name = origin.model, origin.dictionary
    if _plain(info.model) not in ("unknown", _plain(model)) and _plain(model) != "unknown":
        return "the models are called differently"
    if info.dictionary == name:
        return None
    if imported and (
        info.dictionary in _UNSAID or _plain(info.dictionary) == _plain(info.model) or _same_set(info.dictionary, name)
    ):
        return None
    return (
        "the dictionaries are called differently (if they are the same, load_transcoders(..., "
        f"name={info.dictionary!r}) says so)"
    )


def _same_set(said: str, name: str) -> bool:
    """Whether two names mean the same published set; Neuronpedia and circuit-tracer name some sets differently."""
    from tl_circuits.dictionaries.source_sets import known_source_set

    if said in SHORT_NAMES:
        said = str(parse_reference(SHORT_NAMES[said].reference))
    one, other = known_source_set(said), known_source_set(name)
    return said == name or (other is not None and (one == other or said.split("/")[-1] == other.name))


def _absent(replacement: Replacement, graph: AttributionGraph) -> str | None:
    """A message about a feature or token of the graph that does not exist in the attached ones; None if all do."""
    dictionary, nodes = replacement.dictionary, graph._nodes
    largest_at: dict[tuple[int, str], int] = {}
    for i in (nodes.kind == Kind.FEATURE).nonzero()[:, 0].tolist():
        at = int(nodes.layer[i]), graph.sites[i]
        largest_at[at] = max(largest_at.get(at, 0), int(nodes.feature[i]))
    for (layer, site), largest in sorted(largest_at.items()):
        if layer not in dictionary.layers:
            return f"the graph has features of layer {layer}, the dictionary has the layers {ranges(dictionary.layers)}"
        there = sites_of(dictionary, layer)
        if (site and site not in there) or (not site and len(there) > 1):
            return (
                f"the graph has features of layer {layer} at {site or 'one site'}, where the dictionary has "
                f"{', '.join(there)}"
            )
        width = by_place(dictionary).width(place_number(dictionary, layer, site or None))
        if largest >= width:
            return f"the graph has feature {largest} of layer {layer}, where the dictionary has {width}"
    d_vocab = int(replacement.model.cfg.d_vocab)
    largest = max(graph.info.token_ids, default=-1)
    return (
        f"the graph's prompt has the token id {largest}, the model's vocabulary {d_vocab}"
        if largest >= d_vocab
        else None
    )


def _plain(name: str) -> str:
    """A model's name without organisation or folder, in lower case, letters and digits only, for comparison."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").split("/")[-1].lower())
