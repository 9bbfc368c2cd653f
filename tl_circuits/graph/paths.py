"""The strongest paths from prompt tokens to a target, and sentences that tell them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_circuits.graph.carried import answer_scale
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.scores import input_shares
from tl_circuits.graph.visible import visible

# What an edge does to what it points to: with it, against it. A feature that counts because it is less active than in
# the prompts compared with is turned down.
VERBS = {"target": ("raise", "lower"), "feature": ("activate", "hold back"), "lower": ("turn down", "keep up")}


@dataclass(frozen=True)
class Path:
    """Nodes from a token to a target.

    Attributes:
        nodes: node indices, from the token to the target.
        signs: one for each edge. +1 if the edge pushes the node it points to in the direction of that node's activation
            on this prompt, else -1. For the last edge: +1 if it raises the target.
        share: the last edge's part, without its sign, of what there is to explain about the answer
            (:func:`~tl_circuits.graph.carried.to_explain`).
    """

    nodes: tuple[int, ...]
    signs: tuple[int, ...]
    share: float


def strongest_paths(graph: AttributionGraph, count: int = 5) -> list[Path]:
    """The strongest path to each of the features that act most directly on the answer, largest direct effect first.

    The answer is the target of largest weight. A path is as strong as the product of its edges' shares of their
    targets' inputs. ``share`` is of the last edge alone: what the feature brings to the answer directly.
    """
    edges = graph._edges
    shares = input_shares(edges, len(graph))
    target = int(graph._nodes.weight.argmax())
    came_from = _best_ways(graph, shares)
    last = (edges.target == target) & graph.is_kind("feature")[edges.source]
    of_answer = edges.weight[last].double().abs() / answer_scale(graph, target)
    order = torch.argsort(of_answer, descending=True, stable=True)
    found = []
    for feature, share in zip(edges.source[last][order].tolist(), of_answer[order].tolist(), strict=True):
        chain = [feature]
        while int(came_from[chain[0]]) >= 0:
            chain.insert(0, int(came_from[chain[0]]))
        if graph.is_kind("embedding")[chain[0]]:
            chain.append(target)
            found.append(Path(tuple(chain), _signs(graph, chain), share))
        if len(found) == count:
            break
    return found


def _best_ways(graph: AttributionGraph, shares: Tensor) -> Tensor:
    """For each node, the node before it on the strongest path from a token; -1 for tokens and where no path leads."""
    edges, depth_of = graph._edges, graph._nodes.depth
    best = graph.is_kind("embedding").double()
    came_from = torch.full((len(graph),), -1, dtype=torch.long)
    depth = depth_of[edges.target]
    for at in depth.unique().tolist():  # ascending, so that a source's own best is final
        here = (depth == at).nonzero()[:, 0]
        strength = best[edges.source[here]] * shares[here]
        order = torch.argsort(strength, stable=True)
        order = order[torch.argsort(edges.target[here][order], stable=True)]  # by target, the strongest last
        here, strength = here[order], strength[order]
        last = torch.ones_like(strength, dtype=torch.bool)
        last[:-1] = edges.target[here][1:] != edges.target[here][:-1]
        # Each target is written to once: of several writes to one place, threads may let any stay.
        strongest = last & (strength > 0)
        best[edges.target[here[strongest]]] = strength[strongest]
        came_from[edges.target[here[strongest]]] = edges.source[here[strongest]]
    return came_from


def _signs(graph: AttributionGraph, chain: list[int]) -> tuple[int, ...]:
    edges, nodes = graph._edges, graph._nodes
    signs = []
    for source, target in zip(chain, chain[1:], strict=False):
        weight = edges.weight[(edges.source == source) & (edges.target == target)]
        towards = float(nodes.towards[target])
        signs.append(1 if float(weight.sum()) * towards >= 0 else -1)
    return tuple(signs)


def sentence(graph: AttributionGraph, path: Path) -> str:
    """A path in words, such as ``“ France” activates layer 20 [say “ Paris”], which raises “ Paris”``."""
    nodes = graph._nodes
    words, joint, would = f"“{graph.info.tokens[int(nodes.position[path.nodes[0]])]}”", " ", False
    for node, sign in zip(path.nodes[1:], path.signs, strict=True):
        if node == path.nodes[-1]:
            verbs, name = VERBS["target"], _target_name(graph, node)
        else:
            lower = nodes.baseline is not None and float(nodes.towards[node]) < 0
            verbs, name = (
                VERBS["lower" if lower else "feature"],
                f"layer {int(nodes.layer[node])} [{graph.label(node)}]",
            )
        words += f"{joint}{conjugated(verbs[0 if sign > 0 else 1], would)} {name}"
        joint = ", which " if sign > 0 else f"; {name} "
        would = would or sign < 0  # after "holds back [X]" comes what X would do, not what holding it back does
    return visible(words)


def conjugated(verb: str, would: bool) -> str:
    """A verb after its subject: ``"hold back"`` as ``"holds back"``, or as ``"would hold back"``."""
    first, space, rest = verb.partition(" ")
    return f"would {verb}" if would else f"{first}s{space}{rest}"


def _target_name(graph: AttributionGraph, node: int) -> str:
    if not graph.is_kind("logit")[node]:
        return f"layer {int(graph._nodes.layer[node])} [{graph.label(node)}]"
    return graph.label(node).removeprefix("output ")
