"""Every name a published set goes by, on files laid out exactly like the real repositories."""

import shutil
from collections import namedtuple

import pytest
import torch

import tl_circuits as tlc
from tests import eleuther, published
from tests.fake_hub import serving
from tests.tiny import cross_layer, hook_state, prompt, tiny_bridge
from tl_circuits.dictionaries.residency import choose_residency
from tl_circuits.errors import DictionaryError, DownloadError

# The 26 sparsities of Gemma Scope that circuit-tracer and SAELens both take.
GEMMA_L0 = (76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6, 8, 8, 8, 10, 12, 13, 12, 11, 13, 15, 25, 37, 41)
GEMMA_REPO = "google/gemma-scope-2b-pt-transcoders"


def spread(layers, bias):
    """Tensors for a model of width 32 with a few active features a position."""
    for t in layers:
        t["W_enc"] /= 32**0.5
        t["W_dec"] /= 32**0.5
        t["b_enc"] = 0.1 * t["b_enc"] + bias
        t["W_skip"] *= 0.05
        t["b_dec"] *= 0.1
        t["threshold"] *= 0.3
    return layers


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub cache with the real repositories' names, files, configs and hooks."""
    cache = tmp_path_factory.mktemp("hub")
    gemma = spread(published.random_layers(4, width=40, d=32, seed=1), 0.0)

    def weights(folder):
        published.gemma_scope(folder, gemma, l0=lambda i: GEMMA_L0[i])
        published.gemma_scope(folder, gemma[:3], l0=lambda i: 200 + i)

    published.hub_cache(cache, GEMMA_REPO, weights)
    published.hub_cache(
        cache,
        "mwhanna/gemma-scope-transcoders",
        lambda folder: published.config_yaml(
            folder,
            model_name="google/gemma-2-2b",
            model_kind="transcoder_set",
            feature_input_hook="ln2.hook_normalized",
            feature_output_hook="hook_mlp_out",
            scan="mwhanna/gemma-scope-transcoders",
            transcoders=[
                f"hf://{GEMMA_REPO}/layer_{i}/width_16k/average_l0_{GEMMA_L0[i]}/params.npz" for i in range(4)
            ],
        ),
    )
    llama = spread(published.random_layers(3, width=40, d=32, seed=2, dtype=torch.float32), -0.3)
    published.hub_cache(
        cache, "mntss/transcoder-Llama-3.2-1B", lambda folder: published.circuit_tracer(folder, llama, skip=True)
    )
    clt = spread(published.random_layers(3, width=40, d=32, seed=3, decoders=True), -0.3)
    published.hub_cache(cache, "mntss/clt-llama-3.2-1b-524k", lambda folder: published.circuit_tracer_clt(folder, clt))
    qwen = spread(published.random_layers(3, width=40, d=32, seed=4), -0.3)
    published.hub_cache(
        cache,
        "mwhanna/qwen3-4b-transcoders",
        lambda folder: published.circuit_tracer(
            folder, qwen, hooks=("mlp.hook_in", "mlp.hook_out"), model="Qwen/Qwen3-4B"
        ),
    )

    def scope_2(folder):
        published.gemma_scope_2(folder, qwen, affine=True)
        published.gemma_scope_2(folder, qwen, l0="big")

    published.hub_cache(cache, "google/gemma-scope-2-1b-pt", scope_2)
    published.hub_cache(
        cache,
        "mwhanna/gemma-scope-2-1b-pt",
        lambda folder: published.config_yaml(
            folder / "transcoder_all/width_16k_l0_small_affine",
            model_name="google/gemma-3-1b-pt",
            model_kind="transcoder_set",
            feature_input_hook="mlp.hook_in",
            feature_output_hook="hook_mlp_out",
            transcoders=[
                f"hf://google/gemma-scope-2-1b-pt/transcoder_all/layer_{i}_width_16k_l0_small_affine/params.safetensors"
                for i in range(3)
            ],
        ),
    )
    gpt2 = spread(published.random_layers(3, width=40, d=32, seed=5), -0.3)
    published.hub_cache(
        cache, "callummcdougall/arena-demos-transcoder", lambda folder: published.arena(folder, gpt2, unfolded=(1,))
    )
    published.hub_cache(
        cache,
        "bluelightai/clt-qwen3-0.6b-base-20k",
        lambda folder: published.circuit_tracer_clt(folder, clt, model="Qwen/Qwen3-0.6B-Base"),
    )
    published.hub_cache(
        cache, "google/gemma-scope-2-270m-pt", lambda folder: published.gemma_scope_2_clt(folder, clt, affine=True)
    )

    def smollm2(folder):
        for i, t in enumerate(spread(published.random_layers(3, width=40, d=32, seed=6), 0.0)):
            tensors = {
                "encoder.weight": t["W_enc"],
                "encoder.bias": t["b_enc"],
                **{n: t[n] for n in ("W_dec", "b_dec", "W_skip")},
            }
            eleuther.write(
                folder,
                f"model.layers.{i}.mlp",
                tensors,
                {"activation": "topk", **eleuther.OLD, "k": 5, "transcode": True},
            )

    published.hub_cache(cache, "EleutherAI/skip-transcoder-SmolLM2-135M-128x", smollm2)
    return cache


