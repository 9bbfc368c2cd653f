"""``tlc.name_features``: name the features of a graph by where they fire, or by their weights, whichever is sharper."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.errors import PromptError
from tl_circuits.feature_labels.example_text import file_passages, shipped_passages, world_passages
from tl_circuits.feature_labels.family_names import family_firing, family_name
from tl_circuits.feature_labels.feature_files import EXAMPLES_KEPT, FeatureFiles
from tl_circuits.feature_labels.firing import Firing, Pieces, cut
from tl_circuits.feature_labels.firing_cache import firing_of
from tl_circuits.feature_labels.firing_names import BACK, Fired, FiringName, Place, fits, name_from, place_of
from tl_circuits.feature_labels.record_names import record_names
from tl_circuits.feature_labels.token_space import TokenSpace
from tl_circuits.feature_labels.top_firing import BEFORE
from tl_circuits.feature_labels.vocabulary import FEATURES_AT_ONCE, active_side, strongest_tokens, vocabulary_products
from tl_circuits.feature_labels.weight_names import WeightName, sharpest, usual_products, weight_names
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import UNCLEAR, Example, Label
from tl_circuits.hooks import Replacement, embed_weights, in_turn, token_text
from tl_circuits.models import BUILTIN
from tl_circuits.support.checked import checked

logger = logging.getLogger(__name__)

SHARP = 4.0  # standard deviations; of six thousand normally distributed numbers the largest lies at 3.7
_UNREADABLE = 0.1  # a text with so large a share of unknown words says nothing about a model
_FAMILY_KEPT = 2


@checked
@in_turn
def name_features(
    replacement: Replacement,
    graph: AttributionGraph,
    text: str | Path | None = None,
    *,
    features: int = 100,
    examples: bool = True,
    max_tokens: int = 30_000,
    progress: bool = False,
) -> AttributionGraph:
    """Name features by where they fire in a text, or by what their weights point at, whichever is sharper.

    A text is run through the model once. A feature's strongest examples name it if they have more in common than chance
    gives: ``on “ Paris, Berlin, Rome”`` or ``after “ The capital of”``. Its weights name it if a token stands out from
    the vocabulary more than it does for random directions: ``say “ Paris”``, ``suppresses “ French”`` or ``sees
    “ France”``. Both are measured in standard deviations, over the text and over the vocabulary. If neither is sharp,
    the label says ``no clear name``. Neurons that are negative in the graph are named by their negative side.

    In a contrast graph, features without a sharp name are named by the prompts of the family for which they fire.

    What fires where is remembered for each model, dictionary and text, under ``firing`` in the cache folder
    (``$TL_CIRCUITS_CACHE``); you can delete it at any time.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        text: a text file, or a folder that :func:`make_dashboards` wrote. None: the text that comes with the package.
        features: how many features get examples, most influential first; the others are named by their weights.
        examples: False to name all features by their weights.
        max_tokens: how much of the text is run.
        progress: show progress bars on stderr.

    Returns:
        The graph with these labels. ``labels[i].origin`` is ``"examples"``, ``"family"`` or ``"vocabulary"``.

    Raises:
        BelongingError: for a graph, or feature files, of another model or dictionary.
        PromptError: for a text that is missing, in another encoding, shorter than two tokens, or made of words that the
            model does not know.

    Examples:
        >>> named = tlc.name_features(replacement, graph)
        >>> named.nodes.set_index("id").label["L0/F308@7"]
        'on “Dallas, Waco, Austin”'
        >>> example = named.labels[named.node_numbers["L0/F308@7"]].examples[0]
        >>> " ".join(example.tokens)
        'the capital of the state containing Dallas is Austin .'
    """
    require_belonging(replacement, graph)
    if features < 0 or max_tokens < 2:
        raise ValueError(f"features must be 0 or more and max_tokens at least 2, got {features} and {max_tokens}.")
    nodes = graph.is_kind("feature").nonzero()[:, 0].tolist()
    weights = _weights(replacement, graph, nodes, progress)
    ranked = sorted(nodes, key=lambda i: -float(graph.influence[i]))[: features if examples else 0]
    found = _examples(replacement, graph, ranked, None if text is None else Path(text), max_tokens, progress)
    family = _family(replacement, graph, ranked)
    labels = dict(graph.labels)
    labels |= {i: _label(weights[i], found.get(i), family.get(i)) for i in nodes}
    return replace(graph, labels=labels)


@dataclass(frozen=True)
class Examples:
    """A feature's name from a text, if it has one, and its strongest examples."""

    name: FiringName | None
    shown: tuple[Example, ...]


