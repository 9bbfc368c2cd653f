"""Groups, pins and names: added to a graph, kept beside it, never mixed up with another graph's."""

import json
from dataclasses import replace

import pytest

import tl_circuits as tlc
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.errors import GraphFileError


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        return tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)


def test_a_group_takes_its_members_out_of_other_groups_and_leaves_the_first_graph_alone(graph):
    a, b, c = graph.node_ids[:3]
    first = graph.group("one", [a, b])
    second = first.group("two", [b, c]).rename("two", "zwei")
    assert graph.groups == () and first.groups == (("one", (a, b)),)
    assert second.groups == (("one", (a,)), ("zwei", (b, c)))
    assert second.ungroup("one").groups == (("zwei", (b, c)),)
    with pytest.raises(ValueError, match="already"):
        second.group("one", [c])
    with pytest.raises(ValueError, match="no node 'L99/F0@0'"):
        graph.group("three", ["L99/F0@0"])
    with pytest.raises(KeyError, match="no group 'x'"):
        second.ungroup("x")


def test_pins_and_names_are_shown_and_taken_back(graph):
    a = graph.node_ids[0]
    noted = graph.pin(a, a).rename(a, "mine <b>")
    assert noted.pins == (a,) and noted.label(0) == "mine <b>" and noted.nodes.label[0] == "mine <b>"
    assert noted.unpin(a).pins == ()


BESIDE = "a.graph.safetensors.notes.json"


def test_notes_are_saved_and_loaded_with_the_graph_and_survive_pruning(graph, tmp_path):
    noted = graph.group("« שלום & co »", graph.node_ids[:4]).pin(graph.node_ids[5])
    path = noted.save(tmp_path / "a.graph.safetensors")
    assert tlc.load_graph(path).notes == noted.notes
    assert json.loads((tmp_path / BESIDE).read_text())["graph"] == graph.fingerprint == noted.fingerprint
    pruned = noted.prune(0.3)
    assert set(pruned.pins) <= set(pruned.node_ids) and all(
        set(ids) <= set(pruned.node_ids) for _, ids in pruned.groups
    )


def test_a_graph_without_notes_saved_again_leaves_the_notes_that_are_there(graph, tmp_path):
    path = graph.pin(graph.node_ids[0]).save(tmp_path / "a.graph.safetensors")
    before = (tmp_path / BESIDE).read_bytes()
    graph.save(path, overwrite=True)
    assert (tmp_path / BESIDE).read_bytes() == before
    path.unlink()
    graph.save(path)  # the graph was removed, its notes were not
    graph.prune(0.3).save(path, overwrite=True)
    assert (tmp_path / BESIDE).read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        path.name,
        BESIDE,
    ]


def test_notes_taken_back_from_a_loaded_graph_are_gone_after_a_save(graph, tmp_path):
    path = graph.pin(graph.node_ids[0]).save(tmp_path / "a.graph.safetensors")
    tlc.load_graph(path).unpin(graph.node_ids[0]).save(path, overwrite=True)
    assert tlc.load_graph(path).notes == tlc.Notes() and not list(tmp_path.glob("*.other*"))


def test_other_notes_in_the_way_are_put_aside_each_under_its_own_name(graph, tmp_path):
    a, b, c, d = graph.node_ids[:4]
    path = graph.pin(a).save(tmp_path / "a.graph.safetensors")
    graph.pin(a, b).save(path, overwrite=True)  # says all that was said: nothing to put aside
    assert not list(tmp_path.glob("*.other*"))
    graph.pin(c).save(path, overwrite=True)  # not read from the file
    small = graph.prune(0.3)
    small.pin(small.node_ids[0]).save(path, overwrite=True)  # another graph
    graph.pin(d).save(path, overwrite=True)
    (tmp_path / BESIDE).write_text("{")
    graph.rename(d, "mine").save(path, overwrite=True)  # damaged notes may still be mended by hand
    assert tlc.load_graph(path).notes.names == {d: "mine"}
    kept = [(tmp_path / f"{BESIDE}.other{end}").read_text() for end in ("", "-2", "-3", "-4")]
    assert len(list(tmp_path.glob("*.other*"))) == 4 and kept[3] == "{"
    assert [json.loads(text)["pins"] for text in kept[:3]] == [[a, b], [c], [small.node_ids[0]]]


