"""The same on HookedTransformer, as long as TransformerLens has it (before version 4)."""

import pytest
import torch

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.oracles import measured_effects, removal_gap
from tests.sites import SITES, at, autoencoders, several
from tests.tiny import VOCAB, hook_state, prompt, transcoders
from tl_circuits.errors import DictionaryError

transformer_lens = pytest.importorskip("transformer_lens")
if not hasattr(transformer_lens, "HookedTransformer"):
    pytest.skip("transformer_lens 4 has no HookedTransformer", allow_module_level=True)

BASE = dict(n_layers=3, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=48, d_vocab=VOCAB, device=DEVICE, seed=0)
KINDS = {
    "gpt2": dict(act_fn="gelu_new", normalization_type="LN"),
    "folded": dict(act_fn="gelu_new", normalization_type="LNPre"),
    "neox": dict(
        act_fn="gelu", normalization_type="LN", parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=4
    ),
    "llama": dict(
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=8,
        n_key_value_heads=2,
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
        output_logits_soft_cap=10.0,
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    config = transformer_lens.HookedTransformerConfig(**BASE, **KINDS[request.param])
    made = transformer_lens.HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


@pytest.mark.parametrize("kind", ["neurons", "transcoders", "skip_before_post_norm"])
def test_graphs_add_up_engines_agree_and_the_model_is_restored(model, kind):
    before = hook_state(model)
    modules = dict(model.mod_dict)
    with torch.no_grad():
        bare = model(prompt()[None])
    dictionary = {
        "neurons": lambda: tlc.mlp_neurons(model),
        "transcoders": lambda: transcoders(model, input_hook="ln2.hook_normalized"),
        "skip_before_post_norm": lambda: transcoders(model, skip=True, output_hook="mlp.hook_out"),
    }[kind]()
    with tlc.attach(model, dictionary) as replacement:
        with torch.no_grad():
            assert torch.equal(model(prompt()[None]), bare)
        linear, autograd = (
            tlc.attribute(replacement, prompt(), max_nodes=80, engine=e, progress=False) for e in ("linear", "autograd")
        )
    assert linear.completeness_error() < 1e-4
    assert linear.node_ids == autograd.node_ids
    assert torch.allclose(linear.adjacency(), autograd.adjacency(), atol=1e-4)  # float32, other order of sums
    assert hook_state(model) == before and dict(model.mod_dict) == modules


def test_the_points_work_with_the_models_own_methods(model):
    site = "blocks.1.hook_mlp_out"
    with tlc.attach(model, transcoders(model)):
        _, cache = model.run_with_cache(prompt()[None])
        assert cache[f"{site}.hook_sae_acts_post"].shape == (1, 9, 40)
        assert cache["blocks.1.mlp.hook_in"].shape == (1, 9, 32)
        model.add_hook(f"{site}.hook_sae_acts_post", lambda acts, hook: acts * 0)
        with torch.no_grad():
            edited = model(prompt()[None])
        model.reset_hooks()
    with torch.no_grad():
        assert not torch.allclose(edited, model(prompt()[None]))


def test_removals_are_minus_the_edges_and_generation_is_the_same_with_and_without_cache(model):
    before = hook_state(model)
    with tlc.attach(model, transcoders(model, skip=True)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=40, skip_positions=(), progress=False)
        sources = (~graph.is_kind("logit")).nonzero()[:, 0].tolist()
        effects = measured_effects(replacement, graph, sources)
        edges = graph.adjacency()[:, sources].T
        edits = [tlc.Set(1, slice(4, None), 3, value=20.0)]
        written = [
            tlc.generate(replacement, prompt(), edits, max_new_tokens=8, use_past_kv_cache=cached)
            for cached in (True, False)
        ]
    scale = graph.adjacency().abs().amax(1).clamp_min(1e-6)
    assert ((effects + edges).abs() / scale).max() < 1e-3  # float32 differences of two runs
    assert written[0] == written[1]
    assert hook_state(model) == before


@pytest.mark.parametrize("site", ["hook_resid_mid", "attn.hook_z"])
def test_autoencoders_of_the_stream_within_a_block_and_of_heads(model, site):
    """A bridge's hook_resid_mid is beside the stream; here an edit reaches it, and heads have an axis of their own."""
    if site == "hook_resid_mid" and model.cfg.parallel_attn_mlp:
        pytest.skip("a parallel block has no middle")
    before = hook_state(model)
    dictionary = autoencoders(model, at(site, 3))
    with torch.no_grad():
        bare = model(prompt()[None])
    with tlc.attach(model, dictionary) as replacement:
        with torch.no_grad():
            assert torch.equal(model(prompt()[None]), bare)
        linear, autograd = (
            tlc.attribute(replacement, prompt(), max_nodes=40, engine=e, progress=False) for e in ("linear", "autograd")
        )
        assert removal_gap(replacement, linear)[0] < 1e-3
    assert linear.completeness_error() < 1e-4 and linear.node_ids == autograd.node_ids
    assert torch.allclose(linear.adjacency(), autograd.adjacency(), atol=1e-4)  # float32, other order of sums
    assert linear.is_kind("feature").sum() > 20 and hook_state(model) == before


def test_every_site_of_a_block_at_once(model):
    sites = list(SITES) if model.cfg.parallel_attn_mlp else [*SITES, "hook_resid_mid"]
    before = hook_state(model)
    with torch.no_grad():
        bare = model(prompt()[None])
    with tlc.attach(model, several(model, *sites)) as replacement:
        with torch.no_grad():
            assert torch.equal(model(prompt()[None]), bare)
        linear, autograd = (
            tlc.attribute(replacement, prompt(), max_nodes=60, engine=e, progress=False) for e in ("linear", "autograd")
        )
        assert removal_gap(replacement, linear)[0] < 1e-3
        short = tlc.top_head_loadings(replacement, linear, edges=50)
    assert linear.completeness_error() < 1e-4 and linear.node_ids == autograd.node_ids
    assert torch.allclose(linear.adjacency(), autograd.adjacency(), atol=1e-4)  # float32, other order of sums
    assert len(linear.info.sites) == len(sites) and hook_state(model) == before
    assert short[short.kind == "rest"].loading.abs().max() < 1e-4  # one attention between two rebuilt streams


def test_a_transcoder_that_reads_the_hook_of_an_autoencoder_is_refused(model):
    if model.cfg.parallel_attn_mlp or model.cfg.use_normalization_before_and_after:
        pytest.skip("one architecture is enough for the message")
    middle = autoencoders(model, {1: "hook_resid_mid"})
    with pytest.raises(
        DictionaryError,
        match="blocks.1.hook_resid_mid and blocks.1.hook_resid_mid are the same hook point of this model",
    ):
        tlc.attach(model, tlc.load_dictionary([middle, transcoders(model, layers=[1], input_hook="hook_resid_mid")]))
