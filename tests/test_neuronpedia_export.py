"""Files for Neuronpedia's and circuit-tracer's pages: what those readers do with them."""

import json
import math
import os
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_circuits as tlc
from tests.conftest import need
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.errors import ExportError, OutputError
from tl_circuits.feature_labels.feature_codes import cantor_pair, cantor_unpair
from tl_circuits.graph import kinds
from tl_circuits.neuronpedia.ids import node_id, parse_node_id

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "tl_circuits/neuronpedia/graph-schema.json").read_text())
DATA = ROOT / "tests/data"
PEER = find_spec("circuit_tracer")  # its files alone; nothing of it is imported
TARGETS = ("neuronpedia", "circuit-tracer")


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        targets = ["w5", "w6", tlc.LogitDifference("w5", "w6"), tlc.LogitDifference("w7", "w8")]
        traced = tlc.attribute(replacement, prompt(), targets, max_nodes=60, progress=False)
        traced = tlc.explain_heads(replacement, tlc.label_features(replacement, traced), 4, targets=targets)
    ids = traced.node_ids
    return (
        traced.group("opposites", ids[2:5])
        .group("100% & more", ids[6:8])
        .pin(ids[2], ids[20])
        .rename(ids[9], 'my "own" name')
    )


def exported(graph, tmp_path, target="neuronpedia", **options):
    path = graph.to_neuronpedia(tmp_path, target, slug="why", scan="tiny-model", overwrite=True, **options)
    return json.loads(path.read_text(encoding="utf-8"))


def with_names(graph, names):
    return replace(graph, info=replace(graph.info, target_names=tuple(names)))


