"""Head loadings: the ways of an edge through heads add up to the edge."""

import copy
from dataclasses import replace

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import ARCHITECTURES, cross_layer, own_bridge, prompt, tiny_bridge, transcoders
from tl_circuits.attention.loadings import _column, _Reads, edge_paths
from tl_circuits.attention.retrace import columns_of, retrace
from tl_circuits.attribution.engines.linear import Leading
from tl_circuits.errors import ArchitectureError, TargetError

DICTIONARIES = {
    "jumprelu": lambda m: transcoders(m),
    "neurons": lambda m: tlc.mlp_neurons(m),
    "skip_before_post_norm": lambda m: transcoders(m, skip=True, output_hook="mlp.hook_out", layers=[1, 2]),
    "cross_layer": lambda m: cross_layer(m),
}
ALL = 10**5


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(a, "jumprelu") for a in ARCHITECTURES]
    + [(a, k) for a in ("gemma3", "neox") for k in DICTIONARIES if k != "jumprelu"],
)
def test_heads_chains_and_the_residual_stream_add_up_to_the_edge(architecture, kind):
    """With chains of up to three heads listed, only chains of four (Gemma has four layers) or, with skip
    connections, three heads are left for the rest."""
    model = tiny_bridge(architecture)
    with tlc.attach(model, DICTIONARIES[kind](model)) as replacement:
        graph = tlc.attribute(replacement, prompt(6), max_nodes=40, progress=False)
        local = retrace(replacement, graph)
        order = graph._edges.weight.abs().argsort(descending=True)
        some = torch.cat([order[:12], order[torch.arange(20, len(order), len(order) // 24)]]).tolist()
        found = edge_paths(local, graph, some, ALL)
    several = 0
    largest = graph.adjacency().abs().amax(1)
    for edge, paths in zip(some, found, strict=True):
        source, target, weight = (getattr(graph._edges, name)[edge] for name in ("source", "target", "weight"))
        first = int(graph._nodes.layer[source]) + 1
        last = min(int(graph._nodes.layer[target]), len(local.sources.layers) - 1)
        if local.engine.parallel and int(graph._nodes.layer[target]) < len(local.sources.layers):
            last -= 1
        layers = last - first + 1
        total = paths.residual + sum(paths.heads.values()) + sum(v for _, v in paths.chains) + paths.rest
        assert total == pytest.approx(float(weight), rel=1e-4, abs=1e-7)
        if layers <= (2 if local.sources.layers[1].skip is not None else 3):
            # Nothing can be left over: what is, is float32 rounding beside the target's largest edge.
            assert abs(paths.rest) <= 1e-4 * float(largest[target])
            several += len(paths.chains) > 0
    assert several > 0


def edge_through(local, graph, edge, heads):
    """An edge with all heads but these switched off: ``heads`` are ``(layer, head)``."""
    view = copy.copy(local.engine)
    view.attention = []
    for layer, attention in enumerate(local.engine.attention):
        kept = torch.zeros(attention.W_O.shape[0])
        kept[[h for at, h in heads if at == layer]] = 1.0
        view.attention.append(replace(attention, W_O=attention.W_O * kept[:, None, None]))
    view.leading = Leading(local.recording, local.sources, view.attention)
    rows, _ = view.rows(_Reads(local, graph, None).targets(int(graph._edges.target[edge])))
    return float(rows[0, _column(graph, columns_of(local.sources), int(graph._edges.source[edge]))])


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("gemma3", "neurons"), ("gemma3", "skip_before_post_norm"), ("neox", "skip_before_post_norm")],
)
def test_each_way_is_what_the_edge_is_with_all_other_heads_switched_off(architecture, kind):
    model = tiny_bridge(architecture)
    with tlc.attach(model, DICTIONARIES[kind](model)) as replacement:
        graph = tlc.attribute(replacement, prompt(6), targets=[7], max_nodes=40, progress=False)
        local = retrace(replacement, graph)
        tokens = graph.is_kind("embedding")[graph._edges.source] & graph.is_kind("logit")[graph._edges.target]
        tokens = tokens.nonzero()[:, 0].tolist()
        # from the position left out; the longest ways there are, one within a position
        edges = [tokens[0], *tokens[-2:]]
        for edge, paths in zip(edges, edge_paths(local, graph, edges, 6), strict=True):
            assert paths.heads
            scale = max(abs(value) for value in paths.heads.values())
            assert edge_through(local, graph, edge, []) == pytest.approx(paths.residual, rel=1e-4, abs=1e-5 * scale)
            for head in list(paths.heads)[::5]:
                alone = edge_through(local, graph, edge, [head]) - paths.residual
                assert alone == pytest.approx(paths.heads[head], abs=1e-4 * scale)
            every = dict(edge_paths(local, graph, [edge], ALL)[0].chains)
            for chain, value in paths.chains:
                together = edge_through(local, graph, edge, chain) - paths.residual - sum(paths.heads[h] for h in chain)
                shorter = sum(v for other, v in every.items() if set(other) < set(chain))
                assert together - shorter == pytest.approx(value, abs=1e-4 * scale)
            assert paths.residual == 0 or int(graph._nodes.position[graph._edges.source[edge]]) == 5


@pytest.fixture(scope="module")
def traced():
    model = own_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)


def test_the_frame_sums_to_the_edge_and_ends_with_the_residual_stream(traced):
    replacement, graph = traced
    edge = graph.edges.iloc[graph.edges.weight.abs().argmax()]
    frame = tlc.head_loadings(replacement, graph, edge.source, edge.target)
    assert list(frame.columns[:3]) == ["layer", "head", "loading"]
    assert frame.kind.iloc[-1] == "residual" and frame.kind.iloc[-2] == "rest"
    assert frame.loading.sum() == pytest.approx(edge.weight, rel=1e-4)
    heads = frame[frame.kind == "head"].loading.abs()
    assert heads.is_monotonic_decreasing and (frame[frame.kind == "chain"].loading.abs().is_monotonic_decreasing)


def test_loadings_of_the_strongest_edges_and_of_supernodes_add_up(traced):
    replacement, graph = traced
    frame = tlc.top_head_loadings(replacement, graph, 25)
    sums = frame.groupby(["source", "target"]).loading.sum()
    weights = graph.edges.set_index(["source", "target"]).weight
    assert len(sums) == 25
    assert sums.to_numpy() == pytest.approx(weights.loc[sums.index].to_numpy(), rel=1e-4)
    top = graph.edges.loc[graph.edges.weight.abs().nlargest(4).index]
    sources, targets = top.source.unique().tolist(), top.target.unique().tolist()
    inside = graph.edges[graph.edges.source.isin(sources) & graph.edges.target.isin(targets)]
    together = tlc.head_loadings(replacement, graph, sources, targets)
    assert together.loading.sum() == pytest.approx(inside.weight.sum(), rel=1e-4)
    pairs = zip(inside.source, inside.target, strict=True)
    singles = [tlc.head_loadings(replacement, graph, source, target, chains=0) for source, target in pairs]
    for row in together[together.kind == "head"].itertuples():
        parts = [float(f[f.path == row.path].loading.sum()) for f in singles]
        assert row.loading == pytest.approx(sum(parts), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("target", [tlc.LogitDifference(5, 9), tlc.LogitDirection(torch.arange(32.0), "rising")])
def test_a_graph_keeps_what_differences_and_directions_read(traced, tmp_path, target):
    replacement, _ = traced
    graph = tlc.attribute(replacement, prompt(), [target], max_nodes=30, progress=False)
    read = tlc.load_graph(graph.save(tmp_path / "g.safetensors"))
    assert read == graph
    edge = graph.edges[graph.edges.target == "logit:0"].iloc[0]
    for kept in (graph, read, graph.prune(0.99, 0.999)):
        assert tlc.head_loadings(replacement, kept, edge.source, "logit:0").loading.sum() == pytest.approx(
            edge.weight, rel=1e-4
        )


def test_another_programs_file_needs_the_targets_once_more(traced, tmp_path):
    replacement, _ = traced
    targets = [tlc.LogitDifference(5, 9)]
    graph = tlc.attribute(replacement, prompt(), targets, max_nodes=30, progress=False)
    graph = tlc.load_graph(graph.to_neuronpedia(tmp_path, slug="s", scan="m"))
    edge = graph.edges[graph.edges.target == "logit:0"].iloc[0]
    with pytest.raises(TargetError, match="targets="):
        tlc.head_loadings(replacement, graph, edge.source, "logit:0")
    for others, words in (
        ([tlc.LogitDifference(5, 8)], "comes out differently"),
        (targets * 2, "targets has 2 entries, the graph was traced for 1"),
    ):
        with pytest.raises(TargetError, match=words):
            tlc.head_loadings(replacement, graph, edge.source, "logit:0", targets=others)
    frame = tlc.head_loadings(replacement, graph, edge.source, "logit:0", targets=targets)
    assert frame.loading.sum() == pytest.approx(edge.weight, rel=1e-4)


def test_targets_given_once_more_are_read_where_a_model_has_no_final_norm():
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=16, d_head=4, n_heads=4, d_mlp=24, d_vocab=101, act_fn="gelu",
        normalization_type=None, device=DEVICE,
    )  # fmt: skip
    model, targets = HookedTransformer(config), [tlc.LogitDifference(5, 9)]
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(6), targets, max_nodes=20, progress=False)
        without = replace(graph, target_vectors=None)  # as a file of another program is read
        edge = without.edges[without.edges.target == "logit:0"].iloc[0]
        frame = tlc.head_loadings(replacement, without, edge.source, "logit:0", targets=targets)
    # float32: a loading is a sum of products, the edge another order of the same sum
    assert frame.loading.sum() == pytest.approx(edge.weight, rel=1e-4)


