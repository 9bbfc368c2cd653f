"""sparsify's and clt-training's files: activations and reconstructions equal those of EleutherAI's own formulas."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_circuits as tlc
from tests import eleuther
from tests.eleuther import Coder, normal
from tests.oracles import removal_gap
from tests.tiny import prompt, tiny_bridge
from tl_circuits.dictionaries.slot_decoders import SlotDecoders
from tl_circuits.errors import DictionaryError, NotFiniteError

# Our sums are in another order than theirs, in float32 on numbers of size 1 to 30.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
X = normal(40, 6, seed=100)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))


def activations(found, layer, x):
    return found.activate(layer, found.pre_activations(layer, x), x)


@pytest.mark.parametrize("residency", ["disk", "cpu"])
def test_older_sparsify_files_subtract_the_decoder_bias(residency, tmp_path):
    layers = [eleuther.tensors(seed=10 * i, skip=True) for i in range(3)]
    for i, t in enumerate(layers):
        eleuther.write(tmp_path / "set", f"layers.{i}.mlp", t, eleuther.OLD)
    found = tlc.load_transcoders(tmp_path / "set", residency=residency)
    for i, t in enumerate(layers):
        acts, out = eleuther.old_forward(t, X, k=3)
        assert torch.allclose(activations(found, i, X), acts, **CLOSE)
        assert torch.allclose(found.decode(i, {i: acts}, X), out, **CLOSE)
    assert (found.input_hook(1), found.output_hook(1)) == ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
    # From disk the files are used where they are; only the bias, which takes the whole encoder to compute it, is kept.
    kept = [set(load_file(path)) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert kept == ([{"b_enc"}] * 3 if residency == "disk" else [])
    again = tlc.load_transcoders(tmp_path / "set", residency=residency)
    assert torch.equal(activations(again, 2, X), activations(found, 2, X))


def test_an_older_file_without_skip_is_a_transcoder_only_if_its_training_says_so(tmp_path):
    t = eleuther.tensors()
    eleuther.write(tmp_path / "set", "layers.0.mlp", t, eleuther.OLD | {"skip_connection": False})
    with pytest.raises(DictionaryError, match="transcode is None: this is an autoencoder"):
        tlc.load_transcoders(tmp_path / "set")
    (tmp_path / "set/config.json").write_text(json.dumps({"model": "gpt2", "transcode": True}))
    found = tlc.load_transcoders(tmp_path / "set")
    acts, _ = eleuther.old_forward(t | {"W_skip": torch.zeros(6, 6)}, X, k=3)
    assert torch.allclose(activations(found, 0, X), acts, **CLOSE) and found.made_for == "gpt2"


def test_the_layout_of_the_smollm2_set(tmp_path):
    """EleutherAI/skip-transcoder-SmolLM2-135M-128x: folders ``model.layers.{i}.mlp`` in sparsify's present layout."""
    config = {"activation": "topk", **eleuther.OLD, "transcode": True}
    t = eleuther.tensors(skip=True)
    eleuther.write(tmp_path / "set", "model.layers.0.mlp", t, config)
    found = tlc.load_transcoders(tmp_path / "set")
    coder = Coder({}, t)
    assert torch.allclose(activations(found, 0, X), coder.encode(X), **CLOSE)
    assert torch.allclose(found.decode(0, {0: coder.encode(X)}, X), coder.alone(X), **CLOSE)


def affine(width=9, d=6, seed=0, ending=""):
    return {f"post_enc{ending}": normal(width, seed=seed), f"post_enc_scale{ending}": normal(width, seed=seed + 1)}


NORMS = {"in_norm": torch.tensor([7.5]), "out_norm": torch.tensor([0.4])}
SINGLE = {  # configuration, tensors beside those of every file
    "post_enc": ({}, {"post_enc": affine()["post_enc"]}),
    "post_enc and scale": ({"post_encoder_scale": True}, affine()),
    "scaled in and out": ({"normalize_io": True}, NORMS),
    "all, with a skip connection": (
        {"normalize_io": True, "post_encoder_scale": True, "skip_connection": True},
        affine() | NORMS,
    ),
    "one source": ({"n_sources": 1}, {"post_enc": torch.zeros(9)}),
    "jumprelu as gemmascope-transcoders-sparsify has it": ({"k": 9}, {"post_enc": affine()["post_enc"].abs()}),
}


