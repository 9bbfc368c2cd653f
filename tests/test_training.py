"""Transcoders trained here, from text to a graph. On a tiny model seconds, on SmolLM2 two layers for a few steps."""

import gzip
import json
from pydoc_data.topics import topics

import numpy as np
import pandas as pd
import pytest
import torch

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.against_plain import loss_with_mlps_replaced
from tests.tiny import command, prompt, tiny_bridge, tiny_folder
from tl_circuits.dictionaries.training import checkpoint, train
from tl_circuits.errors import ArgumentError, ModelError, NotFiniteError, OutputError, PromptError

SMALL = dict(features=128, k=8, context=16, batch_size=4, lr=3e-3, device=DEVICE, progress=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    numbers = torch.randint(0, 98, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(f"w{i}" for i in numbers))
    return path


def rise(history):
    """Explained variance on held-out text after the first step and at the end."""
    measured = history.dropna(subset="held_out").groupby("step").held_out.mean()
    return measured.iloc[0], measured.iloc[-1]


def test_trained_transcoders_explain_more_and_trace(text, tmp_path, monkeypatch):
    with torch.inference_mode():  # as in many a notebook
        history = tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "out", held_out=text, **SMALL)
    before, after = rise(history)
    assert after > before + 0.02 and sorted(history.layer.unique()) == [0, 1, 2]
    assert (history.l0 <= 8).all() and history.tokens.iloc[-1] == (history.step.max() + 1) * 64
    found = tlc.load_transcoders(tmp_path / "out")
    assert found[1].activation == "topk" and found[1].k == 8 and found.width(0) == 128 and found[2].W_skip is not None
    model = tiny_bridge("llama")
    with tlc.attach(model, found) as replacement:
        pieces = torch.from_numpy(np.load(tmp_path / "out.text/held_out.npy")[: train.HELD_OUT]).long()
        quality = tlc.dictionary_quality(replacement, list(pieces))
        held = history[history.step == history.step.max()].held_out
        # float32, summed in another order, and activations scaled before or after the products
        assert np.allclose(quality.explained_variance[:3], held, atol=1e-4)
        assert tlc.attribute(replacement, prompt(), max_nodes=40, progress=False).completeness_error() < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.text"]
    sparsify = pytest.importorskip("sparsify")
    from sparsify import sparse_coder, utils

    monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)  # its Triton kernels need a GPU
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "out/layers.1.mlp")(x).sae_out
        ours = found.decode(1, {1: found.activate(1, found.pre_activations(1, x), x)}, x)
    assert torch.allclose(ours, theirs, atol=1e-5)  # other order of float32 sums


def test_a_killed_run_goes_on_to_the_same_result(text, tmp_path, monkeypatch):
    folder = tiny_folder("llama")
    whole = tlc.train_transcoders(folder, [text], tmp_path / "whole", layers=[1], **SMALL)

    class Killed(Exception):
        pass

    write, times = train.write_checkpoint, []

    def killed(out, *args, **kwargs):
        times.append(out)
        if len(times) == 30:  # half of the next checkpoint is there, the last one was just moved away
            out.with_name(".cut.saving").mkdir()
            out.rename(out.with_name(".cut.old"))
            raise Killed
        write(out, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(train, "write_checkpoint", killed)
        with pytest.raises(Killed):
            tlc.train_transcoders(folder, [text], tmp_path / "cut", layers=[1], save_minutes=0, **SMALL)
    with pytest.raises(OutputError, match="exists already.*--resume"):
        tlc.train_transcoders(folder, [text], tmp_path / "cut", layers=[1], **SMALL)
    tlc.load_transcoders(tmp_path / "cut")  # the checkpoint before is whole
    for other, message in (
        ({"k": 9}, "k is 8, now 9"),
        ({"lr": 0.5}, "lr is 0.003, now 0.5"),
        ({"epochs": 2}, "steps is"),
    ):
        with pytest.raises(OutputError, match=message):
            tlc.train_transcoders(folder, [text], tmp_path / "cut", layers=[1], resume=True, **SMALL | other)
    resumed = tlc.train_transcoders(folder, [text], tmp_path / "cut", layers=[1], resume=True, **SMALL)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    for name in ("cfg.json", "sae.safetensors"):
        first, second = ((tmp_path / run / "layers.1.mlp" / name).read_bytes() for run in ("whole", "cut"))
        assert first == second
    assert not (tmp_path / "cut" / checkpoint.STATE).exists()
    # nothing left to do
    again = tlc.train_transcoders(folder, [text], tmp_path / "cut", layers=[1], resume=True, **SMALL)
    assert len(again) == len(whole)


def test_the_change_in_loss_is_that_of_the_replaced_model(text, tmp_path):
    folder = tiny_folder("llama")
    history = tlc.train_transcoders(folder, [text], tmp_path / "out", held_out=text, tokens=2000, **SMALL)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(tmp_path / "out.text/held_out.npy")[: train.HELD_OUT]).long()
    found = tlc.load_transcoders(tmp_path / "out")

    change = loss_with_mlps_replaced(plain, ids, found) - loss_with_mlps_replaced(plain, ids)
    # float32, mean of 32 pieces of equal length
    assert history.loss_change.iloc[-1] == pytest.approx(change, abs=1e-4)


