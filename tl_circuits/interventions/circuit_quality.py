"""How much of an answer a circuit carries, measured over a family of prompts on the model itself.

Faithfulness F and completeness C after Marks et al. 2025 ("Sparse feature circuits", section 3) and the areas of the
MIB benchmark (Mueller et al. 2025): everything outside a set of nodes takes the value it has on average over the family
(or on a counterfactual prompt, or zero), nothing is frozen, and a metric of the logits is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attribution.same_values import require_same_run
from tl_circuits.attribution.targets import token_id
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.errors import ArgumentError, BaselineError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind, parse_node_id
from tl_circuits.hooks import Replacement, clean_run, in_turn, place_number, read_prompt, shown, token_text
from tl_circuits.interventions.replaced_runs import (
    Kept,
    Metric,
    Nodes,
    Runs,
    Values,
    circuit,
    everything,
    leads,
    nothing,
    values_of,
)
from tl_circuits.support.checked import checked
from tl_circuits.support.figures import Picture, figure_class, save_figure

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of all nodes, as MIB takes them
STEPS = 5  # of integrated gradients


@dataclass(frozen=True)
class CircuitQuality:
    """F and C of circuits of growing size, beside other ways of choosing as many nodes.

    Both are shares of the part of the metric that nodes carry (Marks et al. 2025, "Sparse Feature Circuits", section
    3): F is what stays if only the circuit's nodes keep the prompt's own values, C what stays if all nodes but the
    circuit's do. F = 1 and C = 0 means that the circuit carries the whole answer.

    Attributes:
        curve: a frame ``chosen nodes F C``: by what the nodes were chosen (``"circuit"`` for those given, else
            ``"random"``, ``"activation x gradient"`` or ``"integrated gradients"``), how many a prompt, and the two
            shares.
        metric: the metric's mean over the family on the model as it is, and with no node kept; in logits, unless a
            metric was given.
        n_nodes: how many nodes a prompt has in all.
        ablate: what replaced nodes outside the circuit: ``"mean"``, ``"counterfactual"`` or ``"zero"``.

    Examples:
        >>> import pandas as pd
        >>> measured = pd.DataFrame({"chosen": "circuit", "nodes": [0, 50, 100], "F": [0, 0.8, 1], "C": [1, 0.4, 0]})
        >>> found = tlc.CircuitQuality(measured, metric=(12.0, 0.5), n_nodes=100, ablate="mean")
        >>> found.at(50)  # F and C of the fifty most important nodes
        (0.8, 0.4)
        >>> round(found.carried_by_nodes(), 2)  # of the metric
        0.96
        >>> print(found.areas().round(2).to_string(index=False))
         chosen  CPR  CMD    C
        circuit 0.65 0.35 0.45
    """

    curve: pd.DataFrame = field(repr=False)
    metric: tuple[float, float]
    n_nodes: int
    ablate: str

    def carried_by_nodes(self) -> float:
        """The share of the metric that is lost when every node is replaced. F and C are shares of that part only.

        What is left comes from what is no node: token embeddings and, in sets that have them, skip connections. So F
        and C of two dictionaries are on one scale only where these shares are alike.

        Returns:
            A share of 1; NaN if the metric is 0 on the model as it is.
        """
        whole, none = self.metric
        return (whole - none) / whole if whole else float("nan")

    def areas(self) -> pd.DataFrame:
        """Areas under F and C, over the share of nodes kept from 0 to 1 (MIB benchmark, Mueller et al. 2025).

        Returns:
            A frame ``chosen CPR CMD C``. ``CPR`` is the area under F (larger is better), ``CMD`` the area between F and
            1 (smaller is better), ``C`` the area under C (smaller is better).
        """
        rows = []
        for chosen, part in self.curve.groupby("chosen", sort=False):
            x = torch.tensor(part.nodes.to_numpy(), dtype=torch.float64) / max(1, self.n_nodes)
            f, c = (torch.tensor(part[name].to_numpy(), dtype=torch.float64) for name in ("F", "C"))
            rows.append((chosen, *(float(torch.trapezoid(y, x)) for y in (f, (1 - f).abs(), c))))
        return pd.DataFrame(rows, columns=["chosen", "CPR", "CMD", "C"])

    def at(self, nodes: int) -> tuple[float, float]:
        """F and C of the given circuits at one of the sizes measured.

        Args:
            nodes: how many nodes a prompt.

        Returns:
            F and C, shares of the metric.

        Raises:
            KeyError: for a size that was not measured; it lists those that were.
        """
        own = self.curve[(self.curve.chosen == "circuit") & (self.curve.nodes == nodes)]
        if own.empty:
            raise KeyError(f"{nodes} nodes were not measured; sizes are {sorted(set(self.curve.nodes))}.")
        return float(own.F.iloc[0]), float(own.C.iloc[0])

    def plot(self, path: str | Path | None = None, overwrite: bool = False) -> Path | Picture:
        """Draw F and C against the number of nodes (extra ``figure``).

        Args:
            path: a file that ends in ``.svg``, ``.png`` or ``.pdf``. Without one, the picture is returned, and a
                notebook shows it.
            overwrite: whether to replace a file that exists.

        Returns:
            The path; without one, the picture.

        Raises:
            OutputError: if the file exists, cannot be written, or has another ending.
            ImportError: if matplotlib is not installed; it names the extra.

        Examples:
            >>> import pandas as pd
            >>> measured = pd.DataFrame({"chosen": "circuit", "nodes": [50, 100], "F": [0.8, 1], "C": [0.4, 0]})
            >>> found = tlc.CircuitQuality(measured, metric=(12.0, 0.5), n_nodes=100, ablate="mean")
            >>> found.plot(folder / "quality.svg").name
            'quality.svg'
        """
        figure = figure_class()(figsize=(8, 3.5), layout="constrained")
        titles = {
            "F": "F: what is left if all else is replaced (1 = all)",
            "C": "C: what is left if the circuit is replaced (0 = none)",
        }
        for axis, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
            for chosen, part in self.curve[self.curve.nodes > 0].groupby("chosen", sort=False):
                axis.plot(part.nodes, part[name], marker="o", markersize=3, label=chosen)
            axis.set(xscale="log", xlabel="nodes a prompt", title=title)
            axis.title.set_size(9)
        axis.legend(fontsize=8)
        return save_figure(figure, None if path is None else Path(path), overwrite)

    def __rich__(self) -> Any:
        from rich.table import Table

        title = (
            f"metric {self.metric[0]:.2f}, {self.metric[1]:.2f} with every node replaced ({self.ablate}); "
            f"{self.n_nodes} nodes"
        )
        table = Table("chosen by", "nodes", "F", "C", title=title, box=None)
        for row in self.curve.itertuples():
            table.add_row(row.chosen, str(row.nodes), f"{row.F:.2f}", f"{row.C:.2f}")
        return table

    def _repr_html_(self) -> str:
        return self.curve.to_html(index=False, float_format="{:.3f}".format)


@checked
@in_turn
def circuit_quality(
    replacement: Replacement,
    circuits: Any,
    prompts: Sequence[Any],
    answers: Sequence[Any] | None = None,
    *,
    counterfactuals: Sequence[Any] | None = None,
    metric: Callable[..., Any] | None = None,
    ablate: Literal["mean", "counterfactual", "zero"] = "mean",
    sizes: Sequence[int] | None = None,
    random_sets: int = 3,
    others: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> CircuitQuality:
    """Measure how much of an answer circuits carry over a family of prompts: F and C against their size.

    For each size, everything outside the circuit is replaced in the running model, and the metric is read:
    ``F = (m(circuit) - m(nothing)) / (m(all) - m(nothing))``, and C the same with all but the circuit (Marks et al.
    2025, "Sparse Feature Circuits", section 3). F is exactly 0 with no node and exactly 1 with all.

    Args:
        replacement: the model with a dictionary attached.
        circuits: nodes by importance, the most important first. A graph or a list of node ids for all prompts alike,
            or one of these for each prompt. A graph's nodes are ordered by what it chose them by: total effect or
            influence.
        prompts: the family, all of the same number of tokens.
        answers: each prompt's answer, one token. The metric is then the answer's logit minus the mean logit of the
            others'.
        counterfactuals: one prompt for each of ``prompts``, of the same length, for ``ablate="counterfactual"``.
        metric: instead of ``answers``: makes one number a prompt of the logits after the last token,
            ``[prompt, d_vocab]``.
        ablate: what nodes outside the circuit are set to: their mean over the family at each position, their value on
            the counterfactual prompt, or zero.
        sizes: numbers of nodes a prompt; None for MIB's shares of all nodes.
        random_sets: how many sets of random nodes of the same layers and positions to compare with.
        others: whether to compare with activation times gradient and with integrated gradients, nothing frozen.
        seed: for the random sets.
        progress: show a progress bar on stderr.

    Returns:
        F and C at each size, for the circuits given and for those that they are compared with.

    Raises:
        BaselineError: for an empty family, prompts of different lengths (counterfactuals included), answers that are
            the same for all, or a metric that does not change when every node is replaced.
        TargetError: for an answer that is not one token.
        ArgumentError: for numbers of circuits or answers that do not fit the prompts, a negative size, an id that is
            not that of a node, no metric, and for ``counterfactuals`` without ``ablate="counterfactual"`` or the other
            way round.
        BelongingError: for a graph of another model or dictionary.
        AttachError: if the replacement was detached.

    Examples:
        >>> family = ["the capital of the state containing Dallas is", "the capital of the state containing Oakland is"]
        >>> graphs = [tlc.attribute(replacement, text, baseline=family, max_nodes=60) for text in family]
        >>> answers = ["Austin", "Sacramento"]
        >>> found = tlc.circuit_quality(replacement, graphs, family, answers, sizes=[0, 20], others=False)
        >>> [round(x, 1) for x in found.at(0)]
        [0.0, 1.0]
    """
    replacement.require_attached()
    tokens, always = _family(replacement, prompts, "prompts")
    score = _metric(replacement, answers, metric, tokens)
    values = values_of(replacement, tokens)
    runs = Runs(replacement, tokens, score, _others(replacement, values, ablate, counterfactuals, tokens), always)
    every = _everything(values, always)
    nodes = [_nodes(replacement, one) for one in _one_each(circuits, len(tokens))]
    whole, none = runs.measure(everything(values)), runs.measure(nothing(values))
    span = float((whole - none).mean())
    if abs(span) < 1e-6 * max(1.0, float(whole.abs().max())):
        raise BaselineError(
            "the metric is the same with every node replaced, so there is nothing for a circuit to carry. Take "
            "prompts with other answers."
        )
    asked = _sizes(sizes, len(every), max(map(len, nodes)))
    rankings: dict[str, list[Nodes]] = {"circuit": nodes}
    if others:
        rankings |= _by_gradients(runs, values, every)
    rows = []
    with tqdm(
        total=len(asked) * (len(rankings) + random_sets), desc="circuits", unit="size", disable=not progress
    ) as bar:
        for name, ranked in rankings.items():
            for size in asked:
                rows.append((name, size, *_shares(runs, circuit(values, [one[:size] for one in ranked]), none, span)))
                bar.update()
        rows += _random(runs, values, nodes, asked, random_sets, seed, none, span, bar)
    rows += [(name, len(every), 1.0, 0.0) for name in dict.fromkeys(row[0] for row in rows)]
    curve = pd.DataFrame(rows, columns=["chosen", "nodes", "F", "C"]).drop_duplicates(["chosen", "nodes"])
    order = {name: i for i, name in enumerate(dict.fromkeys(curve.chosen))}
    curve = curve.sort_values(
        ["chosen", "nodes"], key=lambda c: c.map(order) if c.name == "chosen" else c, ignore_index=True
    )
    return CircuitQuality(curve, (float(whole.mean()), float(none.mean())), len(every), ablate)


@checked
def common_circuit(graphs: Sequence[AttributionGraph]) -> list[str]:
    """The nodes that matter most on average over the graphs of several prompts, the most important first.

    A node counts by the mean of its absolute total effect (of its influence, for graphs that chose nodes by that); a
    graph that does not have it counts as 0. Give the result to :func:`circuit_quality` to judge it on other prompts.

    Args:
        graphs: graphs of one model and dictionary; positions are taken as they are, so prompts should be alike.

    Returns:
        Node ids of features and errors.

    Raises:
        ArgumentError: if there are no graphs.

    Examples:
        >>> family = ["the capital of the state containing Dallas is", "the capital of the state containing Oakland is"]
        >>> graphs = [tlc.attribute(replacement, text, baseline=family, max_nodes=20) for text in family]
        >>> tlc.common_circuit(graphs)[0]
        'L0/F308@7'
    """
    if not graphs:
        raise ArgumentError("common_circuit needs at least one graph, got an empty list.")
    total: dict[str, float] = {}
    for graph in graphs:
        size = _importance(graph)
        for i in (graph.is_kind("feature") | graph.is_kind("error")).nonzero()[:, 0].tolist():
            name = graph.node_ids[i]
            total[name] = total.get(name, 0.0) + float(size[i])
    return sorted(total, key=lambda name: (-total[name], name))


def _importance(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """By what a graph chose its nodes: the size of total effects, or influence."""
    total = graph._nodes.total_effect if graph.info.select == "total_effect" else None
    return graph.influence if total is None else total.abs()


def _family(
    replacement: Replacement, prompts: Sequence[Any], what: str
) -> tuple[Int[Tensor, "prompt pos"], tuple[int, ...]]:
    """Token ids of all prompts, and the positions that the dictionary leaves out in all of them."""
    if not len(prompts):
        raise BaselineError(f"{what} is empty; give at least two prompts.")
    reads = [read_prompt(replacement.model, replacement.dictionary, prompt) for prompt in prompts]
    for prompt, read in zip(prompts, reads, strict=True):
        if isinstance(prompt, AttributionGraph):
            require_belonging(replacement, prompt)
            require_same_run(replacement, prompt, clean_run(replacement, read.tokens, read.skipped))
    for prompt, read in zip(prompts, reads, strict=True):
        if len(read.tokens) != len(reads[0].tokens):
            raise BaselineError(
                f"{what} must have the same number of tokens: {shown(prompts[0])} has {len(reads[0].tokens)}, "
                f"{shown(prompt)} has {len(read.tokens)}."
            )
    always = set(reads[0].skipped).intersection(*(read.skipped for read in reads))
    return torch.stack([read.tokens for read in reads]), tuple(sorted(always))


def _metric(replacement: Replacement, answers: Any, metric: Any, tokens: Int[Tensor, "prompt pos"]) -> Metric:
    n = len(tokens)
    if metric is not None:
        return lambda logits: _checked_metric(metric, logits)
    if answers is None:
        raise ArgumentError(
            "circuit_quality needs answers=[...], one token a prompt, or metric=, a function of the logits."
        )
    if len(answers) != n:
        raise ArgumentError(f"there are {n} prompts and {len(answers)} answers; give one for each prompt.")
    ids = torch.tensor([token_id(replacement.model, answer) for answer in answers], device=tokens.device)
    if len(ids.unique()) < 2:
        raise BaselineError(
            f"all prompts have the answer {token_text(replacement.model, int(ids[0]))!r}; the metric compares an "
            "answer with the others'."
        )
    return lambda logits: leads(logits, ids)


def _checked_metric(metric: Any, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
    made = metric(logits)
    if not isinstance(made, Tensor) or made.shape != (len(logits),):
        raise ArgumentError(
            f"metric must make one number a prompt of the logits [{len(logits)}, {logits.shape[1]}], got {shown(made)}."
        )
    return made


def _others(
    replacement: Replacement, values: Values, ablate: str, counterfactuals: Any, tokens: Int[Tensor, "prompt pos"]
) -> Values:
    if (counterfactuals is not None) != (ablate == "counterfactual"):
        raise ArgumentError('counterfactuals=[...] and ablate="counterfactual" go together; give both or neither.')
    if ablate == "mean":
        return values.mean()
    if ablate == "zero":
        return values.zero()
    other, _ = _family(replacement, counterfactuals, "counterfactuals")
    if other.shape != tokens.shape:
        raise BaselineError(
            f"counterfactuals must be one of the same length for each prompt: they are {list(other.shape)}, the "
            f"prompts {list(tokens.shape)}."
        )
    return values_of(replacement, other)


def _everything(values: Values, always: tuple[int, ...]) -> Int[Tensor, "n 3"]:
    """All that a circuit can have: place, position, feature; features silent on all prompts left out."""
    found = []
    for place, acts in values.acts.items():
        on = (acts != 0).any(0)
        on[list(always)] = False
        here = on.nonzero()
        found.append(torch.cat([torch.full((len(here), 1), place), here.cpu()], 1))
        if place in values.errors:
            rest = [p for p in range(acts.shape[1]) if p not in always]
            found.append(torch.tensor([[place, p, -1] for p in rest]).reshape(-1, 3))
    return torch.cat(found)


def _one_each(circuits: Any, n: int) -> list[Any]:
    """One circuit a prompt: those given, or the single one given for each."""
    single = isinstance(circuits, AttributionGraph) or (len(circuits) > 0 and isinstance(circuits[0], str))
    found = [circuits] * n if single else list(circuits)
    if len(found) != n:
        raise ArgumentError(
            f"there are {n} prompts and {len(found)} circuits; give one for each prompt, or a single one for all."
        )
    return found


def _nodes(replacement: Replacement, given: Any) -> Nodes:
    """A circuit's features and errors as places, the most important first."""
    if isinstance(given, AttributionGraph):
        require_belonging(replacement, given)
        given = [given.node_ids[i] for i in torch.argsort(_importance(given), descending=True, stable=True).tolist()]
    places = [_place(replacement, name) for name in given]
    return [place for place in places if place is not None]


