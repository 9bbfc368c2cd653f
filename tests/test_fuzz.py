"""Damaged files of every format are opened or refused with an error of ours, quickly. By hand: python -m tests.fuzz"""

import gzip
import json
import os
import pickle
import time
import zipfile

import pytest
import torch

import tl_circuits as tlc
from tests import fuzz, published
from tests.tiny import prompt, tiny_bridge
from tl_circuits.errors import DictionaryError, GraphFileError
from tl_circuits.view.folder import GraphFolder

FOUND = {
    71: "json", 123: "gemma_scope params.npz", 305: "gemma_scope params.npz", 314: "baseline", 409: "json.gz",
    526: "features layer_0.bin", 578: "pt", 3374: "graph", 3431: "json",
}  # fmt: skip
"""Seeds that once raised an error that was not ours, each with its sample's name."""


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        return tlc.attribute(replacement, prompt(5), max_nodes=12, progress=False)


@pytest.fixture
def exported(graph, tmp_path):
    return json.loads(graph.to_neuronpedia(tmp_path / "whole.json", slug="whole").read_bytes())


def refused(path, words):
    began = time.process_time()
    with pytest.raises(GraphFileError, match=words):
        tlc.load_graph(path)
    assert time.process_time() - began < 10  # seconds of this process: a server's folder must not hang on one file


def test_damaged_files_of_every_format_raise_errors_of_ours(tmp_path):
    told = []
    fuzz.run(tmp_path, [*FOUND, *range(10_000, 10_250)], told.append, of=FOUND)
    assert not told, "\n".join(told)


def test_a_gzip_file_is_unpacked_no_further_than_a_graph_can_go(tmp_path):
    path = tmp_path / "bomb.json.gz"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(64):
            file.write(b" " * 2**20)
    refused(path, "unpacks to more than .* It is not unpacked")


@pytest.mark.parametrize(
    "odd", [float("nan"), float("inf"), -float("inf"), 10**400], ids=["nan", "inf", "-inf", "400 digits"]
)
def test_numbers_about_the_graph_are_finite_or_it_is_refused(exported, odd, tmp_path):
    """Such as the sample of weights by which a model is recognised: no table holds them, but every export does."""
    path, whole = tmp_path / "odd.json", json.dumps(exported)
    name, values = exported["metadata"]["tl_circuits"]["info"]["sample"][0]
    exported["metadata"]["tl_circuits"]["info"]["sample"][0] = [name, [odd, *values[1:]]]
    path.write_text(json.dumps(exported))
    refused(path, "sample|int too large")
    kept = json.loads(whole)
    # what another program says, kept for the next export
    kept["metadata"]["generation_settings"] = {"by_hand": [{"of": odd}]}
    path.write_text(json.dumps(kept))
    if isinstance(odd, float):
        refused(path, "beyond the graph holds (nan|-?inf), and JSON has only finite numbers")
    else:  # a whole number of any size is JSON
        assert tlc.load_graph(path).source_file


def test_values_of_the_wrong_type_are_found_at_load(exported, tmp_path):
    path = tmp_path / "odd.json"
    node = next(n for n in exported["nodes"] if n["feature_type"] == "cross layer transcoder")
    for field, value in (
        ("activation", "x"),
        ("layer", 1e999),
        ("ctx_idx", 99),
        ("activation", float("nan")),
        ("feature_type", []),
    ):
        path.write_text(json.dumps(exported | {"nodes": [node | {field: value}], "links": []}))
        refused(path, "odd.json")
    for nodes in (None, 5, [], {}, [3]):
        path.write_text(json.dumps(exported | {"nodes": nodes}))
        refused(path, "odd.json")


def test_half_a_surrogate_pair_becomes_the_replacement_character_and_the_graph_can_be_written(exported, tmp_path):
    path = tmp_path / "half.json"
    exported["metadata"]["prompt"] = "a\ud800b \U0001f600 \\ud800"
    path.write_text(json.dumps(exported))
    read = tlc.load_graph(path)
    assert read.info.prompt == "a\ufffdb \U0001f600 \\ud800"  # a pair, and a backslash before u, are left as they are
    assert tlc.load_graph(read.save(tmp_path / "again.graph.safetensors")).info.prompt == read.info.prompt


