"""What recurs over many prompts: counted, averaged, drawn as one graph, contrasted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import tl_circuits as tlc
from tests.tiny import command, prompt, tiny_bridge, transcoders
from tl_circuits.errors import PromptError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import GraphInfo, Label, Nodes
from tl_circuits.graph.scores import Edges
from tl_circuits.recurring import tally
from tl_circuits.view.page_data import page_data

INFO = GraphInfo(
    prompt="", token_ids=(), tokens=(), target_names=(), target_probabilities=(), model="m", dictionary="d",
    n_layers=2, exact=False, engine="linear", max_nodes=9, n_active=9, version="0",
)  # fmt: skip


def by_hand(tokens, target, features, edges, bias, residue=0.0):
    """One target read at the last position; ``features``: (layer, position, feature, activation), and
    ``edges``: (source, target, weight) over features, then tokens, then the target."""
    n, n_f, n_t = len(features) + len(tokens) + 1, len(features), len(tokens)
    source, to, weight = (
        torch.tensor(column) for column in zip(*sorted(edges, key=lambda e: (e[1], e[0])), strict=True)
    )
    bias = torch.tensor([*bias[:-1], *[0.0] * n_t, bias[-1]])
    sums = torch.zeros(n).index_add_(0, to, weight) + bias
    sums[n_f : n_f + n_t] = float("nan")
    layers, places, numbers, acts = ([f[i] for f in features] for i in range(4))
    nodes = Nodes(
        kind=torch.tensor([0] * n_f + [2] * n_t + [3]),
        layer=torch.tensor([*layers, *[-1] * n_t, 2]),
        position=torch.tensor([*places, *range(n_t), n_t - 1]),
        feature=torch.tensor([*numbers, *range(10, 10 + n_t), 50]),
        activation=torch.tensor([*acts, *[0.0] * n_t, float(sums[-1])]),
        value=sums,
        bias=bias,
        residue=torch.tensor([0.0] * (n - 1) + [residue]),
        residue_mass=torch.tensor([0.0] * (n - 1) + [abs(residue)]),
        weight=torch.tensor([0.0] * (n - 1) + [1.0]),
    )
    info = replace(
        INFO, prompt=" ".join(tokens), tokens=tuple(tokens), token_ids=tuple(range(10, 10 + n_t)),
        target_names=(target,), target_probabilities=(1.0,),
    )  # fmt: skip
    return AttributionGraph(info, nodes, Edges(source, to, weight))


@pytest.fixture
def two():
    """F5 of layer 0 is found in both, one position apart from the start; F6 and F7 in one each."""
    first = by_hand(
        ["a", "b"], "x", [(0, 1, 5, 2.0), (1, 1, 6, 1.0)],
        [(2, 0, 3.0), (0, 1, 1.0), (0, 4, 2.0), (1, 4, -2.0), (3, 4, 4.0)], [0.5, 0.25, 1.0], residue=0.5,
    )  # fmt: skip
    second = by_hand(
        ["z", "a", "b"], "y", [(0, 2, 5, 6.0), (0, 2, 7, 1.0)],
        [(3, 0, 1.0), (4, 1, 2.0), (0, 5, 4.0), (1, 5, 4.0)], [0.5, 0.0, 2.0],
    )  # fmt: skip
    return first, second


@pytest.fixture(scope="module")
def traced():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        graphs = [
            tlc.attribute(replacement, prompt(n, seed), max_nodes=40, progress=False)
            for n, seed in ((6, 1), (8, 2), (9, 3))
        ]
        return [tlc.label_features(replacement, graph) for graph in graphs]


def test_counts_and_means_are_those_computed_by_hand(two):
    found = tlc.aggregate(two, min_share=0.0)
    rows = found.features.set_index("id")
    assert rows.loc["L0/F5@-1", ["count", "share", "activation"]].tolist() == [2, 1.0, 4.0]
    assert rows.loc["L1/F6@-1", ["count", "share", "activation"]].tolist() == [1, 0.5, 0.5]
    # Shares of the first target's inputs are 1/4, 1/4, 1/2, of the second's 1/2, 1/2; all that F6 reads is F5.
    assert rows.influence.to_dict() == pytest.approx(
        {"L0/F5@-1": (0.25 + 0.25 + 0.5) / 2, "L1/F6@-1": 0.25 / 2, "L0/F7@-1": 0.5 / 2}
    )
    edges = found.edges.set_index(["source", "target"])
    assert edges["count"].to_dict() == {
        ("L0/F5@-1", "logit:0"): 2, ("token@-2", "L0/F5@-1"): 2, ("token@-1", "L0/F7@-1"): 1,
        ("L0/F5@-1", "L1/F6@-1"): 1, ("L1/F6@-1", "logit:0"): 1, ("token@-1", "logit:0"): 1, ("L0/F7@-1", "logit:0"): 1,
    }  # fmt: skip
    assert edges.weight[("L0/F5@-1", "logit:0")] == 3.0 and edges.weight[("token@-1", "logit:0")] == 2.0
    assert (
        edges.weight[("token@-2", "L0/F5@-1")] == 2.0 and found.edges.source[0] == "L0/F5@-1" and found.unaligned == 0.0
    )


def test_coverage_is_the_share_of_inputs_that_edges_carry_by_influence(two):
    # Of the first target's inputs 8 of 8.5; F5 and F6, of influence 1/2 and 1/4, have all of theirs.
    assert two[0].coverage == pytest.approx((8 / 8.5 + 1 / 2 + 1 / 4) / (1 + 1 / 2 + 1 / 4))


def test_the_graph_keeps_what_recurs_and_accounts_for_the_rest(two):
    graph = tlc.aggregate(two).graph(min_share=1.0)
    assert graph.node_ids == ("L0/F5@1", "token@0", "token@1", "logit:0")
    assert graph.info.tokens == ("a", "b") and graph.info.target_names == ("x / y",)
    assert graph.info.prompt == "2 prompts: ab"
    feature, _, _, logit = graph.nodes.itertuples()
    # The target: mean value (5 + 10) / 2; of it 3 by F5, mean bias 1.5, the rest left out: (4 - 2 + 4) / 2.
    assert (logit.value, logit.bias, logit.residue) == (7.5, 4.5, 0.25 + 3.0)
    assert (feature.activation, feature.value, feature.bias) == (4.0, (3.5 + 1.5) / 2, 0.5)
    assert graph._nodes.residue_mass[3] == 0.25 + (8 + 8) / 2 - 3
    assert graph.completeness_error() == 0.0 and graph.edges.weight.tolist() == [2.0, 3.0]
    everything = tlc.aggregate(two).graph(min_share=0.5)
    assert everything._nodes.residue[-1] == 0.25 and everything.completeness_error() == 0.0


def test_slots_align_what_the_template_says_and_report_what_they_leave_out(two):
    found = tlc.aggregate(two, align=[{0: "subject", -1: "last"}, {0: "subject", 1: "subject"}])
    assert found.slots == ("subject", "last")
    assert set(found.features.id) == {"L0/F5@last", "L1/F6@last"}
    # In the second prompt F5, F7, a and b carry 1/2 each, and only a is in a slot; the first has slots for all.
    assert found.unaligned == pytest.approx(0.75 / 2)
    graph = found.graph()
    subject = graph.nodes[graph.nodes.token == "subject"]
    assert subject.kind.tolist() == ["embedding"] and graph.completeness_error() == 0.0
    both = tlc.aggregate(two, align=[{}, {1: "subject", 2: "subject"}], min_share=0.0)
    assert both.features["count"].tolist() == [1, 1] and both.graph(0.5).node_ids[-2:] == ("token@0", "logit:0")


def test_its_tokens_are_the_words_of_the_template_those_that_differ_in_brackets(two):
    first = two[0]
    other = AttributionGraph(replace(first.info, tokens=("a", " c")), first._nodes, first._edges, {})
    graph = tlc.aggregate([first, first, other]).graph()
    assert graph.info.tokens == ("a", "[b / c]") and graph.info.prompt == "3 prompts: a[b / c]"


def test_several_positions_of_a_slot_are_added_up(two):
    repeated = by_hand(
        ["a", "b"],
        "x",
        [(0, 0, 5, 2.0), (0, 1, 5, 1.0)],
        [(2, 0, 1.0), (3, 1, 2.0), (0, 4, 3.0), (1, 4, 4.0)],
        [0.0, 0.0, 0.0],
    )
    graph = tlc.aggregate([repeated], align=[{0: "s", 1: "s"}]).graph()
    assert graph.edges.weight.tolist() == [3.0, 7.0] and graph.nodes["activation"][0] == 3.0
    assert graph.completeness_error() == 0.0


def test_on_a_model_the_sums_hold_and_the_graph_is_like_any_other(traced, tmp_path):
    found = tlc.aggregate(traced, min_share=0.3)
    for share in (0.3, 0.5, 1.0):
        assert found.graph(share).completeness_error() < 1e-5
    assert found.graph(0.3).coverage > found.graph(1.0).coverage
    assert found.features.share.min() >= 0.3 and len(found.slots) == 9
    graph = found.graph(0.3)
    assert len(graph.info.tokens) == 9 and len(found.graph(1.0).info.tokens) == 6
    pruned = graph.prune(0.6, 0.9)
    assert 0 < len(pruned) < len(graph) and pruned.completeness_error() < 1e-5
    loaded = tlc.load_graph(pruned.save(tmp_path / "g.safetensors"))
    assert loaded.nodes.equals(pruned.nodes) and loaded.edges.equals(pruned.edges) and loaded.labels == pruned.labels
    assert graph.to_html(tmp_path / "g.html").stat().st_size > 1000
    drawn = page_data(graph)
    assert drawn["story"] and all(0 <= place < 9 for place in drawn["nodes"]["position"])


def test_means_on_a_model_are_those_of_the_dense_matrices(traced):
    graph = tlc.aggregate(traced, min_share=0.0).graph(0.3)
    ids = [dict(zip(_from_the_end(g), range(len(g)), strict=True)) for g in [*traced, graph]]
    dense = [g.adjacency() for g in traced]
    expected = torch.zeros(len(graph), len(graph), dtype=torch.float64)
    for matrix, own in zip(dense, ids, strict=False):
        here = [ids[-1][name] for name in own]
        expected[np.ix_(here, here)] += matrix.double() / 3
    assert torch.allclose(graph.adjacency(), expected.float(), rtol=0, atol=1e-6)  # rounded once, from float64
    assert (expected != 0).sum() == len(graph.edges) > 1000


def _from_the_end(graph):
    """Node ids with positions counted from the end; logits are known by rank."""
    n = len(graph.info.tokens)
    split = (name.split("@") for name in graph.node_ids)
    return [f"{part[0]}@{int(part[1]) - n}" if len(part) == 2 else part[0] for part in split]


def test_one_graph_alone_is_itself(traced):
    alone, graph = tlc.aggregate(traced[:1]).graph(1.0), traced[0]
    assert alone.node_ids == graph.node_ids and torch.equal(alone.adjacency(), graph.adjacency())
    assert torch.allclose(alone._nodes.bias, graph._nodes.bias, atol=1e-5)  # the sums are taken anew
    assert {i: label.short for i, label in alone.labels.items()} == {
        i: label.short for i, label in graph.labels.items()
    }


def test_order_and_files_or_objects_make_no_difference(traced, tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "MERGED_AT_LEAST", 0)
    files = [graph.save(tmp_path / f"{i}.safetensors") for i, graph in enumerate(traced)]
    one = tlc.aggregate(traced, names=["p", "q", "r"]).graph(0.3).save(tmp_path / "one")
    other = tlc.aggregate(reversed(files)).graph(0.3).save(tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()
    found = tlc.aggregate(files, align=[{-1: "end"}] * 3)
    again = tlc.aggregate(files[::-1], align=[{-1: "end"}] * 3)
    assert found.prompts == again.prompts and found.edges.equals(again.edges) and found.features.equals(again.features)


def test_a_larger_min_share_gives_the_same_numbers(traced):
    most, all_ = tlc.aggregate(traced, min_share=0.6), tlc.aggregate(traced, min_share=0.0)
    assert torch.equal(most.graph(0.6).adjacency(), all_.graph(0.6).adjacency())
    pd.testing.assert_frame_equal(most.edges, all_.edges[all_.edges.share >= 0.6].reset_index(drop=True))
    assert len(most.edges) < len(all_.edges)


def test_contrast_puts_the_largest_difference_first(two):
    first, second = (tlc.aggregate([graph]) for graph in two)
    first = replace(first, labels={0: Label("say x")})
    frame = tlc.contrast(first, second).set_index("id")
    assert frame.difference.to_dict() == pytest.approx({"L0/F5@-1": 0.0, "L1/F6@-1": 0.25, "L0/F7@-1": -0.5})
    assert frame.index.tolist() == ["L0/F7@-1", "L1/F6@-1", "L0/F5@-1"]
    assert frame.share_first.tolist() == [0.0, 1.0, 1.0] and frame.share_second.tolist() == [1.0, 0.0, 1.0]
    assert frame.label.to_dict() == {"L0/F5@-1": "say x", "L1/F6@-1": "", "L0/F7@-1": ""}
    with pytest.raises(ValueError, match="no slot in common"):
        tlc.contrast(first, tlc.aggregate([two[1]], align=[{0: "subject"}]))
    with pytest.raises(ValueError, match="the second set has dictionary 'other'"):
        tlc.contrast(first, replace(second, info=replace(second.info, dictionary="other")))


def test_contrast_knows_features_that_are_rare_in_one_set(two):
    often = tlc.aggregate([two[1]])
    rare = tlc.aggregate(two, min_share=0.6)
    assert "L0/F7@-1" not in set(rare.features.id)
    assert tlc.contrast(often, rare).set_index("id").share_second["L0/F7@-1"] == 0.5


def test_feature_targets_recur_too():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        whole = tlc.attribute(replacement, prompt(6), max_nodes=200, progress=False).nodes
        row = whole[(whole.kind == "feature") & (whole.layer == 2) & (whole.position == 5)].iloc[0]
        target = tlc.FeatureTarget(2, 5, int(row.feature))
        graph = tlc.attribute(replacement, prompt(6), target, max_nodes=20, progress=False)
    made = tlc.aggregate([graph, graph]).graph()
    assert made.influence.argmax() == graph.influence.argmax() and made.completeness_error() < 1e-5


def test_what_cannot_be_put_together_says_why(two, tmp_path):
    first, second = two
    with pytest.raises(ValueError, match="no graphs"):
        tlc.aggregate([])
    for what in ("model", "dictionary"):
        other = replace(second, info=replace(second.info, **{what: "other"}))
        with pytest.raises(ValueError, match=f"two has {what} 'other', but one has"):
            tlc.aggregate([first, other], names=["one", "two"])
    with pytest.raises(ValueError, match=r"slot 'end' of graph 0 \(“a b”\) is position 2, but the prompt has 2 tokens"):
        tlc.aggregate(two, align=[{2: "end"}, {}])
    with pytest.raises(ValueError, match="in two slots, 'p' and 'q'"):
        tlc.aggregate(two, align=[{1: "p", -1: "q"}, {}])
    with pytest.raises(ValueError, match="1 given, 2 graphs"):
        tlc.aggregate(two, align=[{0: "p"}])
    with pytest.raises(ValueError, match="names no position"):
        tlc.aggregate(two, align=[{}, {}])
    with pytest.raises(ValueError, match="1 given, 2 graphs"):
        tlc.aggregate(two, names=["one"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        tlc.aggregate(two, min_share=1.5)
    with pytest.raises(ValueError, match="aggregate again with a smaller min_share"):
        tlc.aggregate(two, min_share=0.5).graph(0.1)
    with pytest.raises(ValueError, match="no graph file"):
        tlc.aggregate([tmp_path / "none"])


def test_what_runs_the_model_refuses_a_graph_of_many_prompts(traced, tmp_path):
    model = tiny_bridge("llama")
    for graph in (tlc.aggregate(traced).graph(), tlc.aggregate(traced[:1]).graph()):
        feature = next(i for i in graph.node_ids if "/F" in i)
        path, exported = (
            graph.save(tmp_path / "g", overwrite=True),
            graph.to_neuronpedia(tmp_path / "g.json", overwrite=True),
        )
        for again in (graph, graph.prune(), tlc.load_graph(path), tlc.load_graph(exported)):
            runs = (
                lambda r, g, i=feature: tlc.intervene(r, prompt(), tlc.edits_of(g, [i])),
                lambda r, g: tlc.faithfulness(r, g, 3),
                lambda r, g: tlc.box_ablations(r, g),
                lambda r, g: tlc.circuit_curve(r, g, lambda logits: logits[3]),
                lambda r, g: tlc.qk_attribution(r, g, layer=1, head=0, query=4, key=2),
            )
            with tlc.attach(model, transcoders(model)) as replacement:
                for run in runs:
                    with pytest.raises(PromptError, match="recurs over '.* prompts?"):
                        run(replacement, again)


def test_a_target_that_does_not_recur_is_named(two):
    nowhere = replace(two[0], _nodes=replace(two[0]._nodes, weight=torch.zeros(5)))
    with pytest.raises(ValueError, match="no target is found in 100%"):
        tlc.aggregate([nowhere]).graph(1.0)


def test_the_tally_counts_prompts_and_adds_values():
    found = tally.Tally(1)
    found.add(np.array([3, 1, 3]), np.array([[1.0], [2.0], [4.0]]))
    found.add(np.array([3]), np.array([[0.5]]))
    keys, count, sums = found.totals()
    assert keys.tolist() == [1, 3] and count.tolist() == [1, 2] and sums[:, 0].tolist() == [2.0, 5.5]


def test_the_command_writes_graph_and_page(traced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [graph.save(tmp_path / f"{i}.graph.safetensors").name for i, graph in enumerate(traced)]
    done = command("aggregate", *files, "--out", "all", "--min-share", 0.3, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    expected = tlc.aggregate(files, min_share=0.3)
    assert [row["id"] for row in facts["features"]] == expected.features.id.tolist()
    assert tlc.load_graph("all.graph.safetensors").edges.equals(expected.graph(0.3).edges)
    assert Path("all.html").read_text().startswith("<!doctype html>")
    shown = command("aggregate", *files, "--out", "all", "--force")
    assert shown.exit_code == 0 and "of 3 prompts" in shown.stdout
    for arguments, words in (
        (["nothing", "--out", "other"], "no graph file"),
        ([*files, "--out", "all"], "exists already"),
    ):
        refused = command("aggregate", *arguments)
        assert refused.exit_code == 1 and words in refused.stderr


def test_attention_features_keep_their_numbers_and_every_kind_of_node_is_counted():
    """Kinds from 4 on, which other programs' files hold, once overflowed 64 bits and were lost."""
    kinds = [0, 4, 4, 5, 6, 2, 3]
    n = len(kinds)
    numbers = torch.tensor([5, 7, 2**31 + 5, -1, 3, 10, 50])
    zeros = torch.zeros(n)
    nodes = Nodes(
        kind=torch.tensor(kinds),
        layer=torch.tensor([0, 300, 300, 1, 1, -1, 301]),
        position=torch.zeros(n, dtype=torch.long),
        feature=numbers,
        activation=torch.arange(1.0, n + 1),
        value=torch.tensor([*[float("nan")] * (n - 1), 6.0]),
        bias=zeros,
        residue=zeros,
        residue_mass=zeros,
        weight=torch.tensor([*[0.0] * (n - 1), 1.0]),
    )
    order = sorted(range(n), key=lambda i: kinds[i])
    nodes = nodes[torch.tensor(order)]
    last = n - 1
    logit = order.index(last)
    sources = [i for i in range(n) if i != logit]
    edges = Edges(torch.tensor(sources), torch.full((last,), logit), torch.ones(last))
    info = replace(
        INFO, prompt="a", tokens=("a",), token_ids=(10,), target_names=("x",), target_probabilities=(1.0,), n_layers=301
    )
    graphs = [AttributionGraph(info, nodes, edges), AttributionGraph(replace(info, prompt="b"), nodes, edges)]
    found = tlc.aggregate(graphs)
    assert set(found.features.id) == {"L0/F5@-1", "L300/attention-F7@-1", f"L300/attention-F{2**31 + 5}@-1"}
    assert (
        found.features.set_index("id").activation["L300/attention-F7@-1"] == 2.0 and (found.features.share == 1.0).all()
    )
    assert len(found.edges) == last and (found.edges.weight == 1.0).all()
    graph = found.graph(1.0)
    assert sorted(graph._nodes.kind.tolist()) == sorted(kinds) and graph.completeness_error() == 0.0
    assert graph._nodes.feature[graph.is_kind("attention feature")].tolist() == [7, 2**31 + 5]
    assert len(tlc.contrast(found, found)) == 3


@pytest.mark.parametrize(("column", "value", "words"), [("layer", 2000, "a layer"), ("feature", 2**33, "a feature")])
def test_numbers_beyond_what_a_key_holds_are_refused_not_mixed_up(two, column, value, words):
    graph = two[0]
    nodes = replace(graph._nodes, **{column: torch.where(graph._nodes.kind == 0, value, getattr(graph._nodes, column))})
    with pytest.raises(ValueError, match=words):
        tlc.aggregate([replace(graph, _nodes=nodes)])
