"""Contrast graphs: what is here and not in the baseline, held against sums, two engines, and the plain model."""

from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests import tiny
from tests.accelerator import DEVICE
from tl_circuits.errors import BaselineError, EditError
from tl_circuits.graph.paths import sentence, strongest_paths
from tl_circuits.interventions.replaced_runs import Runs, values_of
from tl_circuits.view.story import story_of

PROMPT = "the capital of the state containing Dallas is"
OTHERS = ["the capital of the state containing Oakland is", "the capital of the state containing Miami is"]
MAKES = {
    "neurons": lambda model: tlc.mlp_neurons(model),
    "transcoders": lambda model: tiny.transcoders(model),
    "skip": lambda model: tiny.transcoders(model, skip=True),
    "cross-layer": lambda model: tiny.cross_layer(model),
}


@pytest.fixture(scope="module")
def facts():
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        yield replacement


@pytest.fixture(scope="module")
def contrast(facts):
    return tlc.attribute(facts, PROMPT, ["Austin"], baseline=OTHERS, max_nodes=150, progress=False)


# Every kind of dictionary on one architecture, and every architecture with one kind.
PAIRS = [("gpt2", make) for make in MAKES] + [
    (a, list(MAKES)[i % len(MAKES)]) for i, a in enumerate(tiny.ARCHITECTURES) if a != "gpt2"
]


@pytest.mark.parametrize(("architecture", "make"), PAIRS)
def test_engines_agree_on_edges_shared_parts_and_total_effects_and_sums_hold(architecture, make):
    model = tiny.tiny_bridge(architecture)
    others = [tiny.prompt(7, seed=5), tiny.prompt(7, seed=6)]
    others[0][:3] = tiny.prompt(7)[:3]  # some tokens in common with one of them, and the first with both
    with tlc.attach(model, MAKES[make](model)) as replacement:
        linear, autograd = (
            tlc.attribute(replacement, tiny.prompt(7), baseline=others, max_nodes=150, engine=engine, progress=False)
            for engine in ("linear", "autograd")
        )
    assert linear.node_ids == autograd.node_ids
    # Both add a few hundred float32 products: 1e-5 of the largest is rounding.
    assert (linear.adjacency() - autograd.adjacency()).abs().max() <= 1e-5 * autograd.adjacency().abs().max()
    for name in ("total_effect", "shared", "bias"):
        ours, theirs = linear.nodes[name], autograd.nodes[name]
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())
    assert linear.completeness_error() < 1e-4
    assert linear.nodes.shared.abs().max() > 0


@pytest.mark.parametrize("make", ["neurons", "transcoders", "skip"])
def test_total_effects_are_the_gradient_of_the_frozen_model_through_its_features(make):
    """Removing one feature, with everything but ReLU-like features frozen, moves the logit by its total effect."""
    model = tiny.tiny_bridge("gpt2")
    with tlc.attach(model, MAKES[make](model)) as replacement:
        graph = tlc.attribute(replacement, tiny.prompt(7), [5], max_nodes=10_000, row_mass=1.0, progress=False)
    nodes, edges = graph.nodes, graph.adjacency().double()
    feature = torch.tensor((nodes.kind == "feature").to_numpy())
    activation, value = (torch.tensor(nodes[name].to_numpy()).double() for name in ("activation", "value"))
    # From the last node to the first: an effect is direct, or goes through a feature, each unit of which has one too.
    total = torch.zeros(len(nodes)).double()
    ratio = torch.where(feature, activation / value, torch.zeros(len(nodes)).double())
    layers = torch.tensor(nodes.layer.to_numpy())
    total += edges[-1]
    for layer in sorted(set(nodes.layer[nodes.kind == "feature"]), reverse=True):
        for i in (feature & (layers == layer)).nonzero()[:, 0].tolist():
            total += edges[i] * ratio[i] * total[i] / activation[i]
    weight = float(graph._nodes.weight[-1])
    found = torch.tensor(nodes.total_effect.to_numpy()).double()[:-1]
    assert (found - weight * total[:-1]).abs().max() <= 1e-5 * found.abs().max()


