"""Whether a graph is of the model and dictionary that are attached: one check for all that asks the model about a graph.

Graphs traced here carry a few numbers out of the weights of both (:mod:`tl_circuits.hooks.identity`), which decide,
whatever the two are called. Older files and other programs' are held against what they say: names, the
number of layers, and features that the dictionary does not have.
"""

import re
from collections.abc import Iterable
from typing import Any

from tl_circuits.dictionaries.base import ranges
from tl_circuits.dictionaries.references import SHORT_NAMES, parse_reference
from tl_circuits.errors import BelongingError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import KINDS, GraphInfo
from tl_circuits.hooks import Replacement, first_difference

_OUR_ENGINES = ("linear", "autograd", "mean of graphs")
_UNSAID = ("", "unknown", "transcoders")  # what stands in files that do not say


def require_belonging(replacement: Replacement, graph: AttributionGraph | GraphInfo) -> None:
    """Raise BelongingError, naming both dictionaries and models, unless ``graph`` is of the attached ones."""
    info = graph if isinstance(graph, GraphInfo) else graph.info
    why = _other(replacement, info)
    if why is None and isinstance(graph, AttributionGraph):
        why = _absent(replacement, graph)
    if why is not None:
        raise BelongingError(
            f"the graph is of the model {info.model!r} with the dictionary {info.dictionary!r}, and attached is "
            f"{replacement.dictionary.name!r} on {_model_name(replacement)!r}: {why}. Attach what it was traced with, or trace "
            "the prompt again."
        )


def require_edits_belong(replacement: Replacement, edits: Iterable[Any]) -> None:
    """Raise BelongingError for edits made from the nodes of a graph that is not of the attached model and dictionary."""
    infos = {id(edit.of): edit.of for edit in edits if isinstance(getattr(edit, "of", None), GraphInfo)}
    for info in infos.values():
        require_belonging(replacement, info)


def require_one_kind(infos: Iterable[GraphInfo]) -> str | None:
    """The first thing in which the weights behind several graphs differ; None if none is known to."""
    infos = list(infos)
    return next((found for info in infos if (found := first_difference(infos[0].sample, info.sample))), None)


def _other(replacement: Replacement, info: GraphInfo) -> str | None:
    """What tells the graph's model or dictionary from the attached ones; None if nothing does."""
    n_layers = int(replacement.model.cfg.n_layers)
    if info.n_layers != n_layers:
        return f"the graph's model has {info.n_layers} layers, this one has {n_layers}"
    name = replacement.dictionary.name
    if not info.sample:
        return _other_names(replacement, info)
    found = first_difference(info.sample, replacement.sample)
    if found is not None:
        what = found.removeprefix("model ")
        return f"the weights of the two models differ ({what})" if what != found else f"{found} has the weights of another one"
    theirs, ours = (_of_dictionary(sample) for sample in (info.sample, replacement.sample))
    if theirs != ours:
        only = min(theirs ^ ours)
        return f"only the {'graph' if only in theirs else 'attached dictionary'} has {only}"
    return None if theirs or info.dictionary == name else "the dictionaries are called differently"


def _of_dictionary(sample: Any) -> set[str]:
    return {name for name, _ in sample if not name.startswith("model ")}


def _other_names(replacement: Replacement, info: GraphInfo) -> str | None:
    model, name = _model_name(replacement), replacement.dictionary.name
    if _plain(info.model) not in ("unknown", _plain(model)) and _plain(model) != "unknown":
        return "the models are called differently"
    if info.dictionary == name:
        return None
    imported = info.engine not in _OUR_ENGINES
    if imported and (info.dictionary in _UNSAID or _plain(info.dictionary) == _plain(info.model) or _same_set(info.dictionary, name)):
        return None
    return f"the dictionaries are called differently (if they are the same, load_transcoders(..., name={info.dictionary!r}) says so)"


def _same_set(said: str, name: str) -> bool:
    """Whether two names, of which Neuronpedia or circuit-tracer may have given one, mean one published set."""
    from tl_circuits.neuronpedia.registry import known_source_set

    if said in SHORT_NAMES:
        said = str(parse_reference(SHORT_NAMES[said].reference))
    one, other = known_source_set(said), known_source_set(name)
    return said == name or (other is not None and (one == other or said.split("/")[-1] == other.name))


def _absent(replacement: Replacement, graph: AttributionGraph) -> str | None:
    """A feature or token of the graph that does not exist in what is attached."""
    dictionary, nodes = replacement.dictionary, graph._nodes
    feature = nodes.kind == KINDS.index("feature")
    for layer in nodes.layer[feature].unique().tolist():
        if layer not in dictionary.layers:
            return f"the graph has features of layer {layer}, the dictionary has the layers {ranges(dictionary.layers)}"
        largest, width = int(nodes.feature[feature & (nodes.layer == layer)].max()), dictionary.width(layer)
        if largest >= width:
            return f"the graph has feature {largest} of layer {layer}, where the dictionary has {width}"
    d_vocab = int(replacement.model.cfg.d_vocab)
    largest = max(graph.info.token_ids, default=-1)
    return f"the graph's prompt has the token id {largest}, the model's vocabulary {d_vocab}" if largest >= d_vocab else None


def _model_name(replacement: Replacement) -> str:
    return str(getattr(replacement.model.cfg, "model_name", "unknown"))


def _plain(name: str) -> str:
    """A model's name without the organisation or folder before it, and without what is written differently."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").split("/")[-1].lower())
