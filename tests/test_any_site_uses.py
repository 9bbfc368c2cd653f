"""What one does with graphs of autoencoders: interventions, faithfulness, attention, labels, files, pages, texts."""

import copy
from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests.sites import at, autoencoders, several
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.attention.loadings import _Reads
from tl_circuits.attention.qk import score_attribution
from tl_circuits.attention.retrace import columns_of, retrace
from tl_circuits.errors import BelongingError

SETS = {
    "stream": at("hook_resid_post", 3),
    "mixed": {0: "attn.hook_z", 1: "hook_mlp_out", 2: "hook_attn_out"},
}


@pytest.fixture(params=SETS)
def traced(request):
    model = tiny_bridge("llama")
    with tlc.attach(model, autoencoders(model, SETS[request.param])) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)


def strongest(graph, kind="feature"):
    """A node of this kind, the one with the largest total effect."""
    here = graph.is_kind(kind)
    return graph.node_ids[int((graph._nodes.total_effect.abs() * here).argmax())]


def test_direct_effects_are_predicted_exactly_and_all_effects_follow(traced):
    replacement, graph = traced
    report = tlc.faithfulness(replacement, graph, n=12, seed=0)
    held = report.effects[report.effects.freeze == "all"]
    assert len(held) and (held.predicted - held.measured).abs().max() < 1e-4 * held.measured.abs().max()  # float32


@pytest.mark.parametrize("freeze", ["none", "attention", "all"])
def test_an_ablation_is_the_same_as_a_hook_that_takes_the_vector_out(traced, freeze):
    replacement, graph = traced
    model, dictionary = replacement.model, replacement.dictionary
    index = graph.node_numbers[strongest(graph)]
    layer, position, feature = (int(getattr(graph._nodes, name)[index]) for name in ("layer", "position", "feature"))
    result = tlc.intervene(replacement, prompt(), tlc.Ablate(layer, position, feature), freeze=freeze)
    after = result.activations.query("layer == @layer and position == @position and feature == @feature")
    assert float(after.before.iloc[0]) > 0
    if freeze != "none":
        return  # what is held is compared with edges in other tests
    assert (result.logits - result.baseline_logits).abs().max() > 1e-4
    step = float(after.before.iloc[0]) * dictionary[layer].W_dec[feature]

    def by_hand(tensor, hook):
        changed = tensor.clone()
        changed[0, position] -= step.reshape(tensor.shape[2:])
        return changed

    with torch.no_grad():
        expected = model.run_with_hooks(prompt()[None], fwd_hooks=[(dictionary.output_hook(layer), by_hand)])[0]
    assert torch.allclose(result.logits, expected, atol=1e-5)  # float32, another order of sums


def test_generation_with_edits_repeats_what_runs_without_a_cache_give(traced):
    replacement, graph = traced
    index = graph.node_numbers[strongest(graph)]
    layer, feature = int(graph._nodes.layer[index]), int(graph._nodes.feature[index])
    edits, ids = [tlc.Scale(layer, None, feature, factor=-3.0)], prompt().tolist()
    text = tlc.generate(replacement, prompt(), edits, max_new_tokens=3)
    for _ in range(3):
        ids.append(int(tlc.intervene(replacement, ids, edits, freeze="none").logits[-1].argmax()))
    assert text.split()[-3:] == replacement.model.tokenizer.decode(ids[-3:]).split()


def with_heads(engine, kept):
    """The engine with heads that write nothing, but for those ``kept``, pairs of layer and head."""
    cut, blocks = copy.copy(engine), []
    for layer, block in enumerate(engine.blocks):
        mask = torch.zeros(len(block.attention.W_O), 1, 1)
        mask[[head for at_layer, head in kept if at_layer == layer]] = 1.0
        into = block.heads and replace(block.heads, into=replace(block.heads.into, W_O=block.heads.into.W_O * mask))
        blocks.append(replace(block, attention=replace(block.attention, W_O=block.attention.W_O * mask), heads=into))
    cut.blocks = blocks
    return cut


