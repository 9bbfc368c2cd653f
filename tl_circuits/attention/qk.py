"""Why a head looks where it looks: its attention score as a sum over pairs of sources (QK attribution).

With the patterns of earlier layers and all norm denominators frozen, the stream that enters a layer is a sum: what
tokens, features and errors wrote anywhere in the prompt, carried along by earlier heads, plus a constant. A score
before softmax is the product of one such sum at the query position and one at the key position. So it is exactly a sum
over pairs of sources ("Tracing Attention Computation Through Feature Interactions", Anthropic 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attention.retrace import Columns, Retraced, columns_of, retrace
from tl_circuits.attention.top_pairs import top_pairs
from tl_circuits.attribution.batches import sweeps
from tl_circuits.attribution.targets import Targets, resolve_position
from tl_circuits.errors import ArchitectureError, TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.hooks import FrozenScores, Replacement, in_turn, rounding_within
from tl_circuits.support.checked import checked
from tl_circuits.support.figures import Picture
from tl_circuits.support.outputs import output

MAX_PAIRS = 2**24  # the most pairs that are listed as a frame


@dataclass(frozen=True)
class QKAttribution:
    """One attention score, or the difference of two, as a sum over pairs of sources.

    Attributes:
        layer: the head's layer.
        head: the head.
        query: the position that looks.
        key: the position that is looked at.
        baseline_key: the key position to compare with; None if there is none.
        score: the model's own score before softmax and before any soft cap, minus that of ``baseline_key`` if there is
            one.
        total: the sum of all pairs. It equals ``score`` up to rounding.
        terms: the largest pairs, a frame ``query_source key_source weight``.
        by_query: the largest sources on the query side, each with the sum of its pairs with all sources on the key
            side. A frame ``source kind layer position feature token in_graph weight``.
        by_key: the same for the key side.
        by_position: all of ``total``, by the positions at which the two sources were written. Rows are the query side,
            columns the key side; ``"bias"`` is what no source wrote.
        tokens: the prompt's tokens.

    Examples:
        >>> qk = tlc.qk_attribution(replacement, graph, layer=2, head=1, query=-1, key=7)
        >>> qk.by_query[["source", "token", "weight"]].head(1).round(2)
            source token  weight
        0  token@8    is    6.55
        >>> qk.by_position.shape        # 9 positions and the bias
        (10, 10)
        >>> round(qk.removal(["token@8"]), 2)
        -6.55
    """

    layer: int
    head: int
    query: int
    key: int
    baseline_key: int | None
    score: float
    total: float
    terms: pd.DataFrame = field(repr=False, compare=False)
    by_query: pd.DataFrame = field(repr=False, compare=False)
    by_key: pd.DataFrame = field(repr=False, compare=False)
    by_position: pd.DataFrame = field(repr=False, compare=False)
    tokens: tuple[str, ...] = field(repr=False)
    _sides: "Sides" = field(repr=False, compare=False)

    @checked
    def removal(self, sources: Sequence[str]) -> float:
        """How the score changes if these sources are removed from both sides, with everything else frozen.

        The equation is in docs/method.md, "Attention".

        Args:
            sources: node ids, such as ``"L14/F2268@9"``.

        Returns:
            The change of the score before softmax and any soft cap.

        Raises:
            TargetError: for an id that is not a source of this score.
        """
        wanted = sorted({self._sides.columns.column(name) for name in sources})
        q, k = (side.double() for side in (self._sides.query, self._sides.key))
        q_all, k_all, q_gone, k_gone = q.sum(0), k.sum(0), q[wanted].sum(0), k[wanted].sum(0)
        return float(q_gone @ k_gone - q_gone @ k_all - q_all @ k_gone)

    def plot(self, path: str | Path | None = None) -> Path | Picture:
        """Draw ``by_position`` as a map of query side by key side (extra ``figure``).

        Args:
            path: a file that ends in ``.svg``, ``.png`` or ``.pdf``; if it exists, it is replaced. Without one, the
                picture is returned, and a notebook shows it.

        Returns:
            The path; without one, the picture.

        Raises:
            OutputError: if the file cannot be written, or has another ending.
            ImportError: if matplotlib is not installed; it names the extra.

        Examples:
            >>> qk = tlc.qk_attribution(replacement, graph, layer=2, head=1, query=-1, key=7)
            >>> qk.plot(folder / "score.svg").name
            'score.svg'
        """
        return output("attention figure")(self, None if path is None else Path(path))

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("query side", "key side", "part of the score", title=self.title, box=None)
        for row in self.terms.itertuples():
            table.add_row(row.query_source, row.key_source, f"{row.weight:+.3f}")
        return table

    def _repr_html_(self) -> str:
        return f"<p>{self.title}</p>{self.terms.to_html(index=False)}"

    @property
    def title(self) -> str:
        """The head, the positions and the score in words."""
        instead = "" if self.baseline_key is None else f" rather than {self.baseline_key}"
        return f"layer {self.layer} head {self.head}, {self.query} to {self.key}{instead}: score {self.score:.3f}"


@dataclass(frozen=True)
class Sides:
    """What every source adds to the rotated query and to the rotated key; the last row is the bias."""

    columns: Columns
    query: Float[Tensor, "source d_head"]
    key: Float[Tensor, "source d_head"]


@checked
@in_turn
def qk_attribution(
    replacement: Replacement,
    graph: AttributionGraph,
    layer: int,
    head: int,
    query: int,
    key: int,
    baseline_key: int | None = None,
    top: int | None = 20,
) -> QKAttribution:
    """Why a head looks from one position to another: its attention score as a sum over pairs of sources.

    Sources are the prompt's tokens, all active features, all errors, and one bias. Each counts with its linear effect
    on the stream that enters ``layer`` at the query (or key) position, also through the frozen patterns of earlier
    heads. Norm denominators, those of queries and keys included, are frozen ("Tracing Attention Computation Through
    Feature Interactions", Anthropic 2025; the equation is in docs/method.md, "Attention"). If the layer has an
    autoencoder of ``hook_resid_pre``, its features and errors at the two positions are the sources: the heads read
    nothing else.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: says which prompt; sources need not be among its nodes.
        layer: the head's layer.
        head: the head.
        query: the position that looks; negative positions count from the end.
        key: the position that is looked at.
        baseline_key: another key position: why does the head look at ``key`` rather than there?
        top: how many pairs and sources to list, by absolute size; None for all.

    Returns:
        The score with its largest pairs, and the sums by source of either side and by position. All numbers are parts
        of the score before softmax and any soft cap.

    Raises:
        TargetError: for a layer, head or position that does not exist, a key after the query, a ``baseline_key`` that
            is the key itself, or a key that the sliding window masks.
        BelongingError: for a graph of another model or dictionary.
        ArchitectureError: for attention without plain query and key weights, and if the sum does not give the model's
            score.
        ValueError: for ``top`` below 1, or None where there are too many pairs to list.
        AttachError: if the replacement was detached.

    Examples:
        >>> qk = tlc.qk_attribution(replacement, graph, layer=2, head=1, query=-1, key=7)
        >>> round(qk.score, 2), round(qk.total, 2)
        (5.83, 5.83)
        >>> qk.terms.head(2).round(2)
          query_source key_source  weight
        0      token@8       bias    1.65
        1      token@8    token@7   -1.00
    """
    replacement.require_attached()
    _require_head(replacement.model, layer, head)
    return score_attribution(
        retrace(replacement, graph, scores_of=layer), graph, layer, head, query, key, baseline_key, top
    )


def score_attribution(
    local: Retraced,
    graph: AttributionGraph,
    layer: int,
    head: int,
    query: int,
    key: int,
    baseline_key: int | None = None,
    top: int | None = 20,
) -> QKAttribution:
    """The same as :func:`qk_attribution`, on a prompt that is already retraced."""
    _require_head(local.model, layer, head)
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1, or None for all pairs, got {top}.")
    query, key = (resolve_position(p, local.n_pos) for p in (query, key))
    keys = [key] if baseline_key is None else [key, resolve_position(baseline_key, local.n_pos)]
    for position in keys:
        if position > query:
            raise TargetError(f"key position {position} comes after query position {query}: attention only looks back.")
    if len(set(keys)) < len(keys):
        raise TargetError(f"baseline_key {baseline_key} is the key itself; name another position.")
    with torch.no_grad():
        scores = local.scores(layer)
        for position in keys:
            if scores.masked(head, query, position):
                raise TargetError(
                    f"layer {layer} masks position {position} for queries at {query} (sliding window), so there "
                    "is no score to explain."
                )
        q = _parts(local, layer, query, *scores.query(head, query))
        each = [_parts(local, layer, position, *scores.key(head, position)) for position in keys]
        _require_sum(local, scores, head, query, keys, q, each)
        k = each[0] if len(each) == 1 else each[0] - each[1]
        own = [scores.uncapped(head, query, position) for position in keys]
        return _assemble(local, graph, layer, head, query, keys, own, q, k, top)


def _require_head(model: Any, layer: int, head: int) -> None:
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    if not 0 <= layer < n_layers:
        raise TargetError(f"layer {layer} is not in 0..{n_layers - 1}.")
    if not 0 <= head < n_heads:
        raise TargetError(f"head {head} is not in 0..{n_heads - 1} of layer {layer}.")


def _parts(
    local: Retraced, layer: int, position: int, matrix: Float[Tensor, "d_model d_head"], bias: Float[Tensor, " d_head"]
) -> Float[Tensor, "source d_head"]:
    """What every source, and in the last row the bias, adds to one query or key: 0 if a source cannot reach it."""
    d_head = matrix.shape[1]
    vectors = matrix.T.contiguous()
    end = local.sources.up_to_heads(layer)
    at, where = (torch.full((d_head,), number, device=matrix.device) for number in (end, position))
    targets = Targets(at, where, vectors, vectors.new_zeros(d_head)).to(local.sources.home)
    parts = targets.vector.new_empty(local.sources.before(end) + 1, d_head)
    for some, rows, constant in sweeps(local.engine.below(layer), targets, "auto"):
        parts[:-1, some] = rows.T
        parts[-1, some] = constant + bias.to(constant.device)[some]
    return parts


def _require_sum(
    local: Retraced, scores: FrozenScores, head: int, query: int, keys: list[int], q: Tensor, each: list[Tensor]
) -> None:
    tolerance = rounding_within(local.recording.dtype)  # as a share of length of query times length of key
    for position, k in zip(keys, each, strict=True):
        a, b = q.sum(0, dtype=torch.float64), k.sum(0, dtype=torch.float64)
        gap = abs(float(a @ b) - scores.uncapped(head, query, position)) / max(float(a.norm() * b.norm()), 1e-30)
        if not gap <= tolerance:
            raise ArchitectureError(
                f"layer {scores.layer}: query times key is off by {gap:.2%} from the model's own score (tolerance "
                f"{tolerance:.2%}). The model adds something to it, such as a bias for the distance (ALiBi), or its "
                "bridge does not show how queries and keys are rotated or normalised. Such scores are not explained."
            )


def _assemble(
    local: Retraced,
    graph: AttributionGraph,
    layer: int,
    head: int,
    query: int,
    keys: list[int],
    own: list[float],
    q: Tensor,
    k: Tensor,
    top: int | None,
) -> QKAttribution:
    columns = columns_of(local.sources, local.sources.up_to_heads(layer))
    q_wide, k_wide = q.double(), k.double()
    q_all, k_all = q_wide.sum(0), k_wide.sum(0)
    live_q, live_k = (side.any(1).nonzero()[:, 0] for side in (q, k))
    if top is None and len(live_q) * len(live_k) > MAX_PAIRS:
        raise ValueError(
            f"there are {len(live_q)} x {len(live_k)} pairs, more than {MAX_PAIRS}; give top=1000 or so instead of "
            "None."
        )
    count = len(live_q) * len(live_k) if top is None else top
    i, j, weight = top_pairs(q[live_q], k[live_k], count)
    terms = pd.DataFrame(
        {
            "query_source": [columns.name(c) for c in live_q[i].tolist()],
            "key_source": [columns.name(c) for c in live_k[j].tolist()],
            "weight": weight.cpu().numpy(),
        }
    )
    place = torch.cat([columns.position, torch.tensor([local.n_pos])])
    grouped = [  # on the CPU, because a GPU adds several numbers to one place in no fixed order
        torch.zeros(local.n_pos + 1, q.shape[1], dtype=torch.float64).index_add_(0, place, side.cpu())
        for side in (q_wide, k_wide)
    ]
    names = [*range(local.n_pos), "bias"]
    return QKAttribution(
        layer=layer,
        head=head,
        query=query,
        key=keys[0],
        baseline_key=None if len(keys) == 1 else keys[1],
        score=own[0] if len(own) == 1 else own[0] - own[1],
        total=float(q_all @ k_all),
        terms=terms,
        by_query=_marginals(graph, columns, q_wide @ k_all, live_q, top),
        by_key=_marginals(graph, columns, k_wide @ q_all, live_k, top),
        by_position=pd.DataFrame((grouped[0] @ grouped[1].T).numpy(), index=names, columns=names),
        tokens=graph.info.tokens,
        _sides=Sides(columns, q, k),
    )


def _marginals(
    graph: AttributionGraph,
    columns: Columns,
    weight: Float[Tensor, " source"],
    live: Int[Tensor, " n"],
    top: int | None,
) -> pd.DataFrame:
    """The largest sources of one side, each with the sum of its pairs, as a frame."""
    count = len(live) if top is None else min(top, len(live))
    chosen = live[weight[live].abs().argsort(descending=True, stable=True)[:count]].tolist()
    in_graph = set(graph.node_ids)
    rows = []
    for column in chosen:
        name, bias = columns.name(column), column == len(columns.kind)
        position = -1 if bias else int(columns.position[column])
        rows.append(
            {
                "source": name,
                "kind": "bias" if bias else columns.place(column).kind.text,
                "layer": -1 if bias else int(columns.layer[column]),
                "position": position,
                "feature": -1 if bias else _feature(graph, columns, column),
                "token": "" if bias else graph.info.tokens[position],
                "in_graph": name in in_graph,
                "weight": float(weight[column]),
            }
        )
    return pd.DataFrame(rows)


def _feature(graph: AttributionGraph, columns: Columns, column: int) -> int:
    """The number in the column ``feature`` of the nodes frame: for tokens the vocabulary id, for errors -1."""
    place = columns.place(column)
    return graph.info.token_ids[place.position] if place.kind == Kind.EMBEDDING else place.feature
