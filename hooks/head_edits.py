"""Edits of attention patterns and scores as hooks."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .edits import HeadOps, Plan
from .errors import EditError

AttentionHook = tuple[str, Callable[[Tensor, HookPoint], Tensor]]


def head_edit_hooks(plan: Plan, held: bool) -> list[AttentionHook]:
    """Hooks that set patterns and move scores; put them on behind those that hold patterns.

    ``held``: patterns are held, so a score moves the held row as its softmax would. Raises EditError
    in the run when the mask of the layer (a sliding window) leaves nothing to move.
    """
    hooks: list[AttentionHook] = []
    for layer, ops in plan.scores.items():
        name = f"blocks.{layer}.attn." + ("hook_pattern" if held else "hook_attn_scores")
        hooks.append((name, _reweigh(layer, ops) if held else _add_scores(layer, ops)))
    hooks += [(f"blocks.{layer}.attn.hook_pattern", _set_patterns(ops)) for layer, ops in plan.patterns.items()]
    return hooks


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
    """Softmax with some scores moved, from the pattern alone: ``p·e^Δ / (1 + Σ p (e^Δ - 1))``."""

    def reweigh(pattern: Tensor, hook: HookPoint) -> Tensor:
        cells = (ops.row, ops.head, ops.query, ops.key)
        _require_open(layer, ops, pattern[cells] == 0)
        edited = pattern.float()  # the row of a sink sums below one; what it lacks does not move
        gained = torch.zeros_like(edited)
        gained[cells] = edited[cells] * torch.expm1(ops.value)
        return ((edited + gained) / (1 + gained.sum(-1, keepdim=True))).to(pattern.dtype)

    return reweigh


def _require_open(layer: int, ops: HeadOps, closed: Tensor) -> None:
    if closed.any():
        query, key = (int(part[closed][0]) for part in (ops.query, ops.key))
        raise EditError(
            f"layer {layer} does not attend from {query} to {key} at all (masked by its sliding window, or a weight "
            "of zero), so moving that score does nothing."
        )
