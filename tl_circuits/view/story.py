"""The story of a graph: its question, a few boxes between tokens and answer, sentences, and a meter.

The page, the server, the widget and the figure all show it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.graph.box_names import place
from tl_circuits.graph.carried import answer_scale, carried, input_mass
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import AGAINST_OTHERS
from tl_circuits.graph.paths import VERBS, conjugated
from tl_circuits.graph.scores import Carried
from tl_circuits.graph.visible import visible

SENTENCES = 3
ARROWS_PER_BOX = 4  # arrows drawn into one box or target, strongest first,
WEAK_STEP = 0.05  # of what reaches a box: a sentence says so below it
LEAST_ARROW = 0.002  # none below this share of its inputs
LEAST_TOLD = 0.10  # if boxes carry less of the answer, no sentence is told
MOST_TARGETS = 5


@dataclass(frozen=True)
class Unit:
    """One thing that the picture draws: a prompt token, a box of features, or a target.

    Attributes:
        kind: ``"token"``, ``"box"`` or ``"target"``.
        name: what is written on it.
        place: where it is, in words.
        members: its node indices.
        row: its height: 0 for tokens, 1 for targets, and for boxes between them according to their layers.
        column: where on the prompt it sits, in tokens.
        influence: of its members together.
        lower: whether its features, weighted by influence, mostly lie below their baseline (contrast graphs only).
    """

    kind: str
    name: str
    place: str
    members: tuple[int, ...]
    row: float
    column: float
    influence: float
    lower: bool = False


@dataclass(frozen=True)
class Arrow:
    """The direct effects of one unit on another.

    Attributes:
        source: index of the unit that acts.
        target: index of the unit that is acted on.
        share: into a box, the share of its features' absolute inputs; into a target, the share of what there is to
            explain about it (:func:`~tl_circuits.graph.carried.to_explain`). Above zero, it pushes the target in the
            direction it went on this prompt (for an output: raises it); below zero, against it.
    """

    source: int
    target: int
    share: float


@dataclass(frozen=True)
class Meter:
    """Where the influence on the targets comes from: all paths by their size, also those that cancel. The three shares
    add up to 1.

    Attributes:
        shown: from tokens, over nothing but what is drawn.
        error: from MLP output that the features miss.
        hidden: through features that are not drawn.
    """

    shown: float
    error: float
    hidden: float


@dataclass(frozen=True)
class Story:
    """Everything that is shown of a graph.

    Attributes:
        headline: the question.
        sentences: the strongest paths in words; none if boxes carry less than :data:`LEAST_TOLD` of the answer.
        units: tokens, boxes and targets.
        arrows: the effects between them.
        meter: how much of the influence the picture shows.
        carried: what all boxes together bring to the first target.
        lump_error: how much is lost by drawing boxes (:class:`Supernodes`).
        ways: for each sentence, the units that its path goes over, from token to target.
    """

    headline: str
    sentences: tuple[str, ...]
    units: tuple[Unit, ...]
    arrows: tuple[Arrow, ...]
    meter: Meter
    carried: Carried
    lump_error: float
    ways: tuple[tuple[int, ...], ...] = ()  # for each sentence the units it goes over, token to target


def story_of(graph: AttributionGraph, max_boxes: int = 12) -> Story:
    """The story of ``graph`` in at most ``max_boxes`` boxes. A person's groups are among them."""
    found = graph.supernodes(max_boxes)
    index = {name: i for i, name in enumerate(graph.node_ids)}
    boxes = [(label, tuple(index[i] for i in ids)) for label, ids in found.groups]
    units = (*_tokens(graph), *(_box(graph, label, members) for label, members in boxes), *_targets(graph))
    flows = _flows(graph, units)
    arrows = _arrows(units, flows)
    boxed = carried(graph, [i for _, members in boxes for i in members])
    ways = _told_ways(units, arrows) if boxed.share >= LEAST_TOLD else ()
    sentences = tuple(_sentence(units, flows, way) for way in ways)
    return Story(graph.info.question, sentences, units, arrows, meter(graph, units), boxed, found.lump_error, ways)


def _tokens(graph: AttributionGraph) -> list[Unit]:
    units = []
    for i in graph.is_kind("embedding").nonzero()[:, 0].tolist():
        position = int(graph._nodes.position[i])
        name = f"“{visible(graph.info.tokens[position])}”"
        units.append(Unit("token", name, f"position {position}", (i,), 0.0, float(position), float(graph.influence[i])))
    return units


def _box(graph: AttributionGraph, label: str, members: tuple[int, ...]) -> Unit:
    picked, nodes = list(members), graph._nodes
    weight = graph.influence[picked].clamp_min(1e-30)
    row = float((nodes.layer[picked] * weight).sum() / weight.sum())
    column = float((nodes.position[picked] * weight).sum() / weight.sum())
    height = (row + 1) / (graph.info.n_layers + 1)
    lower = nodes.baseline is not None and float((weight * nodes.counted[picked].sign()).sum()) < 0
    return Unit(
        "box", label, place(graph, picked), members, height, column, float(graph.influence[picked].sum()), lower
    )