def test_a_heads_loading_is_the_edge_with_all_other_heads_cut(traced):
    replacement, graph = traced
    with torch.no_grad():
        local = retrace(replacement, graph)
        reads, columns = _Reads(local, graph, None), columns_of(local.sources)

        def cut(layer, head, target, column):
            return float(with_heads(local.engine, [(layer, head)]).rows(reads.targets(target))[0][0, column])

        checked = 0
        for edge in graph._edges.weight.abs().argsort(descending=True)[:40:4].tolist():
            source, target, weight = (getattr(graph._edges, name)[edge] for name in ("source", "target", "weight"))
            frame = tlc.head_loadings(replacement, graph, int(source), int(target))
            assert abs(frame.loading.sum() - float(weight)) < 1e-5 * max(1.0, abs(float(weight)))
            place = (int(getattr(graph._nodes, name)[int(source)]) for name in ("kind", "layer", "position", "feature"))
            column = columns.find(*place)
            residual = cut(-1, 0, int(target), column)
            assert abs(residual - float(frame.loading[frame.kind == "residual"].iloc[0])) < 1e-5 * abs(float(weight))
            for _, row in frame[frame.kind == "head"].head(2).iterrows():
                alone = cut(int(row.layer), int(row["head"]), int(target), column) - residual
                assert abs(alone - row.loading) < 1e-5 * abs(float(weight))  # float32
                checked += 1
    assert checked > 5


@pytest.mark.parametrize(
    "sites",
    [
        {0: "attn.hook_z", 1: "hook_mlp_out", 2: "hook_attn_out"},
        {0: "hook_resid_pre"},
        {2: "hook_resid_post"},
        {2: "hook_mlp_out"},
    ],
)
@pytest.mark.parametrize("architecture", ["gemma2", "neox"])
def test_two_heads_one_after_the_other_carry_what_the_edge_loses_if_both_are_not_there(architecture, sites):
    model = tiny_bridge(architecture)
    with tlc.attach(model, autoencoders(model, sites), mlps="ratio") as replacement, torch.no_grad():
        graph = tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)
        local = retrace(replacement, graph)
        reads, columns, checked = _Reads(local, graph, None), columns_of(local.sources), 0
        for edge in graph._edges.weight.abs().argsort(descending=True)[:60:6].tolist():
            source, target, weight = (getattr(graph._edges, name)[edge] for name in ("source", "target", "weight"))
            frame = tlc.head_loadings(replacement, graph, int(source), int(target), chains=10_000)
            column = columns.find(
                *(int(getattr(graph._nodes, name)[int(source)]) for name in ("kind", "layer", "position", "feature"))
            )
            assert abs(frame.loading.sum() - float(weight)) < 1e-5 * max(1.0, abs(float(weight)))

            def left(*kept, target=target, column=column):
                return float(with_heads(local.engine, kept).rows(reads.targets(int(target)))[0][0, column])

            for path, loading in frame[frame.kind == "chain"][["path", "loading"]].head(3).itertuples(index=False):
                first, second = [tuple(int(part[1:]) for part in head.split("/")) for head in path.split(" > ")]
                alone = left(first, second) - left(first) - left(second) + left()
                assert abs(alone - loading) < 1e-5 * max(1.0, abs(float(weight)))  # float32
                checked += 1
    assert checked > 3


def test_attention_scores_are_sums_over_features_and_errors(traced):
    replacement, graph = traced
    qk = tlc.qk_attribution(replacement, graph, layer=2, head=1, query=8, key=2, top=None)
    assert abs(qk.total - qk.score) < 1e-4 and abs(qk.terms.weight.sum() - qk.score) < 1e-4  # float32
    assert (qk.terms.query_source.str.contains("/F")).any()
    assert tlc.explain_heads(replacement, graph).head_stories


REBUILT = {
    "stream before every layer": (at("hook_resid_pre", 3),),
    "one of three": ({0: "hook_mlp_out", 1: "hook_resid_pre", 2: "attn.hook_z"},),
    "several in a layer": (
        "hook_attn_out",
        {1: "hook_resid_pre", 2: "hook_resid_pre"},
        {0: "hook_resid_post", 1: "attn.hook_z"},
    ),
}


