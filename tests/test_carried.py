"""How much of the answer runs through some features: by hand, and as predicted by removing them."""

import pytest
import torch

import tl_circuits as tlc
from tests.test_recurring import by_hand
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.interventions.faithfulness import predicted_effects


def test_paths_through_several_members_count_once_by_hand():
    # token a -> F5 (2.0) -> F6 (activation 0.5 of 1) -> answer; F5 and a also act on the answer at once.
    graph = by_hand(
        ["a"], "x", [(0, 0, 5, 2.0), (1, 0, 6, 0.5)],
        [(2, 0, 2.0), (0, 1, 1.0), (0, 3, 3.0), (1, 3, 4.0), (2, 3, 1.0)], [0.0, -0.5, 2.0], residue=0.0,
    )  # fmt: skip
    nodes = graph.nodes
    answer = float(nodes.value[nodes.kind == "logit"].iloc[0])
    assert answer == 10.0  # 3 + 4 + 1 and a bias of 2
    early, late, both = (graph.carried(ids) for ids in (["L0/F5@0"], ["L1/F6@0"], ["L0/F5@0", "L1/F6@0"]))
    assert (early.value, early.whole) == (10.0, 8.0)
    assert late.by == 4.0 and both.by == 7.0
    assert early.by == 3.0 + 4.0 * 1.0 / 0.5  # through F6, whose activation is half of what F5 brings
    with pytest.raises(tlc.errors.TargetError):
        graph.carried([])


@pytest.mark.parametrize("contrast", [False, True])
def test_it_is_what_removing_the_features_is_predicted_to_take_from_the_first_target(contrast):
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        others = [prompt(7, seed=5), prompt(7, seed=6)] if contrast else None
        graph = tlc.attribute(replacement, prompt(7), baseline=others, max_nodes=60, progress=False)
    first = int(graph._nodes.weight.argmax())
    features = graph.is_kind("feature").nonzero()[:, 0]
    for members in (features[::3].tolist(), features[:5].tolist(), features.tolist()):
        found = graph.carried(members)
        predicted = float(predicted_effects(graph, [members], direct=False)[0, first])
        assert found.by == pytest.approx(-predicted, rel=1e-4, abs=1e-5)  # float32 there, float64 here
    everything = graph.carried(features.tolist())
    edges = graph._edges
    rest = (
        edges.weight[(edges.target == first) & ~torch.isin(edges.source, features)].sum() + graph._nodes.residue[first]
    )
    assert everything.by == pytest.approx(everything.whole - float(rest), rel=1e-4, abs=1e-4)
