"""QK attributions: pairs of sources add up to the model's own scores."""

import math

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import ARCHITECTURES, cross_layer, prompt, tiny_bridge, transcoders
from tl_circuits.attribution.qk import score_attribution
from tl_circuits.attribution.retrace import retrace
from tl_circuits.attribution.top_pairs import top_pairs
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
                    assert abs(qk.total - expected) <= 1e-4 * max(abs(expected), float(typical))
                    assert float(qk.by_position.to_numpy().sum()) == pytest.approx(qk.total, rel=1e-9)
                    compared += 1
    return compared


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pairs_add_up_to_the_score_of_every_head_at_ten_pairs(architecture):
    model = tiny_bridge(architecture)
    compared = check_scores(model, transcoders(model))
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    assert compared >= n_heads * 9


HOOKED = {
    "gpt2": dict(act_fn="gelu_new", normalization_type="LNPre"),
    "neox": dict(act_fn="gelu", normalization_type="LN", parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=4),
    "llama_qk_norm": dict(
        act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True, positional_embedding_type="rotary",
        rotary_dim=8, n_key_value_heads=2, use_qk_norm=True,
    ),
    "gemma2": dict(
        act_fn="gelu_pytorch_tanh", gated_mlp=True, normalization_type="RMS", final_rms=True, positional_embedding_type="rotary",
        rotary_dim=8, n_key_value_heads=2, use_normalization_before_and_after=True, attn_scores_soft_cap=5.0,
        use_local_attn=True, window_size=4, attn_types=["local", "global"],
    ),
}


@pytest.mark.parametrize("kind", HOOKED)
def test_pairs_add_up_on_hooked_transformer_too(kind):
    transformer_lens = pytest.importorskip("transformer_lens")
    if not hasattr(transformer_lens, "HookedTransformer"):
        pytest.skip("transformer_lens 4 has no HookedTransformer")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=48, d_vocab=101, device="cpu", seed=0, **HOOKED[kind]
    )
    model = transformer_lens.HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert check_scores(model.eval(), tlc.mlp_neurons(model)) >= 8 * 8