def test_graphs_of_one_stem_do_not_share_notes_and_the_earlier_name_is_still_read(graph, tmp_path):
    a, b = graph.node_ids[:2]
    path, other = tmp_path / "a.graph.safetensors", tmp_path / "a.safetensors"
    graph.pin(a).save(path)
    small = graph.prune(0.3)
    small.pin(small.node_ids[0]).save(other)
    assert tlc.load_graph(path).pins == (a,) and tlc.load_graph(other).pins == small.node_ids[:1]
    (tmp_path / BESIDE).rename(tmp_path / "a.notes.json")
    text = json.loads((tmp_path / "a.notes.json").read_text())
    (tmp_path / "a.notes.json").write_text(json.dumps(text | {"graph": graph.earlier_fingerprint}))
    loaded = tlc.load_graph(path)
    assert loaded.pins == (a,)
    loaded.pin(b).save(path, overwrite=True)
    assert tlc.load_graph(path).pins == (a, b) and not (tmp_path / "a.notes.json").exists()


def test_notes_know_their_graph_by_what_was_traced_not_by_its_last_bits(graph, tmp_path):
    nodes = replace(graph._nodes, activation=graph._nodes.activation * (1 + 1e-7))
    same = replace(graph, _nodes=nodes, _edges=replace(graph._edges, weight=graph._edges.weight * (1 - 1e-7)))
    assert same.fingerprint == graph.fingerprint and same.earlier_fingerprint != graph.earlier_fingerprint
    exported = tlc.load_graph(graph.to_neuronpedia(tmp_path / "a.json", slug="a"))
    assert exported.fingerprint == graph.fingerprint
    for change in (
        {"model": "x"},
        {"dictionary": "x"},
        {"token_ids": (0, *graph.info.token_ids[1:])},
        {"target_names": ("x",)},
    ):
        assert replace(graph, info=replace(graph.info, **change)).fingerprint != graph.fingerprint
    assert graph.prune(0.3).fingerprint != graph.fingerprint


def test_notes_beside_an_exported_file_are_read_with_it(graph, tmp_path):
    path = graph.to_neuronpedia(tmp_path / "a.json", slug="a")
    read = tlc.load_graph(path)
    noted = read.pin(read.node_ids[0])
    noted.save(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors.notes.json").rename(tmp_path / "a.json.notes.json")
    assert tlc.load_graph(path).pins == noted.pins and tlc.load_graph(path, notes=False).pins == ()


def test_notes_of_another_graph_are_not_applied(graph, tmp_path):
    other = graph.prune(0.3)
    path = graph.save(tmp_path / "a.graph.safetensors")
    other.pin(other.node_ids[0]).save(tmp_path / "b.graph.safetensors")
    (tmp_path / "b.graph.safetensors.notes.json").rename(tmp_path / BESIDE)
    assert tlc.load_graph(path).notes == tlc.Notes()


def test_a_damaged_notes_file_is_an_error_that_names_it(graph, tmp_path):
    path = graph.save(tmp_path / "a.graph.safetensors")
    for text in (
        "{",
        "[]",
        '{"version": 9}',
        '{"version": 9, "graph": "x", "pins": [], "groups": [], "names": {}, "text": ""}',
        '{"version": 1, "graph": "x", "pins": [3], "groups": [], "names": {}, "text": ""}',
    ):
        (tmp_path / BESIDE).write_text(text)
        with pytest.raises(GraphFileError, match="notes"):
            tlc.load_graph(path)
