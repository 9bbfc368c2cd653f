"""Damaged, hostile and self-contradicting files: one clear error naming file and field, nothing executed or left
behind."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tl_circuits as tlc
from tests import published
from tests.oracles import removal_gap
from tests.test_sources import spread
from tests.tiny import prompt, tiny_bridge
from tl_circuits.errors import DictionaryError, NotFiniteError, TLCircuitsError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))
    yield
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def refused(folder, words, **options):
    with pytest.raises(DictionaryError, match=words):
        tlc.load_transcoders(folder, **options)


@pytest.fixture
def llama(tmp_path):
    published.circuit_tracer(tmp_path, published.random_layers(3), skip=True)
    return tmp_path


@pytest.fixture
def gemma(tmp_path):
    published.gemma_scope(tmp_path, published.random_layers(3))
    return tmp_path


def npz_of(folder):
    return folder / "layer_1/width_16k/average_l0_71/params.npz"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_cut_off_files(share, llama, tmp_path):
    path = llama / "layer_1.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(llama, r"layer_1\.safetensors is not a whole safetensors file.*cut off")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_cut_off_npz(share, gemma):
    path = npz_of(gemma)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(gemma, r"average_l0_71/params\.npz is not a whole npz")


def test_corrupted_npz_is_found_by_its_checksum(gemma):
    data = bytearray(npz_of(gemma).read_bytes())
    data[data.index(b"NUMPY") + 150] ^= 255  # inside the first array
    npz_of(gemma).write_bytes(data)
    refused(gemma, r"params\.npz is not a whole npz.*CRC", residency="cpu")


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_pickles_are_refused_whatever_their_name(llama, tmp_path):
    (llama / "layer_1.safetensors").write_bytes(pickle.dumps(Trap()))
    refused(llama, r"layer_1\.safetensors is a Python pickle.*never loaded")
    torch.save({"W_enc": torch.zeros(2)}, llama / "layer_1.safetensors")
    refused(llama, "a PyTorch pickle.*never loaded")
    (tmp_path / "pickles").mkdir()
    torch.save({}, tmp_path / "pickles/layer_0.pt")
    refused(tmp_path / "pickles", r"layer_0\.pt is a pickle.*never loaded")


def _rewrite_npz(path, **members):
    arrays = dict(np.load(path)) | members
    np.savez(path, **arrays)


def test_object_arrays_are_refused(gemma):
    _rewrite_npz(npz_of(gemma), threshold=np.array([Trap()], dtype=object))
    refused(gemma, "threshold has dtype object: pickled objects are never loaded")


def test_zip_bombs_are_not_unpacked(gemma):
    with zipfile.ZipFile(npz_of(gemma), "w", zipfile.ZIP_DEFLATED) as archive:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.zeros(50_000_000, np.float32))
        archive.writestr("W_enc.npy", buffer.getvalue())
    refused(gemma, r"W_enc\.npy unpacks from .* to 200,000,128 bytes.*not unpacked")


def test_an_array_that_claims_more_than_there_is(gemma):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    with zipfile.ZipFile(npz_of(gemma), "w") as archive:
        archive.writestr("W_enc.npy", header.getvalue())
    refused(gemma, r"W_enc claims shape \(1000000, 1000000\)")


@pytest.mark.parametrize("member", ["../W_enc.npy", "/etc/W_enc.npy", "run.sh"])
def test_members_that_lead_out_of_the_archive(member, gemma):
    with zipfile.ZipFile(npz_of(gemma), "a") as archive:
        archive.writestr(member, b"x")
    refused(gemma, "is not a plain NumPy array")


@pytest.mark.parametrize(
    "path",
    ["../secret/layer_0.safetensors", "/etc/layer_0.safetensors", "~/layer_0.safetensors", "a\\..\\b.safetensors"],
)
def test_configs_that_lead_out_of_their_folder(path, tmp_path):
    published.config_yaml(
        tmp_path,
        model_kind="transcoder_set",
        feature_input_hook="mlp.hook_in",
        feature_output_hook="hook_mlp_out",
        transcoders=[path],
    )
    refused(tmp_path, r"config\.yaml names the path .* leads out of its own folder")


def test_a_config_cannot_run_code(tmp_path):
    (tmp_path / "config.yaml").write_text("model_kind: !!python/object/apply:os.system ['false']\n")
    refused(tmp_path, r"config\.yaml is not plain YAML")


def test_missing_layers_are_named(llama):
    (llama / "layer_1.safetensors").unlink()
    refused(
        llama,
        r"missing the layers 1; it has 0, 2. Complete it, or .*layers=\[0, 2\]\): "
        "the MLPs of all other layers are error",
    )


@pytest.mark.parametrize("layers", [[0, 2], [0], [2]])
def test_layers_asked_for_one_by_one_are_traced_the_others_as_errors(layers, tmp_path):
    published.circuit_tracer(
        tmp_path, spread(published.random_layers(3, width=40, d=32), -0.3), hooks=("mlp.hook_in", "hook_mlp_out")
    )
    found = tlc.load_transcoders(tmp_path, layers=layers)
    assert list(found.layers) == layers
    with tlc.attach(tiny_bridge("llama"), found) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)
        assert graph.completeness_error() < 1e-4  # float32 sums
        nodes = graph.nodes
        assert set(nodes.layer[nodes.kind == "feature"]) == set(layers)
        assert set(nodes.layer[nodes.kind == "error"]) == {0, 1, 2}
        assert removal_gap(replacement, graph)[0] < 1e-3
        assert list(tlc.dictionary_quality(replacement, [prompt()]).layer) == [*layers, -1]


def test_a_cross_layer_transcoder_with_a_gap_is_not_opened_in_part(tmp_path):
    published.circuit_tracer_clt(tmp_path, published.random_layers(3, decoders=True))
    for kind in ("W_enc", "W_dec"):
        (tmp_path / f"{kind}_1.safetensors").unlink()
    refused(tmp_path, "missing the layers 1; it has 0, 2")
    with pytest.raises(
        DictionaryError, match="missing the layers 1; it has 0, 2. A cross-layer transcoder is one whole"
    ):
        tlc.load_transcoders(tmp_path, layers=[0, 2])


def test_a_cross_layer_file_without_its_other_half(tmp_path):
    published.circuit_tracer_clt(tmp_path, published.random_layers(3, decoders=True))
    (tmp_path / "W_dec_1.safetensors").unlink()
    refused(tmp_path, r"W_dec_1\.safetensors is missing")


def test_mixed_widths(llama, tmp_path):
    published.circuit_tracer(tmp_path / "wider", published.random_layers(3, width=9))
    (tmp_path / "wider/layer_1.safetensors").rename(llama / "layer_1.safetensors")
    refused(llama, "layer 0 has 7 features and layer 1 has 9")


def edit(path, **changes):
    """Rewrite a safetensors file with tensors replaced, or removed where None."""
    tensors = load_file(path) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"b_enc": None}, r"layer_1\.safetensors: the tensor 'b_enc' is missing; the file holds W_dec, W_enc"),
        (
            {"W_dec": torch.zeros(3, 3)},
            r"layer_1\.safetensors: W_dec has shape \(3, 3\), expected \(7, 4\) or \(4, 7\)",
        ),
        ({"W_enc": torch.zeros(4, 7)}, r"W_enc has shape \(4, 7\), expected \(7, any\)"),
        ({"W_skip": torch.zeros(4, 5)}, r"layer_1\.safetensors: W_skip has shape \(4, 5\), expected \(4, 4\)"),
        (
            {"activation_function.threshold": -torch.ones(7)},
            "threshold has 7 negative values, the lowest -1.*logarithm",
        ),
        ({"b_enc": torch.full((7,), float("nan"))}, "b_enc holds NaN"),
        (
            {"threshold": torch.ones(7)},
            r"layer_1\.safetensors holds the tensor 'threshold', which this version does not know",
        ),
        ({"k": torch.tensor(70)}, "needs 1 <= k <= 7, got k=70"),
    ],
)
def test_tensors_that_do_not_fit(changes, words, llama):
    edit(llama / "layer_1.safetensors", **changes)
    with pytest.raises(TLCircuitsError, match=words):
        tlc.load_transcoders(llama)


def test_nan_in_a_mapped_matrix_is_found_when_it_is_used(llama):
    edit(llama / "layer_1.safetensors", W_enc=torch.full((7, 4), float("nan")))
    found = tlc.load_transcoders(llama, residency="disk")
    with pytest.raises(NotFiniteError, match="layer 1: W_enc as read from disk holds NaN"):
        found.active(1, torch.ones(2, 4))


def test_a_missing_threshold(gemma, tmp_path):
    arrays = dict(np.load(npz_of(gemma)))
    del arrays["threshold"]
    np.savez(npz_of(gemma), **arrays)
    refused(gemma, r"average_l0_71/params\.npz: there is no 'threshold'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "gelu"}, "activation 'gelu' is not one of relu, jumprelu, topk"),
        ({"activation": "jumprelu"}, "activation is 'jumprelu', but there is no threshold tensor"),
        ({"activation": "topk"}, "k is None, expected a whole number"),
        ({"k": -3}, r"config\.yaml: k is -3"),
        ({"half_life": 3, "rope": 1}, r"config\.yaml: 'half_life', 'rope' are fields that this version does not know"),
        (
            {"feature_input_hook": "blocks.3.hook_resid_mid"},
            "feature_input_hook is 'blocks.3.hook_resid_mid', expected a hook's name within a block",
        ),
        ({"model_kind": "sae"}, "model_kind is 'sae', expected transcoder_set or cross_layer_transcoder"),
        ({"model_kind": "cross_layer_transcoder"}, "laid out as per-layer transcoders"),
        ({"feature_input_hook": None}, "nothing says which tensors.*input_hook="),
        ({"feature_input_hook": 5}, "feature_input_hook is 5, expected text"),
        ({"transcoders": {"0": "x"}}, "transcoders is dict, expected a list"),
        ({"transcoders": ["layer_1.safetensors", "layer_0.safetensors"]}, "the file of layer 1"),
        ({"transcoders": ["layer_0.pt"]}, r"layer_0\.pt, expected an \.npz or \.safetensors"),
        (
            {"transcoders": ["layer_0.safetensors", "layer_1.safetensors", "x/layer_2.safetensors"]},
            "there is no file .*x/layer_2",
        ),
    ],
)
def test_configs_that_contradict_themselves_or_the_tensors(change, words, llama):
    path = llama / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    refused(llama, words)


@pytest.mark.parametrize("given", [{"input_hook": "mlp.hook_in"}, {"output_hook": "hook_mlp_out"}])
def test_one_of_two_hooks_that_nothing_says_is_not_enough(given, llama):
    (llama / "config.yaml").unlink()
    with pytest.raises(DictionaryError, match="nothing says which tensors.*Give input_hook= and output_hook="):
        tlc.load_transcoders(llama, **given)
    assert tlc.load_transcoders(llama, input_hook="mlp.hook_in", output_hook="hook_mlp_out").layers


def _json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("write", "config", "changes", "words"),
    [
        (
            published.gemma_scope_2,
            "transcoder_all/layer_1_width_16k_l0_small/config.json",
            {"width": 9},
            "config.json: width is 9, but the tensors say 7",
        ),
        (
            published.gemma_scope_2,
            "transcoder_all/layer_1_width_16k_l0_small/config.json",
            {"affine_connection": True},
            "affine_connection is True",
        ),
        (
            published.gemma_scope_2,
            "transcoder_all/layer_1_width_16k_l0_small/config.json",
            {"hf_hook_point_in": "model.layers.5.mlp"},
            "hf_hook_point_in is 'model.layers.5.mlp'",
        ),
        (
            published.gemma_scope_2,
            "transcoder_all/layer_1_width_16k_l0_small/config.json",
            {"half_life": 3},
            "'half_life' is a field",
        ),
        (published.saelens, "layer_1/cfg.json", {"half_life": 3}, "'half_life' is a field"),
        (published.saelens, "layer_1/cfg.json", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        (
            published.llamascopium,
            "transcoder/8x/k64/layer1_transcoder_8x_k64/config.json",
            {"half_life": 3},
            "'half_life' is a field",
        ),
        (
            published.llamascopium,
            "transcoder/8x/k64/layer1_transcoder_8x_k64/config.json",
            {"apply_decoder_bias_to_pre_encoder": True},
            "apply_decoder_bias_to_pre_encoder True is recognised",
        ),
        (
            published.llamascopium,
            "transcoder/8x/k64/layer1_transcoder_8x_k64/config.json",
            {"jump_relu_threshold": 0.5},
            "jump_relu_threshold 0.5 is recognised",
        ),
        (
            published.arena,
            "gpt2-small-layer-1-mlp-transcoder-folded-b_dec_out/cfg.json",
            {"half_life": 3},
            "'half_life' is a field",
        ),
        (
            published.arena,
            "gpt2-small-layer-1-mlp-transcoder-folded-b_dec_out/cfg.json",
            {"apply_b_dec_to_input": True},
            "apply_b_dec_to_input is True, expected False.*folded",
        ),
        (
            published.arena,
            "gpt2-small-layer-1-mlp-transcoder-folded-b_dec_out/cfg.json",
            {"use_b_dec_out": True},
            "use_b_dec_out is True",
        ),
        (
            published.arena,
            "gpt2-small-layer-1-mlp-transcoder-folded-b_dec_out/cfg.json",
            {"hook_name": "blocks.1.hook_mlp_out"},
            "hook_name is 'blocks.1.hook_mlp_out'",
        ),
        (
            published.arena,
            "gpt2-small-layer-1-mlp-transcoder-folded-b_dec_out/cfg.json",
            {"d_sae": 9},
            "d_sae is 9, but the tensors say 7",
        ),
        (published.saelens, "layer_1/cfg.json", {"d_sae": 9}, "cfg.json: d_sae is 9, but the tensors say 7"),
        (
            published.saelens,
            "layer_1/cfg.json",
            {"architecture": "standard"},
            "an autoencoder writes where it reads, but hook_name is",
        ),
        (
            published.saelens,
            "layer_1/cfg.json",
            {"architecture": "jumprelu_transcoder"},
            "the tensor 'threshold' is missing",
        ),
        (
            published.saelens,
            "layer_1/cfg.json",
            {"normalize_activations": "layer_norm"},
            "normalize_activations is 'layer_norm'",
        ),
        (
            published.llamascopium,
            "transcoder/8x/k64/layer1_transcoder_8x_k64/config.json",
            {"d_model": 9},
            "d_model is 9",
        ),
        (
            published.llamascopium,
            "transcoder/8x/k64/layer1_transcoder_8x_k64/config.json",
            {"sae_type": "lorsa"},
            "Lorsa.*recognised but not supported",
        ),
        (
            published.llamascopium,
            "transcoder/8x/k64/layer1_transcoder_8x_k64/config.json",
            {"act_fn": "batchtopk"},
            "act_fn 'batchtopk' is recognised but not supported",
        ),
    ],
)
def test_configs_of_one_layer(write, config, changes, words, tmp_path):
    write(tmp_path, published.random_layers(3))
    _json(tmp_path / config, **changes)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transcode": False}, "transcode is False: this is an autoencoder"),
        ({"activation": "groupmax"}, "activation 'groupmax' is not supported"),
        ({"num_latents": 99}, "num_latents .* is 99, but the tensors say 7"),
        ({"skip_connection": True}, "skip_connection is True, but the tensors say False"),
        ({"k": 8}, "k is 8, but there are only 7 features"),
        ({"n_targets": 3, "n_sources": 2}, "layer 1 has n_targets 3.*The layers of one cross-layer set agree"),
        ({"half_life": 3}, r"cfg\.json: 'half_life' is a field that this version does not know in this layout"),
    ],
)
def test_configs_of_sparsify(changes, words, tmp_path):
    published.sparsify(tmp_path, published.random_layers(3), k=2)
    _json(tmp_path / "layers.1.mlp/cfg.json", **changes)
    refused(tmp_path, words)


def test_sparsify_on_the_residual_stream(tmp_path):
    published.sparsify(tmp_path, published.random_layers(2), k=2)
    (tmp_path / "layers.1.mlp").rename(tmp_path / "layers.1")
    refused(tmp_path, "hookpoint 'layers.1' is not an MLP.*no linear path")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Llama3_1-8B-Base-L0TC-8x/hyperparams.json", "Llama Scope 1"),
        ("relu/norm_stats.json", "crosslayer-coding"),
        ("checkpoint.safetensors", "crosslayer-transcoder"),
        ("clt_cfg.json", "CircuitLab"),
        ("encoder_layer_0.safetensors", "sparsecoder sweep"),
    ],
)
def test_layouts_known_by_sight_are_refused_by_name(file, name, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    refused(tmp_path, f"{name}.*recognised but not supported")


def test_a_repository_of_autoencoders_with_the_layout_of_transcoders(tmp_path):
    published.gemma_scope(tmp_path / "google/gemma-scope-2b-pt-res", published.random_layers(2))
    refused(
        tmp_path / "google/gemma-scope-2b-pt-res",
        "autoencoders .res., not transcoders.*gemma-scope-2b-pt-res-canonical",
    )


def test_a_set_that_chooses_features_over_all_layers_is_refused_by_name(tmp_path):
    """ByteDance-Seed/Cross-Layer-TopK-CLT: files of circuit-tracer's names, with a norm for each feature beside
    them."""
    for i in range(2):
        save_file({f"W_enc_{i}": torch.zeros(7, 4)}, tmp_path / f"W_enc_{i}.safetensors")
        save_file(
            {f"W_dec_{i}": torch.zeros(7, 2 - i, 4), f"W_dec_norm_{i}": torch.ones(7)},
            tmp_path / f"W_dec_{i}.safetensors",
        )
    save_file({"W_dec_norm": torch.ones(2, 7)}, tmp_path / "W_dec_norm.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"d_feature": 7, "k": 2}))
    refused(tmp_path, "highest-scoring features of all layers together.*recognised but not supported")


def test_a_cross_layer_skip_that_only_some_layers_have(tmp_path):
    published.circuit_tracer_clt(tmp_path, published.random_layers(3, decoders=True), skip="with the encoder")
    edit(tmp_path / "W_enc_1.safetensors", W_skip_1=None)
    refused(tmp_path, r"layer 0 has a skip connection .W_skip_0. and layer 1 has none")
    edit(tmp_path / "W_enc_1.safetensors", W_skip_1=torch.zeros(4, 5))
    refused(tmp_path, r"W_skip_1 has shape \(4, 5\), expected \(4, 4\)")


def test_an_empty_folder_and_a_file(tmp_path, llama):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no transcoders in a layout we know; it holds nothing")
    refused(llama / "layer_0.safetensors", "is a file; give the folder")


def test_an_unknown_residency(llama):
    with pytest.raises(DictionaryError, match="residency is 'ram', expected \"disk\""):
        from tl_circuits.dictionaries.residency import choose_residency

        choose_residency("ram", torch.device("cpu"), 1)
