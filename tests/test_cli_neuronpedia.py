"""The commands around Neuronpedia, in one process."""

import json
import os

import pytest

import tl_circuits as tlc
from tests.fake_neuronpedia import KEY, running
from tests.tiny import command, prompt, tiny_bridge, tiny_folder, transcoders
from tl_circuits.neuronpedia import client


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
    return graph.save(tmp_path_factory.mktemp("cli") / "why.graph.safetensors"), graph


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    with running() as fake:
        monkeypatch.setenv("TL_CIRCUITS_NEURONPEDIA", fake.url)

        def call(*arguments):
            return command(*arguments)

        call.site = fake
        yield call


def test_a_graph_goes_out_to_every_format_and_back(run, saved, tmp_path):
    path, graph = saved
    for target in ("neuronpedia", "circuit-tracer"):
        done = run("export", path, "--target", target, "--slug", "s", "--model-id", "m", "--force", "--all")
        assert done.exit_code == 0, done.output
        assert tlc.load_graph(done.stdout.strip()).node_ids == graph.node_ids
    for target, out in (("graphml", "g.graphml"), ("dot", "g.dot"), ("parquet", "tables"), ("html", "g.html")):
        assert run("export", path, "--target", target, "--out", out).exit_code == 0 and (tmp_path / out).exists()
    done = run("export", "s.json", "--target", "tl-circuits", "--out", "again.safetensors", "--json")
    assert json.loads(done.stdout) == {"files": ["again.safetensors"]}
    smaller = run("export", path, "--out", "small.json", "--node-threshold", 0.5)
    assert smaller.exit_code == 0 and len(tlc.load_graph("small.json")) < len(graph)


def test_an_export_without_a_name_is_named_after_the_graph_and_keeps_what_carries_most(run, saved, tmp_path):
    path, graph = saved
    for target, made in (("dot", "why.dot"), ("graphml", "why.graphml"), ("html", "why.html")):
        done = run("export", path, "--target", target)
        assert done.exit_code == 0 and done.stdout.strip() == made, done.output
        assert run("export", path, "--target", target).exit_code == 1  # never overwritten unasked
    done = run("export", path, "--target", "neuronpedia", "--slug", "s", "--model-id", "m", "--out", "folder")
    assert done.exit_code == 0 and (tmp_path / "folder" / "s.json").is_file(), done.output
    pruned = tlc.load_graph("folder/s.json")
    assert pruned.node_ids == graph.prune().node_ids and len(pruned) < len(graph)
    assert f"{len(pruned)} nodes with 80 % of the influence are written, of {len(graph)}" in done.stderr
    assert run("export", path, "--target", "dot", "--out", "name").exit_code == 0 and (tmp_path / "name.dot").is_file()


def test_labels_of_another_programs_file_go_into_a_file_of_ours_beside_it(run, saved, tmp_path):
    path, graph = saved
    for row in graph.nodes[graph.nodes.kind == "feature"].itertuples():
        run.site.add_feature("tiny-model", row.layer, row.feature, "cities")
    graph.to_neuronpedia(tmp_path / "theirs.json", slug="s", scan="tiny-model")
    before = (tmp_path / "theirs.json").read_bytes()
    options = ("--model-id", "tiny-model", "--source-set", "tiny-set")
    done = run("label", "theirs.json", *options, "--force")
    assert done.exit_code == 0 and "theirs.graph.safetensors" in done.stdout, done.output
    assert (tmp_path / "theirs.json").read_bytes() == before and tlc.load_graph("theirs.graph.safetensors").labels
    done = run("label", "theirs.json", *options, "--out", "labelled.json")
    assert done.exit_code == 0 and json.loads((tmp_path / "labelled.json").read_text())["nodes"], done.output


def test_upload_prints_the_address(run, saved, monkeypatch):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    done = run("upload", saved[0], "--slug", "cli", "--model-id", "tiny-model")
    assert done.exit_code == 0 and done.stdout.strip() == "https://www.neuronpedia.org/tiny-model/graph?slug=cli"


def test_label_writes_the_graph_with_labels(run, saved):
    path, graph = saved
    for row in graph.nodes[graph.nodes.kind == "feature"].itertuples():
        run.site.add_feature("tiny-model", row.layer, row.feature, "cities")
    done = run("label", path, "--model-id", "tiny-model", "--source-set", "tiny-set", "--out", "labelled.safetensors")
    assert done.exit_code == 0 and "20 of 20 features have a label, 20 of them new" in done.stdout
    assert tlc.load_graph("labelled.safetensors").label(0) == "cities"


def test_dashboards_write_files_that_label_a_graph(run, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 " * 20)
    done = run(
        "dashboards",
        "--text",
        "text.txt",
        "--out",
        "d",
        "--model",
        tiny_folder("llama"),
        "--layers",
        "1-2",
        "--context",
        8,
        "--json",
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "GRAPH", "--slug", "a b"], "slug 'a b' holds ' '"),
        (["export", "nowhere.json"], "no graph file at nowhere.json"),
        (["upload", "GRAPH", "--slug", "x"], "needs a key"),
        (["label", "GRAPH"], "Give model=... and source_set"),
        (["label", "GRAPH", "--source", "nowhere"], "no feature files"),
        (["dashboards", "--text", "x", "--out", "d", "--layers", "a-b"], "cannot be read; write 3"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(run, saved, arguments, words, tmp_path, monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    done = run(*[saved[0] if a == "GRAPH" else a for a in arguments])
    assert done.exit_code == 1 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == [] and not run.site.graphs