@pytest.fixture(autouse=True)
def _own_conversions(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "converted"))


FIRST_TRIED = [
    ("gemma", "gemma2"),
    ("llama", "llama"),
    ("llama-3.2-1b-clt", "llama"),
    ("qwen3-4b", "qwen3"),
    ("gpt2-arena", "gpt2"),
    ("smollm2-135m", "llama"),
    ("qwen3-0.6b-clt", "qwen3"),
    ("gemma-3-270m-clt", "gemma3"),
]


@pytest.mark.parametrize("residency", ["disk", "device"])
@pytest.mark.parametrize(("name", "architecture"), FIRST_TRIED)
def test_short_names_through_the_whole_chain(name, architecture, residency, cache, tmp_path):
    model = tiny_bridge(architecture)
    before = hook_state(model)
    transcoders = tlc.load_transcoders(name, cache_dir=cache, residency=residency)
    with tlc.attach(model, transcoders) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        again = tlc.attribute(replacement, prompt(), max_nodes=60, engine="autograd", progress=False)
        feature = graph.nodes[graph.nodes["kind"] == "feature"].iloc[0]
        edit = tlc.Ablate(int(feature["layer"]), int(feature["position"]), int(feature["feature"]))
        assert tlc.intervene(replacement, prompt(), edit, freeze="attention").kl() > 0
    assert graph.is_kind("feature").sum() > 20 and graph.completeness_error() < 1e-4
    assert torch.allclose(graph.adjacency(), again.adjacency(), atol=1e-4)  # float32, two ways of summing
    assert hook_state(model) == before
    graph.save(tmp_path / "g.safetensors")
    assert tlc.load_graph(tmp_path / "g.safetensors").completeness_error() < 1e-4


def test_gemma_is_the_same_by_all_its_names(cache):
    by_name = {
        name: tlc.load_transcoders(name, cache_dir=cache, **options)
        for name, options in {
            "gemma": {},
            "gemma-2-2b": {},
            "mwhanna/gemma-scope-transcoders@main": {},
            "hf://mwhanna/gemma-scope-transcoders": {},
            GEMMA_REPO: {"width": 16384, "l0": 70},
        }.items()
    }
    first = by_name["gemma"]
    assert (first.input_hook(2), first.output_hook(2)) == ("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out")
    assert first.made_for == "google/gemma-2-2b" and list(first.layers) == [0, 1, 2, 3]
    for other in by_name.values():
        assert all(torch.equal(first[i].W_enc, other[i].W_enc) for i in range(4))


def test_saelens_releases_are_found_without_a_network(cache):
    pytest.importorskip("sae_lens", reason="sae_lens is not installed (transformer_lens 4)")
    # SAELens names one sparsity a layer, so nothing is ambiguous although the repository has more.
    gemma = tlc.load_transcoders("gemma-scope-2b-pt-transcoders", cache_dir=cache)
    assert torch.equal(gemma[1].W_dec, tlc.load_transcoders("gemma", cache_dir=cache)[1].W_dec)
    qwen = tlc.load_transcoders("mwhanna-qwen3-4b-transcoders", cache_dir=cache)
    assert qwen.output_hook(0) == "blocks.0.mlp.hook_out"
    scope = tlc.load_transcoders("gemma-scope-2-1b-pt-transcoders-all", l0="small_affine", cache_dir=cache)
    assert scope[0].W_skip is not None and scope.input_hook(1) == "blocks.1.mlp.hook_in"
    assert torch.equal(scope[2].W_enc, tlc.load_transcoders("gemma-3-1b-pt", cache_dir=cache)[2].W_enc)


