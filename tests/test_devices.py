"""Models on an accelerator, and spread over two: everything works where the layers lie and equals the CPU's result."""

from dataclasses import astuple
from functools import cache, partial

import pandas as pd
import pytest
import torch
import transformer_lens
from transformer_lens.utilities.multi_gpu import get_device_for_block_index

import tl_circuits as tlc
from tests.pretend_devices import Pretend, PretendDevices, on_one_device, on_two_devices, place
from tests.tiny import VOCAB, cross_layer, prompt, tiny_bridge, transcoders
from tl_circuits.attribution.batches import least_free_memory
from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.errors import ModelError
from tl_circuits.support.memory import free_memory

PLACES = {"cpu": partial(tiny_bridge, device="cpu"), "one": on_one_device, "two": on_two_devices}
DICTIONARIES = {
    "transcoders": transcoders,
    "skip_transcoders": lambda model: transcoders(model, skip=True),
    "topk": lambda model: transcoders(model, activation="topk"),
    "cross_layer": cross_layer,
    "neurons": tlc.mlp_neurons,
    "some_layers": lambda model: transcoders(model, layers=[1]),
}


@pytest.fixture(autouse=True)
def _devices():
    with PretendDevices():
        yield


@cache
def placed(architecture: str, where: str, dtype: torch.dtype = torch.float32):
    return PLACES[where](architecture, dtype)


def with_dictionary(architecture: str, where: str, kind: str, dtype: torch.dtype = torch.float32):
    model = placed(architecture, where, dtype)
    return tlc.attach(model, DICTIONARIES[kind](model))


@cache
def traced(architecture: str, where: str, kind: str, dtype: torch.dtype = torch.float32, **options):
    with with_dictionary(architecture, where, kind, dtype) as replacement:
        return tlc.attribute(replacement, prompt(6), **{"max_nodes": 12, "progress": False} | options)


def require_same(graph, expected):
    """Same nodes and, to rounding, the same numbers."""
    assert graph.node_ids == expected.node_ids
    assert torch.allclose(graph.adjacency(), expected.adjacency(), atol=1e-6)
    assert graph.completeness_error() < 1e-4


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b, cpu: a + b,
        lambda a, b, cpu: a + cpu,
        lambda a, b, cpu: a.add_(b[0, 0]),
        lambda a, b, cpu: torch.cat([a, cpu]),
        lambda a, b, cpu: torch.stack([a[0, 0], cpu[0, 0]]),
        lambda a, b, cpu: torch.where(a > 0, b, 0.0),
        lambda a, b, cpu: torch.addmm(a, b, b),
        lambda a, b, cpu: a.index_add_(0, torch.tensor([0]), a[:1]),
        lambda a, b, cpu: cpu[a[0].long()],
        lambda a, b, cpu: a[b[0].long()],
        lambda a, b, cpu: a.index_select(0, torch.tensor([0])),
        lambda a, b, cpu: a.__setitem__(torch.tensor([0]), b[:1]),
        lambda a, b, cpu: torch.nn.functional.embedding(torch.tensor([0]), a),
        lambda a, b, cpu: torch.einsum("ij,jk->ik", a, cpu),
    ],
)
def test_the_pretence_raises_where_devices_mix(mix):
    a, b, cpu = torch.ones(3, 3, device="xpu:0"), torch.ones(3, 3).to("xpu:1"), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="same device"):
        mix(a, b, cpu)


def test_the_pretence_allows_what_accelerators_allow():
    a, b = torch.arange(6.0, device="xpu:0").reshape(2, 3), torch.zeros(2, 3, device="xpu:1")
    assert (a * torch.tensor(2.0)).device == torch.device("xpu:0")
    assert a[torch.tensor([1, 0])].tolist() == [[3, 4, 5], [0, 1, 2]]
    a[torch.tensor([1])] = torch.tensor(7.0)
    b.copy_(a)
    b[0] = torch.ones(3)
    assert b.tolist() == [[1, 1, 1], [7, 7, 7]] and b.device == torch.device("xpu:1")
    assert torch.zeros_like(a, device="cpu").numpy().shape == a.cpu().numpy().shape == (2, 3)
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()


