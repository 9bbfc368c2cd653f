"""All layers trained together, so that the model with every MLP replaced says what the model says."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

import tl_circuits as tlc
from tests.against_plain import loss_with_mlps_replaced
from tests.tiny import tiny_folder
from tl_circuits.dictionaries.builtin.world import states_of_cities, two_hop_facts
from tl_circuits.dictionaries.formats.four_bit import dequantised, fitted_levels, quantised
from tl_circuits.dictionaries.training import train
from tl_circuits.dictionaries.training.layer import LayerTraining
from tl_circuits.dictionaries.training.network import opened
from tl_circuits.dictionaries.training.start import Start
from tl_circuits.dictionaries.training.step import Weights
from tl_circuits.dictionaries.training.together import step_together
from tl_circuits.errors import ArgumentError
from tl_circuits.models import BUILTIN_FOLDER

SMALL = dict(features=128, k=8, context=16, batch_size=4, lr=3e-3, device="cpu", progress=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    numbers = torch.randint(0, 98, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(f"w{i}" for i in numbers))
    return path


def random_layers(network, k=8, width=48):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    d = network.d_model
    weights = {
        n: Weights(normal(width, d), normal(width), normal(width, d), normal(d), normal(d, d)) for n in network.mlps
    }
    return {n: LayerTraining(Start(w, 1.5, 0.5, 2.0), k, 1000) for n, w in weights.items()}


@pytest.mark.parametrize("rounding", [False, True])
def test_a_step_follows_the_gradient_of_divergence_and_local_errors(rounding, monkeypatch):
    """Against the model with its MLPs swapped for modules, differentiated as a whole by autograd."""
    network, _ = opened(tiny_folder("llama"), "cpu", None)
    layers = random_layers(network)
    if rounding:
        for layer in layers.values():
            layer.levels = {name: fitted_levels(t) for name, t in layer.tensors.items() if t.ndim == 2}
    before = {n: {name: t.clone() for name, t in layer.tensors.items()} for n, layer in layers.items()}
    ids = torch.randint(0, network.d_vocab, (3, 9), generator=torch.Generator().manual_seed(2))
    found = {}
    monkeypatch.setattr(LayerTraining, "update", lambda self, slopes, lr: found.update({id(self): slopes}))
    _, divergence = step_together(network, layers, ids, 0.1, 0.3)

    plain, _ = opened(tiny_folder("llama"), "cpu", None)
    leaves = {n: {name: t.clone().requires_grad_() for name, t in layer.items()} for n, layer in before.items()}

    class Slow(torch.nn.Module):
        def __init__(self, n, mlp):
            super().__init__()
            self.n, self.mlp, self.start = n, mlp, layers[n].start

        def out(self, x):
            w = dict(leaves[self.n])
            if rounding:
                for name, levels in layers[self.n].levels.items():
                    near = dequantised(quantised(w[name].detach(), levels))
                    w[name] = w[name] + (near - w[name]).detach()
            pre = x / self.start.x_scale @ w["W_enc"].T + w["b_enc"]
            lowest = pre.sort(-1).values[..., -8:-7]
            acts = torch.where(pre >= lowest, pre.clamp_min(0), 0.0)
            return acts @ w["W_dec"] + w["b_dec"] + x / self.start.x_scale @ w["W_skip"].T

        def forward(self, x):
            return torch.cat([self.mlp(x)[:, :1], self.out(x)[:, 1:] * self.start.y_scale], 1)

    blocks = plain.whole.model.layers
    seen = {}
    for n, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda module, args, output, n=n: seen.update({n: (args[0], output)}))
    with torch.no_grad():
        right = plain.whole(input_ids=ids).logits[:, 1:].softmax(-1)
    loss = 0
    for n, (x, y) in dict(seen).items():
        slow = Slow(n, None)
        error = (slow.out(x) - y / slow.start.y_scale)[:, 1:].square().sum(-1)
        weight = (10 / (y / slow.start.y_scale)[:, 1:].square().mean(-1)).clamp_max(1)
        loss = loss + 0.3 * (weight * error).mean() / slow.start.variance
    for n, block in enumerate(blocks):
        block.mlp = Slow(n, block.mlp)
    said = plain.whole(input_ids=ids).logits[:, 1:]
    crossed = cross_entropy(said.flatten(0, 1), right.flatten(0, 1)) + (right * right.log()).sum(-1).mean()
    (loss + crossed).backward()
    assert divergence == pytest.approx(float(crossed.detach()), rel=1e-4)  # float32, another formula
    for n, layer in layers.items():
        for name, leaf in leaves[n].items():
            # float32 through a whole model, in another order
            assert torch.allclose(found[id(layer)][name], leaf.grad, atol=1e-5 + 1e-4 * float(leaf.grad.abs().max())), (
                n,
                name,
            )
    assert all("forward" not in mlp.__dict__ and not mlp._forward_hooks for mlp in network.mlps.values())


def test_steps_together_bring_the_replaced_model_nearer_to_the_model(tmp_path):
    """tiny-facts on its own facts: the loss with all MLPs replaced, with and without."""
    text = tmp_path / "facts.txt"
    facts = [f"{fact.prompt} {fact.answer}" for fact in (*two_hop_facts(), *states_of_cities())]
    text.write_text(" ".join(random.Random(0).sample(facts, len(facts))))
    small = SMALL | dict(held_out=text, features=64, k=2, context=32)
    alone = tlc.train_transcoders(str(BUILTIN_FOLDER), [text], tmp_path / "alone", **small)
    both = tlc.train_transcoders(str(BUILTIN_FOLDER), [text], tmp_path / "both", together=8_000, **small)
    steps = alone.step.max() + 1
    assert both.step.max() + 1 == steps + -(-8_000 // 128)
    pd.testing.assert_frame_equal(both[both.step < steps].drop(columns=["held_out", "loss_change"]),
                                  alone.drop(columns=["held_out", "loss_change"]))  # fmt: skip
    before, after = alone.loss_change.iloc[-1], both.loss_change.iloc[-1]
    assert 0 < after < before


def test_a_killed_run_goes_on_to_the_same_four_bits(text, tmp_path, monkeypatch):
    folder = tiny_folder("llama")
    options = SMALL | dict(tokens=1000, together=1000, four_bits=True)
    whole = tlc.train_transcoders(folder, [text], tmp_path / "whole", **options)
    write = train.write_checkpoint

    class Killed(Exception):
        pass

    for at in (16, 28):  # the second step together, and the third with rounded weights
        done = []

        def killed(*args, at=at, done=done, **kwargs):
            write(*args, **kwargs)
            done.append(args)
            if len(done) == at:
                raise Killed

        out = tmp_path / f"cut{at}"
        with monkeypatch.context() as patched:
            patched.setattr(train, "write_checkpoint", killed)
            with pytest.raises(Killed):
                tlc.train_transcoders(folder, [text], out, save_minutes=0, **options)
        resumed = tlc.train_transcoders(folder, [text], out, resume=True, **options)
        measured = ["held_out", "loss_change"]
        pd.testing.assert_frame_equal(resumed.drop(columns=measured), whole.drop(columns=measured), check_exact=True)
        for path in sorted((tmp_path / "whole.four_bits").iterdir()):
            assert path.read_bytes() == (tmp_path / f"cut{at}.four_bits" / path.name).read_bytes(), path.name


def test_what_is_kept_with_four_bits_is_what_was_measured(text, tmp_path):
    """The loss of the plain Hugging Face model with the opened four-bit set in place of its MLPs."""
    folder = tiny_folder("llama")
    history = tlc.train_transcoders(
        folder, [text], tmp_path / "out", held_out=text, tokens=2000, together=2000, four_bits=True, **SMALL
    )
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(tmp_path / "out.text/held_out.npy")[: train.HELD_OUT]).long()
    kept, whole = tlc.load_transcoders(tmp_path / "out.four_bits"), tlc.load_transcoders(tmp_path / "out")

    before = loss_with_mlps_replaced(plain, ids)
    change = loss_with_mlps_replaced(plain, ids, kept) - before
    # float32, and biases in float16
    assert history.loss_change.iloc[-1] == pytest.approx(change, abs=2e-4)
    assert abs(loss_with_mlps_replaced(plain, ids, whole) - before - change) > 4e-4  # and rounding matters here
    assert len(kept[1].W_enc[0].unique()) <= 16


def test_training_goes_on_from_a_set_that_was_opened(text, tmp_path):
    folder = tiny_folder("llama")
    tlc.train_transcoders(folder, [text], tmp_path / "first", held_out=text, tokens=4000, **SMALL)
    on = dict(held_out=text, tokens=0, together=4000)
    history = tlc.train_transcoders(folder, [text], tmp_path / "second", begin_with=tmp_path / "first", **on, **SMALL)
    assert history.step.max() + 1 == -(-4000 // 64)
    before = tlc.load_transcoders(tmp_path / "first")
    # One step, far too small to change anything: what is written is what was opened, scaled there and back.
    tlc.train_transcoders(
        folder, [text], tmp_path / "same", begin_with=tmp_path / "first", tokens=0, together=1, **SMALL | dict(lr=1e-20)
    )
    after = tlc.load_transcoders(tmp_path / "same")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
        # float32, scaled and scaled back
        assert torch.allclose(getattr(before[1], name), getattr(after[1], name), rtol=1e-5, atol=1e-8), name
    with pytest.raises(ArgumentError, match="begin_with: layer 0 of .* 'k': 8.*expected.*'k': 4"):
        tlc.train_transcoders(folder, [text], tmp_path / "k", begin_with=tmp_path / "first", **on, **SMALL | dict(k=4))
    with pytest.raises(ArgumentError, match="tokens"):
        tlc.train_transcoders(folder, [text], tmp_path / "none", tokens=0, **SMALL)