def _place(replacement: Replacement, name: Any) -> tuple[int, int, int] | None:
    place = parse_node_id(name) if isinstance(name, str) else None
    if place is None:
        raise ArgumentError(
            f"{shown(name)} is no node id; a circuit is a graph or a list of ids such as 'L14/F2268@9' or 'L3/error@2'."
        )
    if place.kind not in (Kind.FEATURE, Kind.ERROR) or place.layer not in replacement.dictionary.layers:
        return None
    at = place_number(replacement.dictionary, place.layer, place.site or None, ArgumentError)
    return at, place.position, place.feature


def _sizes(asked: Sequence[int] | None, n_every: int, most: int) -> list[int]:
    sizes = [0, *(max(1, round(share * n_every)) for share in SHARES)] if asked is None else list(asked)
    if any(size < 0 for size in sizes):
        raise ArgumentError(f"sizes are numbers of nodes, 0 or more; got {min(sizes)}.")
    return sorted({size for size in sizes if size <= most})


def _shares(runs: Runs, kept: Kept, none: Float[Tensor, " prompt"], span: float) -> tuple[float, float]:
    """F and C of one circuit."""
    faithful, complete = (float((runs.measure(part) - none).mean()) / span for part in (kept, kept.others()))
    return faithful, complete


def _by_gradients(runs: Runs, values: Values, every: Int[Tensor, "n 3"]) -> dict[str, list[Nodes]]:
    """Rankings by (activation - other) times gradient, at the prompt and integrated over the way of the embeddings."""
    once = runs.gradients()
    along = [runs.gradients((step + 0.5) / STEPS) for step in range(STEPS)]
    integrated = {at: sum((grads[at] for grads in along), torch.zeros(())) / STEPS for at in once}
    return {
        "activation x gradient": _ranked(runs, values, every, once),
        "integrated gradients": _ranked(runs, values, every, integrated),
    }


