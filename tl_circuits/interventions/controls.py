"""Random sets of features to compare a box with: as many, in the same layers, at the same positions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_circuits.attribution.contrast import compare_again
from tl_circuits.attribution.sources import Sources, find_sources, recorded_sites
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import BlockPlace, Edit, Replacement, Set, read_prompt, record


def random_sets(
    replacement: Replacement,
    graph: AttributionGraph,
    boxes: Sequence[Sequence[int]],
    count: int,
    seed: int,
    factor: float = 0.0,
) -> list[list[list[Edit]]]:
    """For each box, edits that do to random features what is done to the box.

    A random set has one active feature for each feature of the box, of the same layer (and site) and at the same
    position, in the graph or not. In a contrast graph these are set to their baseline, as the box's own are.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        boxes: node indices of each box.
        count: how many random sets for each box.
        seed: for the choice.
        factor: what the box is multiplied by; 0 removes it.

    Raises:
        BaselineError: for a graph against a baseline made from texts, which a graph does not keep.
    """
    sources, generator = _sources(replacement, graph), torch.Generator().manual_seed(seed)
    places = (node_places(replacement.dictionary, graph), graph._nodes.position, graph._nodes.feature)
    found = []
    for box in boxes:
        members = [tuple(int(column[i]) for column in places) for i in box if bool(graph.is_kind("feature")[i])]
        found.append([_one(sources, members, generator, factor) for _ in range(count)])
    return found


def _sources(replacement: Replacement, graph: AttributionGraph) -> Sources:
    model, dictionary = replacement.model, replacement.dictionary
    prompt = read_prompt(model, dictionary, graph)
    with torch.no_grad():
        recording = record(model, prompt.tokens, len(prompt.tokens) - 1, recorded_sites(model, dictionary))
        sources = find_sources(model, dictionary, recording, prompt.skipped)
        return compare_again(replacement, sources, recording, graph.info)


def _one(sources: Sources, members: Sequence[tuple[int, ...]], generator: torch.Generator, factor: float) -> list[Edit]:
    """One random set. Where a place has too few other features, the set is smaller."""
    edits: list[Edit] = []
    for place, position in dict.fromkeys((place, position) for place, position, _ in members):
        own = [feature for at, where, feature in members if (at, where) == (place, position)]
        active = sources.layers[place].active
        here = (
            (active.position == position) & ~torch.isin(active.feature, torch.tensor(own, device=active.feature.device))
        ).nonzero()[:, 0]
        chosen = here[torch.randperm(len(here), generator=generator)[: len(own)].to(here.device)]
        edits += [
            _edit(sources.places[place], position, active.feature[i], active.activation[i], active.counted[i], factor)
            for i in chosen.tolist()
        ]
    return edits


def _edit(
    place: BlockPlace, position: int, feature: Tensor, activation: Tensor, counted: Tensor, factor: float
) -> Edit:
    return Set(
        place.layer, position, int(feature), value=float(activation + (factor - 1) * counted), site=place.site or None
    )
