"""Names for boxes of features, made from the features' labels."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import UNCLEAR
from tl_circuits.graph.notes import Groups
from tl_circuits.graph.visible import visible

TOKENS_NAMED = 2
FIRING = ("examples", "family")  # origins of labels from where features fire


def name_boxes(graph: AttributionGraph, boxes: Sequence[Sequence[int]], own: dict[tuple[int, ...], str]) -> Groups:
    """A name for each box.

    A box is named after the tokens that most of its influence promotes or responds to. If its labels do not come from
    the vocabulary, it is named after its strongest feature; without labels, after its token and layers.

    Args:
        graph: the graph.
        boxes: node indices of each box.
        own: labels that a person gave, by sorted members.

    Returns:
        (label, node ids) for each box: a person's boxes first, then by influence.
    """
    ranked = sorted(boxes, key=lambda box: (tuple(sorted(box)) not in own, -float(graph.influence[list(box)].sum())))
    labels = [own.get(tuple(sorted(box))) or _name(graph, box) for box in ranked]
    labels = _told_apart(labels, [place(graph, box) for box in ranked], len(own))
    by_influence = [sorted(box, key=lambda i: -float(graph.influence[i])) for box in ranked]
    return tuple(
        (label, tuple(graph.node_ids[i] for i in box)) for label, box in zip(labels, by_influence, strict=True)
    )


def _told_apart(labels: list[str], places: list[str], n_own: int) -> list[str]:
    """Labels that all differ. The first ``n_own`` come from a person and stay as they are."""
    counts, made = Counter(labels), labels[:n_own]
    for label, where in zip(labels[n_own:], places[n_own:], strict=True):
        told = f"{label} · {where}" if counts[label] > 1 else label
        number = 2
        while told in made:
            told = f"{label} ({number})"
            number += 1
        made.append(told)
    return made


def place(graph: AttributionGraph, box: Sequence[int]) -> str:
    """Where a box sits, such as ``“ France”, layers 12–14``."""
    nodes = graph._nodes
    positions: dict[int, float] = defaultdict(float)
    for i in box:
        positions[int(nodes.position[i])] += float(graph.influence[i])
    most = sorted(positions, key=lambda p: (-positions[p], p))
    tokens = f"“{visible(graph.info.tokens[most[0]])}”" + (f" and {len(most) - 1} more" if len(most) > 1 else "")
    layers = sorted({int(nodes.layer[i]) for i in box})
    return f"{tokens}, " + (f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}")


def _name(graph: AttributionGraph, box: Sequence[int]) -> str:
    strongest = max(box, key=lambda i: (float(graph.influence[i]), -i))
    if any(graph.node_ids[i] in graph.notes.names for i in box):
        return next(graph.label(i) for i in box if graph.node_ids[i] in graph.notes.names)
    labelled = {i: graph.labels[i] for i in box if i in graph.labels and graph.labels[i].short != UNCLEAR}
    if not labelled:
        return f"at {place(graph, box)}"
    if any(label.origin in FIRING for label in labelled.values()):  # names of one measure: the most influential one
        return labelled[max(labelled, key=lambda i: (float(graph.influence[i]), -i))].short
    if any(label.origin != "vocabulary" for label in labelled.values()):
        told = {i: label for i, label in labelled.items() if label.origin != "vocabulary"}
        return told[strongest].short if strongest in told else next(iter(told.values())).short
    votes: dict[str, dict[str, float]] = {verb: defaultdict(float) for verb in ("say", "sees", "suppresses")}
    for i, label in labelled.items():
        verb = next((verb for verb in votes if label.short.startswith(verb)), "sees")
        tokens = {"say": label.promotes, "sees": label.reads, "suppresses": label.suppresses}[verb]
        for rank, token in enumerate(tokens):
            votes[verb][token] += float(graph.influence[i]) ** 2 / (1 + rank)  # the strongest members name the box
    verb = max(votes, key=lambda v: sum(votes[v].values()))
    best = sorted(votes[verb], key=lambda token: (-votes[verb][token], token))[:TOKENS_NAMED]
    return f"{verb} " + ", ".join(f"“{visible(token)}”" for token in best) if best else f"at {place(graph, box)}"
