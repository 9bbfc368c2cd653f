"""Add up the nodes and edges of many graphs: counts and means by kind, layer, slot and feature."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import NUMBERED, Kind
from tl_circuits.graph.nodes import Label
from tl_circuits.graph.slots import Slots
from tl_circuits.graph.storage import load_graph
from tl_circuits.recurring.tally import Tally

# A node's key packs kind, layer, slot and feature number into one integer, with so many bits each, the highest first.
# The sign bit stays free, so that keys sort as their nodes do.
_KIND, _LAYER, _SLOT, _NUMBER = 3, 10, 18, 32
# What is added up for each node. `inflow` and `mass` are the sums of all incoming edges and of their absolute weights,
# including edges that do not recur.
_OF_FEATURES = ["total_effect", "baseline", "shared"]  # zero where a graph lacks them
SUMS = ["influence", "activation", "value", "bias", "residue", "mass", "weight", "inflow", *_OF_FEATURES]


def each(graphs: Sequence[AttributionGraph | str | Path]) -> Iterator[AttributionGraph]:
    """The graphs one at a time; those given by their path are read when their turn comes."""
    return (graph if isinstance(graph, AttributionGraph) else load_graph(graph) for graph in graphs)


def _keys(graph: AttributionGraph, slot_of: np.ndarray) -> Int64[np.ndarray, " node"]:
    """Each node's key: kind, layer, slot and feature packed into one integer, ascending; -1 for nodes without a slot.

    A logit's number is its rank among the targets (wherever it is read); errors and tokens have none.
    """
    nodes = graph._nodes
    kind, layer, feature = (t.numpy().astype(np.int64) for t in (nodes.kind, nodes.layer, nodes.feature))
    logit = kind == Kind.LOGIT
    slot = np.where(logit, 0, slot_of[nodes.position.numpy()])
    number = np.where(logit, logit.cumsum() - 1, np.where(np.isin(kind, NUMBERED), feature, 0))
    parts = (
        (kind, _KIND, "kind"),
        (layer + 1, _LAYER, "layer"),
        (slot.clip(min=0), _SLOT, "slot"),
        (number, _NUMBER, "feature"),
    )
    key = np.zeros_like(kind)
    for part, bits, what in parts:
        if len(part) and not 0 <= int(part.min()) <= int(part.max()) < 2**bits:
            raise ValueError(
                f"the graph of {graph.info.prompt!r} has a {what} that is negative or beyond {2**bits - 1}, more than "
                "aggregate counts."
            )
        key = (key << bits) | part
    return np.where(slot < 0, -1, key)


def _unpacked(keys: Int64[np.ndarray, " key"]) -> dict[str, Int64[np.ndarray, " key"]]:
    """Kind, layer, slot and feature of keys that :func:`_keys` made."""
    found = {}
    for what, bits in (("feature", _NUMBER), ("slot", _SLOT), ("layer", _LAYER), ("kind", _KIND)):
        found[what], keys = keys & (2**bits - 1), keys >> bits
    return found | {"layer": found["layer"] - 1}


def add_up_nodes(
    graphs: Sequence[AttributionGraph | str | Path], slots: Slots
) -> tuple[pd.DataFrame, dict[int, Label], float]:
    """All nodes with their counts and means, in the order of their keys; labels by key; the mean unaligned share."""
    tally, labels, unaligned = Tally(len(SUMS)), dict[int, Label](), []
    vocabulary: dict[int, set[int]] = defaultdict(set)
    read_at = -1
    for graph, slot_of in zip(each(graphs), slots.of, strict=True):
        keys, nodes = _keys(graph, slot_of), graph._nodes
        here = keys >= 0
        flow = torch.zeros(2, len(graph), dtype=torch.float64)
        weight = graph._edges.weight.double()
        flow.index_add_(1, graph._edges.target, torch.stack([weight, weight.abs()]))
        columns = [graph.influence, nodes.activation, nodes.value, nodes.bias, nodes.residue]
        columns += [nodes.residue_mass + flow[1], nodes.weight, flow[0]]
        columns += [
            torch.zeros(len(graph)) if c is None else c for c in (getattr(nodes, name) for name in _OF_FEATURES)
        ]
        tally.add(keys[here], torch.stack([c.double() for c in columns], dim=1).numpy()[here])
        sources = graph.influence.numpy()[~graph.is_kind("logit").numpy()]
        dropped = graph.influence.numpy()[~here].sum()
        unaligned.append(dropped / max(sources.sum(), 1e-30))
        for index, label in sorted(graph.labels.items()):
            labels.setdefault(int(keys[index]), label)
        for index in (graph.is_kind("embedding") | graph.is_kind("logit")).nonzero()[:, 0].tolist():
            vocabulary[int(keys[index])].add(int(nodes.feature[index]))
        read_at = max([read_at, *slot_of[nodes.position[graph.is_kind("logit")].numpy()].tolist()])
    keys, count, sums = tally.totals()
    known = _unpacked(keys)
    # Logits have no slot in their keys; they are shown at the last slot at which any prompt's are read.
    table = {
        "key": keys,
        "kind": known["kind"],
        "layer": known["layer"],
        "slot": np.where(known["kind"] == Kind.LOGIT, read_at if read_at >= 0 else len(slots.names) - 1, known["slot"]),
        "feature": known["feature"],
        "token": [min(ids) if len(ids := vocabulary.get(key, {-1})) == 1 else -1 for key in keys.tolist()],
        "count": count,
    }
    means = dict(zip(SUMS, sums.T / len(graphs), strict=True))
    return pd.DataFrame(table | means), labels, float(np.mean(unaligned))


def add_up_edges(
    graphs: Sequence[AttributionGraph | str | Path], slots: Slots, nodes: pd.DataFrame, min_share: float
) -> pd.DataFrame:
    """Edges found in at least ``min_share`` of the graphs, as row numbers of ``nodes``, by target, then source."""
    common = np.flatnonzero(nodes["count"] >= min_share * len(graphs))
    known = nodes.key.to_numpy()[common]
    tally = Tally(1)
    for graph, slot_of in zip(each(graphs), slots.of, strict=True):
        keys = _keys(graph, slot_of)
        row = np.searchsorted(known, keys).clip(max=max(0, len(known) - 1))
        row = np.where(known[row] == keys, common[row], -1) if len(known) else np.full(len(keys), -1)
        source, target = row[graph._edges.source.numpy()], row[graph._edges.target.numpy()]
        here = (source >= 0) & (target >= 0)
        tally.add(target[here] * len(nodes) + source[here], graph._edges.weight.double().numpy()[here][:, None])
    keys, count, sums = tally.totals()
    enough = count >= min_share * len(graphs)
    target, source = np.divmod(keys[enough], len(nodes))
    return pd.DataFrame(
        {"source": source, "target": target, "count": count[enough], "weight": sums[enough, 0] / len(graphs)}
    )
