"""Which nodes to expand next: best first, by influence on the targets, until the budget is spent."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets

ROUNDS = 6  # how often the ranking is renewed on the way to the budget
SMALLEST_ROUND = 64
ROWS_AT_ONCE = 1024  # (targets x positions) in one sweep, where batch_size is "auto"


@runtime_checkable
class Engine(Protocol):
    """What computes rows; the linear and the autograd engine."""

    sources: Sources

    def rows(self, targets: Targets) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """Direct effects and biases of ``targets``."""


@dataclass(frozen=True)
class Block:
    """Rows of expanded nodes of one layer. ``columns[i]`` is the node whose row ``rows[i]`` is."""

    columns: Int[Tensor, " n"]
    rows: Float[Tensor, "n column"]
    bias: Float[Tensor, " n"]
    mass: Float[Tensor, " n"]  # absolute sum of each row


@dataclass
class Expansion:
    """Rows found so far: those of the roots (logits) and, layer by layer, those of features."""

    sources: Sources
    root_weights: Float[Tensor, " root"]
    roots: Block | None = None
    blocks: dict[int, list[Block]] = field(default_factory=dict)
    started_at: tuple[int, ...] = ()  # columns of features that are themselves targets

    def influence(self) -> Float[Tensor, " column"]:
        """Each column's total influence on the roots through all expanded nodes.

        Rows are taken in absolute value and scaled to sum one (Ameisen et al. 2025, graph pruning).
        Edges only go up the layers, so one pass from the last layer to the first is exact.
        """
        total = self.root_weights.new_zeros(self.sources.width)
        if self.roots is not None:
            _push(total, self.roots, self.root_weights)
        for column in self.started_at:
            total[column] += 1.0
        for layer in sorted(self.blocks, reverse=True):
            for block in self.blocks[layer]:
                _push(total, block, total[block.columns])
        return total

    def expanded(self) -> Int[Tensor, " n"]:
        """The columns of all expanded features, in the order they were expanded within a layer."""
        columns = [block.columns for blocks in self.blocks.values() for block in blocks]
        return torch.cat(columns) if columns else torch.empty(0, dtype=torch.long)


def _push(total: Tensor, block: Block, weights: Float[Tensor, " n"]) -> None:
    share = weights / block.mass.clamp_min(1e-30)
    total[: block.rows.shape[1]] += share @ block.rows.abs()


def sweep_chunks(targets: Targets, batch_size: int | str) -> Iterator[Int[Tensor, " n"]]:
    """Indices of targets to sweep together: near positions together, so that few rows are padding.

    Each chunk stands from the last layer to the first, the order in which a sweep takes targets up.
    """
    order = torch.argsort(targets.position, stable=True)
    positions = targets.position[order].tolist()
    start = 0
    for i in range(1, len(positions) + 1):
        full = i - start >= batch_size if isinstance(batch_size, int) else (
            i < len(positions) and (i + 1 - start) * (positions[i] + 1) > ROWS_AT_ONCE
        )
        if i == len(positions) or full:
            chunk = order[start:i]
            yield chunk[torch.argsort(targets.layer[chunk], descending=True, stable=True)]
            start = i


def expand(
    engine: Engine,
    expansion: Expansion,
    root_targets: Targets | None,
    feature_targets: Callable[[Int[Tensor, " n"]], Targets],
    max_nodes: int,
    batch_size: int | str,
    advance: Callable[[int], None],
) -> None:
    """Fill ``expansion`` with the rows of the roots and of the ``max_nodes`` most influential features.

    ``feature_targets`` turns columns into targets; ``advance(n)`` is told of n finished nodes. The
    ranking is renewed on a schedule that depends on ``max_nodes`` alone, so the outcome does not
    depend on ``batch_size``.
    """
    if root_targets is not None:
        for indices in sweep_chunks(root_targets, batch_size):
            _store_roots(expansion, *engine.rows(root_targets[indices]), indices, len(root_targets))
    features = engine.sources.feature_columns
    waiting = torch.ones(engine.sources.width, dtype=torch.bool)
    if expansion.started_at:
        start = torch.tensor(expansion.started_at)
        waiting[start] = False
        _expand_columns(engine, expansion, start, feature_targets, batch_size, advance)
    budget = min(max_nodes, features.numel()) - len(expansion.started_at)
    step = max(SMALLEST_ROUND, -(-max_nodes // ROUNDS))
    while budget > 0:
        candidates = features[waiting[features]]
        influence = expansion.influence().cpu()[candidates]
        best = torch.argsort(influence, descending=True, stable=True)[: min(step, budget)]
        best = best[influence[best] > 0]
        if best.numel() == 0:
            break
        columns = candidates[best]
        waiting[columns] = False
        budget -= columns.numel()
        _expand_columns(engine, expansion, columns, feature_targets, batch_size, advance)


def _expand_columns(
    engine: Engine,
    expansion: Expansion,
    columns: Int[Tensor, " n"],
    feature_targets: Callable[[Int[Tensor, " n"]], Targets],
    batch_size: int | str,
    advance: Callable[[int], None],
) -> None:
    targets = feature_targets(columns)
    for indices in sweep_chunks(targets, batch_size):
        chunk = targets[indices]
        rows, bias = engine.rows(chunk)
        for layer in chunk.layer.unique().tolist():
            here = (chunk.layer == layer).nonzero()[:, 0]
            block_rows = rows[here, : engine.sources.before(layer)]
            block = Block(columns[indices[here]], block_rows, bias[here], block_rows.abs().sum(-1))
            expansion.blocks.setdefault(layer, []).append(block)
        advance(len(chunk))


def _store_roots(
    expansion: Expansion, rows: Tensor, bias: Tensor, indices: Int[Tensor, " n"], n_roots: int
) -> None:
    if expansion.roots is None:
        expansion.roots = Block(
            torch.full((n_roots,), -1),
            rows.new_zeros(n_roots, expansion.sources.width),
            rows.new_zeros(n_roots),
            rows.new_zeros(n_roots),
        )
    expansion.roots.rows[indices, : rows.shape[1]] = rows
    expansion.roots.bias[indices] = bias
    expansion.roots.mass[indices] = rows.abs().sum(-1)
