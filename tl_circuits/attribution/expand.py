"""Choose which features to expand: the most influential on the targets first, until ``max_nodes`` are expanded.

To *expand* a node is to compute its row: the direct effect of every source on it. A node's influence is only known
through the rows of the nodes it acts on, so features are expanded in a few rounds, and after each round all
influences are computed anew, as in circuit-tracer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.batches import Engine, sweeps
from tl_circuits.attribution.rows import ROW_FLOATS, ROW_FLOATS_OF_A_GPU, ROW_MASS, Rows, trimmed_rows, whole_rows
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets

MAX_NODES = 4000  # how many features a graph gets unless the caller says otherwise
ROUNDS = 6  # max_nodes are expanded in about this many rounds
SMALLEST_ROUND = 64  # features in a round at least: fewer would make small, slow matrix products


@dataclass(frozen=True)
class Block:
    """Rows of expanded nodes of one place: row ``i`` of ``rows`` is that of the node in column ``columns[i]``.

    ``shared``: what a baseline brings to each of them, which is part of ``bias``.
    """

    columns: Int[Tensor, " n"]
    rows: Rows
    bias: Float[Tensor, " n"]
    shared: Float[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Trimming:
    """How much of each row is kept: entries with a share ``mass`` of its absolute sum, at most ``limit`` of them."""

    mass: float
    limit: int

    @classmethod
    def choose(cls, mass: float | None, max_nodes: int, width: int, device: torch.device) -> "Trimming | None":
        """The trimming for ``max_nodes`` rows of ``width`` entries on ``device``; None means that rows are kept whole.

        ``mass`` is the caller's wish (1.0: everything). If it is None, rows are kept whole when they all fit into
        ``ROW_FLOATS``, and else trimmed so that they do.
        """
        if mass is None:
            most = ROW_FLOATS if device.type == "cpu" else ROW_FLOATS_OF_A_GPU
            # An entry that is kept by itself takes two numbers, its value and its column: hence half as many.
            return None if max_nodes * width <= most else cls(ROW_MASS, max(1, most // (2 * max_nodes)))
        return None if mass == 1.0 else cls(mass, width)


@dataclass
class Expansion:
    """All rows computed so far: those of the roots (the targets) and, place by place, those of features.

    A place is a layer, or one of its dictionaries if it has several (:mod:`tl_circuits.hooks.places`).
    """

    sources: Sources
    root_weights: Float[Tensor, " root"]
    roots: Block | None = None
    blocks: dict[int, list[Block]] = field(default_factory=dict)
    started_at: tuple[int, ...] = ()  # columns of features that are themselves targets
    trimming: Trimming | None = None

    def influence(self) -> Float[Tensor, " column"]:
        """Each column's influence on the roots, summed over all paths through expanded nodes.

        Every row is taken in absolute value and divided by its sum (Ameisen et al. 2025, graph pruning). An edge
        never leads to the same or an earlier place, so when a place's turn comes, going from the last place to the
        first, its nodes' influences are complete, and one pass is exact.
        """
        total = self.root_weights.new_zeros(self.sources.width)
        if self.roots is not None:
            self.roots.rows.add_influence(self.root_weights, total)
        for column in self.started_at:
            total[column] += 1.0
        for place in sorted(self.blocks, reverse=True):
            for block in self.blocks[place]:
                block.rows.add_influence(total[block.columns], total)
        return total

    def kept(self, rows: Float[Tensor, "n column"], which: Int[Tensor, " m"], width: int) -> Rows:
        """Rows ``which`` of a sweep, up to column ``width`` (later ones are zero), trimmed if rows are to be."""
        if self.trimming is None:
            return whole_rows(rows[which, :width])
        return trimmed_rows([rows[i, :width] for i in which.tolist()], self.trimming.mass, self.trimming.limit)

    def expanded(self) -> Int[Tensor, " n"]:
        """The columns of all expanded features, in the order they were expanded within a place."""
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
    """Fill ``expansion`` with the rows of the roots and of ``max_nodes`` features, chosen by ``ranking`` or influence.

    Args:
        engine: computes the rows.
        expansion: where rows are put.
        root_targets: the logits or directions to explain; None where a feature is explained
            (``expansion.started_at``).
        feature_targets: gives the targets that stand for the features in some columns.
        max_nodes: how many features to expand.
        batch_size: how many rows to compute at once. The result does not depend on it, because the ranking is
            renewed after a number of nodes that depends on ``max_nodes`` alone.
        advance: called with the number of nodes finished since its last call.
        ranking: a number for each column; features with the largest are expanded. None to choose by influence.
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
        best = best[influence[best] > 0]  # what acts on nothing expanded so far would only fill the graph
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
        places, own = targets.place[indices], columns[indices.cpu()]
        shared = _take_shared(engine.sources, rows, bias)
        for place in places.unique().tolist():
            here = (places == place).nonzero()[:, 0]
            block = Block(
                own[here.cpu()], expansion.kept(rows, here, engine.sources.before(place)), bias[here], shared[here]
            )
            expansion.blocks.setdefault(place, []).append(block)
        advance(indices.numel())


def _root_block(engine: Engine, targets: Targets, batch_size: int | str) -> Block:
    values = targets.vector.new_zeros(len(targets), engine.sources.width)
    biases = targets.bias.new_zeros(len(targets))
    for indices, rows, bias in sweeps(engine, targets, batch_size):
        values[indices, : rows.shape[1]] = rows
        biases[indices] = bias
    shared = _take_shared(engine.sources, values, biases)
    return Block(torch.full((len(targets),), -1), whole_rows(values), biases, shared)


def _take_shared(sources: Sources, rows: Float[Tensor, "n column"], bias: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The baseline's effect on each target, which is moved from its column of the rows into the biases.

    Zeros if there is no baseline.
    """
    if sources.shared_column is None:
        return torch.zeros_like(bias)
    shared = rows[:, sources.shared_column].clone()
    rows[:, sources.shared_column] = 0.0
    bias += shared
    return shared