def _ranked(runs: Runs, values: Values, every: Int[Tensor, "n 3"], grads: dict[int, Tensor]) -> list[Nodes]:
    scores = torch.zeros(len(runs.tokens), len(every))
    for place in values.acts:
        moved = (values.acts[place] - runs.others.acts[place]) * grads[place]
        here = (every[:, 0] == place) & (every[:, 2] >= 0)
        scores[:, here] = moved[:, every[here, 1], every[here, 2]].abs().cpu()
        if place in values.errors:
            moved = ((values.errors[place] - runs.others.errors[place]) * grads[-1 - place]).sum(-1)
            here = (every[:, 0] == place) & (every[:, 2] < 0)
            scores[:, here] = moved[:, every[here, 1]].abs().cpu()
    order = scores.argsort(dim=1, descending=True, stable=True)
    return [[tuple(node) for node in every[row].tolist()] for row in order]


def _random(
    runs: Runs,
    values: Values,
    nodes: list[Nodes],
    sizes: list[int],
    count: int,
    seed: int,
    none: Float[Tensor, " prompt"],
    span: float,
    bar: Any,
) -> list[tuple[str, int, float, float]]:
    """Mean F and C of random features at the same layers and positions as the circuits'."""
    if not count:
        return []
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for _ in range(count):
        swapped = [_swapped(values, prompt, one, generator) for prompt, one in enumerate(nodes)]
        for size in sizes:
            found[size].append(_shares(runs, circuit(values, [one[:size] for one in swapped]), none, span))
            bar.update()
    return [
        ("random", size, *(sum(column) / count for column in zip(*shares, strict=True)))
        for size, shares in found.items()
    ]


def _swapped(values: Values, prompt: int, nodes: Nodes, generator: torch.Generator) -> Nodes:
    """As many random active features at each place and position; errors stay."""
    waiting: dict[tuple[int, int], list[int]] = {}
    made = []
    for place, position, feature in nodes:
        if feature < 0:
            made.append((place, position, feature))
            continue
        if (place, position) not in waiting:
            on = values.acts[place][:, position].ne(0).any(0).nonzero()[:, 0].cpu()
            waiting[place, position] = on[torch.randperm(len(on), generator=generator)].tolist()
        pool = waiting[place, position]
        made.append((place, position, pool.pop() if pool else feature))
    return made
