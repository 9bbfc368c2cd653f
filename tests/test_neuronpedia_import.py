"""Graphs of other programs, read: nothing lost, nothing run, and clear words for what is damaged."""

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import tl_circuits as tlc
from tl_circuits.dictionaries.source_sets import SourceSet
from tl_circuits.errors import GraphFileError
from tl_circuits.feature_labels.feature_codes import cantor_pair
from tl_circuits.neuronpedia.labelling import source_set_for

DATA = Path(__file__).resolve().parent / "data"


def small(encode=cantor_pair, schema=1, ids="{layer}_{i}_{p}", **metadata):
    """Two features, one error, one token, one output, in circuit-tracer's or another program's spelling."""

    def feature(layer, i, p, kind="cross layer transcoder"):
        return {
            "node_id": ids.format(layer=layer, i=i, p=p),
            "feature": encode(layer, i),
            "layer": str(layer),
            "ctx_idx": p,
            "feature_type": kind,
            "jsNodeId": f"{layer}_{i}-0",
            "clerp": f"label {i}",
            "activation": 1.5,
        }

    rest = {"feature": -1, "jsNodeId": "x", "clerp": ""}
    nodes = [
        feature(2, 77, 1),
        feature(14, 2268, 1),
        {"node_id": "0_9_1", "layer": "9", "ctx_idx": 1, "feature_type": "mlp reconstruction error"} | rest,
        {"node_id": "E_42_0", "layer": "E", "ctx_idx": 0, "feature_type": "embedding"} | rest,
        {"node_id": "27_5_1", "layer": "27", "ctx_idx": 1, "feature_type": "logit", "token_prob": 0.5} | rest
        | {"feature": 5, "clerp": 'Output " x" (p=0.500)'},
    ]  # fmt: skip
    names = [n["node_id"] for n in nodes]
    pairs = [(3, 0, 0.5), (0, 1, -0.25), (2, 1, 0.125), (1, 4, 2.0)]
    links = [{"source": names[s], "target": names[t], "weight": w} for s, t, w in pairs]
    made = {"slug": "s", "scan": "gemma-2-2b", "prompt_tokens": ["a", "b"], "prompt": "ab"} | metadata
    if schema:
        made["schema_version"] = schema
    return {"metadata": made, "qParams": {}, "nodes": nodes, "links": links}


def load(content, tmp_path, name="g.json"):
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return tlc.load_graph(path)


def places(graph):
    return graph.nodes[["kind", "layer", "position", "feature"]].values.tolist()


EXPECTED = [
    ["feature", 2, 1, 77],
    ["feature", 14, 1, 2268],
    ["error", 9, 1, -1],
    ["embedding", -1, 0, 42],
    ["logit", 26, 1, 5],
]


@pytest.mark.parametrize(
    ("encode", "schema", "ids"),
    [
        (cantor_pair, 1, "{layer}_{i}_{p}"),
        (cantor_pair, None, "{layer}_{i}_{p}"),
        (lambda layer, i: layer * 10**5 + i, None, "{layer}_{i}_{p}"),
        (lambda layer, i: i, None, "{layer}_{i}_{p}"),
        (cantor_pair, 1, "{layer}_cro_{i}_{p}"),
        (cantor_pair, 1, "some-{layer}-{i}-{p}"),
        (lambda layer, i: layer * 10**5 + i, None, "some-{layer}-{i}-{p}"),
        (lambda layer, i: None, 1, "{layer}_{i}_{p}"),
    ],
)
def test_every_spelling_of_ids_and_numbers_gives_the_same_graph(encode, schema, ids, tmp_path):
    graph = load(small(encode, schema, ids), tmp_path)
    assert places(graph) == EXPECTED
    assert graph.edges.values.tolist() == [
        ["token@0", "L2/F77@1", 0.5], ["L2/F77@1", "L14/F2268@1", -0.25], ["L9/error@1", "L14/F2268@1", 0.125],
        ["L14/F2268@1", "logit:0", 2.0],
    ]  # fmt: skip
    assert graph.info.target_names == (" x",) and graph.info.target_probabilities == (0.5,)
    assert [label.short for label in graph.labels.values()] == ["label 77", "label 2268"]
    assert graph.info.token_ids == (42, -1) and graph.scores().replacement > 0