def test_text_comes_from_folders_compressed_files_ids_and_the_model(text, tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper/a.txt").write_text("w1 w2 w3 " * 100)
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write("w4 w5 w6 " * 100)
    np.save(folder / "c.npy", np.full((5, 16), 7, dtype=np.int64))
    (folder / "picture.png").write_bytes(b"\x89")
    options = SMALL | {"layers": [0], "generate": 150}
    tlc.train_transcoders(tiny_folder("llama"), [folder], tmp_path / "out", **options)
    pieces = np.load(tmp_path / "out.text/pieces.npy")
    own = np.load(tmp_path / "out.text/samples.npy")
    assert own.shape == (10, 16) and (own >= 0).all() and len(np.unique(own[:, 1:])) > 20
    assert (pieces == 7).all(1).sum() == 5 and len(pieces) == 5 + 10 + (2 * 301) // 15
    assert all((pieces == row).all(1).any() for row in own)
    tlc.train_transcoders(tiny_folder("llama"), [folder], tmp_path / "again", **options)
    assert np.array_equal(np.load(tmp_path / "again.text/samples.npy"), own)
    with pytest.raises(PromptError, match=r"\[piece, 32\]"):
        tlc.train_transcoders(tiny_folder("llama"), [folder / "c.npy"], tmp_path / "no", **SMALL | {"context": 32})


def test_a_dataset_in_a_folder_is_read_by_its_column_text(tmp_path):
    pytest.importorskip("datasets", reason="needs pip install 'tl_circuits[train]'")
    (tmp_path / "data").mkdir()
    rows = [{"text": " ".join(f"w{(i * j) % 97}" for j in range(60))} for i in range(30)]
    (tmp_path / "data/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    history = tlc.train_transcoders(
        tiny_folder("llama"), [], tmp_path / "out", dataset=str(tmp_path / "data"), **SMALL | {"layers": [0]}
    )
    assert history.tokens.iloc[-1] > 1500
    (tmp_path / "data/rows.jsonl").write_text('{"words": "w1"}\n')
    with pytest.raises(PromptError, match="no text under 'text', only words"):
        tlc.train_transcoders(tiny_folder("llama"), [], tmp_path / "no", dataset=str(tmp_path / "data"), **SMALL)


def test_features_of_smollm2_explain_more_of_unseen_text_than_a_linear_map_does(smollm2, tmp_path, monkeypatch):
    # each measures the loss, which runs all layers
    for name, number in (("MEASURES", 1), ("MEASURED", 1), ("HELD_OUT", 4)):
        monkeypatch.setattr(train, name, number)
    text, explained = tmp_path / "manual.txt", {}
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)))  # Python's manual: real text on every machine
    for width, k in ((1, 1), (256, 16)):
        history = tlc.train_transcoders(
            "smollm2-135m",
            [text],
            tmp_path / str(width),
            layers=[0],
            features=width,
            k=k,
            context=64,
            batch_size=8,
            tokens=26_000,
            lr=3e-3,
            device=DEVICE,
            progress=False,
        )
        explained[width] = float(history.held_out.iloc[-1])
    assert 1 - explained[256] < 0.9 * (1 - explained[1]), explained  # 0.74 here: half the tokens are too few to tell
    found = tlc.load_transcoders(tmp_path / "256")
    assert found.width(0) == 256
    with tlc.attach(smollm2, found) as replacement:
        assert (tlc.dictionary_quality(replacement, [text.read_text()[:200]]).explained_variance > 0.5).all()


def test_the_command_trains_and_says_how_far(text, tmp_path):
    options = [
        "train",
        "--model",
        tiny_folder("llama"),
        "--text",
        str(text),
        "--out",
        str(tmp_path / "made"),
        "--device",
        "cpu",
    ]
    small = ["--layer", "0", "--features", "64", "--k", "4", "--context", "16"]
    done = command(*options, *small, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["folder"] == str(tmp_path / "made") and facts["steps"] > 20 and list(facts["last"]) == ["0"]
    assert facts["held_out"]["0"] > 0 and facts["l0"]["0"] <= 4
    steps = [row["explained_variance"] for row in json.loads((tmp_path / "made/history.json").read_text())]
    window = len(steps) // 20
    assert facts["last"]["0"] == pytest.approx(np.mean(steps[-window:])) and facts["first"]["0"] == pytest.approx(
        np.mean(steps[:window])
    )
    again = command(*options)
    assert again.exit_code == 1 and "--resume" in again.stderr


def test_wrong_arguments_and_too_little_text_leave_nothing_behind(text, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    folder, out = tiny_folder("llama"), tmp_path / "out"
    for error, message, texts, options in (
        (PromptError, "fewer than one batch of 4", [tmp_path / "short.txt"], {}),
        (PromptError, "there is no text file", [tmp_path / "none.txt"], {}),
        (ArgumentError, "features=... or expansion", [text], {"expansion": 4}),
        (ArgumentError, "k is 129", [text], {"k": 129}),
        (ArgumentError, "tokens=...", [text], {"tokens": 0}),
        (ModelError, "layers 0 to 2, asked for 5", [text], {"layers": [5]}),
    ):
        with pytest.raises(error, match=message):
            tlc.train_transcoders(folder, texts, out, **SMALL | options)
    assert not out.exists()


def test_training_that_runs_away_is_an_error_that_names_the_learning_rate(text, tmp_path):
    with pytest.raises(NotFiniteError, match="layer 0 is not finite in step .* lower learning rate than 1e\\+30"):
        tlc.train_transcoders(tiny_folder("llama"), [text], tmp_path / "out", **SMALL | {"lr": 1e30})
    assert not (tmp_path / "out").exists()
