"""Which nodes to expand next: best first, by influence on the targets, until the budget is spent."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.batches import Engine, sweeps
from tl_circuits.attribution.rows import ROW_FLOATS, ROW_MASS, Rows, trimmed_rows, whole_rows
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets

ROUNDS = 6  # how often the ranking is renewed on the way to the budget
SMALLEST_ROUND = 64


@dataclass(frozen=True)
class Block:
    """Rows of expanded nodes of one layer. ``columns[i]`` is the node whose row is row ``i`` of ``rows``.

    ``shared``: what a baseline brings to each, which is part of ``bias``.
    """

    columns: Int[Tensor, " n"]
    rows: Rows
    bias: Float[Tensor, " n"]
    shared: Float[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Trimming:
    """How much of each row is kept: its absolute ``mass``, in at most ``limit`` entries; None: all of it."""

    mass: float
    limit: int

    @classmethod
    def choose(cls, mass: float | None, max_nodes: int, width: int) -> "Trimming | None":
        """Whole rows where ``max_nodes`` of ``width`` entries fit, or the part asked for."""
        if mass is None:
            return None if max_nodes * width <= ROW_FLOATS else cls(ROW_MASS, max(1, ROW_FLOATS // (2 * max_nodes)))
        return None if mass == 1.0 else cls(mass, width)


@dataclass
class Expansion:
    """Rows found so far: those of the roots (logits) and, layer by layer, those of features."""

    sources: Sources
    root_weights: Float[Tensor, " root"]
    roots: Block | None = None
    blocks: dict[int, list[Block]] = field(default_factory=dict)
    started_at: tuple[int, ...] = ()  # columns of features that are themselves targets
    trimming: Trimming | None = None

    def influence(self) -> Float[Tensor, " column"]:
        """Each column's total influence on the roots through all expanded nodes.

        Rows are taken in absolute value and scaled to sum one (Ameisen et al. 2025, graph pruning).
        Edges only go up the layers, so one pass from the last layer to the first is exact.
        """
        total = self.root_weights.new_zeros(self.sources.width)
        if self.roots is not None:
            self.roots.rows.add_influence(self.root_weights, total)
        for column in self.started_at:
            total[column] += 1.0
        for layer in sorted(self.blocks, reverse=True):
            for block in self.blocks[layer]:
                block.rows.add_influence(total[block.columns], total)
        return total

    def kept(self, rows: Float[Tensor, "n column"], which: Int[Tensor, " m"], width: int) -> Rows:
        """What is kept of some of a sweep's rows, which end at ``width``."""
        if self.trimming is None:
            return whole_rows(rows[which, :width])
        return trimmed_rows([rows[i, :width] for i in which.tolist()], self.trimming.mass, self.trimming.limit)

    def expanded(self) -> Int[Tensor, " n"]:
        """The columns of all expanded features, in the order they were expanded within a layer."""
        columns = [block.columns for blocks in self.blocks.values() for block in blocks]
        return torch.cat(columns) if columns else torch.empty(0, dtype=torch.long)


def expand(
    engine: Engine,
    expansion: Expansion,
    root_targets: Targets | None,
    feature_targets: Callable[[Int[Tensor, " n"]], Targets],
    max_nodes: int,
    batch_size: int | str,
    advance: Callable[[int], None],
    ranking: Float[Tensor, " column"] | None = None,
) -> None:
    """Fill ``expansion`` with the rows of the roots and of ``max_nodes`` features: the highest in ``ranking``, else by influence.

    ``feature_targets`` turns columns into targets; ``advance(n)`` is told of n finished nodes. The
    ranking is renewed on a schedule that depends on ``max_nodes`` alone, so the outcome does not
    depend on ``batch_size``.
    """
    if root_targets is not None:
        expansion.roots = _root_block(engine, root_targets, batch_size)
    features = engine.sources.feature_columns
    waiting = torch.ones(engine.sources.width, dtype=torch.bool)
    if expansion.started_at:
        start = torch.tensor(expansion.started_at)
        waiting[start] = False
        _expand_columns(engine, expansion, start, feature_targets, batch_size, advance)
    budget = min(max_nodes, features.numel()) - len(expansion.started_at)
    if ranking is not None:
        candidates = features[waiting[features]]
        best = torch.argsort(ranking[candidates], descending=True, stable=True)[:budget]
        columns = candidates[best[ranking[candidates[best]] > 0]].sort().values
        if len(columns):
            _expand_columns(engine, expansion, columns, feature_targets, batch_size, advance)
        return
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
    for indices, rows, bias in sweeps(engine, targets, batch_size):
        layers, own = targets.layer[indices], columns[indices.cpu()]
        shared = _take_shared(engine.sources, rows, bias)
        for layer in layers.unique().tolist():
            here = (layers == layer).nonzero()[:, 0]
            block = Block(own[here.cpu()], expansion.kept(rows, here, engine.sources.before(layer)), bias[here], shared[here])
            expansion.blocks.setdefault(layer, []).append(block)
        advance(indices.numel())


def _root_block(engine: Engine, targets: Targets, batch_size: int | str) -> Block:
    values = targets.vector.new_zeros(len(targets), engine.sources.width)
    biases = targets.bias.new_zeros(len(targets))
    for indices, rows, bias in sweeps(engine, targets, batch_size):
        values[indices, : rows.shape[1]] = rows
        biases[indices] = bias
    shared = _take_shared(engine.sources, values, biases)
    return Block(torch.full((len(targets),), -1), whole_rows(values), biases, shared)


def _take_shared(
    sources: Sources, rows: Float[Tensor, "n column"], bias: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """What a baseline brings to each target, moved from its column of the rows to their biases; zeros without one."""
    if sources.shared_column is None:
        return torch.zeros_like(bias)
    shared = rows[:, sources.shared_column].clone()
    rows[:, sources.shared_column] = 0.0
    bias += shared
    return shared