def as_neuronpedia_reads(content):
    """What Neuronpedia's page makes of a file: it fails where the page fails (see viz notes in docs/neuronpedia.md)."""
    layers = [float(n["layer"]) for n in content["nodes"] if n["feature_type"] != "logit" and n["layer"] != "E"]
    assert max(layers, default=0), "no layer found"
    read = {}
    for node in content["nodes"]:
        if node["feature_type"] == "logit" and node["clerp"]:
            token = node["clerp"].split('"')[1]
            read[node["node_id"]] = (token, float(node["clerp"].split("(p=")[1].split(")")[0]))
        elif node["feature_type"] == "cross layer transcoder":
            assert content["metadata"]["schema_version"] == 1
            w = math.floor((math.sqrt(8 * node["feature"] + 1) - 1) / 2)  # in doubles, as JavaScript does
            read[node["node_id"]] = (int(node["layer"]), node["feature"] - (w * w + w) // 2)
    return read


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_is_valid_by_neuronpedias_schema_and_finite(graph, tmp_path, target):
    content = exported(graph, tmp_path, target, source_set="some-set", description="why", creator="me")
    jsonschema.Draft7Validator(SCHEMA).validate(content)
    assert len(content["nodes"]) == len(graph) and len(content["links"]) == len(graph._edges)
    json.dumps(content, allow_nan=False)
    made = content["metadata"]["info"]["generator"]
    assert made == {"name": "tl_circuits", "version": graph.info.version}
    assert 0 < content["metadata"]["replacement_score"] < 1 and content["metadata"]["schema_version"] == 1


def test_neuronpedia_reads_every_feature_and_output_as_we_meant_it(graph, tmp_path):
    content = exported(graph, tmp_path)
    read = as_neuronpedia_reads(content)
    expected = {
        f"{row.layer}_{row.feature}_{row.position}": (row.layer, row.feature)
        for row in graph.nodes.itertuples()
        if row.kind == "feature"
    }
    assert expected.items() <= read.items()
    outputs = [read[n["node_id"]] for n in content["nodes"] if n["feature_type"] == "logit"]
    assert [name for name, _ in outputs] == list(graph.info.target_names)
    logits = [n for n in content["nodes"] if n["feature_type"] == "logit"]
    assert (
        {n["layer"] for n in logits} == {n["node_id"].split("_")[0] for n in logits} == {str(graph.info.n_layers + 1)}
    )


@pytest.mark.parametrize("token", ['say "hi"', '"', "(p=0.5)", 'a" (p=', "<b>&", "\u2028\n\t", "＂"])
def test_tokens_with_quotes_and_brackets_do_not_break_the_readers(graph, tmp_path, token):
    content = exported(with_names(graph, [token, *graph.info.target_names[1:]]), tmp_path)
    first = next(n for n in content["nodes"] if n["feature_type"] == "logit")
    shown, probability = as_neuronpedia_reads(content)[first["node_id"]]
    assert shown.replace("＂", '"').replace("(p＝", "(p=") == token.replace("＂", '"')
    assert probability == pytest.approx(first["token_prob"], abs=1e-3)
    again = tlc.load_graph(tmp_path / "why.json")
    assert again.info.target_names[0] == token


def test_every_node_has_an_id_of_its_own_even_where_circuit_tracer_gives_two_the_same(tmp_path):
    both = tlc.load_graph(DATA / "circuit_tracer.pt")
    content = exported(both, tmp_path)
    ids = [n["node_id"] for n in content["nodes"]]
    assert len(set(ids)) == len(ids) and {"0_1_2", "1_-1_2"} <= set(ids)
    assert {n["feature_type"] for n in content["nodes"] if n["node_id"] == "0_1_2"} == {"cross layer transcoder"}


def test_outputs_that_are_no_single_token_have_ids_too(graph, tmp_path):
    logits = [n for n in exported(graph, tmp_path)["nodes"] if n["feature_type"] == "logit"]
    assert len({n["node_id"] for n in logits}) == 4 and all(n["feature"] >= 0 for n in logits)


def test_names_of_features_cannot_land_on_an_output_in_circuit_tracers_page(graph, tmp_path):
    layer, feature = graph.nodes.loc[9, ["layer", "feature"]]
    clash = cantor_pair(int(layer), int(feature))
    token = graph._nodes.feature.clone()
    token[int(graph.is_kind("logit").nonzero()[0])] = clash
    clashing = replace(graph, _nodes=replace(graph._nodes, feature=token))
    for made, names in ((graph, 1), (clashing, 0)):
        clerps = exported(made, tmp_path, "circuit-tracer")["qParams"]["clerps"]
        assert isinstance(clerps, str) and len(json.loads(clerps)) == names  # its page parses it as JSON


def test_one_file_holds_pins_and_groups_the_way_each_page_wants_them(graph, tmp_path):
    content = exported(graph, tmp_path)
    assert content["qParams"]["supernodes"][1][0] == "100% & more"
    members = [i for group in content["qParams"]["supernodes"] for i in group[1:]]
    assert set(members) < set(content["qParams"]["pinnedIds"])  # a supernode of unpinned nodes is not drawn
    node = content["nodes"][9]
    assert content["qParams"]["clerps"] == [[f"{node['layer']}_{node['feature']}_{node['ctx_idx']}", 'my "own" name']]
    assert node["clerp"] == 'my "own" name'


def test_graphs_that_a_page_cannot_show_are_refused(graph, tmp_path):
    only_first = graph._subgraph(
        (graph._nodes.layer < 1) | graph.is_kind("logit"), torch.zeros(len(graph._edges), dtype=torch.bool)
    )
    with pytest.raises(ExportError, match="only nodes of layer 0.*circuit-tracer"):
        exported(only_first, tmp_path)
    exported(only_first, tmp_path, "circuit-tracer")
    one_token = replace(graph, info=replace(graph.info, tokens=("a",)), notes=graph.notes)
    with pytest.raises(ExportError, match="one token"):
        one_token.to_neuronpedia(tmp_path, "circuit-tracer", slug="x")


def test_a_small_influence_value_means_an_important_node(graph, tmp_path):
    content = exported(graph, tmp_path)
    shares = [(n["influence"], i) for i, n in enumerate(content["nodes"]) if n["influence"] is not None]
    assert min(shares)[1] == int((graph.influence - graph._nodes.weight).argmax())
    assert max(shares)[0] <= content["metadata"]["node_threshold"]  # nothing is hidden at first
    assert {n["influence"] for n in content["nodes"] if n["feature_type"] == "logit"} == {None}


def test_influence_and_scores_are_circuit_tracers_on_its_own_graph(tmp_path):
    ours = exported(tlc.load_graph(DATA / "circuit_tracer.pt"), tmp_path)
    theirs = json.loads((DATA / "circuit_tracer.json").read_text())
    pairs = [
        (a["influence"], b["influence"])
        for a, b in zip(ours["nodes"], theirs["nodes"], strict=True)
        if b["influence"] is not None
    ]
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in pairs) and len(pairs) == 14  # theirs is float32


