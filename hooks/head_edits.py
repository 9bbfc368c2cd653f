"""Turn edits of attention patterns and scores into hooks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .attach import Replacement, blaming
from .edit_plan import HeadOps, Plan
from .errors import EditError
from .owned import others_hooks
from .proof import moves_pattern

AttentionHook = tuple[str, Callable[[Tensor, HookPoint], Tensor]]


def head_edit_hooks(replacement: Replacement, plan: Plan) -> list[AttentionHook]:
    """Hooks that change scores and set patterns in a run where patterns are not held.

    Raises:
        EditError: a layer's attention ignores what such a hook returns. During the run: the layer's mask (a sliding
            window) hides the key from the query, so that there is nothing to change.
    """
    for layer in plan.patterns | plan.scores:
        if layer in replacement.holds(None).replayed_patterns:
            raise EditError(
                f"layer {layer} ignores patterns that a hook returns, because the Hugging Face module has already used "
                "them. Hold patterns (freeze='attention'): then the heads are computed again from the held pattern, "
                "and pattern edits act."
            )
    for layer in plan.scores:
        with blaming(others_hooks(replacement.model)):
            moves = replacement.remembered(("scores", layer), partial(moves_pattern, replacement.model, layer))
        if not moves:
            raise EditError(
                f"layer {layer} ignores scores that a hook returns. Set the pattern instead (PatternEdit), or hold "
                "patterns (freeze='attention'): then the edit changes the held attention weights of that query as "
                "softmax would."
            )
    hooks: list[AttentionHook] = []
    for layer, ops in plan.scores.items():
        hooks.append((f"blocks.{layer}.attn.hook_attn_scores", _add_scores(layer, ops)))
    hooks += [(f"blocks.{layer}.attn.hook_pattern", _set_patterns(ops)) for layer, ops in plan.patterns.items()]
    return hooks


def held_pattern_edits(plan: Plan) -> dict[int, list[Callable[[Tensor, Any], Tensor]]]:
    """Functions that edit each layer's held pattern, to be applied in order.

    A change of a score changes the held weights of its query as their softmax would.
    """
    edits: dict[int, list[Callable[[Tensor, Any], Tensor]]] = {}
    for layer, ops in plan.scores.items():
        edits.setdefault(layer, []).append(_reweigh(layer, ops))
    for layer, ops in plan.patterns.items():
        edits.setdefault(layer, []).append(_set_patterns(ops))
    return edits


def _set_patterns(ops: HeadOps) -> Callable[[Tensor, HookPoint], Tensor]:
    def set_patterns(pattern: Tensor, hook: HookPoint) -> Tensor:
        edited = pattern.clone()
        edited[ops.row, ops.head, ops.query, ops.key] = ops.value.to(edited.dtype)
        return edited

    return set_patterns


def _add_scores(layer: int, ops: HeadOps) -> Callable[[Tensor, HookPoint], Tensor]:
    def add_scores(scores: Tensor, hook: HookPoint) -> Tensor:
        cells = (ops.row, ops.head, ops.query, ops.key)
        _require_open(layer, ops, scores[cells] < torch.finfo(scores.dtype).min / 2)
        edited = scores.clone()
        edited[cells] += ops.value.to(edited.dtype)
        return edited

    return add_scores


def _reweigh(layer: int, ops: HeadOps) -> Callable[[Tensor, HookPoint], Tensor]:
    """The pattern that softmax would give if some scores were changed by Δ: ``p·e^Δ / (r + Σ p e^Δ)``.

    It needs only the old pattern ``p``, not the scores. ``r`` is what a row lacks to 1, which is in an attention sink.
    Both sides are divided by the largest ``p·e^Δ``, so a large Δ does not overflow.
    """

    def reweigh(pattern: Tensor, hook: HookPoint) -> Tensor:
        cells = (ops.row, ops.head, ops.query, ops.key)
        _require_open(layer, ops, pattern[cells] == 0)
        old = pattern if pattern.device.type == "mps" else pattern.double()  # MPS has no float64
        moved = torch.zeros_like(old)
        moved[cells] = ops.value.to(old.dtype)
        rows = moved.any(-1, keepdim=True)
        logs = old.log() + moved
        largest = logs.amax(-1, keepdim=True).clamp_min(0.0)
        weights = (logs - largest).exp()
        rest = (1 - old.sum(-1, keepdim=True)) * (-largest).exp()
        return torch.where(rows, weights / (rest + weights.sum(-1, keepdim=True)), old).to(pattern.dtype)

    return reweigh


def _require_open(layer: int, ops: HeadOps, closed: Tensor) -> None:
    if closed.any():
        query, key = (int(part[closed][0]) for part in (ops.query, ops.key))
        raise EditError(
            f"layer {layer} has zero attention from position {query} to {key} (hidden by its mask, or exactly zero), "
            "so adding to that score changes nothing."
        )
