"""How well a dictionary stands in for the MLPs, and what is said when it does not."""

import json
import re
from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests import published
from tests.accelerator import DEVICE
from tests.tiny import command, prompt, tiny_bridge, tiny_folder, transcoders
from tl_circuits.errors import DictionaryError


def linear_stand_in(model, layer, read, write, samples=300):
    """A transcoder that is the best linear map (its skip) from one tensor to another, no active features."""
    names = [f"blocks.{layer}.{read}", f"blocks.{layer}.{write}"]
    pairs = []
    for seed in range(samples // 25):
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt(26, seed=seed)[None], names_filter=names)
        pairs.append([cache[name][0, 1:] for name in names])
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    fitted = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    none = torch.zeros(4, 32)
    return tlc.Transcoder(
        W_enc=none,
        W_dec=none,
        b_enc=-torch.ones(4),
        b_dec=fitted[-1],
        W_skip=fitted[:-1].T.contiguous(),
        input_hook=read,
        output_hook=write,
    )


def test_neurons_are_perfect():
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        quality = tlc.dictionary_quality(replacement, [prompt(), prompt(seed=4)])
    assert quality.layer.tolist() == [0, 1, 2, -1]
    assert (quality.explained_variance > 0.9999).all() and (quality.loss_change.abs() < 1e-4).all()
    assert (quality.l0 == 48).all()


def test_the_numbers_are_those_of_their_definitions():
    model = tiny_bridge("gemma2")
    tokens = prompt(12)
    with tlc.attach(model, transcoders(model)) as replacement:
        quality = tlc.dictionary_quality(replacement, [tokens]).set_index("layer")
        _, cache = model.run_with_cache(tokens[None])
        site = "blocks.2.hook_mlp_out"
        y, y_hat = cache[f"{site}"][0, 1:] * 1.0, cache[f"{site}.hook_sae_recons"][0, 1:]
        variance = 1 - ((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert quality.explained_variance[2] == pytest.approx(float(variance), abs=1e-4)
        assert quality.l0[2] == pytest.approx(
            float((cache[f"{site}.hook_sae_acts_post"][0, 1:] != 0).sum(-1).float().mean())
        )

    def replaced(value, hook):
        value[:, 1:] = cache[f"{site}.hook_sae_recons"][:, 1:]
        return value

    with torch.no_grad():
        logits = model.run_with_hooks(tokens[None], fwd_hooks=[(site, replaced)])[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[1:])
    assert quality.loss[2] == pytest.approx(float(loss), abs=1e-4)


def test_the_wrong_hook_is_named_with_the_right_one():
    texts = [prompt(20, seed=s) for s in (90, 91, 92)]
    model = tiny_bridge("gpt2")
    right = linear_stand_in(model, 0, "mlp.hook_in", "hook_mlp_out", samples=1500)
    with tlc.attach(model, {0: right}) as replacement:
        quality = tlc.dictionary_quality(replacement, texts)
        assert quality.explained_variance[0] > 0.8 and tlc.hook_hint(replacement, quality, texts[0]) is None
    with tlc.attach(model, {0: replace(right, input_hook="hook_resid_mid")}) as replacement:
        worse = tlc.dictionary_quality(replacement, texts)
        assert worse.explained_variance[0] < quality.explained_variance[0] - 0.5
        hint = tlc.hook_hint(replacement, worse, texts[0])
    assert (
        "(now hook_resid_mid to hook_mlp_out): load it with input_hook='mlp.hook_in', output_hook='hook_mlp_out'"
        in hint
    )
    # of one text
    assert float(re.search(r"would explain (\d+)%", hint)[1]) == pytest.approx(
        100 * quality.explained_variance[0], abs=10
    )
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        quality = tlc.dictionary_quality(replacement, texts)
        assert (quality.explained_variance < 0.1).all()
        assert "near or below zero" in tlc.hook_hint(replacement, quality, texts[0])


def test_hooks_that_are_in_use_are_not_recommended():
    model = tiny_bridge("gpt2")
    dictionary = {
        **{layer: transcoders(model)[layer] for layer in (0, 2)},
        1: linear_stand_in(model, 1, "mlp.hook_in", "hook_mlp_out", samples=1500),
    }
    with tlc.attach(model, dictionary) as replacement:
        quality = tlc.dictionary_quality(replacement, [prompt(20, seed=90)]).set_index("layer")
        assert quality.explained_variance[1] > 0.8 > 0.1 > quality.explained_variance[[0, 2]].max()
        hint = tlc.hook_hint(replacement, quality, prompt(20, seed=90))
    assert "near or below zero" in hint and "load it with" not in hint


def test_a_dictionary_for_another_model_is_refused_naming_both(tmp_path):
    published.circuit_tracer(tmp_path, published.random_layers(2, width=8, d=48))
    with pytest.raises(
        DictionaryError, match=r"layer 0: W_enc.*made for meta-llama/Llama-3.2-1B.*\(8, 48\), expected \(8, 32\)"
    ):
        tlc.attach(tiny_bridge("llama"), tlc.load_transcoders(tmp_path))
    published.circuit_tracer(tmp_path / "deep", published.random_layers(5, width=8, d=32))
    with pytest.raises(DictionaryError, match="layer 4 does not exist: the model has layers 0..2"):
        tlc.attach(tiny_bridge("llama"), tlc.load_transcoders(tmp_path / "deep"))


def test_folded_norms_are_refused_where_the_gain_is_wanted(tmp_path):
    transformer_lens = pytest.importorskip("transformer_lens")
    if not hasattr(transformer_lens, "HookedTransformer"):
        pytest.skip("transformer_lens 4 has no HookedTransformer")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2,
        d_model=32,
        n_ctx=16,
        d_head=8,
        n_heads=4,
        d_mlp=48,
        d_vocab=50,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMSPre",
        device=DEVICE,
    )
    model = transformer_lens.HookedTransformer(config)
    published.circuit_tracer(tmp_path, published.random_layers(2, width=8, d=32), hooks=("mlp.hook_in", "mlp.hook_out"))
    with pytest.raises(DictionaryError, match="fold_ln=False"):
        tlc.attach(model, tlc.load_transcoders(tmp_path))


def test_doctor_and_trace_take_a_folder(tmp_path):
    layers = published.random_layers(4, width=40, d=32)
    published.circuit_tracer(tmp_path / "set", layers, hooks=("mlp.hook_in", "hook_mlp_out"))
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 " * 500)  # far beyond the model's context
    both = "--model", tiny_folder("gemma3"), "--transcoders", tmp_path / "set"
    shown = command("doctor", *both, "--text", tmp_path / "text.txt")
    assert shown.exit_code == 0, shown.stderr
    assert "explained variance" in shown.stdout and "near or below zero" in shown.stdout
    facts = json.loads(command("doctor", *both, "--text", tmp_path / "text.txt", "--json").stdout)
    assert [row["layer"] for row in facts["layers"]] == [0, 1, 2, 3, -1] and facts["reads"] == "blocks.0.mlp.hook_in"
    done = command("trace", "w1 w2 w3", *both, "--max-nodes", 20, "--json", cwd=tmp_path)
    assert done.exit_code == 0 and json.loads(done.stdout)["features_traced"] == 20, done.stderr
    alone = command("doctor", "--transcoders", tmp_path / "set")
    assert alone.exit_code == 1 and "needs --model" in alone.stderr
