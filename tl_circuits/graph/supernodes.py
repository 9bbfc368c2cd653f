"""Group features that read and write alike into a few boxes, so that a picture of boxes can be read from bottom to top.

Two features are similar in two ways: they share neighbours, and the neighbours drive them (or are driven) by similar
shares and signs. Each is a Jaccard index, and the similarity is their mean. The most similar boxes are merged again and
again (average linkage). A merge that would close a cycle among boxes is skipped. In a contrast graph, features that
raise the answer's lead are kept apart from those that lower it: what a box does is then predicted better
(docs/benchmarks.md).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuits.graph.box_names import name_boxes
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.notes import Supernodes
from tl_circuits.graph.prune import smallest_kept
from tl_circuits.graph.scores import input_shares

FEATURE_SHARE = 0.6  # boxes are made of the features that carry this share of the features' influence,
MOST_FEATURES = (48, 36, 26, 18, 12)  # but of at most so many; fewer while the boxes lump too much together
DIRECT_FEATURES = 0.5  # times that number: how many of the strongest direct causes of the first target are added
LAYERS_APART = 0.5  # added to the distance of the first and the last layer, because a box has one height in the picture
OPPOSITE = 1.0  # added to the distance of two features of a contrast graph whose total effects have opposite signs
NEIGHBOUR_SHARE = 0.8  # two nodes are neighbours if their edge is among those that carry this share of the influence
CYCLE_SHARE = 0.01  # flows below this share of the strongest flow between boxes count as no flow
GOOD_LUMP_ERROR = 0.18
FEWEST_BOXES = 8
Boxes = list[list[int]]


@dataclass(frozen=True)
class _Role:
    """What features read and write within the part of the graph that boxes are made of.

    Attributes:
        features: node indices of the features.
        flow: ``flow[i, j]`` is the share of ``i``'s inputs that come from ``j``, times ``i``'s influence. It is
            positive if ``j`` pushes ``i`` in the direction of its activation. Features come first, then tokens, errors
            and targets.
        drawn: what a picture draws one by one: everything but errors.
        influence: of the features.
    """

    features: Int[Tensor, " feature"]
    flow: Float[Tensor, "kept kept"]
    drawn: Bool[Tensor, " kept"]  # what a picture draws one by one: everything but errors
    influence: Float[Tensor, " feature"]


def supernodes(graph: AttributionGraph, max_boxes: int = 12) -> Supernodes:
    """At most ``max_boxes`` boxes for ``graph``, named by their labels. Deterministic; needs no model.

    The fewest boxes are taken that keep the lump error under 0.18, but not fewer than 8 or ``max_boxes - 4``. If none
    do, there are ``max_boxes``, and weak features are left out where they would lump too much together. A person's
    groups and pins are always among the boxes.

    Args:
        graph: the graph.
        max_boxes: the most boxes, at least 1.

    Raises:
        ValueError: for ``max_boxes`` below 1.
    """
    if max_boxes < 1:
        raise ValueError(f"max_boxes must be at least 1, got {max_boxes}.")
    index = {name: i for i, name in enumerate(graph.node_ids)}
    is_feature = (graph.is_kind("feature") & (graph._nodes.weight <= 0)).tolist()  # targets stay apart
    own = [[index[i] for i in ids if is_feature[index[i]]] for _, ids in graph.groups]
    own = [members for members in own if members]
    pinned = [index[i] for i in graph.pins if is_feature[index[i]]]
    boxes, error = [], 1.0
    for most in MOST_FEATURES:
        role = _role(graph, most, [i for members in own for i in members] + pinned)
        found, found_error = _fewest(graph, role, own, max_boxes)
        if found_error < error:
            boxes, error = [[int(role.features[i]) for i in box] for box in found], found_error
        if error <= GOOD_LUMP_ERROR:
            break
    names = [label for label, ids in graph.groups if any(is_feature[index[i]] for i in ids)]
    labels = {tuple(sorted(members)): label for label, members in zip(names, own, strict=True)}
    return Supernodes(name_boxes(graph, boxes, labels), error)


def _fewest(graph: AttributionGraph, role: _Role, own: list[list[int]], max_boxes: int) -> tuple[Boxes, float]:
    """The fewest boxes whose lump error is good, else the ones with the smallest lump error."""
    if not len(role.features):
        return [], 0.0
    place = {node: i for i, node in enumerate(role.features.tolist())}
    fixed = [[place[i] for i in members] for members in own]
    steps = _merges(graph, role, fixed, max_boxes)
    errors = [lump_error(role, boxes) for boxes in steps]
    fewest = max(min(FEWEST_BOXES, max_boxes), max_boxes - 4)
    good = [i for i, boxes in enumerate(steps) if errors[i] <= GOOD_LUMP_ERROR and len(boxes) >= fewest]
    chosen = good[-1] if good else errors.index(min(errors))
    return steps[chosen], errors[chosen]


def _role(graph: AttributionGraph, most: int, always: list[int]) -> _Role:
    edges, nodes, n = graph._edges, graph._nodes, len(graph)
    influence, is_feature = graph.influence, graph.is_kind("feature") & (nodes.weight <= 0)
    shares = input_shares(edges, n)
    strongest = torch.argsort(torch.where(is_feature, influence, -1.0), descending=True, stable=True)
    strongest = strongest[: int(is_feature.sum())]
    reached = influence[strongest].cumsum(0) / influence[strongest].sum().clamp_min(1e-30)
    chosen = set(strongest[: min(int((reached < FEATURE_SHARE).sum()) + 1, most)].tolist()) | set(always)
    direct = (edges.target == int(nodes.weight.argmax())) & is_feature[edges.source]
    order = torch.argsort(shares[direct], descending=True, stable=True)[: int(most * DIRECT_FEATURES)]
    chosen |= set(edges.source[direct][order].tolist())
    features = torch.tensor(sorted(chosen), dtype=torch.long)
    rest = (~is_feature).nonzero()[:, 0]  # tokens, errors, targets
    place = torch.full((n,), -1, dtype=torch.long)
    place[features] = torch.arange(len(features))
    place[rest] = torch.arange(len(rest)) + len(features)
    kept = (place[edges.source] >= 0) & (place[edges.target] >= 0)
    towards = nodes.towards.double()
    signed = shares * edges.weight.sign() * towards[edges.target] * influence[edges.target]
    size = len(features) + len(rest)
    flow = torch.zeros(size, size, dtype=torch.float64)
    flow[place[edges.target[kept]], place[edges.source[kept]]] = signed[kept]
    drawn = ~graph.is_kind("error")[torch.cat([features, rest])]
    return _Role(features, flow, drawn, influence[features])


def _distances(role: _Role) -> Float[Tensor, "feature feature"]:
    """One minus the similarity of every two features.

    It is the mean of the Jaccard index of their neighbours and the weighted Jaccard index of their signed inputs and
    outputs.
    """
    n, flow = len(role.features), role.flow
    strong = flow.abs() >= smallest_kept(flow.abs()[flow != 0], NEIGHBOUR_SHARE)
    strong &= flow != 0
    neighbours = torch.cat([strong[:n], strong.T[:n]], 1).double()
    common = neighbours @ neighbours.T
    counts = neighbours.sum(1)
    neighbour_jaccard = common / (counts[:, None] + counts - common).clamp_min(1)
    profile = torch.cat([_unit(flow[:n]), _unit(flow.T[:n])], 1)
    profile = _unit(torch.cat([profile.clamp_min(0), (-profile).clamp_min(0)], 1))
    variation = torch.cdist(profile, profile, p=1.0) / 2
    return 1 - (neighbour_jaccard + (1 - variation) / (1 + variation)) / 2


def _opposite(graph: AttributionGraph, role: _Role) -> Bool[Tensor, "feature feature"]:
    """Which two features move the answer in opposite directions; none in a graph without a baseline."""
    effects = graph._nodes.total_effect
    if effects is None or not graph.info.compared_with:
        return torch.zeros(len(role.features), len(role.features), dtype=torch.bool)
    sign = effects[role.features].sign()
    return sign[:, None] * sign < 0


def _unit(rows: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    return rows / rows.abs().sum(1, keepdim=True).clamp_min(1e-30)


def _merges(graph: AttributionGraph, role: _Role, fixed: Boxes, max_boxes: int) -> list[Boxes]:
    """The boxes after each merge, from ``max_boxes`` boxes down. The ``fixed`` boxes are never merged."""
    n = len(role.features)
    # On a tie, features on the same token go together first, then those with the same label.
    position = graph._nodes.position[role.features]
    labels = [graph.label(i) for i in role.features.tolist()]
    same_label = torch.tensor([[a == b for b in labels] for a in labels])
    depth = graph._nodes.layer[role.features].double() / max(1, graph.info.n_layers)
    apart = LAYERS_APART * (depth[:, None] - depth).abs()
    distance = (_distances(role) + apart + OPPOSITE * _opposite(graph, role)).round(decimals=9)
    distance = distance - 2e-10 * (position[:, None] == position) - 1e-10 * same_label
    boxes = [*fixed, *([i] for i in range(n) if not any(i in box for box in fixed))]
    to_box = torch.zeros(len(boxes), n, dtype=torch.float64)
    for row, box in enumerate(boxes):
        to_box[row, box] = 1
    flow = to_box @ role.flow[:n, :n].abs() @ to_box.T
    size = to_box.sum(1)
    linkage = to_box @ distance @ to_box.T / (size[:, None] * size)
    linkage.fill_diagonal_(torch.inf)
    linkage[: len(fixed)] = torch.inf
    linkage[:, : len(fixed)] = torch.inf
    steps = [boxes]
    while pair := _closest(linkage, flow):
        keep, gone = pair
        left = torch.arange(len(boxes)) != gone
        a, b = len(boxes[keep]), len(boxes[gone])
        merged = (a * linkage[keep] + b * linkage[gone]) / (a + b)
        linkage[keep], linkage[:, keep] = merged, merged
        linkage[keep, keep] = torch.inf
        linkage, flow = linkage[left][:, left], _joined(flow, keep, gone)
        boxes = [sorted(box + boxes[gone]) if i == keep else box for i, box in enumerate(boxes) if i != gone]
        steps.append(boxes)
    fitting = [boxes for boxes in steps if len(boxes) <= max_boxes]
    return fitting or [_strongest(role, steps[-1], len(fixed), max_boxes)]


def _strongest(role: _Role, boxes: Boxes, n_fixed: int, count: int) -> Boxes:
    """The ``count`` boxes of largest influence; a person's boxes are always among them."""
    reach = [-float(role.influence[box].sum()) - (1e9 if i < n_fixed else 0) for i, box in enumerate(boxes)]
    order = sorted(range(len(boxes)), key=reach.__getitem__)[: max(count, n_fixed)]
    return [boxes[i] for i in sorted(order)]


