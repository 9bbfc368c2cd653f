"""How far a graph's predictions hold in the model: predicted and measured effects of removing nodes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attention.qk import QKAttribution
from tl_circuits.attribution.same_values import require_same_run
from tl_circuits.attribution.targets import kept_vectors
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.errors import ArgumentError, EditError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.lookup import node_indices
from tl_circuits.hooks import (
    FREEZE_MODES,
    CleanRun,
    Replacement,
    by_place,
    clean_run,
    in_turn,
    read_prompt,
    require_freeze,
)
from tl_circuits.interventions.intervene import DIVERGED, edited_batches, edits_of, growth
from tl_circuits.interventions.score_checks import score_effects
from tl_circuits.support.checked import checked
from tl_circuits.support.figures import Picture, figure_class, save_figure


@dataclass(frozen=True, eq=False)
class FaithfulnessReport:
    """Predicted and measured changes of a graph's nodes when other nodes are removed.

    Under ``freeze="all"`` the prediction is minus the edge and must hold to rounding; this tests the program. Under
    ``"attention"`` and ``"none"`` it is the effect along all paths of the graph, with features treated as linear; this
    tests how far the explanation holds in the model. Equations: docs/method.md, "Interventions and faithfulness".

    Attributes:
        effects: a frame ``freeze source target predicted measured`` with one row for each pair of what was removed and
            a node that changes. ``predicted`` and ``measured`` are changes of the target's ``value``: of a feature's
            pre-activation, or of an output in logits. In rows with ``freeze`` ``"score"``, the target is an attention
            score, before softmax and any soft cap. ``measured`` is NaN if the run diverged
            (:attr:`InterventionResult.diverged`).

    Examples:
        >>> report = tlc.faithfulness(replacement, graph, n=5, freezes=["all"])
        >>> gap = (report.effects.predicted - report.effects.measured).abs()
        >>> bool(gap.max() < 1e-3)
        True
    """

    effects: pd.DataFrame

    def summary(self) -> pd.DataFrame:
        """How well prediction and measurement agree, one row for each freeze mode.

        Returns:
            A frame ``freeze pairs correlation explained_variance sign_agreement diverged``. ``pairs`` is how many
            changes are compared. ``correlation``: Pearson's. ``explained_variance``:
            ``1 - Σ(measured - predicted)² / Σ measured²``. ``sign_agreement``: the share of pairs with the same sign,
            among those where either change is at least 1 % of the largest measured one. ``diverged``: how many removals
            diverged; they are left out of the other columns.

        Examples:
            >>> report = tlc.faithfulness(replacement, graph, n=5, freezes=["all", "attention"])
            >>> report.summary()[["freeze", "correlation", "explained_variance"]].round(1)
                  freeze  correlation  explained_variance
            0        all          1.0                 1.0
            1  attention          1.0                 1.0
        """
        rows = []
        for freeze, whole in self.effects.groupby("freeze", sort=False):
            part = whole[whole.measured.notna()]
            p, m = part.predicted.to_numpy(), part.measured.to_numpy()
            large = np.maximum(abs(p), abs(m)) >= 0.01 * max(abs(m).max(initial=0), 1e-30)
            rows.append(
                {
                    "freeze": freeze,
                    "pairs": len(part),
                    "correlation": float(np.corrcoef(p, m)[0, 1]) if len(part) > 1 and p.std() and m.std() else np.nan,
                    "explained_variance": 1 - float(((m - p) ** 2).sum() / max((m**2).sum(), 1e-30))
                    if len(part)
                    else np.nan,
                    "sign_agreement": float((np.sign(p) == np.sign(m))[large].mean()) if large.any() else np.nan,
                    "diverged": whole.source[whole.measured.isna()].nunique(),
                }
            )
        return pd.DataFrame(rows)

    def worst(self, n: int = 10) -> pd.DataFrame:
        """The pairs whose measured change is furthest from the predicted one.

        Args:
            n: how many pairs.

        Returns:
            Rows of the frame ``effects``, largest difference first. Removals that diverged come last.

        Examples:
            >>> report = tlc.faithfulness(replacement, graph, n=5)
            >>> report.worst(1)[["freeze", "source", "target", "predicted", "measured"]].round(1)
                freeze     source   target  predicted  measured
            222   none  L3/F204@8  logit:0       -0.2       0.0
        """
        gap = (self.effects.measured - self.effects.predicted).abs()
        return self.effects.loc[gap.sort_values(ascending=False).index[:n]]

    def plot(self, path: str | Path | None = None) -> Path | Picture:
        """Draw predicted against measured changes, one panel for each freeze mode (extra ``figure``).

        Args:
            path: a file that ends in ``.svg``, ``.png`` or ``.pdf``; if it exists, it is replaced. Without one, the
                picture is returned, and a notebook shows it.

        Returns:
            The path; without one, the picture.

        Raises:
            OutputError: if the file cannot be written, or has another ending.
            ImportError: if matplotlib is not installed; it names the extra.

        Examples:
            >>> report = tlc.faithfulness(replacement, graph, n=5, freezes=["all"])
            >>> report.plot(folder / "faithfulness.svg").name
            'faithfulness.svg'
        """
        groups = list(self.effects.groupby("freeze", sort=False))
        figure = figure_class()(figsize=(4 * len(groups), 4), layout="constrained")
        facts = self.summary().set_index("freeze")
        for axis, (freeze, part) in zip(np.atleast_1d(figure.subplots(1, len(groups))), groups, strict=True):
            axis.axline((0, 0), slope=1, color="0.7", linewidth=1)
            axis.scatter(part.predicted, part.measured, s=6, color="#0072B2", alpha=0.5, linewidths=0)
            axis.set(
                title=f"{freeze}: r = {facts.loc[freeze, 'correlation']:.2f}",
                xlabel="predicted change",
                ylabel="measured change",
            )
        return save_figure(figure, None if path is None else Path(path), overwrite=True)


@checked
@in_turn
def faithfulness(
    replacement: Replacement,
    graph: AttributionGraph,
    n: int = 100,
    seed: int = 0,
    *,
    groups: Mapping[str, Any] | None = None,
    scores: Sequence[QKAttribution] = (),
    freezes: Sequence[str] = FREEZE_MODES,
    progress: bool = False,
) -> FaithfulnessReport:
    """Test a graph in the model: remove sampled nodes one at a time, and compare measured with predicted changes.

    All other nodes of the graph are compared. How their changes are predicted is in docs/method.md, "Interventions and
    faithfulness".

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        n: how many features, errors and tokens to sample, among those with an edge (of a contrast graph features alone;
            to remove one then means to set it to the baseline).
        seed: for the sample.
        groups: supernodes, from name to node ids; each is removed as a whole.
        scores: QK attributions. The largest sources of each are removed one by one and then together, with all else and
            all norms held, and the score's change is compared (rows with ``freeze`` ``"score"``).
        freezes: which of ``"all"``, ``"attention"`` and ``"none"`` to measure under; see :func:`intervene`.
        progress: show a progress bar on stderr.

    Returns:
        Every predicted change beside the measured one.

    Raises:
        BelongingError: for a graph of another model or dictionary.
        EditError: for groups with nodes that the graph does not have or that cannot be removed, scores of another
            prompt, an unknown freeze mode, and a graph in which there is nothing to remove.
        ArgumentError: for a negative ``n``.
        AttachError: if the replacement was detached.

    Examples:
        >>> report = tlc.faithfulness(replacement, graph, n=5)
        >>> report.summary().set_index("freeze").correlation.round(1).head(2).to_dict()
        {'all': 1.0, 'attention': 1.0}
    """
    replacement.require_attached()
    require_belonging(replacement, graph)
    if n < 0:
        raise ArgumentError(f"faithfulness(n=...) must be 0 or more, got {n}.")
    for freeze in freezes:
        require_freeze(freeze)
    for qk in scores:
        if qk.tokens != graph.info.tokens:
            raise EditError(
                f"one of scores= belongs to another prompt: {qk.title}. Make it with "
                "tlc.qk_attribution(replacement, graph, ...) of this graph."
            )
    prompt = read_prompt(replacement.model, replacement.dictionary, graph)
    tokens = prompt.tokens
    names, members = _sample(graph, n, seed, prompt.skipped)
    for name, nodes in (groups or {}).items():
        names.append(name)
        try:
            members.append(node_indices(graph, nodes, EditError))
            edits_of(graph, members[-1])
        except EditError as error:
            raise EditError(f"group {name!r}: {error}") from error
    if not members:
        what = "feature with an edge (in a contrast graph, features alone are removed)"
        what = what if graph.info.compared_with else "node with an edge"
        raise EditError(f"nothing to remove: the graph has no {what}, and no groups were given.")
    rows = (~graph._nodes.value.isnan()).nonzero()[:, 0]
    clean = clean_run(replacement, tokens, prompt.skipped)
    require_same_run(replacement, graph, clean)
    frames = []
    for freeze in freezes:
        predicted = predicted_effects(graph, members, direct=freeze == "all")
        measured = torch.cat(list(_measure(replacement, graph, tokens, clean, members, rows, freeze, progress)))
        frames.append(_frame(graph, freeze, names, members, rows, predicted, measured))
    if scores:
        frames.append(score_effects(replacement, graph, scores, clean))
    return FaithfulnessReport(pd.concat(frames, ignore_index=True))


def _sample(graph: AttributionGraph, n: int, seed: int, skipped: Sequence[int]) -> tuple[list[str], list[list[int]]]:
    has_output = torch.zeros(len(graph), dtype=torch.bool)
    has_output[graph._edges.source] = True
    # At skipped positions the whole MLP output is a constant, so there is no error to remove.
    constant = graph.is_kind("error") & torch.isin(graph._nodes.position, torch.tensor(list(skipped)))
    removable = has_output & ~constant
    if graph.info.compared_with:  # a graph keeps the baseline of its features only
        removable &= graph.is_kind("feature")
    candidates = removable.nonzero()[:, 0]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:n]
    chosen = candidates[order].sort().values.tolist()
    return [graph.node_ids[i] for i in chosen], [[i] for i in chosen]


def predicted_effects(
    graph: AttributionGraph, members: Sequence[Sequence[int]], direct: bool, factor: float = 0.0
) -> Float[Tensor, "removal node"]:
    """How much every node's value changes, according to the graph, if each set of nodes is multiplied by ``factor``.

    Args:
        graph: the graph.
        members: node indices of each set.
        direct: count only direct effects, the edges. Otherwise changes run on through features, in proportion to their
            activation, from the first layer to the last (docs/method.md, "Interventions and faithfulness"). This is the
            signed sum over all paths from the set; paths that enter the set again count ``factor`` times (for a removal
            not at all).
        factor: 0 removes the nodes.

    Returns:
        Changes of values ``[set, node]``, of pre-activations or of outputs in logits.
    """
    adjacency = graph.adjacency()
    inside = torch.zeros(len(graph), len(members), dtype=torch.bool)
    for column, removed in enumerate(members):
        inside[list(removed), column] = True
    relative = (factor - 1) * inside.float()  # change as a share of each node's activation
    if direct:
        return (adjacency @ relative).T
    change = torch.zeros_like(relative)
    nodes = graph._nodes
    depth, counted = nodes.depth, nodes.counted[:, None]
    # a silent feature's activation stays 0 when its pre-activation moves a little
    fires = nodes.activation[:, None] != 0
    has_row = ~nodes.value.isnan()
    for at in depth[has_row].unique().tolist():
        here = (has_row & (depth == at)).nonzero()[:, 0]
        change[here] = adjacency[here] @ relative
        moved = torch.where(fires[here] & (counted[here] != 0), change[here] / counted[here], 0.0)
        relative[here] = torch.where(inside[here], factor * (1 + moved) - 1, moved)
    return change.T


def _measure(
    replacement: Replacement,
    graph: AttributionGraph,
    tokens: Int[Tensor, " pos"],
    clean: CleanRun,
    members: Sequence[Sequence[int]],
    rows: Int[Tensor, " row"],
    freeze: str,
    progress: bool,
) -> Iterator[Float[Tensor, "removal node"]]:
    dictionary, at = by_place(replacement.dictionary), node_places(replacement.dictionary, graph)
    sets = [tuple(edits_of(graph, nodes)) for nodes in members]
    logits = rows[graph.is_kind("logit")[rows]]
    directions = _directions(replacement, graph, logits)
    with tqdm(total=len(sets), desc=f"measuring ({freeze})", disable=not progress) as bar:
        for finals, seen, part in edited_batches(replacement, tokens, sets, clean, freeze, (), list(dictionary.layers)):
            measured = torch.zeros(len(part), len(graph))
            for place in dictionary.layers:
                here = rows[graph.is_kind("feature")[rows] & (at[rows] == place)]
                if len(here):
                    measured[:, here] = _feature_changes(dictionary, graph, place, here, clean, seen, freeze)
            if len(logits):
                moved = (finals - clean.final)[:, graph._nodes.position[logits].to(finals.device)]
                measured[:, logits] = torch.einsum("bnd,nd->bn", moved, directions.to(moved.device)).cpu()
            measured[growth(finals, clean.final).cpu() > DIVERGED] = torch.nan
            bar.update(len(part))
            yield measured


def _feature_changes(
    dictionary: Any,
    graph: AttributionGraph,
    place: int,
    nodes: Int[Tensor, " n"],
    clean: CleanRun,
    seen: dict[str, Tensor],
    freeze: str,
) -> Float[Tensor, "removal n"]:
    name = dictionary.input_hook(place)
    device = seen[name].device
    position = graph._nodes.position[nodes].to(device)
    features = graph._nodes.feature[nodes].to(device)
    x, after = clean.seen[name][0, position].float(), seen[name][:, position].float()
    silent = (graph._nodes.activation[nodes] == 0).to(device)
    vectors, bias = _rows(dictionary, place, features, x, silent)
    if freeze == "all":  # a neuron's edges are those of its linearised self
        return torch.einsum("bnd,nd->bn", after - x, vectors).cpu()
    n_runs, n = after.shape[:2]
    flat = after.reshape(n_runs * n, -1)
    moved, moved_bias = _rows(dictionary, place, features.repeat(n_runs), flat, silent.repeat(n_runs))
    values = ((flat * moved).sum(-1) + moved_bias).reshape(n_runs, n)
    return (values - ((x * vectors).sum(-1) + bias)).cpu()


def _rows(
    dictionary: Any, place: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"], silent: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
    """What features read; for those that the graph lists as silent, what keeps them silent."""
    vectors, bias = dictionary.read_vectors(place, features, x)
    if not bool(silent.any()):
        return vectors, bias
    instead, instead_bias = dictionary.silent_vectors(place, features, x)
    return torch.where(silent[:, None], instead, vectors), torch.where(silent, instead_bias, bias)


def _directions(
    replacement: Replacement, graph: AttributionGraph, nodes: Int[Tensor, " n"]
) -> Float[Tensor, "n d_model"]:
    """What targets read of the final norm's output."""
    found = kept_vectors(replacement, graph, nodes.tolist())
    known = [vector for vector in found if vector is not None]
    if len(known) < len(found):
        raise EditError(
            "a target of this graph is a difference or direction, and the file does not hold its vector. Trace the "
            "prompt again."
        )
    return torch.stack(known) if known else torch.zeros(0, 0)


def _frame(
    graph: AttributionGraph,
    freeze: str,
    names: Sequence[str],
    members: Sequence[Sequence[int]],
    rows: Int[Tensor, " row"],
    predicted: Float[Tensor, "removal node"],
    measured: Float[Tensor, "removal node"],
) -> pd.DataFrame:
    ids = np.array(graph.node_ids, dtype=object)
    parts = []
    for i, (name, nodes) in enumerate(zip(names, members, strict=True)):
        inside = torch.isin(rows, torch.tensor(list(nodes)))
        kept = rows[~inside & ((predicted[i, rows] != 0) | (measured[i, rows].abs() > 1e-6))]
        parts.append(
            pd.DataFrame(
                {
                    "freeze": freeze,
                    "source": name,
                    "target": ids[kept.numpy()],
                    "predicted": predicted[i, kept].numpy(),
                    "measured": measured[i, kept].numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