def test_a_spread_models_layers_lie_apart_and_its_logits_are_the_cpus():
    model = placed("llama", "two")
    assert {str(p.device) for p in model.parameters()} == {"xpu:0", "xpu:1"}
    with torch.no_grad():
        logits = model(prompt(6).to("xpu:0")[None])
        assert isinstance(logits, Pretend)
        assert torch.equal(logits.cpu(), placed("llama", "cpu")(prompt(6)[None]))


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("where", ["one", "two"])
def test_a_graph_is_the_cpus(where, kind):
    require_same(*(traced("llama", place, kind) for place in (where, "cpu")))


@pytest.mark.parametrize("kind", ["skip_transcoders", "cross_layer", "neurons"])
@pytest.mark.parametrize("where", ["one", "two"])
def test_the_reference_engine_gives_the_same_graph(where, kind):
    require_same(*(traced("llama", place, kind, engine="autograd", max_nodes=3, targets=5) for place in (where, "cpu")))


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "neox", "qwen3"])
def test_a_spread_model_of_any_architecture_is_traced(architecture):
    require_same(*(traced(architecture, place, "skip_transcoders") for place in ("two", "cpu")))


@pytest.mark.parametrize("kind", ["transcoders", "neurons"])
@pytest.mark.parametrize("where", ["one", "two"])
def test_a_model_in_half_precision_is_traced(where, kind):
    require_same(*(traced("llama", place, kind, dtype=torch.bfloat16) for place in (where, "cpu")))


@pytest.mark.parametrize("where", ["one", "two"])
def test_trimmed_rows_and_a_feature_as_target(where):
    require_same(*(traced("llama", place, "cross_layer", row_mass=0.9) for place in (where, "cpu")))
    node = next(
        n for n in traced("llama", "cpu", "transcoders").nodes.itertuples() if n.layer == 2 and n.kind == "feature"
    )
    target = tlc.FeatureTarget(node.layer, node.position, node.feature)
    require_same(*(traced("llama", place, "transcoders", targets=target) for place in (where, "cpu")))


def test_a_graph_from_an_accelerator_is_pruned_scored_and_saved(tmp_path):
    graph, expected = (traced("llama", where, "transcoders") for where in ("two", "cpu"))
    # float32 sums: the same kernels may add in another order from other addresses in memory
    assert astuple(graph.scores()) == pytest.approx(astuple(expected.scores()), abs=1e-5)
    assert graph.prune().node_ids == expected.prune().node_ids
    graph.save(tmp_path / "graph.safetensors")
    assert torch.equal(tlc.load_graph(tmp_path / "graph.safetensors").adjacency(), graph.adjacency())


def everywhere(measure, kind: str = "skip_transcoders", architecture: str = "llama"):
    """``measure`` of the tiny model and its graph: on one device and on two, and on the CPU."""
    found = []
    for where in ("one", "two", "cpu"):
        graph = traced(architecture, where, kind)
        with with_dictionary(architecture, where, kind) as replacement:
            found.append(measure(replacement, graph))
    return found


def edits_for(graph) -> list:
    feature = next(n for n in graph.nodes.itertuples() if n.kind == "feature" and n.layer == 0)
    return [
        tlc.Scale(0, feature.position, feature.feature, factor=3.0),
        tlc.Set(2, slice(4, None), 3, value=2.0),
        tlc.ErrorEdit(1, 4),
        tlc.TokenEdit(2),
        tlc.ScoreEdit(1, 0, 5, 2, value=1.0),
        tlc.PatternEdit(2, 1, 4, 1, value=0.5),
        tlc.Patch(1, 3, 7, prompt(6, seed=5)),
    ]