@pytest.mark.parametrize("residency", ["disk", "cpu"])
@pytest.mark.parametrize("kind", SINGLE)
def test_one_layer_of_clt_training(kind, residency, tmp_path):
    config, more = SINGLE[kind]
    t = eleuther.tensors(skip=bool(config.get("skip_connection"))) | more
    coder = Coder(config, t)
    eleuther.write(tmp_path / "set", "h.0.mlp", t, coder.config)
    found = tlc.load_transcoders(tmp_path / "set", residency=residency)
    assert isinstance(found, tlc.TranscoderSet) and not isinstance(found, tlc.CrossLayerTranscoders)
    acts = coder.encode(X)
    expected = acts + t.get("post_enc", 0.0) * (acts > 0)
    ours = activations(found, 0, X)
    assert torch.allclose(ours, expected, **CLOSE)
    assert torch.allclose(found.decode(0, {0: ours}, X), coder.alone(X), **CLOSE)
    active = found.active(0, X)
    vectors, bias = found.read_vectors(0, active.feature, X[active.position])
    # An active feature's incoming edges and bias add up to its activation, post_enc included.
    assert torch.allclose((vectors * X[active.position]).sum(-1) + bias, active.activation, **CLOSE)
    assert torch.equal(found.activations_at(0, active.feature, X[active.position]), active.activation)


def cross(kind, n=4, width=9, d=6, config=(), affine_scales=False, span=None):
    """A cross-layer set of ``n`` layers; with ``span`` its features write to that many layers only."""
    coders = []
    for s in range(n):
        n_targets = min(span or n, n - s)
        sources = [i for i in range(s + 1) if i + min(span or n, n - i) > s]
        t = eleuther.tensors(width, d, seed=100 * s)
        decoders = {f"W_decs.{k}": normal(width, d, seed=100 * s + 50 + k) for k in range(n_targets)}
        biases = {f"b_decs.{k}": normal(d, seed=100 * s + 70 + k) for k in range(n_targets)}
        if kind == "per-layer":
            t["W_dec"] = normal(width * len(sources), d, seed=100 * s + 60)
        elif kind == "untied":
            t |= decoders | biases | {"W_dec": decoders["W_decs.0"], "b_dec": biases["b_decs.0"]}
        elif kind == "tied by source":
            t |= biases
        for k in range(n_targets):
            scales = affine(width, seed=100 * s + 80 + k, ending=f"s.{k}")
            t[f"post_encs.{k}"] = affine(width, seed=100 * s + 80)["post_enc"]  # the same for every target
            if affine_scales:
                t[f"post_enc_scales.{k}"] = scales[f"post_enc_scales.{k}"]
        made = dict(config) | {"n_targets": n_targets, "n_sources": len(sources), "post_encoder_scale": affine_scales}
        if kind in ("per-layer", "tied by target"):
            made["coalesce_topk"] = "per-layer" if kind == "per-layer" else "concat"
        made["per_source_tied"] = kind == "tied by source"
        if made.get("normalize_io"):
            t |= {"in_norm": torch.tensor([3.0 + s]), "out_norm": torch.tensor([0.5 + s])}
        if made.get("skip_connection"):
            t |= {"W_skips.0" if kind in ("untied", "tied by source") else "W_skip": normal(d, d, seed=100 * s + 90)}
        coders.append(Coder(made, t))
    return coders


def write_set(folder, coders):
    for s, coder in enumerate(coders):
        eleuther.write(folder, f"layers.{s}.mlp", coder.tensors, coder.config)


KINDS = ("untied", "per-layer", "tied by target", "tied by source")
SETTINGS = {
    "plain": {},
    "scaled, with skips": {"config": {"normalize_io": True, "skip_connection": True}, "affine_scales": True},
    "divided": {"config": {"divide_cross_layer": True}},
    "writing to two layers": {"span": 2},
}


