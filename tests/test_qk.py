"""QK attributions: pairs of sources add up to the model's own scores."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tl_circuits as tlc
from tests import zoo
from tests.accelerator import DEVICE
from tests.tiny import ARCHITECTURES, cross_layer, hook_state, own_bridge, prompt, tiny_bridge, transcoders
from tl_circuits.attention import top_pairs as top_pairs_module
from tl_circuits.attention.qk import score_attribution
from tl_circuits.attention.retrace import retrace
from tl_circuits.attention.top_pairs import top_pairs
from tl_circuits.errors import ArchitectureError, TargetError

PAIRS = [(0, 0), (1, 0), (3, 1), (4, 4), (5, 3), (6, 5), (7, 7), (8, 6), (8, 5), (8, 8)]


def recorded_scores(model, tokens):
    """What hook_attn_scores shows in every layer, before the soft cap: ``[layer, head, query, key]``."""
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name in names)
    scores = torch.cat([cache[name] for name in names]).double()
    cap = float(getattr(model.cfg, "attn_scores_soft_cap", -1.0) or -1.0)
    return scores if cap <= 0 else torch.atanh((scores / cap).clamp(-1, 1)) * cap


def check_scores(model, dictionary):
    """Sums of all pairs against the model, for every head at ten pairs; how many scores were compared."""
    tokens, compared = prompt(9), 0
    scores = recorded_scores(model, tokens)
    with tlc.attach(model, dictionary) as replacement:
        graph = tlc.attribute(replacement, tokens, max_nodes=20, progress=False)
        local = retrace(replacement, graph)
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                own = scores[layer, head]
                typical = own[own.abs() < 1e6].abs().mean()
                for query, key in PAIRS:
                    expected = float(own[query, key])
                    if not abs(expected) < 1e6:  # masked by the sliding window
                        with pytest.raises(TargetError, match="sliding window"):
                            score_attribution(local, graph, layer, head, query, key)
                        continue
                    qk = score_attribution(local, graph, layer, head, query, key, top=5)
                    # Float32 on both sides; a score near zero is the difference of larger terms.
                    assert qk.score == pytest.approx(expected, rel=1e-6, abs=1e-6)
                    assert abs(qk.total - expected) <= 1e-4 * max(abs(expected), float(typical) / 10)
                    assert float(qk.by_position.to_numpy().sum()) == pytest.approx(qk.total, rel=1e-9)
                    compared += 1
    return compared


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pairs_add_up_to_the_score_of_every_head_at_ten_pairs(architecture):
    model = tiny_bridge(architecture)
    compared = check_scores(model, transcoders(model))
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    assert compared == n_heads * 10


@pytest.mark.parametrize("name", ["opt", "xglm", "gptneo", "olmo2", "exaone4", "gpt2", "gemma2", "nemotron"])
def test_softmax_of_a_heads_scores_is_the_plain_models_pattern(name):
    """Also where a bridge shows patterns in place of scores (OPT, XGLM, GPT-Neo), or has no norm before attention (OLMo
    2)."""
    tokens, folder = torch.tensor([1, 45, 60, 7, 88, 33]), zoo.folder(name)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        patterns = plain(tokens[None], output_attentions=True).attentions
    model = tlc.load_model(folder, device=DEVICE)
    cap = float(getattr(model.cfg, "attn_scores_soft_cap", -1.0) or -1.0)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, tokens, max_nodes=10, progress=False)
        for layer, head in ((0, 1), (1, 3), (2, 0)):
            pattern = patterns[layer][0, head, 4].double()
            keys = [key for key in range(5) if pattern[key] > 0]
            found = [tlc.qk_attribution(replacement, graph, layer, head, query=4, key=key) for key in keys]
            assert max(abs(qk.total - qk.score) for qk in found) < 1e-4  # float32
            scores = torch.tensor([qk.total for qk in found], dtype=torch.float64)
            scores = torch.tanh(scores / cap) * cap if cap > 0 else scores
            assert (scores.softmax(0) - pattern[keys] / pattern[keys].sum()).abs().max() < 1e-5  # float32 on both sides


@pytest.mark.parametrize(
    ("name", "why"), [("bloom", "ALiBi"), ("gptj", "does not show how"), ("glmdsa", "has no plain W_Q")]
)
def test_scores_that_are_not_a_product_alone_are_refused_with_the_reason(name, why):
    model = tlc.load_model(zoo.folder(name), device=DEVICE)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, torch.tensor([1, 45, 60, 7, 88, 33]), max_nodes=10, progress=False)
        with pytest.raises(ArchitectureError, match=why):
            tlc.qk_attribution(replacement, graph, layer=1, head=1, query=4, key=2)


HOOKED = {
    "gpt2": dict(act_fn="gelu_new", normalization_type="LNPre"),
    "neox": dict(
        act_fn="gelu", normalization_type="LN", parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=4
    ),
    "llama_qk_norm": dict(
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=8,
        n_key_value_heads=2,
        use_qk_norm=True,
    ),
    "gemma2": dict(
        act_fn="gelu_pytorch_tanh",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=8,
        n_key_value_heads=2,
        use_normalization_before_and_after=True,
        attn_scores_soft_cap=5.0,
        use_local_attn=True,
        window_size=4,
        attn_types=["local", "global"],
    ),
}


@pytest.mark.parametrize("kind", HOOKED)
def test_pairs_add_up_on_hooked_transformer_too(kind):
    transformer_lens = pytest.importorskip("transformer_lens")
    if not hasattr(transformer_lens, "HookedTransformer"):
        pytest.skip("transformer_lens 4 has no HookedTransformer")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2,
        d_model=32,
        n_ctx=32,
        d_head=8,
        n_heads=4,
        d_mlp=48,
        d_vocab=101,
        device=DEVICE,
        seed=0,
        **HOOKED[kind],
    )
    model = transformer_lens.HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert check_scores(model.eval(), tlc.mlp_neurons(model)) >= 8 * 8


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gpt2"])
def test_removing_the_top_sources_lowers_the_score_by_what_was_predicted(architecture):
    """Measured in the model itself, everything else held: no gradient, no frozen map."""
    model = tiny_bridge(architecture)
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(9), max_nodes=20, progress=False)
        qks = [
            tlc.qk_attribution(replacement, graph, 2, 1, 7, 6),
            tlc.qk_attribution(replacement, graph, 1, 3, -1, 7, baseline_key=8),
        ]
        report = tlc.faithfulness(replacement, graph, n=2, freezes=("all",), scores=qks)
    effects = report.effects[report.effects.freeze == "score"]
    assert len(effects) == 22 and effects.predicted.abs().max() > 1e-3
    # Float32, and each change is the difference of two runs of the model.
    scale = effects.groupby("target").predicted.transform(lambda column: column.abs().max())
    assert ((effects.predicted - effects.measured).abs() <= 1e-3 * scale).all()
    assert "score" in report.summary().freeze.tolist()


@pytest.fixture(scope="module")
def traced():
    model = own_bridge("gemma3")
    with tlc.attach(model, cross_layer(model)) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)


def test_listed_pairs_and_marginals_are_the_largest_and_sum_to_the_score(traced):
    replacement, graph = traced
    every = tlc.qk_attribution(replacement, graph, 3, 2, 8, 5, top=None)
    assert every.terms.weight.astype(float).sum() == pytest.approx(every.total, rel=1e-4)
    assert every.by_query.weight.sum() == pytest.approx(every.total, rel=1e-9)
    assert every.by_key.weight.sum() == pytest.approx(every.total, rel=1e-9)
    some = tlc.qk_attribution(replacement, graph, 3, 2, 8, 5, top=7)
    largest = every.terms.weight.abs().sort_values(ascending=False).iloc[:7]
    assert some.terms.weight.abs().to_numpy() == pytest.approx(largest.to_numpy(), rel=1e-5)
    assert some.by_key.source.tolist() == every.by_key.source.tolist()[:7]
    # A marginal is the sum of its pairs.
    source = every.by_query.source.iloc[0]
    pairs = every.terms[every.terms.query_source == source].weight.astype(float).sum()
    assert pairs == pytest.approx(every.by_query.weight.iloc[0], rel=1e-4)
    known = set(graph.node_ids)
    assert [name in known for name in every.by_key.source] == every.by_key.in_graph.tolist()
    assert set(every.by_key.kind) == {"feature", "error", "embedding", "bias"}


@pytest.mark.parametrize("top", [1, 7, 200])
def test_the_largest_of_many_pairs_are_found_without_all_products(top, monkeypatch):
    monkeypatch.setattr(top_pairs_module, "BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 6, generator=generator) * torch.rand(n, 1, generator=generator) ** 3 for n in (50, 40))
    i, j, values = top_pairs(a, b, top)
    every = (a @ b.T).abs().flatten().sort(descending=True).values
    assert torch.allclose(values.abs(), every[:top], atol=1e-6) and torch.allclose(
        (a[i] * b[j]).sum(1), values, atol=1e-6
    )


def test_a_difference_of_keys_is_the_difference_of_scores(traced):
    replacement, graph = traced
    here, there = (tlc.qk_attribution(replacement, graph, 3, 0, 8, key) for key in (4, 2))
    instead = tlc.qk_attribution(replacement, graph, 3, 0, 8, 4, baseline_key=2)
    rounding = 1e-6 * (abs(here.score) + abs(there.score))  # float32 differences of the two scores
    assert instead.score == pytest.approx(here.score - there.score, abs=rounding)
    assert instead.total == pytest.approx(here.total - there.total, abs=rounding)
    assert instead.by_position.to_numpy() == pytest.approx((here.by_position - there.by_position).to_numpy(), abs=1e-6)


def test_sources_behind_a_position_do_not_count(traced):
    replacement, graph = traced
    qk = tlc.qk_attribution(replacement, graph, 3, 0, 6, 3, top=None)
    assert qk.by_query.position.max() <= 6 and qk.by_key.position.max() <= 3
    assert tlc.qk_attribution(replacement, graph, 0, 0, 2, 1, top=None).by_key.source.tolist() in (
        ["token@1", "bias"],
        ["token@1"],
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 0, 1, 0), r"layer 4 is not in 0\.\.3"),
        ((-1, 0, 1, 0), "layer -1 is not"),
        ((0, 4, 1, 0), r"head 4 is not in 0\.\.3"),
        ((0, 0, 9, 0), "position 9 is outside"),
        ((0, 0, 1, 2), "key position 2 comes after query position 1"),
        ((0, 0, 8, 2), "sliding window"),
        ((1, 0, 3, 2, 2), "baseline_key 2 is the key itself"),
        ((1, 0, 3, 2, 5), "key position 5 comes after"),
    ],
)
def test_scores_that_are_not_there_are_refused(traced, arguments, words):
    with pytest.raises(TargetError, match=words):
        tlc.qk_attribution(*traced, *arguments)


def test_other_bad_input_is_refused(traced, monkeypatch):
    replacement, graph = traced
    with pytest.raises(ValueError, match="top must be at least 1"):
        tlc.qk_attribution(replacement, graph, 1, 0, 3, 2, top=0)
    with pytest.raises(TargetError, match="is not a source"):
        tlc.qk_attribution(replacement, graph, 1, 0, 3, 2).removal(["bias"])
    attention = type(replacement.model.blocks[1].attn)
    monkeypatch.setattr(attention, "W_Q", None)
    with pytest.raises(ArchitectureError, match=r"blocks.1.attn has no plain W_Q"):
        tlc.qk_attribution(replacement, graph, 1, 0, 3, 2)


def test_a_score_that_our_map_misses_is_refused(traced, monkeypatch):
    monkeypatch.setattr("tl_circuits.hooks.queries_keys._rotation", lambda *_: None)
    with pytest.raises(ArchitectureError, match="is off by"):
        tlc.qk_attribution(*traced, 1, 0, 8, 2)


@pytest.mark.parametrize("ask", ["scores", "qk_attribution"])
def test_reading_a_layers_scores_runs_no_later_layer_and_leaves_no_hook(ask):
    model, ran = tiny_bridge("llama"), []
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(9), max_nodes=5, progress=False)
        local = retrace(replacement, graph)
        handles = [
            block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
            for layer, block in enumerate(model.blocks)
        ]
        state = hook_state(model)
        local.scores(1) if ask == "scores" else tlc.qk_attribution(replacement, graph, 1, 0, 5, 3)
        for handle in handles:
            handle.remove()
        assert ran == [0]  # block 1 ended at its scores
        assert hook_state(model) == state


def test_what_is_built_below_a_layer_gives_the_same_score_as_the_whole(traced):
    replacement, graph = traced
    whole = score_attribution(retrace(replacement, graph), graph, 2, 1, 7, 5, top=None)
    below = tlc.qk_attribution(replacement, graph, 2, 1, 7, 5, top=None)
    assert below.terms.equals(whole.terms) and below.total == whole.total and below.by_query.equals(whole.by_query)


def test_the_largest_products_are_found_without_making_all():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 6, generator=generator) * torch.rand(n, 1, generator=generator) ** 4 for n in (5000, 3000))
    i, j, values = top_pairs(a, b, 50)
    products = a @ b.T
    assert torch.allclose(values.abs(), products.abs().flatten().topk(50).values, rtol=1e-5)
    assert torch.allclose(products[i, j], values, rtol=1e-5)
