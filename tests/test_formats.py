"""Every published layout: the tensors come out as they were written, and activate as computed by hand."""

import os

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
    "gemma_scope_2_affine": (
        published.gemma_scope_2,
        {"affine": True},
        "jumprelu",
        True,
        _hooks("mlp.hook_in", "hook_mlp_out"),
    ),
    "mntss": (published.circuit_tracer, {"skip": True}, "relu", True, _hooks("hook_resid_mid", "hook_mlp_out")),
    "mntss_flipped": (
        published.circuit_tracer,
        {"flipped": True},
        "relu",
        False,
        _hooks("hook_resid_mid", "hook_mlp_out"),
    ),
    "mwhanna": (
        published.circuit_tracer,
        {"hooks": ("mlp.hook_in", "mlp.hook_out")},
        "relu",
        False,
        _hooks("mlp.hook_in", "mlp.hook_out"),
    ),
    "circuit_tracer_cache": (
        published.circuit_tracer,
        {
            "threshold": True,
            "hooks": ("ln2.hook_normalized", "hook_mlp_out"),
            "repo_id": "a/b",
            "revision": None,
            "scan": "a/b",
        },
        "jumprelu",
        False,
        PRE_GAIN,
    ),
    "topk_in_config": (
        published.circuit_tracer,
        {"activation": "topk", "k": 1},
        "topk",
        False,
        _hooks("hook_resid_mid", "hook_mlp_out"),
    ),
    "saelens": (published.saelens, {}, "relu", False, PRE_GAIN),
    "saelens_skip": (published.saelens, {"architecture": "jumprelu_skip_transcoder"}, "jumprelu", True, PRE_GAIN),
    "arena": (published.arena, {"unfolded": (8,)}, "relu", False, PRE_GAIN),
    "sparsify": (published.sparsify, {"k": 1, "skip": True}, "topk", True, _hooks("mlp.hook_in", "mlp.hook_out")),
    "llamascopium": (published.llamascopium, {}, "jumprelu", False, PRE_GAIN),
    "four_bit": (published.four_bit, {}, "relu", False, _hooks("mlp.hook_in", "mlp.hook_out")),
    "four_bit_skip": (
        published.four_bit,
        {"activation": "topk", "k": 1, "skip": True},
        "topk",
        True,
        _hooks("mlp.hook_in", "mlp.hook_out"),
    ),
    "four_bit_jumprelu": (
        published.four_bit,
        {"activation": "jumprelu"},
        "jumprelu",
        False,
        _hooks("mlp.hook_in", "mlp.hook_out"),
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("residency", ["disk", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_those_written_in_every_layer(layout, residency, tmp_path):
    write, options, activation, skip, hooks = LAYOUTS[layout]
    layers = published.random_layers()
    layers = write(tmp_path / "set", layers, **options) or layers  # one that rounds returns what it wrote
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
    # 3 x 2.5 x [1, 2] + b_dec
    assert found.decode(1, acts, X)[0].tolist() == (torch.tensor([8.0, 14.5]) + skip).tolist()


@pytest.mark.parametrize("skip", ["with the encoder", "of its own"])
def test_circuit_tracers_cross_layer_skips_are_not_transposed(skip, tmp_path):
    """ŷ_1 = b + a_0 W_dec_0[:, 1] + a_1 W_dec_1[:, 0] + x_1 W_skip_1, with W_skip as it is stored."""
    layers = published.random_layers(3, decoders=True)
    published.circuit_tracer_clt(tmp_path / "set", layers, skip=skip)
    found = tlc.load_transcoders(tmp_path / "set", residency="disk")
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    acts = {}
    for i, t in enumerate(layers[:2]):
        pre = x @ t["W_enc"].T + t["b_enc"]
        acts[i] = pre * (pre > t["threshold"])
        assert torch.allclose(found.activate(i, found.pre_activations(i, x), x), acts[i], atol=1e-6)  # float32
    stored = layers[1]["W_skip"].T  # the writer transposes what it is given
    expected = layers[1]["b_dec"] + acts[0] @ layers[0]["W_dec"][:, 1] + acts[1] @ layers[1]["W_dec"][:, 0] + x @ stored
    assert torch.allclose(found.decode(1, acts, x), expected, atol=1e-5)  # float32, another order of sums


def test_hooks_written_for_all_blocks_are_understood(tmp_path):
    published.circuit_tracer_clt(
        tmp_path / "set", published.random_layers(2, decoders=True), read="blocks.{layer}.hook_resid_mid"
    )
    assert tlc.load_transcoders(tmp_path / "set").input_hook(1) == "blocks.1.hook_resid_mid"


@pytest.mark.parametrize("norms", [None, (0.7, 0.35)])
def test_llamascopium_topk_compares_activations_times_the_decoders_norm(norms, tmp_path):
    """``h = x s_in W_E + b_E``, ``a = topk(ReLU(h n)) / n``, ``y = (a W_D + b_D) / s_out``: their encode and decode."""
    layers = published.random_layers(2, width=9, d=4)
    published.llamascopium(tmp_path / "set", layers, act_fn="topk", norms=norms, decoder_norm=True, top_k=3)
    found = tlc.load_transcoders(tmp_path / "set", residency="disk")
    s_in, s_out = (1.0, 1.0) if norms is None else (2.0 / norms[0], 2.0 / norms[1])  # √4 over the average norm
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    changed = 0
    for i, t in enumerate(layers):
        n = t["W_dec"].norm(dim=1)
        h = (x * s_in) @ t["W_enc"].T + t["b_enc"]
        values, kept = (h * n).relu().topk(3, dim=-1)
        a = torch.zeros_like(h).scatter(-1, kept, values) / n
        changed += int((kept.sort().values != h.relu().topk(3).indices.sort().values).any(-1).sum())
        ours = found.activate(i, found.pre_activations(i, x), x)
        assert torch.allclose(ours * s_in, a, atol=1e-5)  # float32; ours are on the raw scale
        assert torch.allclose(found.decode(i, {i: ours}, x), (a @ t["W_dec"] + t["b_dec"]) / s_out, atol=1e-5)
    assert changed > 10  # the norm decides, so a plain TopK would fail here


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
    made = dict(
        W_enc=torch.eye(3),
        W_dec=torch.eye(3),
        b_enc=torch.zeros(3),
        b_dec=torch.zeros(3),
        threshold=torch.tensor([1.0, 1.0, -1.0]),
    )
    pre = torch.tensor([[1.0, 1.5, -0.5]])
    for clamp, expected in ((True, [0.0, 1.5, 0.0]), (False, [0.0, 1.5, -0.5])):
        assert tlc.Transcoder(**made, activation="jumprelu", clamp=clamp).activate(pre)[0].tolist() == expected


@pytest.mark.parametrize(
    ("activation", "words"), [("topk", "k is None; give k="), ("jumprelu", "threshold is None; give threshold=")]
)
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


def test_a_converted_npz_is_not_read_again(tmp_path):
    """After the first opening from disk, the large arrays' bytes in the npz may be anything: only small ones are
    read."""
    published.gemma_scope(tmp_path / "set", published.random_layers(1, width=4096))
    first = tlc.load_transcoders(tmp_path / "set", residency="disk")
    (path,) = (tmp_path / "set").rglob("params.npz")
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[data.index(b"W_dec.npy") + 50_000] ^= 255  # inside the array: its check sum no longer fits
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = tlc.load_transcoders(tmp_path / "set", residency="disk")
    assert all(torch.equal(getattr(first[0], n), getattr(again[0], n)) for n in (*published.BASICS, "threshold"))
    with pytest.raises(DictionaryError, match="CRC"):
        tlc.load_transcoders(tmp_path / "set", residency="cpu")


@pytest.mark.parametrize("positions", [10, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_stored_by_columns_find_the_same_features(positions, dtype):
    """As SAELens keeps them; few and many positions take different products."""
    t = published.random_layers(1, width=70, d=12, dtype=dtype)[0]
    columns = t["W_enc"].T.contiguous().T
    made = {
        name: tlc.load_transcoders({0: tlc.Transcoder(W_enc, t["W_dec"], t["b_enc"], t["b_dec"])})
        for name, W_enc in (("columns", columns), ("rows", t["W_enc"]))
    }
    x = torch.randn(positions, 12, generator=torch.Generator().manual_seed(1))
    found, expected = made["columns"].active(0, x), made["rows"].active(0, x)
    assert torch.equal(found.position, expected.position) and torch.equal(found.feature, expected.feature)
    plain = (x @ t["W_enc"].float().T + t["b_enc"].float()).relu()
    assert torch.allclose(found.activation, plain[found.position, found.feature], atol=1e-5)  # float32, another order
    assert found.feature.numel() == int((plain > 0).sum())
