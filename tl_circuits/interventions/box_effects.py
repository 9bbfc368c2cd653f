"""What removing or scaling a set of features does to the answer, measured in the model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.graph.drawn import LEVELS, page_graph
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement, unembed_weights
from tl_circuits.interventions.faithfulness import predicted_effects
from tl_circuits.interventions.intervene import edits_of, intervene_many
from tl_circuits.support.checked import checked

TOP = 5


@checked
def box_ablations(replacement: Replacement, graph: AttributionGraph, progress: bool = False) -> list[dict[str, Any]]:
    """Remove each box of the graph's page in the model and measure what happens to the answer.

    In a contrast graph, a box is removed by setting its features to what they are in the baseline. Attention patterns and
    norm denominators are held; where such a run diverges, nothing is.

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
    reads = _target_vector(replacement, graph, target)
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
        if reads is not None:
            moved = (result.final - result.baseline_final)[int(graph._nodes.position[target])].float()
            one |= {
                "target": graph.label(target).removeprefix("output ").strip("“”"),
                "predicted": round(float(predicted[row, target]), 5),
                "measured": round(float(moved @ reads.to(moved.device)), 5),
            }
        found.append(one)
    return found


def _target_vector(replacement: Replacement, graph: AttributionGraph, target: int) -> Float[Tensor, " d_model"] | None:
    """What the target reads of the final norm's output; None if the graph does not say, or explains a feature."""
    if not graph.is_kind("logit")[target]:
        return None
    token = int(graph._nodes.feature[target])
    if token >= 0:
        vector = unembed_weights(replacement.model).columns(torch.tensor([token]))[:, 0]
        return vector - replacement.mean_unembedding[0].to(vector.device)
    first = int(graph.is_kind("logit").nonzero()[0])
    return None if graph.target_vectors is None else graph.target_vectors[target - first]
