"""Every published layout: the tensors come out as they were written, and activate as computed by hand."""

import pytest
import torch

import tl_circuits as tlc
from tests import published
from tl_circuits.errors import DictionaryError


def _hooks(read, write):
    return {"input_hook": read, "output_hook": write}


PRE_GAIN = _hooks("ln2.hook_normalized", "hook_mlp_out")
LAYOUTS = {  # writer, its options, activation, which optional tensors, the hooks it stands for
    "gemma_scope": (published.gemma_scope, {}, "jumprelu", False, PRE_GAIN),
    "gemma_scope_2": (published.gemma_scope_2, {}, "jumprelu", False, _hooks("mlp.hook_in", "hook_mlp_out")),
    "gemma_scope_2_affine": (published.gemma_scope_2, {"affine": True}, "jumprelu", True, _hooks("mlp.hook_in", "hook_mlp_out")),
    "mntss": (published.circuit_tracer, {"skip": True}, "relu", True, _hooks("hook_resid_mid", "hook_mlp_out")),
    "mntss_flipped": (published.circuit_tracer, {"flipped": True}, "relu", False, _hooks("hook_resid_mid", "hook_mlp_out")),
    "mwhanna": (
        published.circuit_tracer, {"hooks": ("mlp.hook_in", "mlp.hook_out")}, "relu", False, _hooks("mlp.hook_in", "mlp.hook_out"),
    ),
    "circuit_tracer_cache": (
        published.circuit_tracer,
        {"threshold": True, "hooks": ("ln2.hook_normalized", "hook_mlp_out"), "repo_id": "a/b", "revision": None, "scan": "a/b"},
        "jumprelu", False, PRE_GAIN,
    ),
    "topk_in_config": (published.circuit_tracer, {"activation": "topk", "k": 1}, "topk", False, _hooks("hook_resid_mid", "hook_mlp_out")),
    "saelens": (published.saelens, {}, "relu", False, PRE_GAIN),
    "saelens_skip": (published.saelens, {"architecture": "jumprelu_skip_transcoder"}, "jumprelu", True, PRE_GAIN),
    "sparsify": (published.sparsify, {"k": 1, "skip": True}, "topk", True, _hooks("mlp.hook_in", "mlp.hook_out")),
    "llamascopium": (published.llamascopium, {}, "jumprelu", False, PRE_GAIN),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("residency", ["disk", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_those_written_in_every_layer(layout, residency, tmp_path):
    write, options, activation, skip, hooks = LAYOUTS[layout]
    layers = published.random_layers()
    write(tmp_path / "set", layers, **options)
    found = tlc.load_transcoders(tmp_path / "set", residency=residency)
    assert list(found.layers) == list(range(12))
    for i, expected in enumerate(layers):
        ours = found[i]
        assert ours.activation == activation and (ours.forget_pages is not None) == (residency == "disk")
        assert {"input_hook": ours.input_hook, "output_hook": ours.output_hook} == hooks
        for name in published.BASICS:
            assert torch.equal(getattr(ours, name), expected[name]), (i, name)
        assert ours.W_enc.is_contiguous() and ours.W_dec.is_contiguous()
        assert (ours.W_skip is not None) == skip
        if skip:
            assert torch.equal(ours.W_skip, expected["W_skip"])
        if activation == "jumprelu":
            # llamascopium stores logarithms, and those round
            tolerance = 1e-6 if layout == "llamascopium" else 0.0
            assert torch.allclose(ours.threshold, expected["threshold"], rtol=tolerance, atol=0.0)


# x = [2, 1] gives pre-activations [2.5, 0, 1.25]: the second is not above its threshold 0.
HAND = {
    "W_enc": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]),
    "b_enc": torch.tensor([0.5, -1.0, 0.25]),
    "W_dec": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    "b_dec": torch.tensor([0.5, -0.5]),
    "threshold": torch.tensor([2.0, 1e-30, 2.0]),
    "W_skip": torch.tensor([[0.0, 1.0], [2.0, 0.0]]),
}
BY_HAND = {  # activations, then the reconstruction without and with the skip's [1, 4]
    "relu": ([2.5, 0.0, 1.25], [9.25, 12.0], [10.25, 16.0]),
    "jumprelu": ([2.5, 0.0, 0.0], [3.0, 4.5], [4.0, 8.5]),
    "topk": ([2.5, 0.0, 0.0], [3.0, 4.5], [4.0, 8.5]),
}
X = torch.tensor([[2.0, 1.0]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_and_reconstruction_by_hand(layout, tmp_path):
    write, options, activation, skip, _ = LAYOUTS[layout]
    write(tmp_path / "set", [HAND], **options)
    found = tlc.load_transcoders(tmp_path / "set", residency="disk")
    acts = found.activate(0, found.pre_activations(0, X), X)
    expected, plain, skipped = BY_HAND[activation]
    assert acts[0].tolist() == expected
    assert found.decode(0, {0: acts}, X)[0].tolist() == (skipped if skip else plain)
    active = found.active(0, X)
    assert active.feature.tolist() == [i for i, a in enumerate(expected) if a]
    assert found.decoder_vectors(0, active.feature, 0).tolist() == HAND["W_dec"][active.feature].tolist()


@pytest.mark.parametrize("writer", [published.circuit_tracer_clt, published.gemma_scope_2_clt])
@pytest.mark.parametrize("residency", ["disk", "cpu"])
def test_cross_layer_tensors_are_those_written(writer, residency, tmp_path):
    layers = published.random_layers(decoders=True)
    writer(tmp_path / "set", layers)
    found = tlc.load_transcoders(tmp_path / "set", residency=residency)
    assert isinstance(found, tlc.CrossLayerTranscoders) and found.writers(11) == tuple(range(12))
    everything = torch.arange(7)
    for i, expected in enumerate(layers):
        assert torch.equal(found[i].W_enc, expected["W_enc"]) and torch.equal(found[i].b_dec, expected["b_dec"])
        assert torch.equal(found[i].threshold, expected["threshold"])
        for target in range(i, 12):
            assert torch.equal(found.decoder_vectors(i, everything, target), expected["W_dec"][:, target - i])


@pytest.mark.parametrize("affine", [False, True])
def test_a_cross_layer_transcoder_by_hand(affine, tmp_path):
    """Two layers, the same encoder; features of layer 0 write twice their row to layer 1."""
    first = HAND | {"W_dec": torch.stack([HAND["W_dec"], 2 * HAND["W_dec"]], dim=1)}
    last = HAND | {"W_dec": HAND["W_dec"][:, None]}
    published.gemma_scope_2_clt(tmp_path / "set", [first, last], affine=affine)
    found = tlc.load_transcoders(tmp_path / "set")
    acts = {i: found.activate(i, found.pre_activations(i, X), X) for i in (0, 1)}
    skip = torch.tensor([1.0, 4.0]) if affine else torch.zeros(2)
    assert found.decode(0, acts, X)[0].tolist() == (torch.tensor([3.0, 4.5]) + skip).tolist()
    assert found.decode(1, acts, X)[0].tolist() == (torch.tensor([8.0, 14.5]) + skip).tolist()  # 3 x 2.5 x [1, 2] + b_dec


def test_llamascopium_norms_are_folded_so_that_activations_are_on_the_raw_scale(tmp_path):
    """s_in = √2/√2 · 2 = 2, s_out = 4: h = 2x W_E + b_E, y = (act(h) W_D + b_D) / 4."""
    norms = (2**0.5 / 2, 2**0.5 / 4)
    published.llamascopium(tmp_path / "set", [HAND], norms=norms)
    found = tlc.load_transcoders(tmp_path / "set", residency="disk")
    acts = found.activate(0, found.pre_activations(0, X), X)
    # h = [4.5, 1, 2.25]; thresholds 2, 0, 2 let all pass; divided by s_in.
    assert torch.allclose(acts, torch.tensor([[2.25, 0.5, 1.125]]), atol=1e-6)
    rebuilt = (4.5 * HAND["W_dec"][0] + HAND["W_dec"][1] + 2.25 * HAND["W_dec"][2] + HAND["b_dec"]) / 4
    assert torch.allclose(found.decode(0, {0: acts}, X)[0], rebuilt, atol=1e-5)  # float32 through a square root


def test_llamascopium_thresholds_gated_by_the_decoders_norm(tmp_path):
    """act(h·n)/n with θ = 2, n = ‖[1, 2]‖ = √5: 2.5·√5 passes; feature 2: 1.25·√61 = 9.8 passes too."""
    published.llamascopium(tmp_path / "set", [HAND], decoder_norm=True)
    found = tlc.load_transcoders(tmp_path / "set")
    acts = found.activate(0, found.pre_activations(0, X), X)
    assert acts[0].tolist() == [2.5, 0.0, 1.25]


def test_topk_of_circuit_tracer_keeps_negative_values_and_sparsify_does_not(tmp_path):
    published.circuit_tracer(tmp_path / "theirs", [HAND], k=3)
    published.sparsify(tmp_path / "sparsify", [HAND], k=3)
    x = torch.tensor([[0.0, 0.5]])  # pre-activations 0.5, -0.5, -0.25
    for folder, expected in (("theirs", [0.5, -0.5, -0.25]), ("sparsify", [0.5, 0.0, 0.0])):
        found = tlc.load_transcoders(tmp_path / folder)
        assert found.activate(0, found.pre_activations(0, x), x)[0].tolist() == expected


def test_a_threshold_must_be_passed_not_reached_and_may_be_negative_where_nothing_is_clamped():
    made = dict(W_enc=torch.eye(3), W_dec=torch.eye(3), b_enc=torch.zeros(3), b_dec=torch.zeros(3), threshold=torch.tensor([1.0, 1.0, -1.0]))
    pre = torch.tensor([[1.0, 1.5, -0.5]])
    for clamp, expected in ((True, [0.0, 1.5, 0.0]), (False, [0.0, 1.5, -0.5])):
        assert tlc.Transcoder(**made, activation="jumprelu", clamp=clamp).activate(pre)[0].tolist() == expected


@pytest.mark.parametrize(("activation", "words"), [("topk", "k is None; give k="), ("jumprelu", "threshold is None; give threshold=")])
def test_a_transcoder_that_lacks_what_its_activation_needs_says_so(activation, words):
    made = tlc.Transcoder(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3), torch.zeros(2), activation=activation)
    with pytest.raises(DictionaryError, match=words):
        made.activate(torch.ones(1, 3))


def test_sparsify_computes_its_width_from_the_expansion_factor(tmp_path):
    layers = published.random_layers(2, width=128, d=4)
    published.sparsify(tmp_path / "set", layers, k=5, num_latents=0)
    assert tlc.load_transcoders(tmp_path / "set").width(1) == 128


def test_dtypes_are_kept_or_converted(tmp_path):
    layers = published.random_layers(2, dtype=torch.bfloat16)
    published.circuit_tracer(tmp_path / "set", layers)
    for residency in ("disk", "cpu"):
        kept = tlc.load_transcoders(tmp_path / "set", residency=residency)
        assert kept[1].W_enc.dtype == kept[1].b_enc.dtype == torch.bfloat16
        assert torch.equal(kept[1].W_enc, layers[1]["W_enc"])
        converted = tlc.load_transcoders(tmp_path / "set", residency=residency, dtype=torch.float16)
        assert torch.equal(converted[1].W_dec, layers[1]["W_dec"].half())


def test_what_saelens_saves_loads_and_activates_as_in_saelens(tmp_path):
    pytest.importorskip("sae_lens", reason="sae_lens is not installed (transformer_lens 4)")
    from tests.test_saelens import CLASSES, saelens_transcoder

    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for kind in CLASSES:
        sae = saelens_transcoder(kind, 3)
        sae.save_model(tmp_path / kind)
        found = tlc.load_transcoders(tmp_path / kind)
        with torch.no_grad():
            acts = found.activate(3, found.pre_activations(3, x), x)
            assert torch.allclose(acts, sae.encode(x), atol=1e-5)  # other order of float32 sums
            assert torch.allclose(found.decode(3, {3: acts}, x), sae(x), atol=1e-5)