def with_attention(offset, node_ids):
    """A file of llamascopium's kind: `node_ids` spells attention feature, its error, MLP feature, bias."""
    spelled = [("lorsa", 3, 5), ("lorsa error", 3, None), ("cross layer transcoder", 3, 5), ("bias", 3, None)]
    nodes = []
    for (kind, layer, feature), name in zip(spelled, node_ids, strict=True):
        at = layer if offset is None else 2 * layer + (kind == "cross layer transcoder")
        code = cantor_pair(layer, feature) if offset is None and feature is not None else feature
        nodes.append(
            {
                "node_id": name,
                "feature": code,
                "layer": at,
                "ctx_idx": 1,
                "feature_type": kind,
                "jsNodeId": name,
                "clerp": "",
            }
        )
    nodes.append(
        {
            "node_id": "E_7_0",
            "feature": None,
            "layer": "E" if offset is None else -1,
            "ctx_idx": 0,
            "feature_type": "embedding",
            "jsNodeId": "E",
            "clerp": "",
        }
    )
    last = 4 if offset is None else 8
    nodes.append(
        {
            "node_id": f"{last}_9_1",
            "feature": 9,
            "layer": last,
            "ctx_idx": 1,
            "feature_type": "logit",
            "token": 'to"k',
            "token_prob": 0.75,
            "jsNodeId": "l",
            "clerp": "",
        }
    )
    links = [(4, 0), (0, 2), (1, 2), (2, 5), (3, 5)]
    return nodes, [{"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": 0.5} for s, t in links]


ATTENTION = [
    ["feature", 3, 1, 5], ["embedding", -1, 0, 7], ["logit", 4, 1, 9],
    ["attention feature", 3, 1, 5], ["attention error", 3, 1, -1], ["bias", 3, 1, 3],
]  # fmt: skip


def test_neuronpedias_attention_features_are_read_and_written_back(tmp_path):
    nodes, links = with_attention(None, ["3_lor_5_1", "3_error_attn_1", "3_cro_5_1", "3_bias_attn_bO_1"])
    nodes[0]["qk_tracing_results"] = {
        "pair_wise_contributors": [["3_cro_5_1", "E_7_0", 0.5]], "top_q_marginal_contributors": [["1_cro_8_0", 0.25]],
        "top_k_marginal_contributors": [],
    }  # fmt: skip
    only = {
        "1_cro_8_0": {
            "node_id": "1_cro_8_0",
            "feature_type": "cross layer transcoder",
            "layer": 1,
            "ctx_idx": 0,
            "jsNodeId": "x",
            "clerp": "",
        }
    }
    metadata = {"scan": "m", "slug": "s", "prompt": "ab", "prompt_tokens": ["a", "b"], "schema_version": 1}
    metadata |= {"feature_details": {"neuronpedia_source_set": "tc", "neuronpedia_lorsa_source_set": "lorsa"}}
    content = {
        "metadata": metadata,
        "qParams": {"pinnedIds": ["3_lor_5_1"]},
        "nodes": nodes,
        "links": links,
        "qk_only_nodes": only,
    }
    graph = load(content, tmp_path)
    assert places(graph) == ATTENTION
    assert graph.pins == ("L3/attention-F5@1",)
    assert set(graph.node_ids) == {
        "L3/F5@1",
        "token@0",
        "logit:0",
        "L3/attention-F5@1",
        "L3/attention-error@1",
        "L3/bias3@1",
    }
    assert graph.save(tmp_path / "g.safetensors") and tlc.load_graph(tmp_path / "g.safetensors").nodes.equals(
        graph.nodes
    )
    again = json.loads(tlc.load_graph(tmp_path / "g.safetensors").to_neuronpedia(tmp_path / "out.json").read_text())
    by_type = {n["feature_type"]: n for n in again["nodes"]}
    results = by_type["lorsa"]["qk_tracing_results"]
    assert results["pair_wise_contributors"] == [[by_type["cross layer transcoder"]["node_id"], "E_7_0", 0.5]]
    assert results["top_q_marginal_contributors"] == [["1_cro_8_0", 0.25]] and again["qk_only_nodes"] == only
    assert again["metadata"]["feature_details"]["neuronpedia_lorsa_source_set"] == "lorsa"
    assert places(tlc.load_graph(tmp_path / "out.json"))[:-1] == ATTENTION[:-1]