def test_a_silent_feature_of_the_baseline_is_a_node_with_edges_in_and_out(contrast, facts):
    nodes = contrast.nodes
    silent = nodes[(nodes.kind == "feature") & (nodes.activation == 0)]
    assert len(silent) > 3 and (silent.baseline > 0).all()
    encoder = facts.dictionary
    for row in silent.head(5).itertuples():
        into = contrast.edges[contrast.edges.target == row.id].weight.sum()
        assert into + row.bias == pytest.approx(row.value, abs=1e-4)
        assert encoder.active(row.layer, _input(facts, row.layer)).feature.ne(row.feature).any()
    assert contrast.edges.source.isin(silent.id).any()


def _input(facts, layer):
    _, cache = facts.model.run_with_cache(PROMPT, names_filter=facts.dictionary.input_hook(layer))
    return cache[facts.dictionary.input_hook(layer)][0]


def test_baseline_activations_are_means_over_the_baseline_prompts(contrast, facts):
    graphs = [tlc.attribute(facts, text, max_nodes=5000, progress=False) for text in OTHERS]
    known = [dict(zip(graph.nodes.id, graph.nodes.activation, strict=True)) for graph in graphs]
    features = contrast.nodes[contrast.nodes.kind == "feature"]
    for row in features.itertuples():
        assert row.baseline == pytest.approx(sum(one.get(row.id, 0.0) for one in known) / len(known), abs=1e-4)


def test_tokens_that_all_prompts_share_at_the_start_have_no_features(contrast):
    features = contrast.nodes[contrast.nodes.kind == "feature"]
    assert len(features) and features.position.min() == 7  # "<bos> the capital of the state containing" is shared
    assert contrast.info.skip_positions == (0,)


def test_a_contrast_graph_keeps_its_columns_through_files(contrast, tmp_path):
    back = tlc.load_graph(contrast.save(tmp_path / "c.graph.safetensors"))
    assert back == contrast and len(back.info.baseline) == 2
    exported = tlc.load_graph(contrast.to_neuronpedia(tmp_path / "c.json", slug="c", source_set="s", scan="x"))
    assert (exported.nodes.total_effect - contrast.nodes.total_effect).abs().max() < 1e-6
    assert exported.info.baseline == contrast.info.baseline


def test_nodes_are_chosen_by_total_effect(facts, contrast):
    fewer = tlc.attribute(facts, PROMPT, ["Austin"], baseline=OTHERS, max_nodes=20, progress=False)
    features = contrast.nodes[contrast.nodes.kind == "feature"]
    largest = features.total_effect.abs().nlargest(20).index
    assert set(fewer.nodes.id[fewer.nodes.kind == "feature"]) == set(features.id[largest])


def test_prompts_of_another_length_are_aligned_from_the_end_or_refused(facts):
    short = "capital of the state containing Oakland is"
    with pytest.raises(BaselineError, match="tokens and the prompt has"):
        tlc.attribute(facts, PROMPT, baseline=short, progress=False)
    graph = tlc.attribute(facts, PROMPT, baseline=short, align="end", max_nodes=30, progress=False)
    assert graph.completeness_error() < 1e-4


@pytest.mark.parametrize(
    ("baseline", "says"),
    [([], "empty list"), (PROMPT, "the prompt itself"), ([PROMPT, PROMPT], "the prompt itself")],
)
def test_a_baseline_that_cannot_be_compared_is_refused_in_words(facts, baseline, says):
    with pytest.raises(BaselineError, match=says):
        tlc.attribute(facts, PROMPT, baseline=baseline, progress=False)


ANSWERS = ["Austin", "Sacramento", "Tallahassee"]


def test_a_circuit_of_nothing_carries_nothing_and_all_nodes_carry_all(facts):
    family = [PROMPT, *OTHERS]
    graphs = [
        tlc.attribute(facts, text, [answer], baseline=[t for t in family if t != text], max_nodes=400, progress=False)
        for text, answer in zip(family, ANSWERS, strict=True)
    ]
    found = tlc.circuit_quality(facts, graphs, family, ANSWERS, sizes=[0, 29], random_sets=1, progress=False)
    assert found.at(0) == (0.0, 1.0)
    assert found.at(found.n_nodes) == (1.0, 0.0)
    at = found.curve[found.curve.nodes == 29].set_index("chosen")
    assert at.F["circuit"] > 0.6 and at.C["circuit"] < 0.4
    assert set(found.areas().chosen) == {"circuit", "activation x gradient", "integrated gradients", "random"}


