"""Frames for other programs, read back with those programs' readers."""

import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest

import tl_circuits as tlc
from tests.conftest import need
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.errors import OutputError

ODD = 'a "quoted" \\ back\\nslash\n<b>&amp; \x07 é'


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
    graph = replace(graph, info=replace(graph.info, prompt=ODD))
    return graph.rename(graph.node_ids[0], ODD)


def test_parquet_gives_both_frames_back(graph, tmp_path):
    nodes, edges = graph.to_parquet(tmp_path / "tables")
    pd.testing.assert_frame_equal(pd.read_parquet(nodes), graph.nodes, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_parquet(edges), graph.edges, check_dtype=False)
    with pytest.raises(OutputError, match="exists already"):
        graph.to_parquet(tmp_path / "tables")
    graph.to_parquet(tmp_path / "tables", overwrite=True)


def test_graphml_gives_nodes_edges_and_odd_labels_back(graph, tmp_path):
    networkx = pytest.importorskip("networkx")
    read = networkx.read_graphml(graph.to_graphml(tmp_path / "g.graphml"))
    assert set(read.nodes) == set(graph.node_ids) and read.number_of_edges() == len(graph.edges)
    assert read.nodes[graph.node_ids[0]]["label"] == ODD.replace("\x07", "\\u0007")
    edge = graph.edges.iloc[3]
    assert read.edges[edge.source, edge.target]["weight"] == pytest.approx(edge.weight)


def test_dot_is_read_by_graphviz_or_at_least_balanced(graph, tmp_path):
    text = graph.to_dot(tmp_path / "g.dot").read_text()
    lines = text.splitlines()
    assert len(lines) == 4 + len(graph) + len(graph.edges)
    assert all(line.replace("\\\\", "").replace('\\"', "").count('"') % 2 == 0 for line in lines)
    need(shutil.which("dot") is not None, "Graphviz (Debian: apt-get install graphviz)")
    done = subprocess.run(["dot", "-Tcanon", tmp_path / "g.dot"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