@dataclass(frozen=True)
class Weights:
    """A feature's label from its weights (its ``short`` is not used), and the name they give it, if one is sharp."""

    label: Label
    name: WeightName | None


def _label(weights: Weights, text: Examples | None, family: tuple[str | None, tuple[Example, ...]] | None) -> Label:
    short, origin = UNCLEAR, "vocabulary"
    name = text.name if text is not None else None
    sharpness = weights.name.sharpness if weights.name is not None else SHARP
    if name is not None and name.sharpness >= max(SHARP, sharpness):
        short, origin = name.text, "examples"
    elif weights.name is not None:
        short = weights.name.text
    elif family is not None and family[0] is not None:
        short, origin = family[0], "family"
    shown = (family[1] if family is not None else ()) + (text.shown if text is not None else ())
    return replace(weights.label, short=short, origin=origin, examples=shown)


def _weights(
    replacement: Replacement, graph: AttributionGraph, nodes: Sequence[int], progress: bool
) -> dict[int, Weights]:
    if not nodes:
        return {}
    found: dict[int, Weights] = {}
    at, model, usual = node_places(replacement.dictionary, graph), replacement.model, usual_products(replacement)
    nodes = sorted(nodes, key=lambda i: int(at[i]))  # a layer's weights are read once
    with torch.no_grad(), tqdm(total=len(nodes), desc="reading weights", unit="feature", disable=not progress) as bar:
        for start in range(0, len(nodes), FEATURES_AT_ONCE):
            part = nodes[start : start + FEATURES_AT_ONCE]
            products = vocabulary_products(replacement, at[part], graph._nodes.feature[part], active_side(graph, part))
            tokens, names = strongest_tokens(model, *products), weight_names(model, usual, *products)
            found |= {i: Weights(Label(UNCLEAR, *t), sharpest(n)) for i, t, n in zip(part, tokens, names, strict=True)}
            bar.update(len(part))
    return found


def _examples(
    replacement: Replacement,
    graph: AttributionGraph,
    nodes: list[int],
    text: Path | None,
    max_tokens: int,
    progress: bool,
) -> dict[int, Examples]:
    if not nodes:
        return {}
    if text is not None and text.is_dir():
        files = FeatureFiles(text)
        files.require_of(graph)
        named = record_names(replacement, graph, nodes, files)
        return {i: Examples(*found) for i, found in named.items()}
    pieces = _pieces(replacement, text, max_tokens)
    if pieces is None:
        return {}
    firing = firing_of(replacement, graph, nodes, pieces, progress)
    reader = FiringReader(replacement.model, firing, graph.info.token_ids)
    at = node_places(replacement.dictionary, graph)
    return {i: reader.examples(int(at[i]), *_feature(graph, i), place_of(graph, i)) for i in nodes}


def _feature(graph: AttributionGraph, node: int) -> tuple[int, int]:
    """A feature's index, and the side on which it is active: 0 above zero, 1 below."""
    return int(graph._nodes.feature[node]), int(active_side(graph, [node])[0] < 0)