def test_a_source_set_is_only_told_to_the_database_when_it_exists(graph, tmp_path):
    unknown = exported(graph, tmp_path, source_set="mine")["metadata"]
    assert (
        unknown["feature_details"]["neuronpedia_source_set"] == "mine"
        and "neuronpedia_source_set" not in unknown["info"]
    )
    gemma = replace(graph, info=replace(graph.info, dictionary="gemma-scope-2b-pt-transcoders"))
    metadata = json.loads(gemma.to_neuronpedia(tmp_path / "g.json").read_text())["metadata"]
    assert metadata["scan"] == "gemma-2-2b"
    assert metadata["info"]["neuronpedia_source_set"] == "gemmascope-transcoder-16k"
    assert metadata["feature_details"]["neuronpedia_source_set"] == "gemmascope-transcoder-16k"


def test_local_paths_stay_on_this_computer(graph, tmp_path):
    assert graph.info.model.startswith("/")
    text = graph.to_neuronpedia(tmp_path / "g.json").read_text()
    assert os.path.dirname(graph.info.model) + "/" not in text


@pytest.mark.parametrize(("slug", "which"), [("a b", "' '"), ("../x", "'/'"), ("é/ß", "'/' 'ß' 'é'"), ("", "empty")])
def test_a_slug_with_illegal_characters_says_which(graph, tmp_path, slug, which):
    with pytest.raises(ExportError, match=which):
        graph.to_neuronpedia(tmp_path, slug=slug)
    assert os.listdir(tmp_path) == []


def test_a_slug_is_made_from_the_file_or_the_prompt(graph, tmp_path):
    assert json.loads(graph.to_neuronpedia(tmp_path / "my file.json").read_text())["metadata"]["slug"] == "my-file"
    assert graph.to_neuronpedia(tmp_path).name.startswith("w52")
    with pytest.raises(ExportError, match="looks for other.json"):
        graph.to_neuronpedia(tmp_path / "x.json", "circuit-tracer", slug="other")
    with pytest.raises(ExportError, match="'page' is not"):
        graph.to_neuronpedia(tmp_path, "page")


def test_the_list_of_graphs_is_kept_by_slug(graph, tmp_path):
    for slug in ("a", "b", "a"):
        graph.to_neuronpedia(tmp_path, "circuit-tracer", slug=slug, overwrite=True)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [g["slug"] for g in listed] == ["b", "a"] and listed[0]["prompt"] == graph.info.prompt
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(ExportError, match="is not a list of graphs"):
        graph.to_neuronpedia(tmp_path, "circuit-tracer", slug="c")


def test_nothing_is_overwritten_or_left_half_written(graph, tmp_path, monkeypatch):
    path = tmp_path / "g.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        graph.to_neuronpedia(path)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        graph.to_neuronpedia(path, overwrite=True)
    assert os.listdir(tmp_path) == ["g.json"] and path.read_text() == "mine"


def test_same_graph_same_bytes(graph, tmp_path):
    first = graph.to_neuronpedia(tmp_path / "a.json", slug="s").read_bytes()
    assert graph.to_neuronpedia(tmp_path / "b.json", slug="s").read_bytes() == first


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 200), st.integers(0, 2**22), st.integers(0, 5000))
def test_numbers_and_ids_come_back(layer, feature, position):
    assert cantor_unpair(cantor_pair(layer, feature)) == (layer, feature)
    for kind in ("feature", "error", "attention feature", "attention error"):
        place = parse_node_id(node_id(kind, layer, feature, position, 300), 300)
        assert (place.kind, place.layer, place.position) == (kind, layer, position)
        assert place.feature == (feature if "feature" in kind else -1)


def test_the_numbers_of_the_published_example_come_out():
    assert cantor_pair(14, 2268) == 2607171


D3 = """window.d3 = {
  max: (a, f = d => d) => a.map(f).filter(v => v >= v).reduce((m, v) => m === undefined || v > m ? v : m, undefined),
  sum: (a, f = d => d) => a.map(f).reduce((m, v) => m + (+v || 0), 0),
  sort: (a, f) => [...a].sort((x, y) => f(x) < f(y) ? -1 : f(x) > f(y) ? 1 : 0),
  nestBy: (a, f) => [...a.reduce((m, d) => m.set(f(d), [...(m.get(f(d)) || []), d]), new Map()).values()],
}; window.location.search"""


@pytest.fixture(scope="module")
def peer():
    need(PEER is not None, "the files of circuit-tracer (pip install --no-deps circuit-tracer==0.5.0)")
    return Path(PEER.origin).parent