@pytest.mark.parametrize("kind", REBUILT)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox", "gpt2"])
def test_heads_that_read_a_rebuilt_stream_look_by_its_features_and_errors(architecture, kind):
    model = tiny_bridge(architecture)
    rebuilt = {
        layer
        for one in REBUILT[kind]
        if isinstance(one, dict)
        for layer, site in one.items()
        if site == "hook_resid_pre"
    }
    with tlc.attach(model, several(model, *REBUILT[kind])) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
        whole, found = retrace(replacement, graph), []
        for layer in range(3):
            qk = tlc.qk_attribution(
                replacement, graph, layer=layer, head=1, query=8, key=2 if layer == 1 else 7, top=None
            )
            again = score_attribution(whole, graph, layer, 1, qk.query, qk.key, top=None)
            assert abs(qk.total - qk.score) < 1e-4 * max(1.0, abs(qk.score))  # float32
            assert abs(again.total - qk.total) < 1e-5 and len(again.terms) == len(qk.terms)
            if layer in rebuilt:
                assert not any(qk.by_query.kind == "embedding")  # nothing passes the rebuilt stream
                assert {*qk.by_query.layer} <= {layer, -1} and {*qk.by_query.position} <= {qk.query, -1}
            found.append(tlc.qk_attribution(replacement, graph, layer=layer, head=1, query=qk.query, key=qk.key))
        effects = tlc.faithfulness(replacement, graph, n=2, freezes=("all",), scores=found).effects.query(
            "freeze == 'score'"
        )
    assert len(effects) > 10 and effects.predicted.abs().max() > 1e-3
    # Measured in the model itself with everything else held; float32, each change the difference of two runs.
    scale = effects.groupby("target").predicted.transform(lambda column: column.abs().max())
    assert ((effects.predicted - effects.measured).abs() <= 1e-3 * scale).all()


def test_labels_say_what_features_write_to_the_stream(traced):
    replacement, graph = traced
    model, dictionary = replacement.model, replacement.dictionary
    labelled = tlc.label_features(replacement, graph)
    index = graph.node_numbers[strongest(graph)]
    layer, feature = int(graph._nodes.layer[index]), int(graph._nodes.feature[index])
    written = dictionary[layer].W_dec[feature]
    if dictionary[layer].input_hook == "attn.hook_z":
        written = written @ model.blocks[layer].attn.W_O.flatten(0, 1)
    best = int((written @ model.W_U).argmax())
    assert labelled.labels[index].promotes[0] == model.tokenizer.decode([best])


def test_files_pages_and_exports_hold_them(traced, tmp_path):
    replacement, graph = traced
    again = tlc.load_graph(graph.save(tmp_path / "graph.safetensors"))
    assert again.node_ids == graph.node_ids and torch.equal(again.adjacency(), graph.adjacency())
    assert graph.to_html(tmp_path / "page.html").stat().st_size > 10_000
    graph.plot(tmp_path / "picture.svg")
    graph.to_neuronpedia(tmp_path / "exported")
    assert tlc.dictionary_quality(replacement, [prompt()]).explained_variance.notna().all()
    texts = tmp_path / "texts.txt"
    texts.write_text("w5 w6 w7 w9 w17 w23 w4 w8\n" * 3)
    tlc.make_dashboards(replacement, [texts], tmp_path / "dashboards")
    quality = tlc.circuit_quality(replacement, graph, [prompt(), prompt(seed=4)], answers=[5, 6])
    assert quality.n_nodes > 20


def test_a_graph_with_passed_mlps_is_not_taken_for_one_without():
    model = tiny_bridge("llama")
    some = transcoders(model, layers=[0, 2])
    with tlc.attach(model, some, mlps="ratio") as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
    with tlc.attach(model, some) as replacement:
        with pytest.raises(BelongingError, match="only the graph has MLPs without a dictionary passed by their ratios"):
            tlc.faithfulness(replacement, graph, n=5)


def test_boxes_of_autoencoders_are_removed_beside_random_sets(traced):
    replacement, graph = traced
    removed = tlc.box_ablations(replacement, graph, controls=10)
    assert removed and all(len(one["random"]) == 10 and 0 <= one["after"] <= 1 for one in removed)
    assert all(one["measured"] == one["measured"] for one in removed)  # no NaN