def _pieces(replacement: Replacement, text: Path | None, max_tokens: int) -> Pieces | None:
    """The text as tokens; None if none was asked for and the model cannot read the one that comes with the package."""
    model = replacement.model
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        if text is None:
            return None
        raise PromptError(f"the model has no tokenizer, so the text {text} cannot be read.")
    if text is None:
        passages: Any = world_passages() if str(model.cfg.model_name) == BUILTIN else shipped_passages()
    else:
        passages = file_passages(text)
    pieces = cut(replacement, passages, max_tokens)
    unknown = (
        tokenizer.unk_token_id
        if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        else None
    )
    missed = sum(piece.count(unknown) for piece in pieces.ids) if unknown is not None else 0
    if pieces.n_tokens >= 2 and missed <= _UNREADABLE * pieces.n_tokens:
        return pieces
    if text is None:
        logger.warning(
            "the model does not know the words of the package's text, so features are named by their weights alone; "
            "give text=."
        )
        return None
    if pieces.n_tokens < 2:
        raise PromptError(
            f"the text {text} has {pieces.n_tokens} tokens; features need a text to fire in, of some thousand tokens."
        )
    raise PromptError(
        f"the model does not know {missed} of the {pieces.n_tokens} tokens of {text}. Give a text in its own words."
    )


class FiringReader:
    """Reads names and examples out of what fires where."""

    def __init__(self, model: Any, firing: Firing, also: Sequence[int] = ()):
        self._model, self._firing, self._also = model, firing, also
        self._texts: dict[int, str] = {}

    def texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The texts of tokens, decoded once each."""
        for token in ids:
            if token not in self._texts:
                self._texts[token] = token_text(self._model, token)
        return tuple(self._texts[token] for token in ids)

    @cached_property
    def _space(self) -> TokenSpace:
        distinct = sorted({i for piece in self._firing.pieces.ids for i in piece} | {*self._also})
        texts = dict(zip(distinct, self.texts(distinct), strict=True))
        return TokenSpace(self._firing.pieces.ids, embed_weights(self._model), texts, self._also)

    def examples(self, layer: int, feature: int, side: int, place: Place) -> Examples:
        """A feature's strongest examples on one side of zero, and the name they give it, if it fits at ``place``."""
        top = self._firing.layers[layer]
        row = top.row(feature)
        if row is None:
            return Examples(None, ())
        mean, spread = top.mean_and_spread(row)
        fired, sign = [], -1.0 if side else 1.0
        for number, at, strength in self._kept(layer, row, side):
            ids = self._firing.pieces.ids[number][max(0, at - BACK) : at + 1]
            fired.append(Fired(ids, self.texts(ids), (strength - sign * mean) / max(spread, 1e-30)))
        name = name_from(fired, self._space) if fired else None
        fitting = name if name is not None and fits(name, place, self._space) else None
        return Examples(fitting, self.shown(layer, row, side, EXAMPLES_KEPT))

    def _kept(self, layer: int, row: int, side: int) -> list[tuple[int, int, float]]:
        top = self._firing.layers[layer]
        columns = (column[side, :, row].tolist() for column in (top.piece, top.place, top.strength))
        return [(piece, place, strength) for piece, place, strength in zip(*columns, strict=True) if piece >= 0]

    def shown(self, layer: int, row: int, side: int, count: int) -> tuple[Example, ...]:
        """The strongest examples as texts with activations."""
        made = []
        for k, (number, place, _) in enumerate(self._kept(layer, row, side)[:count]):
            ids = self._firing.pieces.ids[number]
            near = self._firing.layers[layer].window[side, k, row].tolist()
            start, stop = max(0, place - BEFORE), min(len(ids), place - BEFORE + len(near))
            values = near[start - place + BEFORE : stop - place + BEFORE]
            made.append(Example(self.texts(ids[start:stop]), tuple(float(f"{v:.4g}") for v in values)))
        return tuple(made)


def _family(
    replacement: Replacement, graph: AttributionGraph, nodes: list[int]
) -> dict[int, tuple[str | None, tuple[Example, ...]]]:
    firing = family_firing(replacement, graph, nodes)
    if firing is None:
        return {}
    reader, found = FiringReader(replacement.model, firing), {}
    distinct = sorted({i for piece in firing.pieces.ids for i in piece})
    texts = dict(zip(distinct, reader.texts(distinct), strict=True))
    places = node_places(replacement.dictionary, graph).tolist()
    for i in nodes:
        feature, side = _feature(graph, i)
        row = firing.layers[places[i]].row(feature)
        if row is not None:
            found[i] = (
                family_name(firing, places[i], row, side, texts),
                reader.shown(places[i], row, side, _FAMILY_KEPT),
            )
    return found
