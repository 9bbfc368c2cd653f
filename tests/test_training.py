"""Transcoders trained here, from text to a graph. On a tiny model seconds, on SmolLM2 two layers for a few steps."""

import json

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import command, prompt, tiny_bridge, tiny_folder
from tl_circuits.errors import OutputError, PromptError

pytest.importorskip("sparsify", reason="needs pip install 'tl_circuits[train]'")
SMALL = dict(expansion=4, k=8, context=16, batch_size=4, lr=3e-3, device="cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    numbers = torch.randint(0, 98, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(f"w{i}" for i in numbers))
    return path


def rise(history):
    last = history.step.max()
    return [
        history[(history.step >= a) & (history.step < b)].explained_variance.mean() for a, b in ((0, 10), (last - 10, last + 1))
    ]


def test_trained_transcoders_explain_more_and_trace(text, tmp_path, monkeypatch):
    with torch.no_grad():  # as in many a notebook
        history = tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "out", save_every=1000, **SMALL)
    before, after = rise(history)
    assert after > before + 0.1 and sorted(history.layer.unique()) == [0, 1, 2]
    found = tlc.load_transcoders(tmp_path / "out")
    assert found[1].activation == "topk" and found[1].k == 8 and found.width(0) == 128 and found[2].W_skip is not None
    model = tiny_bridge("llama")
    with tlc.attach(model, found) as replacement:
        quality = tlc.dictionary_quality(replacement, [prompt(16, seed=s) for s in range(20)])
        # About what sparsify reports while it trains, on other text and with its averaged weights.
        assert quality.explained_variance.iloc[-1] == pytest.approx(after, abs=0.15)
        assert tlc.attribute(replacement, prompt(), max_nodes=40, progress=False).completeness_error() < 1e-4
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    from sparsify import SparseCoder, sparse_coder, utils

    monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)  # its Triton kernels need a GPU
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = SparseCoder.load_from_disk(tmp_path / "out/layers.1.mlp")(x).sae_out
        ours = found.decode(1, {1: found.activate(1, found.pre_activations(1, x), x)}, x)
    assert torch.allclose(ours, theirs, atol=1e-5)  # other order of float32 sums


def test_an_interrupted_run_resumes_where_it_stopped(text, tmp_path, monkeypatch):
    whole = tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "whole", layers=[1], save_every=1000, **SMALL)
    from sparsify import Trainer

    class Interrupted(Exception):
        pass

    save, saves = Trainer._checkpoint, []

    def interrupt(self, *args):
        saves.append(self.global_step)
        save(self, *args)
        if len(saves) == 2:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_checkpoint", interrupt)
        with pytest.raises(Interrupted):
            tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "cut", layers=[1], save_every=30, **SMALL)
    tlc.load_transcoders(tmp_path / "cut")  # the first checkpoint is whole, although the second was cut off
    with pytest.raises(OutputError, match="exists already.*--resume"):
        tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "cut", layers=[1], **SMALL)
    with pytest.raises(OutputError, match="k is 8, now 9"):
        tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "cut", layers=[1], resume=True, **SMALL | {"k": 9})
    resumed = tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "cut", layers=[1], resume=True, save_every=1000, **SMALL)
    assert resumed.step.max() == whole.step.max() and sorted(set(resumed.step)) == sorted(set(whole.step))
    assert rise(resumed)[1] == pytest.approx(rise(whole)[1], abs=0.05)


def test_a_few_steps_on_smollm2_raise_the_explained_variance(smollm2, tmp_path):
    words = "The capital of France is Paris. Bread is made of flour, water, salt and yeast. Two and two are four. " * 40
    (tmp_path / "text.txt").write_text(words)
    history = tlc.train_transcoders(
        "smollm2-135m", [tmp_path / "text.txt"], tmp_path / "out", layers=[4, 5], expansion=2, k=16, context=32, batch_size=2,
        lr=2e-3, device="cpu",
    )
    last = history.step.max()
    first, final = (history[history.step.between(a, b)].explained_variance.mean() for a, b in ((0, 2), (last - 2, last)))
    assert final > first + 0.1
    with tlc.attach(smollm2, tlc.load_transcoders(tmp_path / "out")) as replacement:
        assert (tlc.dictionary_quality(replacement, [words[:200]]).explained_variance > 0.1).all()


def test_the_command_trains_and_says_how_far(text, tmp_path):
    options = ["train", "--model", tiny_folder("llama"), "--text", str(text), "--out", str(tmp_path / "made"), "--device", "cpu"]
    small = ["--layer", "0", "--expansion", "2", "--k", "4", "--context", "16"]
    done = command(*options, *small, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["folder"] == str(tmp_path / "made") and facts["steps"] > 20 and list(facts["last"]) == ["0"]
    again = command(*options)
    assert again.exit_code == 1 and "--resume" in again.stderr


def test_too_little_text_and_missing_files(tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(PromptError, match="fewer than one batch of 4"):
        tlc.train_transcoders(tiny_folder("llama"), [tmp_path / "short.txt"], tmp_path / "out", **SMALL)
    with pytest.raises(PromptError, match="there is no text file"):
        tlc.train_transcoders(tiny_folder("llama"), [tmp_path / "none.txt"], tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
