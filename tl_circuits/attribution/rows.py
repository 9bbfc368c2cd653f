"""Rows of direct effects, as kept while a graph is being built: every entry, or only the largest ones of each row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROW_FLOATS = 2**27  # how many entries all rows together may keep: 512 MB of float32
ROW_FLOATS_OF_A_GPU = 2**30  # 4 GB
ROW_MASS = 0.999  # the share of its absolute sum that a trimmed row keeps
_SAMPLE = 4096  # from about this many entries of a row the size of the smallest one to keep is estimated


@dataclass(frozen=True)
class Rows:
    """Direct effects of all columns on ``n`` targets, in one of two forms.

    Whole rows (``column`` and ``start`` are None): ``values[i, c]`` is the effect of column ``c`` on target ``i``, for
    the first columns; those after them have no effect.
    Trimmed rows: the kept entries of row ``i`` are ``values[start[i] : start[i + 1]]``, and ``column`` tells the column
    of each. ``total`` and ``mass`` are the sum and the absolute sum of each whole row, dropped entries included.
    """

    values: Float[Tensor, "n column"] | Float[Tensor, " entry"]
    total: Float[Tensor, " n"]
    mass: Float[Tensor, " n"]
    column: Int[Tensor, " entry"] | None = None
    start: Int[Tensor, " n_plus_one"] | None = None

    def add_influence(self, weights: Float[Tensor, " n"], influence: Float[Tensor, " width"]) -> None:
        """Pass on influence: each column gets its absolute share of every row, times the row's weight."""
        share = weights / self.mass.float().clamp_min(1e-30)
        if self.column is None:
            influence[: self.values.shape[1]] += share @ self.values.abs()
        else:
            assert self.start is not None  # set together with ``column``
            column, sizes = self.column.long(), self.values.abs()
            if influence.device.type == "cpu":
                influence.index_add_(0, column, sizes * share.repeat_interleave(self.start.diff()))
                return
            # Row by row, because a GPU adds several numbers to one place in no fixed order; a row has each column once.
            for i, (begin, end) in enumerate(pairwise(self.start.tolist())):
                influence.index_add_(0, column[begin:end], sizes[begin:end] * share[i])

    def entries(
        self, node_of: Int[Tensor, " width"]
    ) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"], Float[Tensor, " edge"]]:
        """Row, node number and value of every non-zero entry whose column became a node (``node_of[column] >= 0``)."""
        if self.column is None:
            columns = (node_of[: self.values.shape[1]] >= 0).nonzero()[:, 0]
            kept = self.values[:, columns.to(self.values.device)].cpu()
            row, at = kept.nonzero(as_tuple=True)
            return row, node_of[columns[at]], kept[row, at].float()
        assert self.start is not None  # set together with ``column``
        row = torch.arange(len(self.mass)).repeat_interleave(self.start.diff().cpu())
        node, values = node_of[self.column.long().cpu()], self.values.cpu()
        kept = (node >= 0) & (values != 0)
        return row[kept], node[kept], values[kept]


def whole_rows(values: Float[Tensor, "n column"]) -> Rows:
    """Rows with all their entries."""
    return Rows(values, _sums(values), _sums(values.abs()))


def trimmed_rows(rows: Sequence[Float[Tensor, " column"]], mass: float, limit: int) -> Rows:
    """The largest entries of each row: enough for the share ``mass`` of its absolute sum, but at most ``limit``."""
    total, whole, columns, values = [], [], [], []
    for row in rows:
        size = row.abs()
        total.append(_sums(row))
        whole.append(_sums(size))
        columns.append(_heaviest(size, float(whole[-1]), mass, limit))
        values.append(row[columns[-1]])
    start = torch.tensor([0, *(column.numel() for column in columns)], device=rows[0].device).cumsum(0)
    return Rows(torch.cat(values), torch.stack(total), torch.stack(whole), torch.cat(columns).int(), start)


def _sums(rows: Float[Tensor, "*n column"]) -> Float[Tensor, "*n"]:
    """Sums over the last axis: 1024 entries at a time in float32, then these partial sums in float64.

    Twenty times faster than adding everything in float64, and the error stays below the rounding of the entries.
    """
    even = rows.shape[-1] // 1024 * 1024
    blocks = rows[..., :even].unflatten(-1, (-1, 1024)).sum(-1) if even else rows[..., :0]
    return blocks.sum(-1, dtype=torch.float64) + rows[..., even:].sum(-1, dtype=torch.float64)


def _heaviest(size: Float[Tensor, " column"], whole: float, mass: float, limit: int) -> Int[Tensor, " entry"]:
    """Columns of the largest entries: so many that they sum to ``mass * whole``, but at most ``limit``.

    ``whole`` is the sum of all entries. Sorting a whole row would be slow, so the size of the smallest entry to
    keep (the cut) is estimated on an evenly spaced sample, and halved until enough is kept.
    """
    step = max(1, size.numel() // _SAMPLE)
    sample = size[::step].sort(descending=True).values
    carried = sample.cumsum(0)
    enough = int((carried < mass * carried[-1]).sum())
    # 5/4: rather a few more than the limit, of which topk drops the smallest.
    cut = float(sample[min(enough, limit * 5 // (4 * step), len(sample) - 1)])
    while True:
        column = (size >= cut).nonzero()[:, 0]
        kept = size[column]
        if column.numel() > limit:
            largest = kept.topk(limit, sorted=False).indices.sort().values
            column, kept = column[largest], kept[largest]
            break
        if cut == 0 or float(kept.sum(dtype=torch.float64)) >= mass * whole:
            break
        cut /= 2
    return column[kept != 0]