@pytest.mark.parametrize(
    ("kind", "freeze", "architecture"),
    [
        ("skip_transcoders", "all", "llama"),
        ("cross_layer", "attention", "llama"),
        ("cross_layer", "all", "gemma2"),  # its unembedding, tied to the embedding, is on the first device
        ("neurons", "none", "gpt2"),
    ],
)
def test_interventions(kind, freeze, architecture):
    *found, expected = everywhere(
        lambda replacement, graph: tlc.intervene(replacement, prompt(6), edits_for(graph), freeze=freeze),
        kind,
        architecture,
    )
    for result in found:
        assert torch.allclose(result.logits.cpu(), expected.logits, atol=1e-5)
        assert torch.allclose(result.baseline_logits.cpu(), expected.baseline_logits, atol=1e-5)
        assert result.top().token.tolist() == expected.top().token.tolist()
        assert result.kl() == pytest.approx(expected.kl(), abs=1e-5)
        pd.testing.assert_frame_equal(result.activations, expected.activations, atol=1e-5)


def test_many_interventions_at_once_and_constrained_layers():
    *found, expected = everywhere(
        lambda replacement, graph: tlc.intervene_many(
            replacement, prompt(6), [[], edits_for(graph)[:1], edits_for(graph)], constrained_layers=[2]
        )
    )
    for results in found:
        for result, wanted in zip(results, expected, strict=True):
            assert torch.allclose(result.last_logits.cpu(), wanted.last_logits, atol=1e-5)


def test_the_points_show_and_change_activations():
    def run(replacement, graph):
        model, name = replacement.model, f"{replacement.site(2)}.hook_sae_acts_post"
        tokens = prompt(6)[None].to(model.cfg.device)
        with torch.no_grad():
            logits, cache = model.run_with_cache(tokens, names_filter=[name])
            edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda acts, hook: acts * 0)])
        return [x.cpu() for x in (logits, cache[name], edited)]

    for kind in ("skip_transcoders", "cross_layer"):
        *found, expected = everywhere(run, kind)
        for tensors in found:
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tensors, expected, strict=True))


def test_generation():
    edits = [tlc.Set(0, None, 3, value=4.0), tlc.Set(2, slice(3, None), 4, value=4.0)]
    for cached in (True, False):
        one, two, cpu = everywhere(
            lambda r, g, c=cached: tlc.generate(r, prompt(6), edits, max_new_tokens=4, use_past_kv_cache=c)
        )
        assert one == two == cpu


@pytest.mark.parametrize("freeze", ["all", "none"])
def test_faithfulness(freeze):
    *found, expected = everywhere(
        lambda replacement, graph: tlc.faithfulness(replacement, graph, n=3, freezes=[freeze]), "cross_layer", "gemma2"
    )
    for report in found:
        pd.testing.assert_frame_equal(report.effects, expected.effects, atol=1e-4)


@pytest.mark.parametrize("kind", ["transcoders", "skip_transcoders", "cross_layer"])
def test_head_loadings(kind):
    *found, expected = everywhere(lambda r, g: tlc.top_head_loadings(r, g, edges=6), kind)
    for frame in found:
        assert frame.path.tolist() == expected.path.tolist()
        assert frame.loading.tolist() == pytest.approx(expected.loading.tolist(), abs=1e-5)


def test_qk_attribution_and_its_check():
    def attributed(replacement, graph):
        qk = tlc.qk_attribution(replacement, graph, layer=2, head=1, query=5, key=2, baseline_key=1)
        return qk, tlc.faithfulness(replacement, graph, n=1, freezes=["all"], scores=[qk]).effects

    *found, (expected, effects) = everywhere(attributed, architecture="qwen3")  # it has norms of queries and keys
    for qk, measured in found:
        assert (qk.score, qk.total) == pytest.approx((expected.score, expected.total), abs=1e-5)
        assert qk.terms.weight.tolist() == pytest.approx(expected.terms.weight.tolist(), abs=1e-5)
        pd.testing.assert_frame_equal(measured, effects, atol=1e-4)


@pytest.mark.parametrize("kind", ["cross_layer", "neurons"])
def test_vocabulary_labels(kind):
    one, two, cpu = everywhere(lambda r, g: tlc.label_features(r, g).labels, kind, "gemma2")
    assert one == two == cpu


