"""Removing sets of features: what the graph predicts, and runs in which held denominators let numbers explode."""

import pytest
import torch
from transformers import GPT2Config

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import VOCAB, checkpoint, own_bridge, prompt
from tl_circuits.errors import ArgumentError, DivergenceError
from tl_circuits.interventions import box_effects
from tl_circuits.interventions.box_effects import measure_boxes
from tl_circuits.interventions.controls import random_sets
from tl_circuits.interventions.faithfulness import predicted_effects


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A model whose MLPs are linear around the prompt: ReLU neurons, all of them far above zero."""
    from safetensors.torch import load_file, save_file
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("linear")
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_inner=24, vocab_size=VOCAB, n_positions=32, bos_token_id=1, eos_token_id=2,
        activation_function="relu",
    )  # fmt: skip
    checkpoint(config, str(folder))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.c_fc.bias"):
            tensors[name] += 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = TransformerBridge.boot_transformers(str(folder), device=DEVICE).eval()
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(5), max_nodes=10_000, progress=False)


def some_sets(graph, n=6, size=8):
    """Sets of features of all layers, which feed each other, and two with a token."""
    features = graph.is_kind("feature").nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    sets = [features[torch.randperm(len(features), generator=generator)[:size]].tolist() for _ in range(n)]
    return [*sets, [*sets[0], graph.node_ids.index("token@3")], [graph.node_ids.index("token@4")]]


def test_what_removing_a_set_does_is_predicted_to_rounding_where_mlps_are_linear(linear):
    replacement, graph = linear
    groups = {str(i): [graph.node_ids[j] for j in members] for i, members in enumerate(some_sets(graph))}
    report = tlc.faithfulness(replacement, graph, 0, groups=groups, freezes=("attention",))
    effects = report.effects
    indirect = predicted_effects(graph, some_sets(graph), direct=False) - predicted_effects(
        graph, some_sets(graph), direct=True
    )
    assert len(effects) > 500 and float(indirect.abs().max()) > 0.05
    # Float32 differences of two runs.
    assert (effects.predicted - effects.measured).abs().max() < 1e-4 * effects.measured.abs().max()


@pytest.mark.parametrize("factor", [-2.0, 0.5, 3.0])
def test_a_set_that_is_scaled_scales_what_reaches_its_members_from_within(linear, factor):
    replacement, graph = linear
    sets = [[graph.node_ids[i] for i in members] for members in some_sets(graph)]
    measured = measure_boxes(replacement, graph, sets, factor)
    assert len(measured) == len(sets)
    for one in measured:
        assert one["predicted"] == pytest.approx(one["measured"], rel=1e-3, abs=2e-4)


def test_paths_that_enter_a_removed_set_again_are_cut(linear):
    _, graph = linear
    members = some_sets(graph)[0]
    adjacency, activation = graph.adjacency().double(), graph._nodes.activation.double()
    feature = graph.is_kind("feature")
    step = adjacency * torch.where(feature, 1 / activation.where(feature, torch.ones(())), 0.0)
    step[:, members] = 0  # a removed feature hands nothing on, whatever reaches it
    removed = -adjacency[:, members].sum(1)
    expected = torch.linalg.solve(torch.eye(len(graph), dtype=torch.float64) - step, removed)
    assert torch.allclose(predicted_effects(graph, [members], direct=False)[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def gated():
    model = own_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(), max_nodes=80, progress=False)


def exploding(graph):
    """An early feature: blown up, it leaves a stream far above its held denominators, which later MLPs square."""
    return next(i for i in graph.node_ids if i.startswith("L0/F"))


def test_a_run_that_outgrows_floating_point_is_an_error_not_nan(gated):
    replacement, graph = gated
    edits = tlc.edits_of(graph, [exploding(graph)], factor=1e15)
    with pytest.raises(DivergenceError, match="norm denominator held.*freeze='none'"):
        tlc.intervene(replacement, prompt(), edits)
    kept, lost = tlc.intervene_many(replacement, prompt(), [[], edits])
    assert not kept.diverged and kept.growth == pytest.approx(1.0) and torch.isfinite(kept.logits).all()
    assert lost.diverged and lost.growth == float("inf")
    for ask in (lambda: lost.logits, lambda: lost.last_logits, lost.top, lost.kl):
        with pytest.raises(DivergenceError):
            ask()
    assert not tlc.intervene(replacement, prompt(), edits, freeze="none").diverged


def test_growth_below_infinity_is_told_too(gated):
    replacement, graph = gated
    result = tlc.intervene(replacement, prompt(), tlc.edits_of(graph, [exploding(graph)], factor=1e5))
    assert result.diverged and 1000 < result.growth < float("inf") and torch.isfinite(result.logits).all()


def test_a_box_whose_held_run_diverges_is_measured_with_nothing_held(gated):
    replacement, graph = gated
    usual = next(i for i in graph.node_ids if i.startswith("L2/F"))
    lost, fine = (
        measure_boxes(replacement, graph, [[exploding(graph)], [usual]], 1e15)[0],
        measure_boxes(replacement, graph, [[usual]], 0.0)[0],
    )
    free = tlc.intervene(replacement, prompt(), tlc.edits_of(graph, [exploding(graph)], 1e15), freeze="none").top(5)
    assert lost["freeze"] == "none" and fine["freeze"] == "attention"
    assert lost["measured"] == lost["measured_free"] and fine["measured"] != fine["measured_free"]
    assert [t["after"] for t in lost["top"]] == pytest.approx(free.after[:5].tolist(), abs=1e-5)


def test_a_report_counts_diverged_removals_and_leaves_them_out(gated, monkeypatch):
    replacement, graph = gated
    whole = tlc.faithfulness(replacement, graph, n=8, freezes=("attention",))
    assert whole.summary().diverged.tolist() == [0]
    monkeypatch.setattr("tl_circuits.interventions.faithfulness.DIVERGED", 1.0)  # every edit lengthens some vector
    some = tlc.faithfulness(replacement, graph, n=8, freezes=("attention",))
    facts = some.summary().iloc[0]
    assert facts.diverged > 0 and facts.pairs == some.effects.measured.notna().sum() < len(some.effects)


@pytest.fixture(scope="module")
def facts():
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        yield replacement, tlc.attribute(replacement, "the capital of the state containing Dallas is", progress=False)


def test_random_sets_have_the_boxes_sizes_layers_and_positions_and_are_other_active_features(facts):
    replacement, graph = facts
    boxes = [ids for _, ids in graph.supernodes(6).groups]
    members = [[graph.node_ids.index(i) for i in ids] for ids in boxes]
    places = [sorted((int(graph._nodes.layer[i]), int(graph._nodes.position[i])) for i in box) for box in members]
    _, cache = replacement.model.run_with_cache(graph.info.prompt, names_filter=lambda name: name.endswith("acts_post"))
    for box, own, sets in zip(members, places, random_sets(replacement, graph, members, 5, seed=0), strict=True):
        features = {
            (int(graph._nodes.layer[i]), int(graph._nodes.position[i]), int(graph._nodes.feature[i])) for i in box
        }
        for edits in sets:
            # few are active at a place
            assert sorted((e.layer, e.position) for e in edits) == own or len(edits) < len(own)
            for edit in edits:
                assert (edit.layer, edit.position, edit.feature) not in features and edit.value == pytest.approx(
                    0.0, abs=1e-6
                )
                assert (
                    float(cache[replacement.site(edit.layer) + ".hook_sae_acts_post"][0, edit.position, edit.feature])
                    > 0
                )


def test_a_box_is_tested_only_if_chance_does_less(facts):
    replacement, graph = facts
    best = max(
        graph.supernodes(6).groups,
        key=lambda group: float(graph.influence[[graph.node_ids.index(i) for i in group[1]]].sum()),
    )[1]
    weakest = [
        graph.node_ids[int(i)] for i in torch.argsort(torch.where(graph.is_kind("feature"), graph.influence, 9.0))[:2]
    ]
    strong, weak = measure_boxes(replacement, graph, [best, weakest], 0.0, controls=20)
    assert strong["tested"] and strong["after"] < min(strong["random"])
    assert not weak["tested"] and len(weak["random"]) == 20
    alone = tlc.intervene(replacement, graph, tlc.edits_of(graph, best), freeze="none")
    token = replacement.model.tokenizer.convert_tokens_to_ids("Austin")
    assert strong["after"] == pytest.approx(float(alone.last_logits.softmax(-1)[token]), abs=1e-5)
    assert strong["logit"] == pytest.approx(
        float(alone.last_logits[token] - alone.baseline_logits[-1, token]), abs=1e-4
    )
    assert not strong["other_way"]
    with pytest.raises(ArgumentError, match="at least 10"):
        tlc.box_ablations(replacement, graph, controls=3)


def test_a_box_that_moves_the_answer_the_other_way_than_predicted_is_not_tested(facts, monkeypatch):
    """However far it moves it: the sentence beside it would say that it raises what it lowers."""
    replacement, graph = facts
    best = max(
        graph.supernodes(6).groups,
        key=lambda group: float(graph.influence[[graph.node_ids.index(i) for i in group[1]]].sum()),
    )[1]
    predicted = box_effects.predicted_effects
    monkeypatch.setattr(box_effects, "predicted_effects", lambda *args, **kwargs: -predicted(*args, **kwargs))
    (found,) = measure_boxes(replacement, graph, [best], 0.0, controls=10)
    assert found["other_way"] and not found["tested"]
    assert found["after"] < min(found["random"])