@pytest.mark.parametrize("whole_feature", [False, True])
def test_llamascopiums_layers_are_halved(tmp_path, whole_feature):
    nodes, links = with_attention(2, ["6_5_1", "6_error_1", "7_5_1", "blocks.3.attn.hook_b_O:1"])
    if whole_feature:
        nodes[2]["feature"] = {"feature_index": 5, "interpretation": {"text": "cities"}}
    graph = load(
        {
            "name": "mine",
            "graph_data": {
                "metadata": {"prompt": "ab", "prompt_tokens": ["a", "b"], "schema_version": 1},
                "nodes": nodes,
                "links": links,
            },
        },
        tmp_path,
    )
    assert places(graph) == ATTENTION and graph.info.target_names == ('to"k',)
    assert graph.label(0) == ("cities" if whole_feature else "feature 5 of layer 3")
    assert graph.prune(1.0, 1.0).scores().replacement == pytest.approx(0.5)  # attention errors count as errors


def test_a_torch_file_whose_tensors_want_gradients_is_the_same_graph(monkeypatch):
    given, load = tlc.load_graph(DATA / "circuit_tracer.pt"), torch.load

    def wishing(*args, **options):  # saving one would need circuit-tracer's own classes
        content = load(*args, **options)
        return {
            name: v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for name, v in content.items()
        }

    monkeypatch.setattr(torch, "load", wishing)
    graph = tlc.load_graph(DATA / "circuit_tracer.pt")
    assert graph.nodes.equals(given.nodes) and graph.edges.equals(given.edges)


def test_circuit_tracers_json_and_pt_are_the_same_graph_though_two_nodes_share_an_id():
    written = json.loads((DATA / "circuit_tracer.json").read_text())
    assert [n["node_id"] for n in written["nodes"]].count("0_1_2") == 2
    a, b = tlc.load_graph(DATA / "circuit_tracer.pt"), tlc.load_graph(DATA / "circuit_tracer.json")
    assert a.node_ids == b.node_ids and torch.equal(a.adjacency(), b.adjacency())
    assert torch.equal(a._nodes.activation, b._nodes.activation) and torch.equal(a._nodes.weight, b._nodes.weight)
    assert a.info.target_names == b.info.target_names == (" a", "a−b")
    assert b.info.tokens == ("<bos>", ' "quoted"', "\n") and a.info.tokens == ("#0", "#1", "#2")


def test_a_link_that_could_mean_two_nodes_is_not_guessed(tmp_path):
    content = json.loads((DATA / "circuit_tracer.json").read_text())
    output = content["nodes"][-1]["node_id"]
    content["links"] = [link for link in content["links"] if link["target"] != output] + [
        {"source": "0_1_2", "target": output, "weight": 1.0}
    ]
    with pytest.raises(GraphFileError, match="'0_1_2'.*feature of layer 0 and the error of layer 1"):
        load(content, tmp_path)