def test_integrated_gradients_begin_where_all_prompts_have_the_familys_mean_embedding(facts):
    """There the prompts are the same to the model; gradients of one token's logit are so, too. At their end they
    differ."""
    tokens = torch.stack([tlc.hooks.to_tokens(facts.model, text) for text in (PROMPT, *OTHERS)])
    values = values_of(facts, tokens)
    runs = Runs(facts, tokens, lambda logits: logits[:, 5], values, (0,))
    begin, end = runs.gradients(0.0), runs.gradients(1.0)
    for gradient in begin.values():
        # float32, in batches whose rows are computed alike
        assert torch.allclose(gradient[0], gradient[1], atol=1e-5) and torch.allclose(
            gradient[0], gradient[2], atol=1e-5
        )
    assert any(not torch.allclose(gradient[0], gradient[1], atol=1e-3) for gradient in end.values())


@pytest.mark.parametrize(
    ("prompts", "answers", "says"),
    [
        ([], [], "empty"),
        ([PROMPT, OTHERS[0]], ["Austin", "Austin"], "all prompts have the answer"),
        ([PROMPT, "Dallas is"], ["Austin", "Austin"], "same number of tokens"),
    ],
)
def test_families_that_measure_nothing_are_refused_in_words(facts, contrast, prompts, answers, says):
    with pytest.raises(BaselineError, match=says):
        tlc.circuit_quality(facts, contrast, prompts, answers, progress=False)


@pytest.mark.parametrize("make", ["neurons", "transcoders", "skip", "cross-layer"])
def test_heads_loadings_of_a_contrast_graph_add_up_to_its_edges(make):
    model = tiny.tiny_bridge("llama")
    others = [tiny.prompt(7, seed=5), tiny.prompt(7, seed=6)]
    with tlc.attach(model, MAKES[make](model)) as replacement:
        graph = tlc.attribute(replacement, tiny.prompt(7), baseline=others, max_nodes=150, progress=False)
        loads = tlc.top_head_loadings(replacement, graph, 40)
        edges = graph.edges.loc[graph.edges.weight.abs().nlargest(40).index]
        sums = loads.groupby(["source", "target"]).loading.sum()
        for edge in edges.itertuples():
            assert sums[edge.source, edge.target] == pytest.approx(edge.weight, rel=1e-4, abs=1e-6)
        told = tlc.explain_heads(replacement, graph, 2, progress=False)
    assert len(told.head_stories) == 2


def test_setting_features_to_the_baseline_moves_others_as_predicted_with_all_held(facts):
    graph = tlc.attribute(facts, PROMPT, baseline=OTHERS, max_nodes=300, progress=False)
    found = tlc.faithfulness(facts, graph, n=40, progress=False).summary().set_index("freeze")
    assert found.correlation["all"] > 0.9999 and found.explained_variance["all"] > 0.9999
    assert found.correlation["attention"] > 0.9


def test_heads_of_a_graph_against_texts_are_refused_in_words(facts):
    usual = tlc.make_baseline(facts, OTHERS, progress=False)
    graph = tlc.attribute(facts, PROMPT, baseline=usual, max_nodes=30, progress=False)
    with pytest.raises(BaselineError, match="does not keep"):
        tlc.top_head_loadings(facts, graph, 2)


def test_the_usual_target_is_the_answer_against_what_the_other_prompts_give(facts):
    graph = tlc.attribute(facts, PROMPT, baseline=OTHERS, max_nodes=100, progress=False)
    explicit = tlc.LogitDifference("Austin", ["Sacramento", "Tallahassee"])
    same = tlc.attribute(facts, PROMPT, explicit, baseline=OTHERS, max_nodes=100, progress=False)
    assert graph.info.question == "Why “Austin”, and not what the other 2 prompts give?"
    assert same.info.target_names == ("Austin − mean of Sacramento, Tallahassee",)
    assert torch.equal(graph.target_vectors, same.target_vectors) and torch.equal(graph.adjacency(), same.adjacency())
    logits = facts.model(PROMPT)[0, -1].detach()
    ids = facts.model.tokenizer.convert_tokens_to_ids(["Austin", "Sacramento", "Tallahassee"])
    value = float(logits[ids[0]] - logits[ids[1:]].mean())
    assert graph.nodes.value.iloc[-1] == pytest.approx(value, abs=1e-4)
    # Prompts that all have this answer leave nothing to compare it with: the likeliest tokens are explained, as usual.
    alike = tlc.attribute(facts, PROMPT, baseline=PROMPT.replace("Dallas", "Houston"), max_nodes=20, progress=False)
    assert alike.info.target_names == ("Austin",)


