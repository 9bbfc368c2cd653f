"""What removing or scaling a set of features does to the answer, measured in the model and against chance."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.targets import kept_vector
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.errors import ArgumentError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.page_limits import LEVELS, page_graph
from tl_circuits.hooks import Replacement, in_turn, token_text, unembed_weights
from tl_circuits.interventions.controls import random_sets
from tl_circuits.interventions.faithfulness import predicted_effects
from tl_circuits.interventions.intervene import InterventionResult, edits_of, intervene_many
from tl_circuits.support.checked import checked

TOP = 5
RUNS_AT_ONCE = 128  # whose logits are computed together
FEWEST_CONTROLS = 10  # with fewer random sets, one box of ten would pass by chance


@checked
@in_turn
def box_ablations(
    replacement: Replacement, graph: AttributionGraph, *, controls: int = 20, seed: int = 0, progress: bool = False
) -> list[dict[str, Any]]:
    """Remove each box of a graph's page in the model, and measure how the answer changes; the same for random sets.

    Boxes are taken from every stop of the page's detail slider; all boxes of a stop are also removed together. Each
    removal runs twice: with nothing held, and with attention patterns and norm denominators held, as the graph assumes.
    In a contrast graph, a box is removed by setting its features to what they are in the baseline. A box is *tested* if
    removing it moves the answer the way the graph predicts, and further than removing any of ``controls`` random sets
    of as many active features of the same layers and positions. How far an answer moves is compared in log-odds of its
    probability.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        controls: how many random sets for each box, at least ten; 0 for none.
        seed: for the random sets.
        progress: show a progress bar on stderr.

    Returns:
        One dict for each box or set of boxes, which ``graph.to_html(ablations=...)`` takes. Its keys are

        * ``nodes``: the ids of the box's nodes.
        * ``answer``: the likeliest next token of the untouched run. This key and the next four are about the run with
          nothing held.
        * ``before``, ``after``: the answer's probability (a share of 1) without and with the removal.
        * ``logit``: how the answer's logit moves, in logits.
        * ``top``: the likeliest next tokens of either run, five dicts ``token``, ``before``, ``after`` with both
          probabilities.
        * ``target``: the name of what the graph explains; of several targets, the one of the largest weight. This key
          and the next four are missing if the target is a feature, or a difference or direction of which the graph's
          file does not say what it reads.
        * ``predicted``: how the graph says that the target moves, in logits (the logit minus the mean logit, before any
          soft cap; a :class:`LogitDirection` moves in units of its own).
        * ``measured``: how the target moves in the model under ``freeze``, in the unit of ``predicted``.
        * ``measured_free``: how the target moves with nothing held, in the unit of ``predicted``.
        * ``freeze``: what was held for ``measured``: ``"attention"``, or ``"none"`` where that run diverged.
        * ``random``: the answer's probability after removing each random set, sorted. This key and the next three are
          missing if ``controls`` is 0.
        * ``random_logits``: how the answer's logit moves for each random set, in logits, sorted by themselves.
        * ``tested``: whether the box is tested.
        * ``other_way``: whether the answer moves further than with every random set, but against the prediction.

    Raises:
        PromptError: for an aggregated graph, which belongs to no single prompt.
        BelongingError: for a graph of another model or dictionary.
        BaselineError: for a graph against a baseline made from texts, unless ``controls`` is 0.
        ArgumentError: for ``controls`` below ten other than 0.
        AttachError: if the replacement was detached.

    Examples:
        >>> removed = tlc.box_ablations(replacement, graph, controls=10)
        >>> removed[0]["answer"], removed[0]["before"] > 0.9, len(removed[0]["random"])
        ('Austin', True, 10)
        >>> path = graph.to_html(folder / "why.html", ablations=removed)
    """
    if controls and controls < FEWEST_CONTROLS:
        raise ArgumentError(
            f"controls must be 0 or at least {FEWEST_CONTROLS}, got {controls}: fewer say nothing about chance."
        )
    require_belonging(replacement, graph)
    shown = page_graph(graph)
    levels = [[ids for _, ids in shown.supernodes(most).groups] for most in LEVELS]
    together = {all_of(level) for level in levels if len(level) > 1}
    boxes = sorted({ids for level in levels for ids in level} | together)
    return measure_boxes(replacement, graph, boxes, 0.0, controls, seed, progress)


def all_of(boxes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The nodes of all boxes of a picture."""
    return tuple(sorted(node for box in boxes for node in box))