def _targets(graph: AttributionGraph) -> list[Unit]:
    weights = graph._nodes.weight
    order = torch.argsort(weights, descending=True, stable=True)[:MOST_TARGETS].tolist()
    last = len(graph.info.tokens) - 1
    units = []
    for i in order:
        if float(weights[i]) <= 0:
            continue
        name = visible(graph.label(i).removeprefix("output ").replace(AGAINST_OTHERS, ""))  # the question says the rest
        position = int(graph._nodes.position[i])
        units.append(
            Unit("target", name, "answer", (i,), 1.0, float(position if position >= 0 else last), float(weights[i]))
        )
    return units


def _membership(graph: AttributionGraph, units: tuple[Unit, ...]) -> Tensor:
    unit_of = torch.full((len(graph),), -1, dtype=torch.long)
    for u, unit in enumerate(units):
        unit_of[list(unit.members)] = u
    return unit_of


def _flows(graph: AttributionGraph, units: tuple[Unit, ...]) -> Float[Tensor, "unit unit"]:
    """The signed share of each unit's inputs (of a target: of its answer) that comes from each other unit. Rows are
    acted on, columns act.
    """
    edges, nodes = graph._edges, graph._nodes
    scale = input_mass(graph).clamp_min(1e-30)
    for unit in units:
        if unit.kind == "target":
            scale[unit.members[0]] = answer_scale(graph, unit.members[0])
    unit_of = _membership(graph, units)
    towards = nodes.towards.double()
    share = edges.weight.double() / scale[edges.target] * towards[edges.target]
    source, target = unit_of[edges.source], unit_of[edges.target]
    both = (source >= 0) & (target >= 0) & (source != target)
    n = len(units)
    flat = torch.zeros(n * n, dtype=torch.float64)
    reach = graph.influence.clamp_min(1e-30)
    flat.index_add_(0, (target * n + source)[both], (share * reach[edges.target])[both])
    whole = torch.tensor([float(reach[list(unit.members)].sum()) for unit in units], dtype=torch.float64)
    return flat.reshape(n, n) / whole[:, None]


def _arrows(units: tuple[Unit, ...], flows: Float[Tensor, "unit unit"]) -> tuple[Arrow, ...]:
    arrows = []
    for target, unit in enumerate(units):
        if unit.kind == "token":
            continue
        order = torch.argsort(flows[target].abs(), descending=True, stable=True)[:ARROWS_PER_BOX]
        found = [Arrow(s, target, float(flows[target, s])) for s in order.tolist()]
        arrows += [arrow for arrow in found if abs(arrow.share) >= LEAST_ARROW]
    return tuple(arrows)


def _told_ways(units: tuple[Unit, ...], arrows: tuple[Arrow, ...]) -> tuple[tuple[int, ...], ...]:
    """The strongest path over each of the boxes that act most on the first target, those that raise it first. All steps
    are drawn arrows.
    """
    first = next((u for u, unit in enumerate(units) if unit.kind == "target"), None)
    if first is None:
        return ()
    came_from = _ways(units, arrows)
    into = sorted((arrow for arrow in arrows if arrow.target == first), key=lambda arrow: -abs(arrow.share))
    told = []
    for last in (arrow.source for arrow in into if came_from[arrow.source] is not None):
        chain = [last]
        while (before := came_from[chain[0]]) is not None:
            chain.insert(0, before)
        if units[chain[0]].kind == "token":
            told.append((*chain, first))
        if len(told) == SENTENCES:
            break
    raises = {arrow.source for arrow in into if arrow.share >= 0}
    # the question is why: first what raises the answer
    return tuple(sorted(told, key=lambda way: way[-2] not in raises))


def _ways(units: tuple[Unit, ...], arrows: tuple[Arrow, ...]) -> list[int | None]:
    """For each box, the unit before it on its strongest path from a token. A path is as strong as the product of its
    arrows' shares.
    """
    best = [1.0 if unit.kind == "token" else 0.0 for unit in units]
    came_from: list[int | None] = [None] * len(units)
    for u in sorted((u for u, unit in enumerate(units) if unit.kind == "box"), key=lambda u: (units[u].row, u)):
        for arrow in sorted((a for a in arrows if a.target == u), key=lambda a: a.source):
            s, unit = arrow.source, units[arrow.source]
            below = unit.kind == "token" or (unit.kind == "box" and (unit.row, s) < (units[u].row, u))
            strength = best[s] * abs(arrow.share)
            if below and strength > best[u]:
                best[u], came_from[u] = strength, s
    return came_from


