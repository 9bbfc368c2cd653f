"""Contrast graphs: what is here and not in the baseline, held against sums, two engines, and the plain model."""

import pytest
import torch

import tl_circuits as tlc
from tests import tiny
from tl_circuits.errors import BaselineError, TargetError

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
    with tlc.attach(tlc.load_model("tiny-facts", device="cpu"), tlc.load_transcoders("tiny-facts")) as replacement:
        yield replacement


@pytest.fixture(scope="module")
def contrast(facts):
    return tlc.attribute(facts, PROMPT, ["Austin"], baseline=OTHERS, max_nodes=150, progress=False)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
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


@pytest.mark.parametrize(
    ("prompts", "answers", "says"),
    [([], [], "empty"), ([PROMPT, OTHERS[0]], ["Austin", "Austin"], "all prompts have the answer"),
     ([PROMPT, "Dallas is"], ["Austin", "Austin"], "same number of tokens")],
)
def test_families_that_measure_nothing_are_refused_in_words(facts, contrast, prompts, answers, says):
    with pytest.raises(BaselineError, match=says):
        tlc.circuit_quality(facts, contrast, prompts, answers, progress=False)


@pytest.mark.parametrize("ask", ["loadings", "faithfulness", "boxes"])
def test_what_asks_for_whole_effects_refuses_a_contrast_graph(facts, contrast, ask):
    edge = contrast.edges[contrast.edges.target == "logit:0"].iloc[0]
    asked = {
        "loadings": lambda: tlc.head_loadings(facts, contrast, edge.source, edge.target),
        "faithfulness": lambda: tlc.faithfulness(facts, contrast, n=2, progress=False),
        "boxes": lambda: tlc.box_ablations(facts, contrast, progress=False),
    }
    with pytest.raises(TargetError, match="differences from 2 other prompts"):
        asked[ask]()