def test_a_circle_a_long_chain_and_thousands_of_groups_do_not_hang(exported, tmp_path):
    path = tmp_path / "chain.json"
    feature = next(n for n in exported["nodes"] if n["feature_type"] == "cross layer transcoder")
    chain = [
        feature | {"node_id": f"0_{i}_1", "jsNodeId": f"0_{i}-1", "feature": i, "layer": "0", "ctx_idx": 1}
        for i in range(20_000)
    ]
    links = [{"source": f"0_{i}_1", "target": f"0_{i + 1}_1", "weight": 1.0} for i in range(len(chain) - 1)]
    bare = {"metadata": {"scan": "x", "prompt": "a b", "prompt_tokens": ["a", "b"]}, "qParams": {}, "nodes": chain}
    path.write_text(json.dumps(bare | {"links": links}))
    refused(path, "through more steps than")
    path.write_text(json.dumps(bare | {"links": [*links, {"source": "0_19999_1", "target": "0_0_1", "weight": 1.0}]}))
    refused(path, "in a circle|through more steps than")
    groups = [["same", f"0_{i}_1"] for i in range(len(chain))]
    path.write_text(json.dumps(bare | {"links": [], "qParams": {"supernodes": groups}}))
    began = time.process_time()
    assert [name for name, _ in tlc.load_graph(path).groups][:3] == ["same", "same (2)", "same (3)"]
    assert time.process_time() - began < 10  # seconds of this process


def test_an_id_that_stands_in_notes_twice_is_refused_at_once():
    began = time.process_time()
    ids = [f"token@{i}" for i in range(100_000)]
    with pytest.raises(ValueError, match="in two groups"):
        tlc.Notes(groups=(("a", (*ids, "token@3")),))
    assert time.process_time() - began < 2  # seconds of this process


def test_one_odd_file_does_not_hide_the_others_of_a_folder(graph, tmp_path):
    graph.save(tmp_path / "good.graph.safetensors")
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "odd.json").write_text('{"nodes": 5}')
    (tmp_path / "folder.json").mkdir()
    names = ["dangling.json", "folder.json", "good.graph.safetensors", "odd.json"]
    try:
        (tmp_path / os.fsdecode(b"\xff.json")).write_text("{}")
        names.append("?.json")
    except OSError:
        pass  # a file system that takes only text
    entries = GraphFolder(tmp_path).entries()
    assert sorted(e.name for e in entries) == sorted(names)
    assert [e.name for e in entries if not e.problem] == ["good.graph.safetensors"]


def test_a_pt_file_opens_no_folder_beside_it_and_runs_no_code(tmp_path, monkeypatch):
    """The name of the tokenizer stands in the file, and its folder could ask for code to be run."""
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "run.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass T: pass\n")
    (evil / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["run.T", None]}, "tokenizer_class": "T"})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    from tl_circuits.neuronpedia.read_pt import _texts

    asked = []
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda name, **options: asked.append((name, options)) or {}["x"]
    )
    for name in ("evil", "./evil", str(evil), "../evil", "a/../evil", "~/evil", ""):
        assert _texts(name, [3]) == ["#3"]
    assert asked == [] and not (tmp_path / "ran").exists()
    assert _texts("org/name", [3]) == ["#3"]
    assert asked == [("org/name", {"local_files_only": True, "trust_remote_code": False})]


def test_a_tensor_that_claims_more_than_the_file_holds_and_packed_parts_are_not_expanded(tmp_path):
    content = {
        name: torch.zeros(1)
        for name in (
            "input_string",
            "cfg",
            "active_features",
            "logit_probabilities",
            "input_tokens",
            "selected_features",
            "activation_values",
        )
    }
    torch.save(content | {"adjacency_matrix": torch.zeros(1).expand(100_000, 100_000)}, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", "adjacency_matrix' claims the shape|adjacency_matrix claims the shape")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}) + b"0" * 10**6)
    refused(tmp_path / "packed.pt", "packed part")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, "
        "*b, *b, *b, *b, *b, *b, *b]\n"
        "d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*d, *d]\n",
        "model_kind: 2020-01-01\n",
        "model_kind: 2020-13-45\n",
        "a: &a [*a]\n",
        "? [1]\n: 2\n",
        "[" * 3000,
    ],
)
def test_a_config_that_repeats_itself_or_holds_dates_is_refused(text, tmp_path):
    published.circuit_tracer(tmp_path, published.random_layers(2))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DictionaryError):
        tlc.load_transcoders(tmp_path)