def measure_boxes(
    replacement: Replacement,
    graph: AttributionGraph,
    boxes: Sequence[Sequence[str]],
    factor: float,
    controls: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Multiply each set of nodes by ``factor`` in the model, and measure what happens; see :func:`box_ablations`."""
    if not boxes:
        return []
    require_belonging(replacement, graph)
    edits = [edits_of(graph, ids, factor) for ids in boxes]  # it refuses ids that the graph does not have
    members = [[graph.node_numbers[i] for i in ids] for ids in boxes]
    random = random_sets(replacement, graph, members, controls, seed, factor) if controls else [[] for _ in boxes]
    every = [*edits, *(one for sets in random for one in sets)]
    free = intervene_many(replacement, graph, every, freeze="none", progress=progress)
    held = intervene_many(replacement, graph, edits, freeze="attention", progress=progress)
    predicted = predicted_effects(graph, members, direct=False, factor=factor)
    target = int(graph._nodes.weight.argmax())
    reads = kept_vector(replacement, graph, target)
    answers = _answers(replacement.model, free, len(boxes))
    found = []
    for row, ids in enumerate(boxes):
        one: dict[str, Any] = {"nodes": list(ids)} | answers[row]
        if reads is not None:
            kept = free[row] if held[row].diverged else held[row]
            one |= {
                "target": graph.label(target).removeprefix("output ").strip("“”"),
                "predicted": round(float(predicted[row, target]), 5),
                "measured": _moved(graph, target, reads, kept),
                "measured_free": _moved(graph, target, reads, free[row]),
                "freeze": kept.freeze,
            }
        if controls:
            start = len(boxes) + row * controls
            one |= _against_chance(one, answers[start : start + controls], _other_way(one))
        found.append(one)
    return found


def _other_way(one: dict[str, Any]) -> bool:
    """Whether the target moved against the prediction, or the answer's odds did where the target raises the answer."""
    if "predicted" not in one:
        return False
    moves = [one["measured_free"]]
    if one["target"].startswith(one["answer"]):  # " Paris", or " Paris − the others' answers"
        moves.append(_odds(one["after"]) - _odds(one["before"]))
    return any(moved * one["predicted"] < 0 for moved in moves)


def _answers(model: Any, results: Sequence[InterventionResult], boxes: int) -> list[dict[str, Any]]:
    """What runs with nothing held say next, and what became of the untouched run's answer.

    All runs' logits are computed together, as reading the unembedding once for each run would take longer than the
    runs. The likeliest tokens are listed for the first ``boxes`` runs only; the others are random sets.
    """
    unembed = unembed_weights(model)
    before = unembed.logits(results[0].baseline_final[-1:])[0]
    answer, likely = int(before.argmax()), before.softmax(-1)
    common = {"answer": token_text(model, answer), "before": round(float(likely[answer]), 6)}
    found: list[dict[str, Any]] = []
    for start in range(0, len(results), RUNS_AT_ONCE):
        part = results[start : start + RUNS_AT_ONCE]
        logits = unembed.logits(torch.stack([result.final[-1] for result in part]))
        shares = logits.softmax(-1)
        for row, share in enumerate(shares):
            one = common | {
                "after": round(float(share[answer]), 6),
                "logit": round(float(logits[row, answer] - before[answer]), 5),
            }
            found.append(one | ({"top": _top(model, likely, share)} if start + row < boxes else {}))
    return found


def _top(model: Any, before: Float[Tensor, " d_vocab"], after: Float[Tensor, " d_vocab"]) -> list[dict[str, Any]]:
    """The likeliest next tokens of either run, with both probabilities."""
    either = torch.maximum(before, after).topk(TOP).indices.tolist()
    return [
        {"token": token_text(model, i), "before": round(float(before[i]), 6), "after": round(float(after[i]), 6)}
        for i in either
    ]


def _against_chance(one: dict[str, Any], random: Sequence[dict[str, Any]], other_way: bool) -> dict[str, Any]:
    """The same of random sets. A box is tested if its answer's odds move as predicted, and further than with every
    random set."""
    odds = [abs(_odds(r["after"]) - _odds(r["before"])) for r in (one, *random)]
    return {
        "random": sorted(r["after"] for r in random),
        "random_logits": sorted(r["logit"] for r in random),
        "tested": odds[0] > max(odds[1:]) and not other_way,
        "other_way": odds[0] > max(odds[1:]) and other_way,
    }


def _odds(probability: float) -> float:
    """The logarithm of the odds, which tells 99 % from 99.9 %."""
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64), eps=1e-7))


def _moved(graph: AttributionGraph, target: int, reads: Float[Tensor, " d_model"], result: InterventionResult) -> float:
    """How far the target moved, before any soft cap."""
    moved = (result.final - result.baseline_final)[int(graph._nodes.position[target])].float()
    return round(float(moved @ reads.to(moved.device)), 5)
