"""Find which features of `tiny-facts` stand for a state, by running the model on the whole world.

A feature stands for a state if it is active on at least one of the state's cities, whichever property is asked about,
and if a good part of all its activation is on them. A feature that is active on several of the cities stands for the
state itself; one that is active on a single city may stand for that city. So only the former count as the middle step
of a graph, but a swap of two states has to replace both.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.builtin.world import PROPERTIES, STATE_OF, STATES, two_hop
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Ablate, Edit, Replacement, Set

PLACES = {"city": -2, "is": -1}
"""The last two positions of `the capital of the state containing Dallas is`."""
REACH = 1 / 7 - 1e-6  # a state's feature is active on at least this share of its cities, for every property
SHARED = 2 / 7 - 1e-6  # active on at least this share, it stands for the state and not for one city
PURITY = 0.25  # at least this share of its activation over all prompts is on the state's cities; chance: 1/31
PROMPTS_AT_ONCE = 256


def state_features(replacement: Replacement) -> pd.DataFrame:
    """Find the features that stand for each state, by running all two-hop prompts (about a second).

    Args:
        replacement: `tiny-facts` with its transcoders.

    Returns:
        A frame with a row for each state, place and feature: ``state``, ``place`` (the token ``city`` or ``is``),
        ``layer``, ``feature``, ``activation`` (mean over the state's prompts), ``reach`` (the share of the state's
        cities on which it is active) and ``purity`` (the share of its activation that is on them).
    """
    prompts = [two_hop(city, name).prompt for city in STATE_OF for name in PROPERTIES]
    states = [state.name for state in STATES]
    of_city = torch.tensor([states.index(state.name) for state in STATE_OF.values()])
    parts = []
    for layer, acts in _activations(replacement, prompts).items():
        # [city property place feature], then sums over the cities of each state
        acts = acts.unflatten(0, (len(STATE_OF), len(PROPERTIES)))
        per_state = torch.zeros(len(states), *acts.shape[1:])
        mass = per_state.index_add(0, of_city, acts)
        count = per_state.index_add(0, of_city, (acts > 0).float())
        cities = torch.bincount(of_city)[:, None, None, None]
        reach = (count / cities).amin(1)
        mass = mass.sum(1)
        purity = mass / mass.sum(0).clamp_min(1e-9)
        mean = mass / (cities[:, 0] * len(PROPERTIES))
        state, place, feature = ((reach >= REACH) & (purity >= PURITY)).nonzero(as_tuple=True)
        parts.append(
            pd.DataFrame(
                {
                    "state": [states[i] for i in state.tolist()],
                    "place": [list(PLACES)[i] for i in place.tolist()],
                    "layer": layer,
                    "feature": feature.numpy(),
                    "activation": mean[state, place, feature].numpy(),
                    "reach": reach[state, place, feature].numpy(),
                    "purity": purity[state, place, feature].numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True).sort_values(["state", "place", "layer", "feature"], ignore_index=True)


def _activations(replacement: Replacement, prompts: Sequence[str]) -> dict[int, Float[Tensor, "prompt place feature"]]:
    """Feature activations of every layer at the two :data:`PLACES`, for prompts of equal length."""
    model, dictionary = replacement.model, replacement.dictionary
    names = {layer: dictionary.input_hook(layer) for layer in dictionary.layers}
    found: dict[int, list[Tensor]] = {layer: [] for layer in names}
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        with torch.no_grad():
            _, cache = model.run_with_cache(
                list(prompts[start : start + PROMPTS_AT_ONCE]), names_filter=list(names.values())
            )
            # Encoding only two of nine positions is cheaper than listening at the dictionary's hook points.
            for layer, name in names.items():
                x = cache[name][:, list(PLACES.values())]
                acts = dictionary.activate(layer, dictionary.pre_activations(layer, x), x)
                found[layer].append(acts.float().cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def swap_edits(features: pd.DataFrame, state: str, other: str | None) -> list[Edit]:
    """Edits for a two-hop prompt that replace one state by another.

    Args:
        features: what :func:`state_features` returned.
        state: the state to take out; its features are set to zero.
        other: the state to put in; its features are set to their mean activation on its own cities. None for none.
    """
    new = {
        (r.layer, PLACES[r.place], r.feature): float(r.activation)
        for r in features[features.state == other].itertuples()
    }
    old = [(r.layer, PLACES[r.place], r.feature) for r in features[features.state == state].itertuples()]
    edits: list[Edit] = [Ablate(*where) for where in old if where not in new]
    return edits + [Set(*where, value=value) for where, value in new.items()]


def state_nodes(graph: AttributionGraph, features: pd.DataFrame, state: str) -> list[str]:
    """The nodes of a two-hop prompt's graph that stand for ``state`` and lie between city and answer.

    Only features that several of the state's cities share count. A node lies between them if edges lead to it from the
    city's token, and from it to a target.
    """
    n = len(graph.info.tokens)
    shared = features[(features.state == state) & (features.reach >= SHARED)]
    wanted = {(n + PLACES[r.place], r.layer, r.feature) for r in shared.itertuples()}
    nodes = graph.nodes[graph.nodes.kind == "feature"]
    rows = zip(nodes.id, nodes.position, nodes.layer, nodes.feature, strict=True)
    members = [name for name, *place in rows if tuple(place) in wanted]
    forward = _reached(graph.edges, "source", "target", {f"token@{n + PLACES['city']}"})
    backward = _reached(graph.edges, "target", "source", {i for i in graph.node_ids if i.startswith("logit:")})
    return [name for name in members if name in forward and name in backward]


def _reached(edges: pd.DataFrame, start: str, end: str, frontier: set[str]) -> set[str]:
    """All nodes that can be reached along edges from ``frontier``, itself included."""
    steps = edges.groupby(start)[end].agg(list)
    seen = set(frontier)
    while frontier:
        frontier = {node for name in frontier if name in steps.index for node in steps[name]} - seen
        seen |= frontier
    return seen
