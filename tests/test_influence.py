"""Influence in one sweep over the edges, against the sum over paths of every length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_circuits as tlc
from tests.oracles import influence_by_passes
from tests.tiny import cross_layer, prompt, tiny_bridge, transcoders
from tl_circuits.graph.scores import Edges, influence, input_shares

TRACED = {
    "llama, transcoders": ("llama", transcoders),
    "gemma3, skip transcoders": ("gemma3", lambda m: transcoders(m, activation="relu", skip=True)),
    "parallel attention and MLP, transcoders": ("neox", transcoders),
    "parallel attention and MLP, neurons": ("neox", tlc.mlp_neurons),
    "gpt2, cross-layer transcoders": ("gpt2", cross_layer),
    "llama, some layers without transcoders": ("llama", lambda m: transcoders(m, layers=[1, 2])),
}


@pytest.mark.parametrize("case", TRACED)
def test_one_sweep_is_the_sum_over_all_paths_of_a_traced_graph(case):
    architecture, dictionary = TRACED[case]
    model = tiny_bridge(architecture)
    with tlc.attach(model, dictionary(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=80, progress=False)
    shares = input_shares(graph._edges, len(graph))
    expected = influence_by_passes(graph._edges, shares, graph._nodes.weight)
    found = influence(graph._edges, shares, graph._nodes.weight)
    assert (found > 0).sum() > 20 and found.dtype == torch.float64
    # Both are float64; only the order of the sums differs.
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_a_feature_that_is_a_target_hands_on_its_own_weight_and_what_reaches_it():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        row = tlc.attribute(replacement, prompt(), max_nodes=40, progress=False).nodes
        row = row.query("kind == 'feature' and layer == 1").iloc[0]
        targets = [tlc.FeatureTarget(int(row.layer), int(row.position), int(row.feature))]
        graph = tlc.attribute(replacement, prompt(), targets=targets, max_nodes=40, progress=False)
    shares = input_shares(graph._edges, len(graph))
    weights = graph._nodes.weight.clone()
    weights[int(graph.is_kind("feature").nonzero()[0])] += 0.5  # an earlier feature counts as well
    found = influence(graph._edges, shares, weights)
    assert torch.allclose(found, influence_by_passes(graph._edges, shares, weights), rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_any_order_of_the_nodes_will_do_as_long_as_there_is_no_cycle(seed, n, density):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, n, generator=generator) * (torch.rand(n, n, generator=generator) < density)
    order = torch.randperm(n, generator=generator)
    dense = dense.tril(-1)[order][:, order]
    target, source = dense.nonzero(as_tuple=True)
    edges, weights = Edges(source, target, dense[target, source]), torch.rand(n, generator=generator)
    shares = input_shares(edges, n)
    found = influence(edges, shares, weights)
    assert torch.allclose(found, influence_by_passes(edges, shares, weights), rtol=1e-12, atol=1e-15)


def test_a_cycle_is_refused():
    edges = Edges(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]), torch.ones(3))
    with pytest.raises(ValueError, match="close a cycle"):
        influence(edges, input_shares(edges, 3), torch.tensor([0.0, 0.0, 1.0]))
