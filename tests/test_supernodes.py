"""Boxes: similar features together, no cycles, little lost, a person's own untouched, also on real prompts."""

from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import cross_layer, prompt, tiny_bridge, transcoders
from tl_circuits.graph import supernodes as module
from tl_circuits.graph.nodes import Label
from tl_circuits.view.story import story_of


def trace(model, dictionary, tokens, n=60):
    with tlc.attach(model, dictionary) as replacement:
        return tlc.attribute(replacement, tokens, max_nodes=n, progress=False)


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("gemma3")
    return trace(model, transcoders(model), prompt())


def box_flow(graph, groups):
    index = {name: i for i, name in enumerate(graph.node_ids)}
    boxes = [[index[i] for i in ids] for _, ids in groups]
    adjacency = graph.adjacency().double().abs()
    mass = adjacency.sum(1, keepdim=True).clamp_min(1e-30)
    flow = adjacency / mass * graph.influence[:, None]
    return torch.stack([torch.stack([flow[a][:, b].sum() for b in boxes]) for a in boxes])


def has_cycle(flow):
    flow = flow.clone().fill_diagonal_(0)
    links = (flow > module.CYCLE_SHARE * flow.max()).double()
    reach = links
    for _ in range(len(links)):
        reach = ((reach + reach @ links) > 0).double()
    return bool(reach.diagonal().any())


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_real_prompts_lose_little_and_have_no_cycles(which, request):
    model = request.getfixturevalue(which)
    dictionary = tlc.mlp_neurons(model) if which == "smollm2" else transcoders(model, width=512)
    graph = trace(model, dictionary, "The capital of France is", 400)
    found = graph.supernodes()
    assert found.lump_error <= 0.18 and 2 <= len(found.groups) <= 12
    assert not has_cycle(box_flow(graph, found.groups))
    members = [i for _, ids in found.groups for i in ids]
    assert len(members) == len(set(members)) >= 12 and all("/F" in i for i in members)
    assert found == graph.supernodes()


def test_flows_that_lead_back_are_a_cycle_unless_they_are_weak():
    flow = torch.zeros(4, 4)
    flow[1, 0], flow[2, 1], flow[3, 2] = 1.0, 0.5, 0.2
    assert module.is_acyclic(flow)
    for source, target, weight, acyclic in (
        (3, 0, 0.1, False),
        (1, 0, 0.02, False),
        (3, 0, 0.009, True),
        (2, 2, 1.0, True),
    ):
        back = flow.clone()
        back[source, target] = back[source, target] or weight
        back[target, source] = weight
        assert module.is_acyclic(back) is acyclic, (source, target)


@pytest.mark.parametrize(("weak", "merged"), [(0.006, None), (0.004, (0, 1))])
def test_boxes_whose_weak_flows_add_up_to_a_cycle_are_not_joined(weak, merged):
    """Box 0 feeds box 2, which hands a little back to 0 and to 1: each too little to count, perhaps not both
    together."""
    flow, linkage = torch.zeros(3, 3), torch.full((3, 3), torch.inf)
    flow[2, 0], flow[0, 2], flow[1, 2] = 1.0, weak, weak
    linkage[0, 1] = linkage[1, 0] = 0.1
    assert module._closest(linkage, flow) == merged


def test_random_boxes_of_the_same_sizes_lose_more(graph):
    role = module._role(graph, 48, [])
    boxes, error = module._fewest(graph, role, [], 8)
    generator = torch.Generator().manual_seed(0)
    worse = []
    for _ in range(10):
        order = torch.randperm(len(role.features), generator=generator).tolist()
        mixed = [[order.pop() for _ in box] for box in boxes]
        worse.append(module.lump_error(role, mixed))
    assert error < 0.75 * sum(worse) / len(worse)


def test_single_features_lose_nothing_and_one_role_is_one_box(graph):
    role = module._role(graph, 20, [])
    assert module.lump_error(role, [[i] for i in range(len(role.features))]) < 1e-12


def test_a_persons_groups_and_pins_are_kept_as_they_are(graph):
    features = [i for i, kind in zip(graph.node_ids, graph.nodes.kind, strict=True) if kind == "feature"]
    mine = ("mine", tuple(sorted(features[-3:])))
    noted = graph.group(*mine).pin(features[0])
    found = noted.supernodes(6)
    assert found.groups[0][0] == "mine" and set(found.groups[0][1]) == set(mine[1])
    assert len(found.groups) <= 6 and any(features[0] in ids for _, ids in found.groups)
    edited = graph.with_groups(graph.supernodes().groups)
    assert set(edited.supernodes().groups) == set(edited.groups)
    with pytest.raises(ValueError, match="at least 1"):
        graph.supernodes(0)


def test_boxes_are_named_by_labels_and_never_alike(graph):
    unlabelled = graph.supernodes().groups
    assert unlabelled and all(label.startswith("at “") for label, _ in unlabelled)
    same = {i: Label("a city", origin="somebody") for i in range(len(graph)) if graph.is_kind("feature")[i]}
    names = [label for label, _ in replace(graph, labels=same).supernodes().groups]
    assert len(set(names)) == len(names) and all(name.startswith("a city") for name in names)
    words = {i: Label("say “x”", ("x", "y"), ("z",), ("w",)) for i in same}
    assert replace(graph, labels=words).supernodes().groups[0][0].startswith("say “x”, “y”")


def test_cross_layer_features_and_odd_targets_get_a_story():
    model = tiny_bridge("llama")
    graph = trace(model, cross_layer(model), prompt())
    difference = trace(model, tlc.mlp_neurons(model), prompt()).supernodes()
    story = story_of(graph)
    assert difference.groups and story.units[-1].kind == "target"
    assert abs(story.meter.shown + story.meter.error + story.meter.hidden - 1) < 1e-9
    with tlc.attach(model, transcoders(model)) as replacement:
        one = tlc.attribute(replacement, prompt(), [tlc.LogitDifference("w5", "w6")], max_nodes=3, progress=False)
    told = story_of(one)
    assert told.headline == "Why “w5 − w6”?"


def test_the_meter_is_the_whole_when_everything_is_drawn():
    """With every feature in a box, what is not error comes from tokens: the replacement score of what is traced."""
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(5), "w55", max_nodes=10_000, progress=False)
    features = [i for i in graph.node_ids if "/F" in i]
    story = story_of(graph.group("all", features))
    assert story.meter.hidden < 1e-5
    assert abs(story.meter.shown - graph.scores().replacement) < 1e-5