def test_removing_a_box_sets_its_features_to_the_baseline_and_moves_the_target_as_predicted(facts):
    graph = tlc.attribute(facts, PROMPT, baseline=OTHERS, max_nodes=300, progress=False)
    removed = tlc.box_ablations(facts, graph)
    predicted, measured = (torch.tensor([one[name] for one in removed]) for name in ("predicted", "measured"))
    assert len(removed) > 4 and torch.corrcoef(torch.stack([predicted, measured]))[0, 1] > 0.9
    silent = graph.nodes[(graph.nodes.kind == "feature") & (graph.nodes.activation == 0)].iloc[0]
    assert tlc.edits_of(graph, [silent.id])[0].value == pytest.approx(silent.baseline)
    assert tlc.edits_of(graph, [silent.id], factor=1.0)[0].value == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(EditError, match="baselines of features only"):
        tlc.edits_of(graph, ["token@7"])


def test_a_file_that_lost_the_baselines_activations_is_not_edited_to_them(contrast):
    lost = replace(contrast, _nodes=replace(contrast._nodes, baseline=None))
    with pytest.raises(EditError, match="does not hold the features. activations in the baseline"):
        tlc.edits_of(lost, [contrast.node_ids[0]])


def test_what_is_lower_than_in_the_baseline_is_said_to_be_turned_down(facts):
    graph = tlc.attribute(facts, PROMPT, baseline=OTHERS, max_nodes=300, progress=False)
    nodes = graph._nodes
    silent = [i for i in graph.is_kind("feature").nonzero()[:, 0].tolist() if nodes.activation[i] == 0]
    assert len(silent) > 3 and bool((nodes.towards[silent] == -1).all())
    grouped = graph.group("of other cities", [graph.node_ids[i] for i in silent[:4]])
    told = story_of(grouped)
    box = next(unit for unit in told.units if unit.name == "of other cities")
    assert box.lower and not any("activates [of other cities]" in line for line in told.sentences)


def test_a_path_says_of_each_feature_whether_it_is_turned_down_or_active(facts):
    other = "the capital of the state containing Oakland is"
    graph = tlc.attribute(facts, PROMPT, baseline=[other], max_nodes=60, progress=False)
    nodes, lower = graph.nodes, set()
    for path in strongest_paths(graph, 40):
        told = sentence(graph, path)
        for node, sign in zip(path.nodes[1:-1], path.signs, strict=False):
            less = bool(nodes.activation[node] < nodes.baseline[node])
            verbs = (("turn", "keep") if less else ("activate", "hold"))[0 if sign > 0 else 1]
            assert any(f"{verb} " in told for verb in (verbs, f"{verbs}s")), told
            lower.add(less)
        if all(nodes.activation[node] >= nodes.baseline[node] for node in path.nodes[1:-1]):
            assert "turn" not in told and "keep" not in told
    assert lower == {True, False}


def test_what_is_compared_with_is_named_as_the_prompt_is_without_the_special_token():
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        info = tlc.attribute(replacement, PROMPT, baseline=OTHERS, max_nodes=10, progress=False).info
    assert info.reads == f"tiny-facts reads “{PROMPT}”, compared with “{OTHERS[0]}” and “{OTHERS[1]}”"
    with_token = replace(info, compared_with=tuple(info.tokens[0] + text for text in [*OTHERS, PROMPT, PROMPT, PROMPT]))
    assert (
        with_token.reads
        == f"tiny-facts reads “{PROMPT}”, compared with “{OTHERS[0]}”, “{OTHERS[1]}”, “{PROMPT}” and 2 more"
    )
    assert replace(info, compared_with=()).reads == f"tiny-facts reads “{PROMPT}”"


def test_boxes_keep_what_raises_the_lead_apart_from_what_lowers_it(contrast, monkeypatch):
    index, effects = contrast.node_numbers, contrast._nodes.total_effect

    def mixed():
        boxes = [[float(effects[index[i]]) for i in ids] for _, ids in replace(contrast).supernodes().groups]
        return sum(min(sum(e > 0 for e in box), sum(e < 0 for e in box)) for box in boxes)

    apart = mixed()
    monkeypatch.setattr("tl_circuits.graph.supernodes.OPPOSITE", 0.0)
    assert apart < mixed()