def test_boxes_removed_and_the_circuit_curve():
    def measured(replacement, graph):
        boxes = graph.prune(node_threshold=0.5)
        curve = tlc.circuit_curve(replacement, graph, lambda logits: logits[3], thresholds=[0.5], random_sets=1)
        return tlc.box_ablations(replacement, boxes), curve

    *found, (boxes, curve) = everywhere(measured)
    for ours, our_curve in found:
        assert [box["nodes"] for box in ours] == [box["nodes"] for box in boxes]
        assert [b["measured"] for b in ours] == pytest.approx([b["measured"] for b in boxes], abs=1e-4)
        pd.testing.assert_frame_equal(our_curve, curve, atol=1e-4)


def test_quality_of_a_dictionary():
    *found, expected = everywhere(lambda r, g: tlc.dictionary_quality(r, [prompt(6), prompt(5)], progress=False))
    for frame in found:
        pd.testing.assert_frame_equal(frame, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["transcoders", "cross_layer"])
def test_patching_feature_by_feature(kind):
    *found, expected = everywhere(
        lambda r, g: tlc.feature_patching(r, prompt(6), prompt(6, seed=5), lambda logits: logits[3], limit=4), kind
    )
    for frame in found:
        pd.testing.assert_frame_equal(frame, expected, atol=1e-4)


@pytest.mark.parametrize("ablate", ["mean", "counterfactual"])
def test_circuit_quality(ablate):
    prompts, others = [prompt(6), prompt(6, seed=5)], [prompt(6, seed=7), prompt(6, seed=8)]

    def measured(replacement, graph):
        options = {"counterfactuals": others} if ablate == "counterfactual" else {}
        return tlc.circuit_quality(
            replacement,
            graph,
            prompts,
            answers=[5, 9],
            ablate=ablate,
            sizes=[2, 4],
            random_sets=1,
            progress=False,
            **options,
        )

    *found, expected = everywhere(measured)
    for quality in found:
        pd.testing.assert_frame_equal(quality.curve, expected.curve, atol=1e-4)


@pytest.mark.parametrize("kind", ["transcoders", "skip_transcoders", "cross_layer", "some_layers"])
def test_a_baseline_of_prompts_and_one_of_texts(kind):
    def contrasted(replacement, graph):
        baseline = tlc.make_baseline(
            replacement, [prompt(6, seed=5).tolist(), prompt(5, seed=6).tolist()], progress=False
        )
        return [
            tlc.attribute(replacement, prompt(6), baseline=one, max_nodes=12, progress=False)
            for one in (baseline, [prompt(6, seed=5), prompt(6, seed=7)])
        ]

    *found, expected = everywhere(contrasted, kind)
    for graphs in found:
        for graph, wanted in zip(graphs, expected, strict=True):
            require_same(graph, wanted)


def test_a_hooked_transformer_spread_over_devices_is_traced():
    def made(spread: bool):
        torch.manual_seed(0)
        model = transformer_lens.HookedTransformer(
            transformer_lens.HookedTransformerConfig(
                n_layers=3,
                d_model=32,
                n_ctx=32,
                d_head=8,
                n_heads=4,
                d_mlp=48,
                d_vocab=VOCAB,
                act_fn="gelu",
                device="cpu",
            )
        )
        if spread:
            model.cfg.device, model.cfg.n_devices = "xpu:0", 2
            for layer, block in enumerate(model.blocks):
                place(block, get_device_for_block_index(layer, model.cfg))
            for name, part in model.named_children():
                if name != "blocks":
                    place(part, "xpu:1" if name in ("ln_final", "unembed") else "xpu:0")
        model = model.eval()
        with tlc.attach(model, transcoders(model, skip=True)) as replacement:
            graph = tlc.attribute(replacement, prompt(6), max_nodes=12, progress=False)
            return graph, tlc.top_head_loadings(replacement, graph, edges=3).loading.tolist()

    (graph, loadings), (expected, expected_loadings) = made(True), made(False)
    require_same(graph, expected)
    assert loadings == pytest.approx(expected_loadings, abs=1e-5)


