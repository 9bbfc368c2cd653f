"""Names from feature files: the examples there, judged as those of a text are."""

from collections.abc import Mapping, Sequence
from typing import Any

from tl_circuits.feature_labels.feature_files import EXAMPLES_KEPT, FeatureFiles, example_of
from tl_circuits.feature_labels.firing_names import BACK, Fired, FiringName, Place, fits, name_from, place_of
from tl_circuits.feature_labels.token_space import TokenSpace
from tl_circuits.feature_labels.top_firing import EXAMPLES
from tl_circuits.feature_labels.vocabulary import active_side
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import Example
from tl_circuits.hooks import Replacement, embed_weights, token_text


def record_names(
    replacement: Replacement, graph: AttributionGraph, nodes: Sequence[int], files: FeatureFiles
) -> dict[int, tuple[FiringName | None, tuple[Example, ...]]]:
    """Names and examples of some nodes from feature files. Nodes without a record are left out.

    What is usual in the corpus is read from the records: the tokens of their examples stand for its tokens, and each
    histogram gives the mean and the spread of a feature's absolute activation.

    Args:
        replacement: the model with its dictionary.
        graph: the graph.
        nodes: indices of feature nodes.
        files: the feature files.
    """
    layer, feature = graph._nodes.layer, graph._nodes.feature
    records = {i: record for i in nodes if (record := files.read(int(layer[i]), int(feature[i]))) is not None}
    vocabulary = {token_text(replacement.model, i): i for i in reversed(range(int(replacement.model.cfg.d_vocab)))}
    pieces = [
        [vocabulary[t] for t in row["tokens"] if t in vocabulary]
        for record in records.values()
        for row in _rows(record)
    ]
    if not any(pieces):
        return {}
    texts = {
        i: token_text(replacement.model, i) for i in {*graph.info.token_ids, *(i for piece in pieces for i in piece)}
    }
    space = TokenSpace(pieces, embed_weights(replacement.model), texts, graph.info.token_ids)
    return {
        i: _named(record, float(active_side(graph, [i])[0]), vocabulary, space, place_of(graph, i))
        for i, record in records.items()
    }


def _rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for quantile in record.get("examples_quantiles", ()) for row in quantile["examples"]]


def _named(
    record: Mapping[str, Any], side: float, vocabulary: Mapping[str, int], space: TokenSpace, place: Place
) -> tuple[FiringName | None, tuple[Example, ...]]:
    mean, spread = _usual(record)
    fired, shown = [], []
    for row in _rows(record):
        values = [side * float(v) for v in row["tokens_acts_list"]]
        at = max(range(len(values)), key=values.__getitem__, default=0)
        if not values or values[at] <= 0:
            continue
        shown.append(example_of(row))
        texts = [str(t) for t in row["tokens"][max(0, at - BACK) : at + 1]]
        if all(t in vocabulary for t in texts):
            fired.append(Fired(tuple(vocabulary[t] for t in texts), tuple(texts), (values[at] - mean) / spread))
    fired.sort(key=lambda one: -one.strength)
    name = name_from(fired[:EXAMPLES], space) if fired else None
    return name if name is not None and fits(name, place, space) else None, tuple(shown[:EXAMPLES_KEPT])


def _usual(record: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and standard deviation of a feature's absolute activation over all tokens, to the width of a bin."""
    shares = [float(s) for s in record.get("histogram", ())]
    wide = float(record.get("histogram_range", 0.0)) / max(1, len(shares))
    middles = [(i + 0.5) * wide for i in range(len(shares))]
    mean = sum(s * m for s, m in zip(shares, middles, strict=True))
    square = sum(s * m * m for s, m in zip(shares, middles, strict=True))
    return mean, max(1e-30, square - mean**2) ** 0.5