def test_circuit_tracers_own_page_reads_the_file(graph, tmp_path, peer, browser):
    content = exported(graph, tmp_path, "circuit-tracer")
    assets = peer / "frontend/assets"
    page = browser.new_page()
    page.route("**/*", lambda route: route.fulfill(body="<body></body>", content_type="text/html"))
    page.goto("http://localhost/")
    page.evaluate(D3)
    page.add_script_tag(path=assets / "util.js")
    page.add_script_tag(path=assets / "attribution_graph/util-cg.js")
    read = page.evaluate(
        """async ([data, state]) => {
          const out = await utilCg.formatData(data, {...state, clerps: new Map(JSON.parse(data.qParams.clerps))})
          return {nodes: out.nodes.map(d => [d.nodeId, d.clerp, d.logitPct ?? null, d.logitToken ?? null,
                    ...(d.feature_type == 'cross layer transcoder' ? util.cantorUnpair(d.featureIndex) : [])]),
                  links: out.links.length}
        }""",
        [content, {"pruningThreshold": 1.0, "pinnedIds": content["qParams"]["pinnedIds"]}],
    )
    page.close()
    assert len(read["nodes"]) == len(graph) and read["links"] == len(graph._edges)
    by_id = {row[0]: row[1:] for row in read["nodes"]}
    for node, row in zip(content["nodes"], graph.nodes.itertuples(), strict=True):
        label, percent, token, *place = by_id[node["node_id"]]
        if row.kind == "feature":
            assert place == [row.layer, row.feature]
        if row.kind == "logit":
            assert percent == pytest.approx(node["token_prob"], abs=1e-3) and token in graph.info.target_names
    assert by_id[content["nodes"][9]["node_id"]][0] == 'my "own" name'


def test_circuit_tracers_own_models_read_the_file(graph, tmp_path, peer):
    content = exported(graph, tmp_path, "circuit-tracer")
    spec = spec_from_file_location("graph_models", peer / "frontend/graph_models.py")
    models = module_from_spec(spec)
    spec.loader.exec_module(models)
    read = models.Model(**content)
    assert (len(read.nodes), len(read.links)) == (len(graph), len(graph._edges))
    assert read.metadata.schema_version == 1


def test_why_heads_look_goes_out_with_every_contributor_and_comes_back(graph, tmp_path):
    content = exported(graph, tmp_path)
    jsonschema.validate(content, SCHEMA)
    by_id = {node["node_id"]: node for node in content["nodes"]}
    told = {their: node["qk_tracing_results"] for their, node in by_id.items() if "qk_tracing_results" in node}
    assert len(told) == len({story["target"] for story in graph.head_stories}) > 0
    only = content["qk_only_nodes"]
    named = {
        x for rows in told.values() for listed in rows.values() for row in listed for x in row if isinstance(x, str)
    }
    assert named <= by_id.keys() | only.keys() and named & by_id.keys() and only.keys() == named - by_id.keys() != set()
    for their, entry in only.items():
        place = parse_node_id(their)
        assert entry["ctx_idx"] == place.position
        if place.kind == "feature":
            assert cantor_unpair(entry["feature"]) == (place.layer, place.feature)
    told_of = [head for story in graph.head_stories for head in story["heads"] if "pairs" in head]
    sources = {
        x for head in told_of for name in ("pairs", "by_query", "by_key") for row in head[name] for x in row[:-1]
    }
    ours = [kinds.parse_node_id(x) for x in sources if "/F" in x]
    theirs = [parse_node_id(their) for their in only]
    found = {(p.layer, p.feature, p.position) for p in theirs if p.kind == "feature"}
    assert found and found <= {(p.layer, p.feature, p.position) for p in ours}
    story = graph.head_stories[0]
    query, _, weight = next(row for row in story["heads"][0]["pairs"] if "bias" not in row)
    same = [n for n in content["nodes"] if n["ctx_idx"] == int(query.split("@")[1])]
    assert (
        any(row[2] == pytest.approx(weight) for rows in told.values() for row in rows["pair_wise_contributors"])
        and same
    )
    again = tlc.load_graph(tmp_path / "why.json")
    assert list(again.head_stories) == list(graph.head_stories)
    small = again.prune(node_threshold=0.5)  # contributors that are pruned become entries of their own
    pruned = json.loads(small.to_neuronpedia(tmp_path / "small.json").read_text())
    ids = {node["node_id"] for node in pruned["nodes"]} | pruned.get("qk_only_nodes", {}).keys()
    rows = [r for n in pruned["nodes"] for listed in n.get("qk_tracing_results", {}).values() for r in listed]
    assert rows and {x for row in rows for x in row if isinstance(x, str)} <= ids
    (tmp_path / "odd.json").write_text(
        json.dumps(
            content | {"metadata": content["metadata"] | {"tl_circuits": {"head_stories": [3, {"source": "x"}]}}}
        )
    )
    assert tlc.load_graph(tmp_path / "odd.json").head_stories == ()