def _closest(linkage: Float[Tensor, "box box"], flow: Float[Tensor, "box box"]) -> tuple[int, int] | None:
    """The two most similar boxes whose merge closes no cycle, lower index first; None if there are none."""
    strong = _strong(flow)
    further = strong @ _reach(strong) > 0  # boxes joined over a third one: a merge would close a cycle through it
    allowed = linkage.clone()
    allowed[further | further.T] = torch.inf
    allowed = allowed.triu(1) + torch.full_like(allowed, torch.inf).tril()
    for flat in torch.argsort(allowed.flatten(), stable=True).tolist():
        a, b = divmod(flat, len(linkage))
        if torch.isinf(allowed[a, b]):
            return None
        if is_acyclic(_joined(flow, a, b)):  # checked again, as weak flows can add up to one that counts
            return a, b
    return None


def _joined(flow: Float[Tensor, "box box"], keep: int, gone: int) -> Float[Tensor, "fewer fewer"]:
    made = flow.clone()
    made[keep] += made[gone]
    made[:, keep] += made[:, gone]
    made[keep, keep] = 0
    left = torch.arange(len(flow)) != gone
    return made[left][:, left]


def _strong(flow: Float[Tensor, "box box"]) -> Float[Tensor, "box box"]:
    outside = flow.clone().fill_diagonal_(0)
    return ((outside > CYCLE_SHARE * outside.max()) & (outside > 0)).double() if len(outside) else outside