def test_each_layers_dictionary_is_where_the_layer_is_and_the_callers_stays():
    model = placed("llama", "two")
    given = transcoders(model).to(torch.device("xpu:0"))
    with tlc.attach(model, given) as replacement:
        own = replacement.dictionary
        assert [str(own[layer].W_enc.device) for layer in own.layers] == ["xpu:0", "xpu:1", "xpu:1"]
        assert own[0] is given[0]  # not copied: it lay there
        assert {str(given[layer].W_dec.device) for layer in given.layers} == {"xpu:0"}
        assert own.placed({0: torch.device("xpu:0")} | dict.fromkeys([1, 2], torch.device("xpu:1"))) is own


def test_wide_matrices_in_the_machines_memory_stay_there():
    model = placed("llama", "two")
    for given in (transcoders(model), cross_layer(model)):
        with tlc.attach(model, given) as replacement:
            own = replacement.dictionary
            assert all(own[layer].W_enc is given[layer].W_enc for layer in own.layers)
            assert [str(own[layer].b_dec.device) for layer in own.layers] == ["xpu:0", "xpu:1", "xpu:1"]


def test_on_the_cpu_the_dictionary_is_the_callers():
    model = placed("llama", "cpu")
    for given in (transcoders(model), cross_layer(model), tlc.mlp_neurons(model)):
        with tlc.attach(model, given) as replacement:
            assert replacement.dictionary is given


def test_cross_layer_decoders_lie_with_the_layer_their_features_read():
    model = placed("llama", "two")
    given = cross_layer(model).to(torch.device("xpu:0"))
    with tlc.attach(model, given) as replacement:
        own = replacement.dictionary
        assert [str(own._decoders[layer].device) for layer in own.layers] == ["xpu:0", "xpu:1", "xpu:1"]
        graph = tlc.attribute(replacement, prompt(6), max_nodes=12, progress=False)
    require_same(graph, traced("llama", "cpu", "cross_layer"))


def test_sweeps_fit_into_the_fullest_device(monkeypatch):
    free = {torch.device("xpu:0"): 800, torch.device("xpu:1"): 80}
    monkeypatch.setattr("tl_circuits.attribution.batches.free_memory", lambda device: free[device])
    assert least_free_memory(free) == 80


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried", "MPS backend out of memory (MPS", "XPU out of memory."]
)
def test_an_accelerator_that_is_full_gets_smaller_sweeps(message, monkeypatch):
    whole, tried = LinearEngine.rows, []

    def full(engine, targets):
        tried.append(len(targets))
        if len(targets) > 4:
            raise RuntimeError(message)
        return whole(engine, targets)

    monkeypatch.setattr(LinearEngine, "rows", full)
    with with_dictionary("llama", "cpu", "transcoders") as replacement:
        graph = tlc.attribute(replacement, prompt(6), max_nodes=12, progress=False)
    assert max(tried) > 4
    require_same(graph, traced("llama", "cpu", "transcoders"))


def test_free_memory_of_devices_that_tell_and_of_those_that_do_not(monkeypatch):
    machine = free_memory(torch.device("cpu"))
    assert machine > 0
    for device in ("xpu:0", "hpu:0"):  # not in this build
        assert free_memory(torch.device(device)) == pytest.approx(machine, rel=0.5)
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 1000)
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 300)
    assert free_memory(torch.device("mps")) == 700
    monkeypatch.setattr("torch.xpu.mem_get_info", lambda device: (5, 10))
    assert free_memory(torch.device("xpu:1")) == 5


def test_load_model_passes_device_maps_on():
    assert {p.device.type for p in tlc.load_model("tiny-facts", device_map={"": "cpu"}).parameters()} == {"cpu"}
    with pytest.raises(ModelError, match="n_devices"):
        tlc.load_model("tiny-facts", n_devices=1000)


def test_tracing_leaves_torchs_precision_settings_alone():
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype()

    before = settings()
    with with_dictionary("llama", "cpu", "transcoders") as replacement:
        tlc.intervene(
            replacement, prompt(6), edits_for(tlc.attribute(replacement, prompt(6), max_nodes=4, progress=False))
        )
    assert settings() == before
