"""What removing or scaling a set of features does to the answer, measured in the model."""

from collections.abc import Sequence
from typing import Any

import torch

from tl_circuits.dictionaries.belonging import require_belonging, require_no_baseline
from tl_circuits.graph.drawn import LEVELS, page_graph
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement
from tl_circuits.interventions.faithfulness import predicted_effects
from tl_circuits.interventions.intervene import edits_of, intervene_many
from tl_circuits.support.checked import checked

TOP = 5


@checked
def box_ablations(replacement: Replacement, graph: AttributionGraph, progress: bool = False) -> list[dict[str, Any]]:
    """Remove each box of the graph's page in the model and measure what happens to the answer.

    Attention patterns and norm denominators are held; where such a run diverges, nothing is.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        progress: show a progress bar on stderr.

    Returns:
        One dict for each box, for ``graph.to_html(ablations=...)``: its ``nodes``, the likeliest next tokens before and
        after (``top``), and how the answer's logit was ``predicted`` to move and how it moved as ``measured``.

    Raises:
        PromptError: for an aggregated graph, which belongs to no single prompt.
        BelongingError: for a graph of another model or dictionary.

    Examples:
        >>> removed = tlc.box_ablations(replacement, graph)
        >>> removed[0]["freeze"], removed[0]["top"][0]["token"]
        ('attention', 'Austin')
        >>> path = graph.to_html(folder / "why.html", ablations=removed)
    """
    require_no_baseline(graph, "box_ablations")
    require_belonging(replacement, graph)
    shown = page_graph(graph)
    boxes = {ids for most in LEVELS for _, ids in shown.supernodes(most).groups}
    return measure_boxes(replacement, graph, sorted(boxes), 0.0, progress)


def measure_boxes(
    replacement: Replacement, graph: AttributionGraph, boxes: Sequence[Sequence[str]], factor: float, progress: bool = False
) -> list[dict[str, Any]]:
    """Multiply each set of nodes by ``factor`` in the model, and measure what happens to the answer.

    For each set: the likeliest next tokens before and after, and how the logit of the strongest token target (minus the
    mean logit) moves, predicted and measured. Patterns and norm denominators are held (``freeze`` is ``"attention"``);
    where that run diverges, nothing is (``"none"``).
    """
    if not boxes:
        return []
    require_belonging(replacement, graph)
    edits = [edits_of(graph, ids, factor) for ids in boxes]
    results = intervene_many(replacement, graph, edits, freeze="attention", progress=progress)
    diverged = [i for i, result in enumerate(results) if result.diverged]
    if diverged:
        free = intervene_many(replacement, graph, [edits[i] for i in diverged], freeze="none")
        for i, result in zip(diverged, free, strict=True):
            results[i] = result
    index = {name: i for i, name in enumerate(graph.node_ids)}
    predicted = predicted_effects(graph, [[index[i] for i in ids] for ids in boxes], direct=False, factor=factor)
    target = int(graph._nodes.weight.argmax())
    token = int(graph._nodes.feature[target]) if graph.is_kind("logit")[target] else -1
    found = []
    for row, (ids, result) in enumerate(zip(boxes, results, strict=True)):
        top = result.top(TOP).head(TOP)
        one: dict[str, Any] = {
            "nodes": list(ids),
            "freeze": result.freeze,
            "top": [
                {"token": r.token, "before": round(float(r.before), 6), "after": round(float(r.after), 6)}
                for r in top.itertuples()
            ],
        }
        if token >= 0:
            before, after = (log - log.mean() for log in _last_logits(result))
            one |= {
                "target": graph.label(target).removeprefix("output ").strip("“”"),
                "predicted": round(float(predicted[row, target]), 5),
                "measured": round(float(after[token] - before[token]), 5),
            }
        found.append(one)
    return found


def _last_logits(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    before = result._logits(result.baseline_final[-1:])[0]
    return before, result.last_logits
