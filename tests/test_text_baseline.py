"""Baselines made from texts: means held against plain sums, sums of graphs, and files."""

from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests import tiny
from tests.accelerator import DEVICE
from tests.test_contrast import MAKES, PROMPT
from tl_circuits.errors import BaselineError, GraphFileError

TEXTS = ["the state containing Oakland is California .", "the state containing Miami is Florida ."]


@pytest.fixture(scope="module")
def facts():
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        yield replacement


@pytest.fixture(scope="module")
def baseline(facts):
    return tlc.make_baseline(facts, TEXTS, progress=False)


@pytest.mark.parametrize(
    ("architecture", "make"), [*(("gpt2", make) for make in MAKES), ("llama", "transcoders"), ("gemma2", "neurons")]
)
def test_sums_hold_and_engines_agree_against_texts(architecture, make):
    model = tiny.tiny_bridge(architecture)
    with tlc.attach(model, MAKES[make](model)) as replacement:
        usual = tlc.make_baseline(
            replacement, [tiny.prompt(12, seed=5), tiny.prompt(9, seed=6)], context=6, progress=False
        )
        linear, autograd = (
            tlc.attribute(replacement, tiny.prompt(7), baseline=usual, max_nodes=150, engine=engine, progress=False)
            for engine in ("linear", "autograd")
        )
    assert linear.node_ids == autograd.node_ids and linear.completeness_error() < 1e-4
    # Both add a few hundred float32 products: 1e-5 of the largest is rounding.
    assert (linear.adjacency() - autograd.adjacency()).abs().max() <= 1e-5 * autograd.adjacency().abs().max()
    assert linear.info.compared_with == (usual.name,) and linear.nodes.baseline.abs().max() > 0


def test_means_are_over_all_tokens_but_the_special_one(facts, baseline):
    point = "blocks.1.hook_mlp_out.hook_sae_acts_post"
    runs = [
        facts.model.run_with_cache(text, names_filter=lambda name: "hook_sae" in name or "resid_pre" in name)[1]
        for text in TEXTS
    ]
    acts = torch.cat([run[point][0, 1:] for run in runs])
    assert baseline.n_tokens == len(acts) == 14 and baseline.first == (1,)
    # Sums of fourteen float32 numbers in another order.
    assert torch.allclose(baseline.activation[1], acts.mean(0), atol=1e-6)
    assert torch.allclose(baseline.frequency[1], (acts != 0).float().mean(0), atol=1e-6)
    errors = torch.cat([run["blocks.1.hook_mlp_out.hook_sae_error"][0, 1:] for run in runs])
    assert torch.allclose(baseline.error[1], errors.mean(0), atol=1e-4)
    assert torch.allclose(
        baseline.embedding, torch.cat([run["blocks.0.hook_resid_pre"][0, 1:] for run in runs]).mean(0), atol=1e-6
    )


def test_features_usual_in_the_texts_and_silent_here_are_nodes(facts, baseline):
    graph = tlc.attribute(facts, PROMPT, ["Austin"], baseline=baseline, max_nodes=4000, progress=False)
    features = graph.nodes[graph.nodes.kind == "feature"]
    for row in features.itertuples():
        mean, share = (float(part[row.layer][row.feature]) for part in (baseline.activation, baseline.frequency))
        assert row.baseline == pytest.approx(mean, abs=1e-6)
        assert row.activation != 0 or share >= 0.1
    assert ((features.activation == 0) & (features.baseline > 0)).any()
    assert features.position.min() == 1 and graph.completeness_error() < 1e-4
    assert "what is usual in 2 texts" in graph.info.compared


def test_a_baseline_keeps_through_its_file(facts, baseline, tmp_path):
    back = tlc.Baseline.load(baseline.save(tmp_path / "b.safetensors"))
    one, other = (tlc.attribute(facts, PROMPT, baseline=b, max_nodes=50, progress=False) for b in (baseline, back))
    assert one == other
    assert baseline.save(tmp_path / "c.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_baseline_that_does_not_fit_is_refused_in_words(facts, baseline, tmp_path):
    model = tiny.tiny_bridge("llama")
    with tlc.attach(model, tiny.transcoders(model)) as other, pytest.raises(BaselineError, match="attached is"):
        tlc.attribute(other, tiny.prompt(7), baseline=baseline, progress=False)
    broken = replace(baseline, error=baseline.error | {2: baseline.error[2] * float("nan")})
    with pytest.raises(BaselineError, match="error of layer 2"):
        tlc.attribute(facts, PROMPT, baseline=broken, progress=False)
    with pytest.raises(BaselineError, match="leave align out"):
        tlc.attribute(facts, PROMPT, baseline=baseline, align="end", progress=False)
    with pytest.raises(BaselineError, match="no tokens"):
        tlc.make_baseline(facts, [""], progress=False)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(GraphFileError, match="not a baseline"):
        tlc.Baseline.load(tmp_path / "no.safetensors")


def test_a_last_piece_of_nothing_but_left_out_positions_is_left_out():
    model = tiny.own_bridge("llama")
    model.cfg.default_prepend_bos = False
    text = " ".join(f"w{i}" for i in range(3, 12))  # one word more than a piece holds
    with tlc.attach(model, tiny.transcoders(model)) as replacement:
        found = tlc.make_baseline(replacement, text, context=8, progress=False)
    assert found.n_tokens in (7, 8)