def _reach(links: Float[Tensor, "box box"]) -> Float[Tensor, "box box"]:
    """1 where one or more links lead from the column's box to the row's box."""
    reach = links
    for _ in range(max(1, len(links).bit_length())):
        reach = ((reach + reach @ reach) > 0).double()
    return reach


def is_acyclic(flow: Float[Tensor, "box box"]) -> bool:
    """Whether the flows between boxes form no cycle. Flows below 1 % of the strongest do not count."""
    return not bool(_reach(_strong(flow)).diagonal().any())


def lump_error(role: _Role, boxes: Boxes) -> float:
    """How much is lost by drawing these boxes instead of their features; see :class:`Supernodes`."""
    n = len(role.features)
    singles = role.drawn.nonzero()[:, 0]
    singles = singles[singles >= n]
    to_unit = torch.zeros(len(role.flow), len(boxes) + len(singles), dtype=torch.float64)
    for column, box in enumerate(boxes):
        to_unit[box, column] = 1
    to_unit[singles, torch.arange(len(singles)) + len(boxes)] = 1
    total, weight = 0.0, 0.0
    for ends in (role.flow.abs()[:n], role.flow.abs().T[:n]):
        spread = _unit(ends @ to_unit)
        for box in boxes:
            own = role.influence[box]
            mean = (spread[box] * own[:, None]).sum(0) / own.sum().clamp_min(1e-30)
            total += float(((spread[box] - mean).abs().sum(1) / 2 * own).sum())
            weight += float(own.sum())
    return total / max(weight, 1e-30)
