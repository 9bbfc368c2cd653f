"""Contrast graphs with autoencoders, or with MLPs that are passed by their ratios."""

import pytest
import torch

import tl_circuits as tlc
from tests.sites import SITES, at, autoencoders
from tests.tiny import prompt, tiny_bridge, transcoders

# float32 sums over a few hundred terms and a handful of layers.
SUMS, AGREE = 1e-4, 1e-4
MIXED = {0: "hook_resid_post", 1: "hook_mlp_out", 2: "hook_attn_out"}
OTHERS = [prompt(7, seed=5), prompt(7, seed=6)]
OTHERS[0][:3] = prompt(7)[:3]  # some tokens in common with one of them, and the first with both


def traced(replacement, engine, baseline):
    return tlc.attribute(replacement, prompt(7), baseline=baseline, max_nodes=100, engine=engine, progress=False)


def by_both(replacement, baseline):
    linear, autograd = (traced(replacement, engine, baseline) for engine in ("linear", "autograd"))
    assert linear.info.engine == "linear" and linear.node_ids == autograd.node_ids
    assert linear.is_kind("feature").sum() > 10
    assert linear.completeness_error() < SUMS and autograd.completeness_error() < SUMS
    assert (linear.adjacency() - autograd.adjacency()).abs().max() <= AGREE * autograd.adjacency().abs().max()
    for name in ("total_effect", "shared", "bias"):
        ours, theirs = linear.nodes[name], autograd.nodes[name]
        assert (ours - theirs).abs().max() <= AGREE * max(1.0, theirs.abs().max())
    assert linear.nodes.shared.abs().max() > 0
    return linear


@pytest.mark.parametrize(
    ("architecture", "where"),
    [("llama", "mixed"), ("gemma2", "mixed"), ("neox", "mixed"), *(("gpt2", s) for s in SITES)],
)
def test_sums_hold_and_engines_agree(architecture, where):
    model = tiny_bridge(architecture)
    dictionary = autoencoders(model, MIXED if where == "mixed" else at(where, int(model.cfg.n_layers)))
    with tlc.attach(model, dictionary) as replacement:
        by_both(replacement, OTHERS)


@pytest.mark.parametrize("kind", ["transcoders", "neurons"])
def test_some_layers_with_transcoders_or_neurons_and_the_rest_passed(kind):
    model = tiny_bridge("llama")
    some = transcoders(model, layers=[0, 2]) if kind == "transcoders" else tlc.mlp_neurons(model, layers=[0, 2])
    with tlc.attach(model, some, mlps="ratio") as replacement:
        by_both(replacement, OTHERS)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_an_edge_is_that_without_a_baseline_times_the_share_that_differs(normalize):
    """``ā`` by hand: what SAELens' formula writes on the other prompts, from the model's own cache."""
    model = tiny_bridge("gpt2")
    dictionary = autoencoders(model, {1: "hook_resid_post"}, activation="relu", normalize=normalize)
    with tlc.attach(model, dictionary) as replacement:
        contrast = by_both(replacement, OTHERS)
        alone = traced(replacement, "linear", None)
    coder, factors, written = dictionary[1], [], []
    for tokens in [prompt(7), *OTHERS]:
        _, cache = model.run_with_cache(tokens[None], names_filter="blocks.1.hook_resid_post")
        x, factor = cache["blocks.1.hook_resid_post"][0], torch.ones(7, 1)
        if normalize == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            factor = x.std(-1, keepdim=True) + 1e-5
        elif normalize == "constant_norm_rescale":
            factor = x.norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5
        acts = torch.relu(x / factor @ coder.W_enc.T + coder.b_enc)
        factors.append(factor[:, 0])
        written.append(acts * factor)
    mean = (written[1] + written[2]) / 2
    compared = 0
    other = alone.adjacency()
    for node in contrast.nodes.itertuples():
        if node.kind != "feature" or node.id not in alone.node_numbers:
            continue
        here, usual = float(written[0][node.position, node.feature]), float(mean[node.position, node.feature])
        # float32
        assert abs(node.baseline - usual / float(factors[0][node.position])) < 1e-4 * max(1, abs(node.baseline))
        if abs(here) < 1e-3:
            continue
        mine, theirs = contrast.node_numbers[node.id], alone.node_numbers[node.id]
        ours = contrast.adjacency()[contrast.is_kind("logit"), mine]
        if contrast.info.target_names == alone.info.target_names:
            assert torch.allclose(
                ours, other[alone.is_kind("logit"), theirs] * (here - usual) / here, rtol=1e-3, atol=1e-5
            )
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_a_baseline_of_texts_holds_the_means_over_all_their_tokens(normalize, tmp_path):
    model = tiny_bridge("gpt2")
    dictionary = autoencoders(model, {0: "attn.hook_z", 2: "hook_resid_pre"}, activation="relu", normalize=normalize)
    texts = [prompt(7, seed=s) for s in (3, 4, 5)]
    with tlc.attach(model, dictionary) as replacement:
        baseline = tlc.make_baseline(replacement, texts, progress=False)
        by_both(replacement, tlc.Baseline.load(baseline.save(tmp_path / "mean.safetensors")))
        graph = traced(replacement, "linear", baseline)
    sites = {layer: dictionary.output_hook(layer) for layer in (0, 2)}
    assert set(baseline.error) == {0, 2}  # passed MLPs leave no error
    _, cache = model.run_with_cache(torch.stack(texts), names_filter=list(sites.values()))
    for layer, site in sites.items():
        x = cache[site][:, 1:].flatten(3 if cache[site].ndim > 3 else 2, -1).flatten(0, 1)
        x = x.flatten(1)
        shift, factor = torch.zeros(len(x), 1), torch.ones(len(x), 1)
        if normalize == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            factor = (x - shift).std(-1, keepdim=True) + 1e-5
        coder = dictionary[layer]
        acts = torch.relu((x - shift) / factor @ coder.W_enc.T + coder.b_enc)
        error = x - ((acts @ coder.W_dec + coder.b_dec) * factor + shift)
        # Means over 18 tokens in float32.
        assert torch.allclose(baseline.activation[layer], (acts * factor).mean(0), rtol=1e-4, atol=1e-5)
        assert torch.allclose(baseline.error[layer], error.mean(0), rtol=1e-3, atol=1e-4)
    assert graph.info.compared_with == ("3 texts, 18 tokens",)
