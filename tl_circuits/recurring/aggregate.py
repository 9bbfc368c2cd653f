"""Find features and edges that recur over the graphs of many prompts, as frames and as one graph of mean effects.

Graphs are read one at a time, in three passes (what they are of, their nodes, their edges), so memory depends on what
recurs, not on the number of graphs. They are read in an order of their own, so the result does not depend on the order
in which they are given.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import NUMBERED, Kind, node_id
from tl_circuits.graph.nodes import GraphInfo, Label, Nodes
from tl_circuits.graph.one_a_layer import require_one_a_layer
from tl_circuits.graph.scores import Edges
from tl_circuits.graph.slots import Align, find_slots
from tl_circuits.hooks import first_difference
from tl_circuits.recurring.adding import SUMS, add_up_edges, add_up_nodes, each
from tl_circuits.recurring.template import commonest, in_template, target_names, words_of
from tl_circuits.support.checked import checked


@dataclass(frozen=True, eq=False)
class RecurringCircuit:
    """What recurs in the graphs of several prompts; :func:`aggregate` makes one.

    Positions of different prompts that correspond to each other share a *slot*. Nodes of different prompts are the same
    if kind, layer, slot and feature agree. All means are over all prompts: a node or edge that a prompt does not have
    counts as 0 there.

    Attributes:
        info: the model, the dictionary and what else the graphs have in common.
        prompts: what the prompts are called: the names given, or else the graphs' paths or prompts.
        slots: the slots' names from left to right: ``-1`` for the last position of all prompts, ``-2`` for the one
            before, and so on, or the names given.
        tokens: for each slot, the tokens seen there, the commonest first.
        min_share: the least share of the prompts (0 to 1) in which a feature or edge is found that is listed.
        unaligned: the share of influence, 0 to 1, at positions without a slot: the mean over the prompts, targets not
            counted.
        labels: what features read and write, by number of the node.

    Examples:
        >>> cities = ("Dallas", "Houston")
        >>> questions = [f"the capital of the state containing {city} is" for city in cities]
        >>> recurring = tlc.aggregate([tlc.attribute(replacement, text, max_nodes=20) for text in questions])
        >>> recurring.tokens[-2]  # seen at the last position but one
        ('Dallas', 'Houston')
        >>> recurring.graph(min_share=1.0).nodes.kind.value_counts().to_dict()  # in both
        {'error': 36, 'feature': 14, 'embedding': 9, 'logit': 1}
    """

    info: GraphInfo
    prompts: tuple[str, ...]
    slots: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    min_share: float
    unaligned: float
    labels: dict[int, Label]
    _nodes: pd.DataFrame
    _edges: pd.DataFrame

    @cached_property
    def features(self) -> pd.DataFrame:
        """A frame of the features found in at least ``min_share`` of the prompts, the commonest first.

        Columns: ``id``, ``layer``, ``slot``, ``feature``; ``count`` and ``share``: in how many prompts, and in which
        share of them (0 to 1); ``influence`` and ``activation``: means; ``label``: empty if the graphs have none.
        ``total_effect`` (in logits, if the targets are) and ``baseline``: means, with 0 for graphs that do not say.
        """
        frame = self.all_features
        frame = frame[frame.share >= self.min_share]
        return frame.sort_values(["share", "influence"], ascending=False, kind="stable", ignore_index=True)

    @cached_property
    def edges(self) -> pd.DataFrame:
        """A frame of the edges found in at least ``min_share`` of the prompts, the commonest first, then the largest.

        Columns: ``source``, ``target``, ``count``, ``share``, ``weight`` (the mean direct effect).
        """
        ids = self._ids
        frame = pd.DataFrame(
            {
                "source": ids[self._edges.source],
                "target": ids[self._edges.target],
                "count": self._edges["count"],
                "share": self._edges["count"] / len(self.prompts),
                "weight": self._edges.weight,
            }
        )
        order = np.lexsort([-frame.weight.abs(), -frame.share])
        return frame.iloc[order].reset_index(drop=True)

    @cached_property
    def _ids(self) -> np.ndarray:
        """Node ids such as ``L3/F12@-1``, ``L3/error@-1``, ``token@-1`` and ``logit:0``, with slots for positions."""
        columns = (self._nodes[name] for name in ("kind", "layer", "slot", "feature"))
        rows = zip(*columns, strict=True)
        ids = [node_id(kind, layer, self.slots[slot], feature) for kind, layer, slot, feature in rows]
        return np.array(ids, dtype=object)

    @cached_property
    def all_features(self) -> pd.DataFrame:
        """As :attr:`features`, but of all prompts, those of few included, in the order of the nodes."""
        here = self._nodes.kind.isin(NUMBERED).to_numpy()
        nodes = self._nodes[here]
        short = [self.labels[i].short if i in self.labels else "" for i in nodes.index]
        return pd.DataFrame(
            {
                "id": self._ids[here],
                "layer": nodes.layer,
                "slot": [self.slots[slot] for slot in nodes.slot],
                "feature": nodes.feature,
                "count": nodes["count"],
                "share": nodes["count"] / len(self.prompts),
                "influence": nodes.influence,
                "activation": nodes.activation,
                "label": short,
                "total_effect": nodes.total_effect,
                "baseline": nodes.baseline,
            }
        ).reset_index(drop=True)

    @checked
    def graph(self, min_share: float = 0.5) -> AttributionGraph:
        """One attribution graph of what recurs: its edges are mean direct effects.

        Its tokens are the words of the prompts' template, such as ``[Dallas / Miami]``, or the names of its slots if
        they were given, and its targets are the prompts' first, second, … targets, named by the tokens seen
        there. It can be pruned, saved and drawn like any other graph; but it belongs to no single prompt, so whatever
        would run the model on it raises PromptError. A node's edges and ``bias`` add up to its mean ``value``: ``bias``
        holds the mean bias and, as ``residue``, the mean of all effects that are no edges here. Effects that cancel
        between prompts lower ``coverage``.

        Args:
            min_share: the share of prompts, 0 to 1, in which a node or edge must be found.

        Returns:
            A graph of mean effects. Its ``info.recurring`` is True.

        Raises:
            ValueError: ``min_share`` is below that of :func:`aggregate` or above 1, or no target is found in so many
                prompts.

        Examples:
            >>> cities = ("Dallas", "Houston")
            >>> questions = [f"the capital of the state containing {city} is" for city in cities]
            >>> recurring = tlc.aggregate([tlc.attribute(replacement, text, max_nodes=20) for text in questions])
            >>> recurring.graph(min_share=1.0).info.tokens[-2:]
            ('[Dallas / Houston]', 'is')
        """
        if not self.min_share <= min_share <= 1.0:
            raise ValueError(
                f"min_share must be between {self.min_share} and 1, got {min_share}. "
                "For less, aggregate again with a smaller min_share."
            )
        enough = min_share * len(self.prompts)
        table = self._nodes[self._nodes["count"] >= enough]
        if not (table.weight > 0).any():
            raise ValueError(f"no target is found in {min_share:.0%} of the prompts: give a smaller min_share.")
        edges = self._edges[(self._edges["count"] >= enough) & (self._edges.weight.astype(np.float32) != 0)]
        row = pd.Series(np.arange(len(table)), index=table.index)
        source, target = (torch.tensor(row[edges[end]].to_numpy()) for end in ("source", "target"))
        weight = torch.tensor(edges.weight.to_numpy())
        into = torch.zeros(2, len(table), dtype=torch.float64).index_add_(
            1, target, torch.stack([weight, weight.abs()])
        )

        used = np.unique(table.slot)
        column = {name: torch.tensor(table[name].to_numpy()) for name in ["kind", "layer", "token", *SUMS]}
        lost = column["inflow"] - into[0]
        nodes = Nodes(
            kind=column["kind"],
            layer=column["layer"],
            position=torch.from_numpy(np.searchsorted(used, table.slot)),
            feature=torch.where(
                torch.isin(column["kind"], torch.tensor((*NUMBERED, Kind.BIAS))),
                torch.tensor(table.feature.to_numpy()),
                column["token"],
            ),
            activation=column["activation"].float(),
            value=column["value"].float(),
            bias=(column["bias"] + lost).float(),
            residue=(column["residue"] + lost).float(),
            residue_mass=(column["mass"] - into[1]).clamp_min(0).float(),
            weight=column["weight"].float(),
            total_effect=column["total_effect"].float(),
            baseline=column["baseline"].float() if self.info.compared_with else None,
            shared=column["shared"].float() if self.info.compared_with else None,
        )
        ranks = table.feature[table.kind == Kind.LOGIT].tolist()
        embeddings = table[table.kind == Kind.EMBEDDING].set_index("slot").token
        info = replace(
            self.info,
            prompt=f"{len(self.prompts)} prompts: {''.join(in_template(self.tokens[slot]) for slot in used)}",
            token_ids=tuple(int(embeddings.get(slot, -1)) for slot in used),
            tokens=tuple(words_of(self.slots[slot], self.tokens[slot]) for slot in used),
            target_names=tuple(self.info.target_names[rank] for rank in ranks),
            target_probabilities=tuple(table.weight[table.kind == Kind.LOGIT].tolist()),
            recurring=True,
            prompt_exact=False,
            skip_positions=None,
            prepended="",
        )
        labels = {int(row[i]): label for i, label in self.labels.items() if i in row.index}
        return AttributionGraph(info, nodes, Edges(source, target, weight.float()), labels)

    def __repr__(self) -> str:
        return f"RecurringCircuit({len(self.prompts)} prompts, {len(self.features)} features, {len(self._edges)} edges)"


@checked
def aggregate(
    graphs: Iterable[AttributionGraph | str | Path],
    *,
    align: Align = "end",
    min_share: float = 0.1,
    names: Sequence[str] | None = None,
) -> RecurringCircuit:
    """Find the features and edges that recur over the graphs of many prompts.

    Args:
        graphs: graphs of one model and dictionary, or paths of saved ones, which are read one at a time.
        align: which positions of different prompts correspond. ``"end"`` counts from the last position of each
            prompt. Or one ``{position: slot name}`` for each graph, in the same order; if a slot holds several
            positions of one prompt, their features are added up, and positions without a slot are left out (see
            ``unaligned``).
        min_share: what is found in a smaller share of the prompts is left out. The smaller it is, the more memory is
            needed.
        names: what the prompts are called, in errors and in ``prompts``; None for paths or prompts.

    Returns:
        Frames of what recurs, and a graph of mean effects.

    Raises:
        ValueError: there are no graphs, they are of different models or dictionaries, some have a baseline and others
            have none, a layer has several dictionaries, a slot is outside its prompt, there are more or fewer names
            than graphs, or ``min_share`` is not within 0..1.
        GraphFileError: a file is not a graph.

    Examples:
        >>> cities = ("Dallas", "Houston")
        >>> questions = [f"the capital of the state containing {city} is" for city in cities]
        >>> recurring = tlc.aggregate([tlc.attribute(replacement, text, max_nodes=20) for text in questions])
        >>> print(recurring.features[["id", "count", "share"]].head(2).to_string(index=False))
                id  count  share
        L3/F667@-1      2    1.0
        L0/F551@-7      2    1.0
    """
    graphs = list(graphs)
    if not graphs:
        raise ValueError("there are no graphs to aggregate: give at least one graph, or the path of one.")
    if not 0.0 <= min_share <= 1.0:
        raise ValueError(f"min_share must be between 0 and 1, got {min_share}.")
    if names is not None and len(names) != len(graphs):
        raise ValueError(f"names needs one name for each graph: {len(names)} given, {len(graphs)} graphs.")
    infos = [graph.info for graph in each(graphs)]
    called = names or [
        f"graph {i} (“{info.prompt}”)" if isinstance(graph, AttributionGraph) else str(graph)
        for i, (graph, info) in enumerate(zip(graphs, infos, strict=True))
    ]
    for info in infos:
        require_one_a_layer(info, "aggregate tells", ValueError)
    require_same(infos, called)
    slots = find_slots(align, [len(info.tokens) for info in infos], called)
    # Sums of floats depend on their order: always add up in that of the graphs' contents.
    keys = [json.dumps([asdict(info), of.tolist()]) for info, of in zip(infos, slots.of, strict=True)]
    order = sorted(range(len(graphs)), key=lambda i: keys[i])
    graphs, infos, called = [graphs[i] for i in order], [infos[i] for i in order], [called[i] for i in order]
    slots = replace(slots, of=tuple(slots.of[i] for i in order))

    nodes, labels, unaligned = add_up_nodes(graphs, slots)
    edges = add_up_edges(graphs, slots, nodes, min_share)
    seen = [Counter[str]() for _ in slots.names]
    for info, of in zip(infos, slots.of, strict=True):
        for token, slot in zip(info.tokens, of, strict=True):
            if slot >= 0:
                seen[slot][token] += 1
    compared = _all_compared(infos)
    info = replace(
        infos[0],
        target_names=target_names(infos),
        exact=all(i.exact for i in infos),
        engine="mean of graphs",
        max_nodes=max(i.max_nodes for i in infos),
        n_active=int(nodes.kind.isin(NUMBERED).sum()),
        version=version("tl_circuits"),
        compared_with=tuple(compared),
        baseline=tuple((ids, ()) for ids in compared.values() if ids is not None),
    )
    kept = {i: labels[key] for i, key in enumerate(nodes.key) if key in labels}
    tokens = tuple(commonest(counter) for counter in seen)
    return RecurringCircuit(info, tuple(called), slots.names, tokens, min_share, unaligned, kept, nodes, edges)


def require_same(infos: Sequence[GraphInfo], called: Sequence[str]) -> None:
    """Raise ValueError unless all graphs are of one model and one dictionary, and all or none have a baseline."""
    for what in ("model", "n_layers", "dictionary"):
        for info, name in zip(infos, called, strict=True):
            if getattr(info, what) != getattr(infos[0], what):
                raise ValueError(
                    f"{name} has {what} {getattr(info, what)!r}, but {called[0]} has {getattr(infos[0], what)!r}: "
                    "only graphs of one model and one dictionary can be put together."
                )
    plain = next((name for info, name in zip(infos, called, strict=True) if not info.compared_with), None)
    contrast = next((name for info, name in zip(infos, called, strict=True) if info.compared_with), None)
    if plain and contrast:
        raise ValueError(f"{contrast} compares with a baseline and {plain} does not: their effects cannot be averaged.")
    for info, name in zip(infos, called, strict=True):
        found = first_difference(infos[0].sample, info.sample)
        if found is not None:
            raise ValueError(
                f"{name} and {called[0]} are of other weights under the same names ({found}): only graphs of one model "
                "and one dictionary can be put together."
            )


def _all_compared(infos: Sequence[GraphInfo]) -> dict[str, tuple[int, ...] | None]:
    """What several contrast graphs compare with, each prompt or text once, with the prompts' token ids."""
    found: dict[str, tuple[int, ...] | None] = {}
    for info in infos:
        prompts: list[tuple[int, ...] | None] = [ids for ids, _ in info.baseline]
        prompts = prompts or [None] * len(info.compared_with)
        found.update(zip(info.compared_with, prompts, strict=True))
    return found
