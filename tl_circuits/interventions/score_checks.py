"""Test QK attributions in the model: remove sources with everything else held, and see how the score changes."""

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attention.qk import QKAttribution
from tl_circuits.errors import EditError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import (
    CleanRun,
    Edit,
    Replacement,
    edit_hooks,
    held_head_norms,
    make_plan,
    run_edited,
    scores_softcap,
    to_tokens,
    without_soft_cap,
)
from tl_circuits.interventions.node_edits import edit_of

SOURCES = 10  # removed one by one, and then together


def score_effects(
    replacement: Replacement, graph: AttributionGraph, scores: Sequence[QKAttribution], clean: CleanRun
) -> pd.DataFrame:
    """Predicted and measured changes of attention scores, as a frame ``freeze source target predicted measured``.

    The largest sources of each score are removed one by one, then together (``"all of these"``). Patterns, all norm
    denominators (queries' and keys' included) and MLP outputs are held. ``freeze`` is ``"score"`` in every row.
    """
    return pd.concat([_one_score(replacement, graph, qk, clean) for qk in scores], ignore_index=True)


def _one_score(replacement: Replacement, graph: AttributionGraph, qk: QKAttribution, clean: CleanRun) -> pd.DataFrame:
    names = _largest(qk)
    sets = [[name] for name in names] + ([names] if len(names) > 1 else [])
    measured = _measure(replacement, graph, qk, [[_edit(qk, name) for name in group] for group in sets], clean)
    instead = "" if qk.baseline_key is None else f"-{qk.baseline_key}"
    return pd.DataFrame(
        {
            "freeze": "score",
            "source": [*names, "all of these"][: len(sets)],
            "target": f"L{qk.layer}/H{qk.head}/score@{qk.query}>{qk.key}{instead}",
            "predicted": [qk.removal(group) for group in sets],
            "measured": measured.tolist(),
        }
    )


def _largest(qk: QKAttribution) -> list[str]:
    both = pd.concat([qk.by_query, qk.by_key])
    names = both[both.kind != "bias"].source.unique().tolist()
    if not names:
        raise EditError(f"{qk.title}: nothing but the bias is in this score, so there is nothing to remove.")
    return sorted(names, key=lambda name: -abs(qk.removal([name])))[:SOURCES]


def _edit(qk: QKAttribution, name: str) -> Edit:
    """The edit that removes a source."""
    columns = qk._sides.columns
    edit = edit_of(columns.place(columns.column(name)))
    if edit is None:
        raise EditError(
            f"{qk.title}: no edit can remove the source {name!r}; only features, errors and tokens can be removed."
        )
    return edit


def _measure(
    replacement: Replacement,
    graph: AttributionGraph,
    qk: QKAttribution,
    sets: Sequence[Sequence[Edit]],
    clean: CleanRun,
) -> Float[Tensor, " removal"]:
    model = replacement.model
    tokens = to_tokens(model, graph)
    n = tokens.numel()
    # One untouched run among them, so that before and after come from the same batch.
    plan = make_plan(model, replacement.dictionary, [*sets, []], n, n)
    hooks = edit_hooks(replacement, plan, clean, "all") + held_head_norms(model, tokens, qk.layer)
    point = f"blocks.{qk.layer}.attn.hook_attn_scores"
    _, seen = run_edited(replacement, tokens.expand(len(sets) + 1, n), hooks, [point])
    rows = without_soft_cap(seen[point][:, qk.head, qk.query].double(), scores_softcap(model))
    score = rows[:, qk.key] if qk.baseline_key is None else rows[:, qk.key] - rows[:, qk.baseline_key]
    return (score[:-1] - score[-1]).cpu()
