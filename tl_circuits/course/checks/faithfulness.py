"""Assignment 4: how far a graph's predictions hold, and where they fail."""

from collections.abc import Iterator

import pandas as pd
import torch

from tl_circuits.attribution import attribute
from tl_circuits.course.questions import (
    Asking,
    Lab,
    Part,
    Question,
    WrongAnswer,
    effects,
    kind,
    near,
    number,
    same_effects,
    sequence,
)
from tl_circuits.dictionaries.builtin.world import two_hop
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.interventions.intervene import edits_of, intervene


def _graph(lab: Lab) -> AttributionGraph:
    return attribute(lab.ours, two_hop("Savannah").prompt, progress=False)


def _strongest(graph: AttributionGraph, kind: str) -> str:
    """The source of a kind with the largest effect on the first target."""
    row = graph.edges[graph.edges.target == "logit:0"]
    kinds = graph.nodes.set_index("id").kind
    row = row[row.source.map(kinds) == kind]
    return str(row.source[row.weight.abs().idxmax()])


def predicted(student: Asking, lab: Lab) -> Iterator[Part]:
    graph = _graph(lab)
    source = _strongest(graph, "feature")
    row = graph.edges[graph.edges.source == source]
    want = dict(zip(row.target, (-row.weight).tolist(), strict=True))
    got = effects(student(lab.graph(graph), source))
    turned = {key: -value for key, value in got.items()}
    yield Part(
        2,
        same_effects(got, want) or same_effects(turned, want),
        "wrong: one entry for every edge that starts at the source.",
    )
    yield Part(1, same_effects(got, want), "the sign: an edge is what the source adds, so removing it takes that away.")


def measured(student: Asking, lab: Lab) -> Iterator[Part]:
    graph = _graph(lab)
    target = int(graph.nodes[graph.nodes.id == "logit:0"].feature.iloc[0])
    cases = (
        (
            2,
            "feature",
            "all",
            "wrong with freeze='all': logit minus mean logit, after minus before, at the last position.",
        ),
        (2, "embedding", "none", "wrong with freeze='none': pass `freeze` on."),
        (
            1,
            "error",
            "attention",
            "wrong for an error node: `tlc.edits_of(graph, [source])` makes the edit of any node.",
        ),
    )
    for points, of, freeze, hint in cases:
        source = _strongest(graph, of)
        result = intervene(lab.ours, graph.info.prompt, edits_of(graph, [source]), freeze=freeze, layers=())
        moved = (result.logits - result.baseline_logits)[-1]
        want = float(moved[target] - moved.mean())
        got = number(student(lab.replacement, lab.graph(graph), source, freeze))
        if near(got, float(moved[target])):
            hint = "the graph's targets are logits minus the mean logit; subtract the mean here too."
        yield Part(points, near(got, want), hint)


def agreement(student: Asking, lab: Lab) -> Iterator[Part]:
    p = torch.tensor([0.5, -1.0, 2.0, 0.25, -0.125, 3.0])
    m = torch.tensor([0.75, -0.5, 2.5, -0.25, -0.25, 1.0])
    answer = student(p, m)
    names = ("correlation", "explained_variance", "sign_agreement")
    if not isinstance(answer, dict) or set(answer) != set(names):
        said = f"a dict with the keys {sorted(map(str, answer))}" if isinstance(answer, dict) else kind(answer)
        raise WrongAnswer(f"it returned {said}; expected a dict with the keys {', '.join(names)}.")
    want = (
        float(torch.corrcoef(torch.stack([p, m]))[0, 1]),
        1 - float(((m - p) ** 2).sum() / (m**2).sum()),
        float((p.sign() == m.sign()).float().mean()),
    )
    hints = (
        "correlation: Pearson's, as `torch.corrcoef` has it.",
        "explained variance: 1 - sum (measured - predicted)² / sum measured², no mean taken off.",
        "sign agreement: the share of pairs in which both have the same sign.",
    )
    for points, name, value, hint in zip((1, 2, 1), names, want, hints, strict=True):
        yield Part(points, near(number(answer[name]), value), hint)


def error_share(student: Asking, lab: Lab) -> Iterator[Part]:
    graph = _graph(lab)
    hint = "wrong: influence of error nodes over that of error and embedding nodes together (`graph.nodes.influence`)."
    yield Part(2, near(number(student(lab.graph(graph))), 1 - graph.scores().replacement), hint)


def _edges(**weights: float) -> pd.DataFrame:
    rows = [(name, "t", weight) for name, weight in weights.items()] + [("a", "other", 5.0)]
    return pd.DataFrame(rows, columns=["source", "target", "weight"])


def shown(student: Asking, lab: Lab) -> Iterator[Part]:
    got = number(student(_edges(a=1.0, b=2.0, c=1.0), _edges(b=2.0, c=1.0), "t"))
    yield Part(1, near(got, 0.75), "wrong: edges into the target that the pruned graph kept, over all edges into it.")
    got = number(student(_edges(a=3.0, b=-2.0, c=-1.0, d=2.0), _edges(a=3.0, b=-2.0), "t"))
    yield Part(2, near(got, 5 / 8), "take absolute values: effects of opposite sign must not cancel.")


def worst_targets(student: Asking, lab: Lab) -> Iterator[Part]:
    columns = ["source", "target", "predicted", "measured"]
    easy = pd.DataFrame([("a", "x", 1.0, 1.1), ("a", "y", 2.0, 0.0), ("a", "z", 0.0, 1.0)], columns=columns)
    got = sequence(student(easy, 2), str, "a list of node ids")
    yield Part(1, got == ["y", "z"], "wrong with one source: the targets with the largest squared gap, largest first.")
    rows = [
        ("a", "x", 1.0, 2.0),
        ("b", "x", 1.0, 0.0),
        ("c", "x", -1.0, 0.0),
        ("a", "y", 0.0, 1.5),
        ("b", "z", 0.5, 0.0),
    ]
    got = sequence(student(pd.DataFrame(rows, columns=columns), 2), str, "a list of node ids")
    yield Part(2, got == ["x", "y"], "wrong with several sources: add up each target's squared gaps over all of them.")


QUESTIONS = (
    Question("predicted", "what the graph says a removal does", 3, predicted),
    Question("measured", "what the removal does", 5, measured),
    Question("agreement", "three numbers for how well they agree", 4, agreement),
    Question("error_share", "the share that comes from errors", 2, error_share),
    Question("shown", "how much of a node's input a pruned graph shows", 3, shown),
    Question("worst_targets", "where the predictions fail", 3, worst_targets),
)
