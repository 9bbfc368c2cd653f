"""The graph: frames, scores, pruning, and the file."""

import math
import os
import stat
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tl_circuits as tlc
from tests.oracles import reference_prune, reference_scores
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.attribution.check_sums import _SUMS_WITHIN, require_sums
from tl_circuits.errors import ArchitectureError, GraphFileError, OutputError, TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.graph.nodes import GraphInfo, Nodes
from tl_circuits.graph.paths import strongest_paths
from tl_circuits.graph.prune import prune_masks
from tl_circuits.graph.scores import Edges, scores


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        traced = tlc.attribute(replacement, prompt(), max_nodes=90, progress=False)
        return tlc.label_features(replacement, traced)


def random_dag(seed, n_features, n_errors, n_tokens, n_logits):
    generator = torch.Generator().manual_seed(seed)
    n = n_features + n_errors + n_tokens + n_logits
    dense = torch.randn(n, n, generator=generator) * (torch.rand(n, n, generator=generator) < 0.5)
    dense[n_features : n - n_logits] = 0  # errors and tokens have no inputs
    dense[:n_features, :n_features] = dense[:n_features, :n_features].tril(-1)
    dense[:, n - n_logits :] = 0
    weights = torch.zeros(n)
    weights[n - n_logits :] = torch.rand(n_logits, generator=generator) + 0.05
    return dense, weights


def as_edges(dense):
    target, source = dense.nonzero(as_tuple=True)
    return Edges(source, target, dense[target, source])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), sizes=st.tuples(*[st.integers(1, 12)] * 3), n_logits=st.integers(1, 4))
def test_scores_follow_their_definition(seed, sizes, n_logits):
    dense, weights = random_dag(seed, *sizes, n_logits)
    index = torch.arange(len(weights))
    is_error = (index >= sizes[0]) & (index < sizes[0] + sizes[1])
    is_token = (index >= sizes[0] + sizes[1]) & (index < sum(sizes))
    found = scores(as_edges(dense), weights, is_error, is_token)
    replacement, completeness = reference_scores(dense, weights, is_error, is_token)
    # Where no influence starts in tokens or errors, the definition is 0 / 0.
    assert found.replacement == pytest.approx(0.0 if math.isnan(replacement) else replacement, abs=1e-6)
    assert found.completeness == pytest.approx(completeness, abs=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(*[st.integers(1, 12)] * 3),
    n_logits=st.integers(1, 4),
    nodes_share=st.sampled_from([0.3, 0.6, 0.8, 0.95]),
    edges_share=st.sampled_from([0.5, 0.9, 0.98]),
)
def test_pruning_follows_its_definition(seed, sizes, n_logits, nodes_share, edges_share):
    dense, weights = random_dag(seed, *sizes, n_logits)
    dense, weights = dense.double(), weights.double()  # so that no threshold falls between two roundings
    n, n_always = len(weights), sizes[2] + n_logits
    always = torch.arange(n) >= n - n_always
    is_feature = torch.arange(n) < sizes[0]
    edges = as_edges(dense)
    nodes, kept = prune_masks(edges, weights, is_feature, always, nodes_share, edges_share)
    expected_nodes, expected_edges = reference_prune(dense, weights, sizes[0], n_always, nodes_share, edges_share)
    assert torch.equal(nodes, expected_nodes)
    assert torch.equal(kept, expected_edges[edges.target, edges.source])


def test_frames_stand_in_adjacency_order(graph):
    nodes, edges, adjacency = graph.nodes, graph.edges, graph.adjacency()
    assert list(nodes.columns[:10]) == [
        "id",
        "kind",
        "layer",
        "position",
        "feature",
        "token",
        "activation",
        "bias",
        "influence",
        "label",
    ]
    assert list(dict.fromkeys(nodes.kind)) == ["feature", "error", "embedding", "logit"]
    assert nodes.id.is_unique and len(nodes) == len(graph) == len(adjacency)
    errors = nodes[nodes.kind == "error"]
    assert errors[["layer", "position"]].values.tolist() == [[layer, p] for layer in range(4) for p in range(9)]
    assert (nodes[nodes.kind == "embedding"].feature == prompt().numpy()).all()
    assert (nodes[nodes.kind == "error"].feature == -1).all()
    row = {node: i for i, node in enumerate(nodes.id)}
    some = edges.sample(20, random_state=0)
    for edge in some.itertuples():
        assert adjacency[row[edge.target], row[edge.source]] == pytest.approx(edge.weight)
    assert int((adjacency != 0).sum()) == len(edges)