@pytest.mark.parametrize("residency", ["disk", "cpu"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_cross_layer_sets_of_clt_training(kind, settings, residency, tmp_path):
    coders = cross(kind, **SETTINGS[settings])
    inputs = [normal(40, 6, seed=1000 + s) for s in range(4)]
    write_set(tmp_path / "set", coders)
    found = tlc.load_transcoders(tmp_path / "set", residency=residency)
    assert isinstance(found, tlc.CrossLayerTranscoders)
    acts = {s: activations(found, s, x) for s, x in enumerate(inputs)}
    for s, (coder, x) in enumerate(zip(coders, inputs, strict=True)):
        plain = coder.encode(x)
        assert torch.allclose(acts[s], plain + coder.tensors["post_encs.0"] * (plain > 0), **CLOSE)
    outputs = eleuther.cross_layer(coders, inputs)
    for t, expected in enumerate(outputs):
        ours = found.decode(t, {s: acts[s] for s in found.writers(t)}, inputs[t])
        assert torch.allclose(ours, expected, rtol=1e-5, atol=5e-5)  # as CLOSE, summed over up to four layers
        # The same from the vectors that a graph's edges are made of.
        written = found.constant(t).expand_as(expected).clone()
        for s in found.writers(t):
            active = found.active(s, inputs[s])
            rows = found.decoder_vectors(s, active.feature, t)
            written.index_add_(0, active.position, rows * active.activation[:, None])
        if found.skip(t) is not None:
            written += inputs[t] @ found.skip(t).T
        assert torch.allclose(written, expected, rtol=1e-5, atol=5e-5)
    everything = torch.arange(9)
    each = sum(found.decoder_vectors(0, everything, t) for t in range(4) if 0 in found.writers(t))
    assert torch.allclose(found.output_directions(0, everything), each, atol=1e-5)  # float32


def test_a_tied_decoder_is_in_memory_once(tmp_path):
    write_set(tmp_path / "set", cross("tied by target"))
    found = tlc.load_transcoders(tmp_path / "set", residency="cpu")
    assert found.decoder(0).matrices[3] is found.decoder(3).matrices[0]


def test_cross_layer_files_are_used_where_they_are(tmp_path):
    """From disk, nothing is copied unless a matrix is stored in another form than it is used in."""
    write_set(tmp_path / "set", cross("per-layer"))
    tlc.load_transcoders(tmp_path / "set", residency="disk")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def retouch(folder, hookpoint="layers.1.mlp", tensors=(), **config):
    path = folder / hookpoint / "sae.safetensors"
    save_file({n: t for n, t in (load_file(path) | dict(tensors)).items() if t is not None}, path)
    path = folder / hookpoint / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"tensors": {"post_encs.1": torch.ones(9)}},
            r"post_encs\.1 differs from post_encs\.0.*recognised but not supported",
        ),
        ({"tensors": {"W_skips.1": torch.eye(6)}}, "W_skips.1 is a skip connection from layer 1 to layer 2"),
        ({"tensors": {"W_decs.2": None}}, "the tensor 'W_decs.2' is missing"),
        ({"tensors": {"W_thing": torch.ones(1)}}, "holds the tensor 'W_thing', which this version does not know"),
        ({"coalesce_topk": "group"}, "coalesce_topk 'group' is recognised but not supported"),
        ({"coalesce_topk": "concat"}, "The layers of one cross-layer set agree"),
        ({"n_targets": 0}, "n_targets is 0.*The layers of one cross-layer set agree"),
        ({"secondary_target_tied": True}, "secondary_target_tied True is recognised but not supported"),
        ({"activation": "batchtopk"}, "keeps the largest activations of a whole batch"),
        ({"signed": True}, "topk of absolute values .signed.' is not supported"),
        ({"normalize_io": True}, "the tensor 'in_norm' is missing"),
        ({"post_encoder_scale": True}, "the tensor 'post_enc_scales.0' is missing"),
        ({"half_life": 3}, r"cfg\.json: 'half_life' is a field that this version does not know"),
    ],
)
def test_cross_layer_sets_that_are_refused(change, words, tmp_path):
    write_set(tmp_path / "set", cross("untied"))
    retouch(tmp_path / "set", **change)
    with pytest.raises(DictionaryError, match=words):
        tlc.load_transcoders(tmp_path / "set")


@pytest.mark.parametrize("value", [0.0, -2.0, float("nan"), float("inf")])
def test_norms_that_are_no_positive_number(value, tmp_path):
    coder = Coder({"normalize_io": True}, eleuther.tensors() | NORMS | {"in_norm": torch.tensor([value])})
    eleuther.write(tmp_path / "set", "h.0.mlp", coder.tensors, coder.config)
    with pytest.raises(
        (DictionaryError, NotFiniteError), match="in_norm (is .*, expected one positive number|holds NaN or infinity)"
    ):
        tlc.load_transcoders(tmp_path / "set")


def test_nan_in_a_vector_that_others_are_computed_from_is_named_and_not_what_was_computed(tmp_path):
    """Older sparsify files' encoder biases are computed from ``b_dec``, clt-training's thresholds from ``post_enc``."""
    broken = torch.tensor([float("nan")] * 6)
    eleuther.write(tmp_path / "older", "layers.0.mlp", eleuther.tensors(skip=True) | {"b_dec": broken}, eleuther.OLD)
    write_set(tmp_path / "cross", cross("untied"))
    added = {f"post_encs.{slot}": torch.full((9,), float("inf")) for slot in range(3)}
    retouch(tmp_path / "cross", tensors=added)
    for name, tensor in (("older", "b_dec"), ("cross", r"post_encs\.0")):
        with pytest.raises(NotFiniteError, match=rf"sae\.safetensors: {tensor} holds NaN or infinity"):
            tlc.load_transcoders(tmp_path / name)


def test_too_few_sources_for_the_layers_that_write(tmp_path):
    write_set(tmp_path / "set", cross("per-layer"))
    retouch(tmp_path / "set", "layers.3.mlp", n_sources=2)
    with pytest.raises(DictionaryError, match="n_sources is 2, but 4 layers write to this one"):
        tlc.load_transcoders(tmp_path / "set")