def _sentence(units: tuple[Unit, ...], flows: Float[Tensor, "unit unit"], chain: tuple[int, ...]) -> str:
    words, joint, would = units[chain[0]].name, " ", False
    for source, target in zip(chain, chain[1:], strict=False):
        share, unit = float(flows[target, source]), units[target]
        up, percent = share >= 0, _percent(abs(share))
        verb = VERBS["target" if unit.kind == "target" else "lower" if unit.lower else "feature"][0 if up else 1]
        count = len(unit.members)
        if unit.kind == "target":
            name = f"{unit.name} ({percent} of the answer)"
        else:
            weak = "a weak step: " if abs(share) < WEAK_STEP else ""
            of_it = f"{weak}{percent} of what reaches {'it' if count == 1 else 'them'}"
            name = f"[{unit.name}] ({count} feature{'s' * (count != 1)}; {of_it})"
        words += f"{joint}{conjugated(verb, would)} {name}"
        joint = ", which " if up else f"; [{unit.name}] "
        would = would or not up  # after "holds back [X]" comes what X would do, not what holding it back does
    return f"{words}."


def meter(graph: AttributionGraph, units: tuple[Unit, ...]) -> Meter:
    """Trace the targets' influence back through drawn nodes, splitting it among each node's inputs by their size.

    The way ends at a token, an error, or a feature that is not drawn.
    """
    edges, depth = graph._edges, graph._nodes.depth
    drawn = _membership(graph, units) >= 0
    is_token, is_error = graph.is_kind("embedding"), graph.is_kind("error")
    share = edges.weight.double().abs() / input_mass(graph).clamp_min(1e-30)[edges.target]
    targets = [unit.members[0] for unit in units if unit.kind == "target"]
    arriving = torch.zeros(len(graph), dtype=torch.float64)
    arriving[targets] = graph._nodes.weight[targets].double()
    whole = max(float(arriving.sum()), 1e-30)
    through = drawn & ~is_token  # influence is followed back through drawn nodes; it ends at tokens
    useful = through[edges.target]
    for at in depth[through].unique().flip(0).tolist():  # a node's inputs all lie in lower layers, or at earlier sites
        now = useful & (depth[edges.target] == at)
        arriving.index_add_(0, edges.source[now], arriving[edges.target[now]] * share[now])
    shown = float(arriving[is_token].sum()) / whole
    error = float(arriving[is_error].sum()) / whole
    return Meter(shown, error, max(0.0, 1 - shown - error))


def carried_line(story: Story, graph: AttributionGraph) -> str:
    """How much of the answer the boxes carry, in words; empty if there are no boxes or nothing to explain."""
    found = story.carried
    if found.share != found.share or not any(unit.kind == "box" for unit in story.units):
        return ""
    first = int(graph._nodes.weight.argmax())
    if graph.info.compared_with and AGAINST_OTHERS in graph.label(first):
        what = "its lead over what the others give"
    elif graph.is_kind("logit")[first] and graph._nodes.feature[first] >= 0:
        what = "its lead over the average token"
    else:  # a difference, a direction or a feature
        what = "the target's value"
    return (
        f"The boxes carry {_percent(found.share)} of the answer: without them, {what} goes from {found.value:.3g} to "
        f"{found.value - found.by:.3g} in the replacement model."
    )


def summary_line(story: Story, graph: AttributionGraph) -> str:
    """How much the picture explains, in one line. If the boxes carry less than half, it begins by saying so."""
    few = "Less than half is explained by this picture. " if story.carried.share < 0.5 else ""
    missed = (
        ""
        if graph.info.exact
        else f" {_percent(story.meter.error)} of the influence starts in MLP output that the features miss."
    )
    return f"{few}{carried_line(story, graph)}{missed}"


def too_little(story: Story, graph: AttributionGraph) -> str:
    """Why no sentence is told, and what would show more; empty if sentences are told."""
    share = story.carried.share
    if share >= LEAST_TOLD or share != share or not any(unit.kind == "target" for unit in story.units):
        return ""
    more = [] if graph.info.compared_with else ["other prompts to compare with"]
    more += ["transcoders instead of neurons"] if graph.info.exact else []
    ways = " or ".join([", ".join([*more, "more nodes"][:-1]), "more nodes"] if more else ["more nodes"])
    return (
        f"The boxes carry {_percent(share)} of the answer, too little to tell a story in sentences. "
        f"To see more: {ways}."
    )


def _percent(share: float) -> str:
    """A share in per cent with two meaningful digits, as the page writes it: with the sign of arithmetic."""
    size = 100 * abs(share)
    digits = 0 if size in (0, 100) or 10 <= size < 99 else 1 if size >= 1 else 2
    return f"{100 * share:.{digits}f} %".replace("-", "−")