def test_rows_and_bias_add_up_to_the_value_for_anyone(graph):
    nodes = graph.nodes
    sums = graph.adjacency().sum(1).numpy() + nodes.bias.to_numpy()
    has_row = nodes.kind.isin(["feature", "logit"])
    # float32 sums of up to a few hundred entries
    assert abs(sums - nodes.value)[has_row].max() < 1e-4 * nodes.value.abs().max()
    assert (nodes.value == nodes.activation)[has_row].all()


def test_a_smaller_budget_moves_untraced_features_into_bias_and_coverage():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        small, whole = (tlc.attribute(replacement, prompt(), max_nodes=n, progress=False) for n in (15, 10_000))
    assert int(small.is_kind("feature").sum()) == 15
    assert small.completeness_error() < 1e-4 and whole.completeness_error() < 1e-4
    assert float(small._nodes.residue.abs().max()) > 0 and float(whole._nodes.residue_mass.max()) < 1e-4
    assert small.coverage < whole.coverage <= 1.0
    assert whole.coverage == pytest.approx(1.0, abs=1e-5)


def test_pruned_graphs_still_add_up(graph):
    pruned = graph.prune(0.6, 0.9)
    assert 0 < len(pruned) < len(graph)
    assert pruned.completeness_error() < 1e-4
    assert set(pruned.node_ids) < set(graph.node_ids)
    kept = [i for i in range(len(pruned)) if i in pruned.labels]
    assert kept and all(pruned.label(i) == graph.label(graph.node_ids.index(pruned.node_ids[i])) for i in kept)


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_thresholds_outside_zero_and_one_are_refused(graph, bad):
    with pytest.raises(ValueError, match="between 0 and 1"):
        graph.prune(node_threshold=bad)