def test_a_choice_is_listed_not_made(cache):
    with pytest.raises(DictionaryError, match=r"width=.*l0=.*'16k'.*76.*200"):
        tlc.load_transcoders(GEMMA_REPO, cache_dir=cache)
    with pytest.raises(DictionaryError, match="'big'.*'small_affine'"):
        tlc.load_transcoders("google/gemma-scope-2-1b-pt/transcoder_all", cache_dir=cache)
    assert (
        tlc.load_transcoders("google/gemma-scope-2-1b-pt/transcoder_all", l0="big", cache_dir=cache)[0].W_skip is None
    )
    with pytest.raises(DictionaryError, match="no width 65536. There is: width='16k'"):
        tlc.load_transcoders(GEMMA_REPO, width=65536, cache_dir=cache)
    with pytest.raises(DictionaryError, match="has no l0 'tiny'"):
        tlc.load_transcoders("google/gemma-scope-2-1b-pt/transcoder_all", l0="tiny", cache_dir=cache)


def test_a_width_in_features_is_the_one_published_in_thousands(tmp_path):
    layers = published.random_layers(2)
    published.gemma_scope(tmp_path, layers)
    published.gemma_scope(tmp_path / "wide", published.random_layers(2, seed=5))
    for layer in range(2):
        (tmp_path / f"wide/layer_{layer}/width_16k").rename(tmp_path / f"layer_{layer}/width_65k")
    (tmp_path / "wide/layer_0").rmdir()
    (tmp_path / "wide/layer_1").rmdir()
    (tmp_path / "wide").rmdir()
    narrow, wide = (tlc.load_transcoders(tmp_path, width=width) for width in (16384, 65536))
    assert torch.equal(narrow[1].W_enc, layers[1]["W_enc"]) and not torch.equal(wide[1].W_enc, narrow[1].W_enc)


def test_some_layers_of_a_set(cache):
    assert list(tlc.load_transcoders("llama", layers=[1, 2], cache_dir=cache).layers) == [1, 2]
    with pytest.raises(DictionaryError, match=r"no layers 7; it has 0..2"):
        tlc.load_transcoders("llama", layers=[1, 7], cache_dir=cache)
    with pytest.raises(DictionaryError, match="loaded whole"):
        tlc.load_transcoders("llama-3.2-1b-clt", layers=[1, 2], cache_dir=cache)


def test_a_folder_for_downloads_is_refused_for_releases_of_autoencoders(cache):
    """SAELens' loaders, which read them, have their own folder. What else they do:
    tests/test_saelens_autoencoders.py."""
    pytest.importorskip("sae_lens", reason="sae_lens is not installed (transformer_lens 4)")
    with pytest.raises(DictionaryError, match="set HF_HOME instead of cache_dir="):
        tlc.load_transcoders("gpt2-small-attn-out-v5-32k", cache_dir=cache)


def test_summed_decoders_point_to_the_whole_cross_layer_transcoder(cache):
    pytest.importorskip("sae_lens", reason="sae_lens is not installed (transformer_lens 4)")
    with pytest.raises(DictionaryError, match="mntss/clt-gemma-2-2b-2.5M"):
        tlc.load_transcoders("mntss-gemma-2-2b-2.5m-clt-as-per-layer", cache_dir=cache)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("lama", "Nearest: .*llama"),
        ("./nowhere", "there is no folder"),
        ("a/b/../../c", "leads out of its own folder"),
        ("a b/c", "not a hub reference"),
        (7, "give a name, a folder"),
    ],
)
def test_names_that_are_none(source, words, cache):
    with pytest.raises(DictionaryError, match=words):
        tlc.load_transcoders(source, cache_dir=cache)


def test_offline_what_is_not_cached_says_what_to_run(cache):
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set.*hf download mwhanna/qwen3-8b-transcoders"):
        tlc.load_transcoders("qwen3-8b", cache_dir=cache)


@pytest.fixture
def online(monkeypatch):
    """Points the hub library at an address and switches offline mode off."""
    from huggingface_hub import constants

    def point(address):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )

    return point


def test_downloads_once_then_never_asks_again(tmp_path, online):
    published.circuit_tracer(tmp_path / "remote", published.random_layers(2))
    with serving({"mntss/transcoder-Llama-3.2-1B": tmp_path / "remote"}) as (address, requests):
        online(address)
        found = tlc.load_transcoders("llama", cache_dir=tmp_path / "cache")
        assert torch.equal(found[1].W_enc, published.random_layers(2)[1]["W_enc"])
        fetched = len([r for r in requests if r[0] == "GET" and "resolve" in r[1]])
        tlc.load_transcoders("llama", cache_dir=tmp_path / "cache")
        assert len([r for r in requests if r[0] == "GET" and "resolve" in r[1]]) == fetched == 3
    # The network is gone: what is in the cache still opens.
    tlc.load_transcoders("llama", cache_dir=tmp_path / "cache")
    with pytest.raises(DownloadError, match="is there a network"):
        tlc.load_transcoders("qwen3-4b", cache_dir=tmp_path / "cache")