def test_bad_edges_are_refused_with_a_reason(traced):
    replacement, graph = traced
    with pytest.raises(TargetError, match="no node 'L9/F1@0'"):
        tlc.head_loadings(replacement, graph, "L9/F1@0", "logit:0")
    with pytest.raises(TargetError, match="no edge from logit:0 to token@0"):
        tlc.head_loadings(replacement, graph, "logit:0", "token@0")
    with pytest.raises(TargetError, match="empty list"):
        tlc.head_loadings(replacement, graph, [], "logit:0")
    with pytest.raises(ValueError, match="chains must not be negative"):
        tlc.head_loadings(replacement, graph, "token@0", "logit:0", chains=-1)
    with pytest.raises(ValueError, match="at least 1"):
        tlc.top_head_loadings(replacement, graph, 0)


def test_a_graph_of_another_model_or_dictionary_is_refused(traced):
    replacement, graph = traced
    llama = tiny_bridge("llama")
    with tlc.attach(llama, transcoders(llama)) as other, pytest.raises(TargetError, match="4 layers"):
        tlc.head_loadings(other, graph, "token@0", "logit:0")
    model = tiny_bridge("qwen3")
    with tlc.attach(model, transcoders(model)) as mine:
        graph = tlc.attribute(mine, prompt(), max_nodes=20, progress=False)
    edge = graph.edges[graph.edges.source.str.startswith("L1/F")].iloc[-1]
    with (
        tlc.attach(model, transcoders(model, seed=8)) as other,
        pytest.raises(TargetError, match="no active|other weights"),
    ):
        tlc.head_loadings(other, graph, edge.source, edge.target)


def test_an_architecture_without_frozen_maps_is_refused(traced, monkeypatch):
    replacement, graph = traced

    def refuse(*_):
        raise ArchitectureError("attention of layer 0: the frozen linear map is off.")

    monkeypatch.setattr("tl_circuits.attention.retrace.closed_form", refuse)
    with pytest.raises(ArchitectureError, match="does not tell heads apart"):
        tlc.head_loadings(replacement, graph, "token@0", "logit:0")