def _one(folder, hookpoint="layers.0.mlp", **training):
    coder = Coder({}, eleuther.tensors())
    eleuther.write(folder, hookpoint, coder.tensors, coder.config)
    if training:
        (folder / "config.json").write_text(json.dumps(training))
    return tlc.load_transcoders(folder)


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("gpt2-mntss-transcoder-relu-sp6-skip", ("hook_resid_mid", "mlp.hook_out")),
        ("gpt2-curt-clt-untied-layerwise-tokentopk", ("hook_resid_mid", "mlp.hook_out")),
        ("Llama-3.2-1B-mntss-skip-transcoder", ("hook_resid_mid", "mlp.hook_out")),
        ("gemma-mntss-no-skip", ("hook_resid_mid", "hook_mlp_out")),
        ("gemmascope-transcoders-sparsify", ("mlp.hook_in", "hook_mlp_out")),
        ("gpt2-plt-none-ef128-k16", ("mlp.hook_in", "mlp.hook_out")),
        ("llama1b-plt-no-skip-ef64-k32", ("mlp.hook_in", "mlp.hook_out")),
    ],
)
def test_hooks_of_converted_sets_are_known_by_their_names(name, hooks, tmp_path):
    found = _one(tmp_path / "EleutherAI" / name)
    assert (found[0].input_hook, found[0].output_hook) == hooks


@pytest.mark.parametrize(
    ("inputs", "model", "read"),
    [
        ("layers.0.post_attention_layernorm", "meta-llama/Llama-3.2-1B", "hook_resid_mid"),
        ("layers.0.pre_feedforward_layernorm", "google/gemma-3-1b-pt", "hook_resid_mid"),
        ("h.0.ln_2", "gpt2", "hook_resid_mid"),
    ],
)
def test_hooks_of_the_training_configuration(inputs, model, read, tmp_path):
    assert (
        _one(tmp_path / "set", model=model, hookpoints=["layers.0.mlp"], hookpoints_in=[inputs])[0].input_hook == read
    )


@pytest.mark.parametrize(
    ("hookpoint", "training", "words"),
    [
        (
            "layers.0.mlp",
            {
                "hookpoints": ["layers.0.mlp"],
                "hookpoints_in": ["layers.0.post_attention_layernorm"],
                "model": "google/gemma-2-2b",
            },
            "expected one of",
        ),
        (
            "layers.0.mlp",
            {"hookpoints": ["layers.0.mlp"], "hookpoints_in": ["layers.3.ln_2"]},
            "expected one of.*of the same layer",
        ),
        (
            "layers.0.mlp",
            {"hookpoints": [], "hookpoints_in": ["layers.0.ln_2"]},
            "do not say what 'layers.0.mlp' reads",
        ),
        (
            "layers.0.post_feedforward_layernorm",
            {"model": "google/gemma-3-1b-pt"},
            "reads and writes the norm behind the MLP",
        ),
        ("layers.0", {}, "not an MLP"),
    ],
)
def test_hookpoints_whose_inputs_are_not_known(hookpoint, training, words, tmp_path):
    with pytest.raises(DictionaryError, match=words):
        _one(tmp_path / "set", hookpoint, **training)


@pytest.mark.parametrize("kind", ["untied", "tied by target"])
@pytest.mark.parametrize("residency", ["disk", "device"])
def test_a_cross_layer_set_is_traced(kind, residency, tmp_path):
    """Sums hold, both engines agree, and taking a feature away changes what its edges say."""
    coders = cross(
        kind, n=3, width=40, d=32, config={"normalize_io": True, "skip_connection": True}, affine_scales=True
    )
    for coder in coders:
        for name, tensor in coder.tensors.items():
            if name.startswith(("W_", "encoder.weight")):
                tensor /= 32 if name.startswith("W_skip") else 32**0.5
    write_set(tmp_path / "set", coders)
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.load_transcoders(tmp_path / "set", residency=residency)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        again = tlc.attribute(replacement, prompt(), max_nodes=60, engine="autograd", progress=False)
        assert graph.is_kind("feature").sum() > 20 and graph.completeness_error() < 1e-4
        assert torch.allclose(graph.adjacency(), again.adjacency(), atol=1e-4)  # float32, two ways of summing
        assert removal_gap(replacement, graph)[0] < 1e-3


@pytest.mark.parametrize(("matrices", "scales"), [((), ()), ((torch.ones(2, 3),), ()), ((), (None,))])
def test_decoders_are_given_with_one_scale_each(matrices, scales):
    with pytest.raises(
        DictionaryError, match=f"{len(matrices)} decoder matrices and {len(scales)} scales: give one scale each"
    ):
        SlotDecoders(matrices, scales)