def test_gated_and_unknown_repositories(tmp_path, online):
    with serving({}, gated={"mntss/transcoder-Llama-3.2-1B"}) as (address, _):
        online(address)
        with pytest.raises(DownloadError, match="https://huggingface.co/mntss/transcoder-Llama-3.2-1B .*hf auth login"):
            tlc.load_transcoders("llama", cache_dir=tmp_path)
        with pytest.raises(DownloadError, match="no repository no/where"):
            tlc.load_transcoders("no/where", cache_dir=tmp_path)


def test_no_room_is_said_before_the_download_with_sizes(tmp_path, online, monkeypatch):
    published.circuit_tracer(tmp_path / "remote", published.random_layers(2))
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 700))
    with serving({"a/b": tmp_path / "remote"}) as (address, requests):
        online(address)
        with pytest.raises(DownloadError, match=r"needs 0.0 GB.*has 0.0 GB free"):
            tlc.load_transcoders("a/b", cache_dir=tmp_path / "cache")
        assert not [r for r in requests if r[1].endswith("layer_1.safetensors")]
    assert not list((tmp_path / "cache").rglob("*layer_*"))


def test_no_room_for_a_conversion_leaves_nothing(cache, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 700))
    with pytest.raises(DownloadError, match="not enough disk space to convert"):
        tlc.load_transcoders("gemma", cache_dir=cache, residency="disk")
    assert not [p for p in (tmp_path / "converted").rglob("*") if p.is_file()]


def test_an_interrupted_conversion_leaves_nothing_and_a_second_try_works(cache, tmp_path, monkeypatch):
    from tl_circuits.dictionaries import residency

    def interrupted(tensors, path):
        path = str(path)
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(residency, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tlc.load_transcoders("gemma", cache_dir=cache, residency="disk")
    assert not [p for p in (tmp_path / "converted").rglob("*") if p.is_file()]
    tlc.load_transcoders("gemma", cache_dir=cache, residency="disk")
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "converted").rglob("*.safetensors")}
    tlc.load_transcoders("gemma", cache_dir=cache, residency="disk")
    assert first and first == {p: p.stat().st_mtime_ns for p in (tmp_path / "converted").rglob("*.safetensors")}


def test_on_a_cpu_large_sets_stay_on_disk_unless_asked():
    cpu = torch.device("cpu")
    assert [choose_residency("auto", cpu, size) for size in (2**29, 2**29 + 1)] == ["device", "disk"]
    assert [choose_residency(asked, cpu, 2**40) for asked in ("device", "cpu", "disk")] == ["device", "cpu", "disk"]


def test_residencies_agree(cache):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    for name in ("gemma", "llama-3.2-1b-clt"):
        disk, cpu = (tlc.load_transcoders(name, cache_dir=cache, residency=r) for r in ("disk", "cpu"))
        for layer in disk.layers:
            ours, theirs = disk.active(layer, x), cpu.active(layer, x)
            assert torch.equal(ours.feature, theirs.feature)
            # Matrix products round differently where the weights lie at another place in memory.
            assert torch.allclose(ours.activation, theirs.activation, atol=1e-6)


def test_cross_layer_skip_connections_add_up():
    """Gemma Scope 2 publishes cross-layer transcoders with an affine skip within each layer."""
    from dataclasses import replace

    model = tiny_bridge("gemma3")
    plain = cross_layer(model)
    g = torch.Generator().manual_seed(0)
    encoders = {i: replace(plain[i], W_skip=0.1 * torch.randn(32, 32, generator=g)) for i in plain.layers}
    with tlc.attach(model, tlc.CrossLayerTranscoders(encoders, plain._decoders)) as replacement:
        graphs = [
            tlc.attribute(replacement, prompt(), max_nodes=80, engine=e, progress=False) for e in ("linear", "autograd")
        ]
    assert graphs[0].completeness_error() < 1e-4
    assert torch.allclose(graphs[0].adjacency(), graphs[1].adjacency(), atol=1e-4)