def test_a_link_into_the_errors_own_layer_can_only_be_the_features(tmp_path):
    content = json.loads((DATA / "circuit_tracer.json").read_text())
    number, target = next(
        (i, n["node_id"])
        for i, n in enumerate(content["nodes"])
        if n["layer"] == "1" and n["feature_type"] == "cross layer transcoder"
    )
    content["links"] = [link for link in content["links"] if link["target"] != target] + [
        {"source": "0_1_2", "target": target, "weight": 1.0}
    ]
    graph = load(content, tmp_path)
    assert graph.edges[graph.edges.target == graph.node_ids[number]].source.tolist() == ["L0/F1@2"]


class Payload:
    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch", "pickle", "hidden"])
def test_a_malicious_pickle_runs_nothing_and_says_what_it_wanted(tmp_path, kind):
    path, payload = tmp_path / "graph.pt", Payload()
    payload.marker = str(tmp_path / "ran")
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"adjacency_matrix": payload}))
    else:
        content = {"input_string": payload}
        if kind == "hidden":
            content = {"cfg": payload, "input_string": "x", "adjacency_matrix": torch.ones(1)}
        torch.save(content, path)
    with pytest.raises(GraphFileError, match="Nothing of it was run|not a whole torch file"):
        tlc.load_graph(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.pt"]


def test_torch_files_that_are_no_graph_or_cut_off_say_so(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(GraphFileError, match="no 'input_string'"):
        tlc.load_graph(tmp_path / "other.pt")
    with zipfile.ZipFile(DATA / "circuit_tracer.pt") as given, zipfile.ZipFile(tmp_path / "outputs.pt", "w") as made:
        for part in given.infolist():  # the entry of the outputs gets another name
            made.writestr(part, given.read(part).replace(b"logit_t", b"logit_x"))
    with pytest.raises(GraphFileError, match="neither logit_targets nor logit_tokens"):
        tlc.load_graph(tmp_path / "outputs.pt")
    whole = (DATA / "circuit_tracer.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GraphFileError, match="not a whole torch file"):
        tlc.load_graph(tmp_path / "cut.pt")


@pytest.mark.parametrize("target", ["neuronpedia", "circuit-tracer"])
def test_a_round_trip_keeps_nodes_links_labels_groups_pins_and_sums(tmp_path, target):
    from tests.tiny import prompt, tiny_bridge, transcoders

    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=40, progress=False)
        graph = tlc.label_features(replacement, graph)
    ids = graph.node_ids
    graph = graph.group("a", ids[2:5]).group('b "c"', (ids[7], ids[-12])).pin(ids[2], ids[9]).rename(ids[11], "mine")
    read = tlc.load_graph(graph.to_neuronpedia(tmp_path, target, slug="s", scan="m"))
    assert read.node_ids == ids and torch.equal(read.adjacency(), graph.adjacency())
    assert read.labels == graph.labels and read.notes == graph.notes
    for name in graph._nodes.__dataclass_fields__:
        ours, theirs = (getattr(g._nodes, name) for g in (graph, read))
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)), name
    assert read.completeness_error() == graph.completeness_error()
    if target == "neuronpedia":
        again = read.to_neuronpedia(tmp_path / "again.json", slug="s", scan="m")
        assert json.loads(again.read_bytes()) == json.loads((tmp_path / "s.json").read_bytes())


def test_what_a_page_changed_counts_more_than_what_we_wrote(tmp_path):
    content = small()
    content["qParams"] = {  # as circuit-tracer's page saves them: lists inside strings
        "pinnedIds": "2_77_1,14_2268_1,gone_1_1",
        "supernodes": json.dumps([["x", "2_77_1"], ["x", "14_2268_1", "2_77_1"]]),
        "clerps": json.dumps([[str(cantor_pair(2, 77)), "by hand"]]),
        "sg_pos": "1 2",
        "linkType": "either",
    }
    graph = load(content, tmp_path)
    assert graph.groups == (("x", ("L2/F77@1",)), ("x (2)", ("L14/F2268@1",)))
    assert graph.label(0) == "by hand" and graph.source_file["qParams"] == {"sg_pos": "1 2", "linkType": "either"}
    assert json.loads(graph.to_neuronpedia(tmp_path / "o.json").read_text())["qParams"]["sg_pos"] == "1 2"


