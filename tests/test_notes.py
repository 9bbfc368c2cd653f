"""Groups, pins and names: added to a graph, kept beside it, never mixed up with another graph's."""

import json

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


def test_notes_are_saved_and_loaded_with_the_graph_and_survive_pruning(graph, tmp_path):
    noted = graph.group("« שלום & co »", graph.node_ids[:4]).pin(graph.node_ids[5])
    path = noted.save(tmp_path / "a.graph.safetensors")
    assert tlc.load_graph(path).notes == noted.notes
    assert json.loads((tmp_path / "a.notes.json").read_text())["graph"] == graph.fingerprint == noted.fingerprint
    pruned = noted.prune(0.3)
    assert set(pruned.pins) <= set(pruned.node_ids) and all(set(ids) <= set(pruned.node_ids) for _, ids in pruned.groups)
    graph.save(path, overwrite=True)
    assert tlc.load_graph(path).notes == tlc.Notes()


def test_notes_of_another_graph_are_not_applied(graph, tmp_path):
    other = graph.prune(0.3)
    path = graph.save(tmp_path / "a.graph.safetensors")
    other.pin(other.node_ids[0]).save(tmp_path / "b.graph.safetensors")
    (tmp_path / "b.notes.json").rename(tmp_path / "a.notes.json")
    assert tlc.load_graph(path).notes == tlc.Notes()


def test_a_damaged_notes_file_is_an_error_that_names_it(graph, tmp_path):
    path = graph.save(tmp_path / "a.graph.safetensors")
    for text in ("{", "[]", '{"version": 9}', '{"version": 9, "graph": "x", "pins": [], "groups": [], "names": {}, "text": ""}', '{"version": 1, "graph": "x", "pins": [3], "groups": [], "names": {}, "text": ""}'):
        (tmp_path / "a.notes.json").write_text(text)
        with pytest.raises(GraphFileError, match="notes"):
            tlc.load_graph(path)