def test_saving_and_loading_keeps_everything(graph, tmp_path):
    path = graph.save(tmp_path / "g.safetensors")
    loaded = tlc.load_graph(path)
    assert loaded.info == graph.info and loaded.labels == graph.labels
    assert torch.equal(loaded.adjacency(), graph.adjacency())
    assert loaded.nodes.equals(graph.nodes)
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_an_existing_file_is_not_overwritten_unless_asked(graph, tmp_path):
    path = tmp_path / "g.safetensors"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        graph.save(path)
    assert path.read_text() == "mine"
    graph.save(path, overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    assert os.listdir(tmp_path) == ["g.safetensors"]


def test_a_place_that_cannot_be_written_says_so(graph, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        graph.save(tmp_path / "missing" / "g.safetensors")


def test_an_interrupted_save_leaves_no_file(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        graph.save(tmp_path / "g.safetensors")
    assert os.listdir(tmp_path) == []


def test_files_that_are_no_graph_say_what_is_wrong(graph, tmp_path):
    whole = graph.save(tmp_path / "g.safetensors").read_bytes()
    cases = {"cut": whole[: len(whole) // 2], "short": whole[:5], "noise": b"hello " * 100, "empty": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GraphFileError, match="not a whole safetensors file"):
            tlc.load_graph(tmp_path / name)
    with pytest.raises(GraphFileError, match="no graph file"):
        tlc.load_graph(tmp_path / "nowhere")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(GraphFileError, match="not an attribution graph of ours"):
        tlc.load_graph(tmp_path / "foreign")


@pytest.mark.parametrize("damage", ["missing", "lengths", "index", "order", "newer"])
def test_damaged_tables_are_refused(graph, tmp_path, damage):
    import json

    from safetensors import safe_open

    path = graph.save(tmp_path / "g.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if damage == "missing":
        del tensors["nodes.bias"]
    elif damage == "lengths":
        tensors["nodes.bias"] = tensors["nodes.bias"][:-1]
    elif damage == "index":
        tensors["edges.source"] = tensors["edges.source"] + len(graph)
    elif damage == "order":
        tensors |= {name: tensors[name].flip(0) for name in tensors if name.startswith("edges.")}
    else:
        content = json.loads(metadata["tl_circuits.graph"])
        metadata["tl_circuits.graph"] = json.dumps(content | {"format_version": 999})
    save_file(tensors, path, metadata)
    with pytest.raises(GraphFileError, match="newer" if damage == "newer" else "damaged"):
        tlc.load_graph(path)


def test_networkx_carries_the_frames(graph):
    pytest.importorskip("networkx")
    made = graph.prune().to_networkx()
    assert made.number_of_nodes() == len(graph.prune())
    source, target, data = next(iter(made.edges(data=True)))
    assert data["weight"] != 0 and made.nodes[source]["kind"] in ("feature", "error", "embedding")


def test_a_node_is_found_by_its_id_and_every_column_is_explained():
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
        assert replacement.site(0) + ". + hook_sae_input" in repr(replacement)
    name = next(i for i in graph.node_ids if "/F" in i)
    row = graph.nodes.set_index("id").loc[name]
    assert graph.node(name).id == name and graph.node(name).activation == row.activation
    with pytest.raises(TargetError, match=f"no node .*did you mean .*{name.split('@')[0]}"):
        graph.node(name.split("@")[0])
    for column in graph.nodes.columns:
        assert f"``{column}``" in tlc.AttributionGraph.nodes.__doc__, column


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_sums_may_be_off_by_a_share_of_a_nodes_value_in_a_model_of_any_scale(graph, scale):
    nodes, edges = graph._nodes, graph._edges
    known = (~nodes.value.isnan()).nonzero()[:, 0]
    node = known[nodes.value[known].abs().argmax()]  # the node of largest value, which sets its own limit
    for share, fits in ((0.2, True), (30.0, False)):  # rounding of float32 is allowed besides
        bias = scale * nodes.bias
        bias[node] += share * _SUMS_WITHIN[torch.float32] * scale * nodes.value[node].abs()
        changed = replace(nodes, bias=bias, value=scale * nodes.value)
        made = replace(graph, _nodes=changed, _edges=Edges(edges.source, edges.target, scale * edges.weight))
        with (
            nullcontext()
            if fits
            else pytest.raises(
                ArchitectureError, match=f"does not add up: edges and bias of {graph.node_ids[node]} sum to"
            )
        ):
            require_sums(made, torch.float32)


def two_full_layers(width=250, n_tokens=4):
    """Tokens, two layers in which every feature reads every one before it, and an answer: 62,500 edges at one depth."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([Kind.FEATURE] * 2 * width + [Kind.EMBEDDING] * n_tokens + [Kind.LOGIT])
    layer = torch.tensor([0] * width + [1] * width + [-1] * n_tokens + [2])
    first, second, tokens = (
        torch.arange(width),
        torch.arange(width, 2 * width),
        torch.arange(2 * width, 2 * width + n_tokens),
    )
    answer = torch.tensor([len(kind) - 1])
    pairs = torch.cat(
        [torch.cartesian_prod(first, tokens), torch.cartesian_prod(second, first), torch.cartesian_prod(answer, second)]
    )
    position = torch.full((len(kind),), n_tokens - 1)
    position[tokens] = torch.arange(n_tokens)
    nothing, value = torch.zeros(len(kind)), torch.full((len(kind),), float("nan"))
    weights = torch.where(kind == Kind.LOGIT, 1.0, 0.0)
    nodes = Nodes(
        kind, layer, position, torch.arange(len(kind)), torch.ones(len(kind)), value, nothing, nothing, nothing, weights
    )
    words = tuple(f" w{i}" for i in range(n_tokens))
    info = GraphInfo(
        "".join(words),
        tuple(range(n_tokens)),
        words,
        (" x",),
        (1.0,),
        "none",
        "none",
        2,
        True,
        "linear",
        2 * width,
        2 * width,
        "0",
    )
    return AttributionGraph(
        info, nodes, Edges(pairs[:, 1], pairs[:, 0], torch.randn(len(pairs), generator=generator)), {}
    )


def test_the_strongest_paths_are_those_of_a_search_by_hand_with_any_number_of_threads():
    graph = two_full_layers()
    shares = graph.adjacency().double().abs()
    shares /= shares.sum(1, keepdim=True).clamp_min(1e-30)
    into_first = shares[:250, 500:504].max(1)
    into_second = (shares[250:500, :250] * into_first.values).max(1)
    direct = graph.adjacency()[504, 250:500].abs().argsort(descending=True)
    wanted = []
    for feature in direct[:20].tolist():
        before = int(into_second.indices[feature])
        wanted.append((500 + int(into_first.indices[before]), before, 250 + feature, 504))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert [path.nodes for path in strongest_paths(graph, 20)] == wanted, f"{count} threads"
    finally:
        torch.set_num_threads(threads)