def test_gzipped_files_are_read(tmp_path):
    (tmp_path / "g.json.gz").write_bytes(gzip.compress(json.dumps(small()).encode()))
    assert places(tlc.load_graph(tmp_path / "g.json.gz")) == EXPECTED
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(small()).encode())[:200])
    with pytest.raises(GraphFileError, match="not a whole gzip"):
        tlc.load_graph(tmp_path / "cut.gz")


def without(content, *path):
    *way, last = path
    for step in way:
        content = content[step]
    del content[last]


def change(content, value, *path):
    *way, last = path
    for step in way:
        content = content[step]
    content[last] = value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: without(c, "links"), "no 'links'"),
        (lambda c: without(c, "metadata", "prompt_tokens"), "metadata has no 'prompt_tokens'"),
        (lambda c: without(c, "nodes", 1, "feature_type"), r"nodes\[1\] has no 'feature_type'"),
        (
            lambda c: change(c, "magic", "nodes", 1, "feature_type"),
            r"nodes\[1\] has the feature_type 'magic'; known are",
        ),
        (lambda c: change(c, "high", "nodes", 0, "layer"), r"nodes\[0\] has a layer"),
        (lambda c: change(c, "14_2268_1", "nodes", 0, "node_id"), r"nodes\[1\] has the id '14_2268_1', as nodes\[0\]"),
        (lambda c: change(c, "nowhere", "links", 2, "source"), r"links\[2\] has the source 'nowhere', and no node"),
        (lambda c: change(c, float("nan"), "links", 2, "weight"), r"links\[2\] has the weight nan"),
        (lambda c: change(c, "much", "links", 2, "weight"), r"links\[2\] has the weight 'much'"),
        (lambda c: without(c, "links", 0, "target"), r"links\[0\] has no 'target'"),
        (lambda c: change(c, {}, "links"), "'links' is dict"),
        (lambda c: c["links"].append(c["links"][0]), "given twice"),
        (lambda c: c["links"].append({"source": "27_5_1", "target": "2_77_1", "weight": 1.0}), "run in a circle"),
        (lambda c: c["nodes"].append(dict(c["nodes"][0], node_id="2_cro_77_1")), "stands for what another node is"),
    ],
)
def test_damaged_graphs_say_what_and_where(tmp_path, damage, words):
    content = small()
    damage(content)
    with pytest.raises(GraphFileError, match=words):
        load(content, tmp_path)


@pytest.mark.parametrize("text", ['{"metadata":', '{"a": 1}', "{}", '{"metadata": [], "nodes": [], "links": []}'])
def test_other_json_is_refused(tmp_path, text):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(GraphFileError, match="is not JSON|not an attribution graph"):
        tlc.load_graph(tmp_path / "g.json")


def test_where_the_features_are_is_known_from_the_transcoder_set_that_files_name(tmp_path):
    content = small()
    content["metadata"].pop("feature_details", None)
    content["metadata"]["info"] = {"transcoder_set": "gemma", "generator": {"name": "theirs", "version": "7"}}
    content["metadata"] |= {"pruning_settings": {"node_threshold": 0.8}, "scan": "gemma-2-2b"}
    graph = load(content, tmp_path)
    assert source_set_for(graph, None, None) == SourceSet("gemma-2-2b", "gemmascope-transcoder-16k")
    # An export names the program that traced it, and says nothing of a pruning that no longer holds.
    again = json.loads(graph.to_neuronpedia(tmp_path / "again.json", slug="s").read_bytes())["metadata"]
    assert again["info"]["generator"] == {"name": "theirs", "version": "7"} and "pruning_settings" in again
    pruned = json.loads(graph.prune(0.5).to_neuronpedia(tmp_path / "pruned.json", slug="s").read_bytes())["metadata"]
    assert "pruning_settings" not in pruned
