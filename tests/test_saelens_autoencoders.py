"""SAELens autoencoders: as objects, by release and id, from folders, and already on the model."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.published import hub_cache
from tests.tiny import prompt, tiny_bridge, tiny_folder
from tl_circuits.errors import DictionaryError, DownloadError, HookFiringError, NotFiniteError

saes = pytest.importorskip("sae_lens.saes", reason="sae_lens is not installed (transformer_lens 4)")
Metadata = pytest.importorskip("sae_lens.saes.sae").SAEMetadata
D, WIDTH = 32, 40
KINDS = [
    "Standard",
    "Gated",
    "JumpReLU",
    "TopK",
    "StandardTraining",
    "BatchTopKTraining",
    "MatryoshkaBatchTopKTraining",
]
OPTIONS = {
    "plain": {},
    "b_dec not subtracted": dict(apply_b_dec_to_input=False),
    "layer_norm": dict(normalize_activations="layer_norm"),
    "constant_norm_rescale": dict(normalize_activations="constant_norm_rescale"),
}


def autoencoder(kind, layer=0, site="hook_resid_post", d=D, **options):
    if "TopK" in kind:
        options["k"] = 6
    if "Matryoshka" in kind:
        options["matryoshka_widths"] = [10, WIDTH]
    config = getattr(saes, f"{kind}SAEConfig")
    cfg = config(
        d_in=d,
        d_sae=WIDTH,
        dtype="float32",
        device=DEVICE,
        metadata=Metadata(hook_name=f"blocks.{layer}.{site}"),
        **options,
    )
    sae = getattr(saes, f"{kind}SAE")(cfg)
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if name == "threshold":
                parameter.abs_()
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold = torch.tensor(0.5, dtype=sae.topk_threshold.dtype)
    return sae


def for_inference(sae):
    """SAELens' own version for single prompts: those that count over a batch become JumpReLU."""
    if not hasattr(sae, "topk_threshold"):
        return sae
    state = dict(sae.state_dict())
    sae.process_state_dict_for_saving_inference(state)
    made = saes.JumpReLUSAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    made.load_state_dict(state)
    return made


def assert_saelens_own(ours, sae, layer=0):
    x = (2 * torch.randn(1, 6, ours[layer].W_enc.shape[1], generator=torch.Generator().manual_seed(5)) + 0.5).to(DEVICE)
    with torch.no_grad():
        acts, theirs = ours.activate(layer, ours.pre_activations(layer, x), x), sae.encode(x)
        # float32 in another order: b_dec is part of the encoder's bias here
        assert torch.allclose(acts, theirs, atol=2e-5)
        assert torch.allclose(ours.decode(layer, {layer: acts}, x), sae.decode(theirs), atol=2e-5)
    assert (acts > 0).any()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_reconstruction_are_saelens_own(kind, options):
    sae = autoencoder(kind, **OPTIONS[options])
    assert_saelens_own(tlc.load_dictionary(sae), for_inference(sae))


@pytest.mark.parametrize("kind", ["TopK", "BatchTopKTraining"])
def test_decoder_norms_that_choose_features_are_folded(kind):
    sae = autoencoder(kind, rescale_acts_by_decoder_norm=True)
    assert_saelens_own(tlc.load_dictionary(sae), for_inference(sae))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_used_in_float32(dtype):
    sae = autoencoder("JumpReLU").to(dtype)
    assert_saelens_own(tlc.load_dictionary(sae), autoencoder("JumpReLU").to(dtype).to(torch.float32))


def test_what_cannot_be_known_is_refused():
    with pytest.raises(DictionaryError, match="numbers of the training set"):
        tlc.load_dictionary(autoencoder("Standard", normalize_activations="expected_average_only_in"))
    with pytest.raises(DictionaryError, match="'abstopk' cannot be opened"):
        tlc.load_dictionary(autoencoder("AbsTopK"))
    untrained = autoencoder("BatchTopKTraining")
    untrained.topk_threshold = torch.tensor(0.0)
    with pytest.raises(DictionaryError, match="has learned no threshold yet"):
        tlc.load_dictionary(untrained)
    one_head = autoencoder("Standard", site="attn.hook_z", d=8)
    one_head.cfg.metadata.hook_head_index = 3
    with pytest.raises(DictionaryError, match="head 3 alone"):
        tlc.load_dictionary(one_head)
    of_nothing = autoencoder("Standard")
    of_nothing.cfg.metadata.hook_name = "hook_embed"
    with pytest.raises(DictionaryError, match="expected a hook of a block"):
        tlc.load_dictionary(of_nothing)
    with pytest.raises(DictionaryError, match="two dictionaries are at one site, blocks.0.hook_resid_post"):
        tlc.load_dictionary([autoencoder("Standard"), autoencoder("Gated")])
    with pytest.raises(DictionaryError, match="layers= is not for SAELens objects of which several are of one layer"):
        tlc.load_dictionary([autoencoder("Standard"), autoencoder("Standard", site="hook_resid_pre")], layers=[0])


def saved(folder, sae, **config):
    """A SAELens autoencoder as SAELens saves it, with more in its config."""
    folder.mkdir(parents=True)
    sae.save_inference_model(folder) if hasattr(sae, "save_inference_model") else sae.save_model(folder)
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_an_edit_of_a_normalised_autoencoder_moves_the_site_as_saelens_own_decoder_says(normalize):
    """SAELens multiplies what it decodes with the input's own scale again; so must what an edit adds."""
    model, sae = tiny_bridge("llama"), autoencoder("Standard", 1, normalize_activations=normalize)
    seen = {}

    def by_hand(tensor, hook):
        with torch.no_grad():
            acts = sae.encode(tensor)
            whole = sae.decode(acts)
            sae.encode(tensor)  # its decoder uses a scale up
            seen["feature"] = int(acts[0, 4].argmax())
            edited = acts.clone()
            edited[0, 4, seen["feature"]] = 7.0
            return tensor + sae.decode(edited) - whole

    with torch.no_grad():
        wanted = model.run_with_hooks(prompt()[None], fwd_hooks=[("blocks.1.hook_resid_post", by_hand)])[0]
    with tlc.attach(model, tlc.load_dictionary(sae)) as replacement:
        edit = tlc.Set(1, 4, seen["feature"], value=7.0)
        result = tlc.intervene(replacement, prompt(), edit, freeze="none", layers=())
    assert not torch.allclose(result.logits, result.baseline_logits, atol=1e-2)
    assert torch.allclose(result.logits, wanted, atol=1e-4)  # float32, another order of sums


def test_nan_in_the_decoder_bias_is_not_called_the_encoder_bias(tmp_path):
    sae = autoencoder("Standard")
    with torch.no_grad():
        sae.b_dec[3] = float("nan")
    for source in (sae, saved(tmp_path / "set", sae)):
        with pytest.raises(NotFiniteError, match="b_dec holds NaN or infinity"):
            tlc.load_dictionary(source)


def test_a_folder_with_several_sites_of_a_layer_is_opened_as_all_of_them(tmp_path):
    made = {
        (layer, site): autoencoder("JumpReLU", layer, site)
        for layer, site in [(0, "hook_resid_post"), (2, "hook_resid_post"), (2, "hook_mlp_out")]
    }
    for (layer, site), sae in made.items():
        saved(tmp_path / "set" / f"{layer}-{site}", sae)
    both = tlc.load_dictionary(tmp_path / "set")
    assert both.layers == (0, 2) and {part[layer].input_hook for layer, part in both.owned if layer == 2} == {
        "hook_resid_post",
        "hook_mlp_out",
    }
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    for layer, part in both.owned:
        sae = made[layer, part[layer].input_hook]
        with torch.no_grad():
            # float32, another order
            assert torch.allclose(part.activate(layer, part.pre_activations(layer, x), x), sae.encode(x), atol=2e-5)
    assert tlc.load_dictionary(tmp_path / "set", layers=[0]).layers == (0,)
    assert tlc.load_dictionary(tmp_path / "set", layers=[2]).layers == (2,)
    for asked, said in (([1, 2], "no layers 1"), ([], "layers= is empty")):
        with pytest.raises(DictionaryError, match=said):
            tlc.load_dictionary(tmp_path / "set", layers=asked)
    saved(tmp_path / "set" / "again", made[0, "hook_resid_post"])
    with pytest.raises(DictionaryError, match="holds 2 dictionaries for layer 0.*Give the folder of one"):
        tlc.load_dictionary(tmp_path / "set")


def test_autoencoders_may_leave_layers_out_in_a_folder_and_as_objects(tmp_path):
    made = {layer: autoencoder("JumpReLU", layer) for layer in (0, 2)}
    for layer, sae in made.items():
        saved(tmp_path / str(layer), sae)
    assert tlc.load_dictionary(tmp_path).layers == tlc.load_dictionary(made).layers == (0, 2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"post_enc_scale": 2.0}, "'post_enc_scale' is a field that this version does not know"),
        ({"architecture": "jumprelu", "activation_fn_str": "tanh-relu"}, "the activation function is 'tanh-relu'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is set"),
        ({"architecture": "batchtopk", "k": 6}, "k counts over a batch. Save it with save_inference_model"),
        ({"architecture": "abstopk"}, "architecture 'abstopk' cannot be opened; these can: "),
        ({"metadata": {"hook_name": "transformer.h.0"}}, "expected a hook of TransformerLens"),
        (
            {"metadata": {"hook_name": "blocks.0.hook_mlp_in", "hook_name_out": "blocks.0.hook_mlp_out"}},
            "writes where it reads",
        ),
        ({"d_in": D + 1}, r"SAELens cannot open this autoencoder: .*size mismatch"),
    ],
)
def test_a_folder_that_says_what_is_not_understood_is_refused_with_the_reason(tmp_path, config, said):
    with pytest.raises(DictionaryError, match=said):
        tlc.load_dictionary(saved(tmp_path / "one", autoencoder("JumpReLU"), **config))


def test_a_config_that_holds_what_a_training_was_told_is_understood(tmp_path):
    told = dict(
        use_ghost_grads=False, noise_scale=0.0, scale_sparsity_penalty_by_decoder_norm=True, jumprelu_bandwidth=0.001
    )
    assert tlc.load_dictionary(saved(tmp_path / "one", autoencoder("JumpReLU"), **told)).layers == (0,)


def test_a_list_of_different_things_is_refused_with_what_to_do():
    sae = autoencoder("JumpReLU")
    with pytest.raises(DictionaryError, match="got JumpReLUSAE, TranscoderSet. Open each with"):
        tlc.load_dictionary([sae, tlc.load_dictionary(autoencoder("Gated", 1))])


def test_a_topk_without_k_and_two_hooks_for_one_autoencoder_are_refused(tmp_path):
    folder = saved(tmp_path / "one", autoencoder("TopK"))
    config = json.loads((folder / "cfg.json").read_text())
    del config["k"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(DictionaryError, match="k is missing"):
        tlc.load_dictionary(folder)
    with pytest.raises(
        DictionaryError,
        match="an autoencoder writes where it reads, but input_hook is 'hook_resid_mid' and output_hook 'hook_mlp_out'",
    ):
        tlc.load_dictionary(
            saved(tmp_path / "two", autoencoder("JumpReLU")), input_hook="hook_resid_mid", output_hook="hook_mlp_out"
        )


def test_a_bridge_whose_points_saelens_put_out_of_use_is_refused_with_the_way_out():
    model = bridge_with([autoencoder("JumpReLU", 1)])
    model.reset_saes()
    with tlc.attach(model, tlc.load_dictionary({1: autoencoder("JumpReLU", 1)})) as replacement:
        with pytest.raises(HookFiringError, match="SAELens' reset_saes.*Open the model again"):
            tlc.attribute(replacement, prompt(), max_nodes=10, progress=False)


@pytest.mark.parametrize("make", ["taken over", "ours"])
def test_text_is_generated_on_saelens_own_hooked_model(make):
    model = hooked_with([autoencoder("JumpReLU", 1)] if make == "taken over" else [])
    with tlc.attach(model, None if make == "taken over" else tlc.mlp_neurons(model)) as replacement:
        cached, plain = (
            tlc.generate(replacement, prompt(), [], max_new_tokens=3, use_past_kv_cache=keep) for keep in (True, False)
        )
    assert cached == plain


def bridge_with(pairs):
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = SAETransformerBridge.boot_transformers(tiny_folder("llama"), device=DEVICE)
    for sae in pairs:
        model.add_sae(sae)
    return model


def hooked_with(pairs):
    from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    from tests.test_hooked_transformer import BASE, KINDS

    torch.manual_seed(0)
    model = HookedSAETransformer(HookedTransformerConfig(**BASE, **KINDS["llama"])).eval()
    for sae in pairs:
        model.add_sae(sae)
    return model


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z"])
@pytest.mark.parametrize("made", [bridge_with, hooked_with])
def test_what_saelens_attached_is_taken_over_and_given_back(made, site):
    reshape = dict(reshape_activations="hook_z") if site == "attn.hook_z" else {}
    pairs = [autoencoder("JumpReLU", layer, site, **reshape) for layer in (0, 2)]
    plain = made([])
    model = made(pairs)
    with torch.no_grad():
        bare, theirs = plain(prompt()[None]), model(prompt()[None])
    wrappers, hooks = dict(model._acts_to_saes), set(model.hook_dict)
    with tlc.attach(model) as replacement, torch.no_grad():
        assert torch.equal(model(prompt()[None]), bare)  # without their attachment the model is itself again
        graph = tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)
        names = [f"blocks.2.{site}", f"blocks.2.{site}.hook_sae_acts_post"]
        seen = tlc.hooks.collect_sites(model, prompt()[None], names)
        x, acts = (seen[name] for name in names)
    assert graph.completeness_error() < 1e-4 and graph.is_kind("feature").any()
    assert dict(model._acts_to_saes) == wrappers and set(model.hook_dict) == hooks
    with torch.no_grad():
        assert torch.equal(model(prompt()[None]), theirs)
    assert not torch.allclose(bare, theirs)
    if reshape:  # a bridge shows heads on an axis of their own to hooks, and one axis to SAELens
        pairs[1].turn_off_forward_pass_hook_z_reshaping()
    expected = pairs[1].encode(tlc.hooks.flat(x))
    assert (acts > 0).any() and torch.allclose(acts, expected, atol=2e-5)  # float32, b_dec in the encoder's bias


def test_autoencoders_of_several_sites_of_a_layer_become_one_dictionary():
    pair = [
        autoencoder("Standard", site="hook_mlp_out"),
        autoencoder("JumpReLU", site="hook_resid_pre"),
        autoencoder("TopK", 1),
    ]
    both = tlc.load_dictionary(pair, name="three")
    assert both.name == "three" and both.layers == (0, 1)
    assert [(place.layer, place.site) for place in both.places] == [(0, "resid_pre"), (0, "mlp_out"), (1, "")]
    for layer, part in both.owned:  # each is SAELens' own, in its layer
        sae = next(one for one in pair if one.cfg.metadata.hook_name == part.output_hook(layer))
        assert_saelens_own(part, for_inference(sae), layer)


@pytest.mark.parametrize("made", [bridge_with, hooked_with])
def test_several_of_one_layer_of_a_model_are_taken_over_and_given_back(made):
    pairs = [autoencoder("JumpReLU", 1, site) for site in ("hook_mlp_out", "hook_resid_post", "hook_attn_out")]
    plain, model = made([]), made([*pairs, autoencoder("TopK", 2)])
    with torch.no_grad():
        bare, theirs = plain(prompt()[None]), model(prompt()[None])
    wrappers, hooks = dict(model._acts_to_saes), set(model.hook_dict)
    with tlc.attach(model) as replacement, torch.no_grad():
        assert torch.equal(model(prompt()[None]), bare)
        graph = tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)
    assert graph.info.sites == ("attn_out", "mlp_out", "resid_post") and graph.completeness_error() < 1e-4
    assert dict(model._acts_to_saes) == wrappers and set(model.hook_dict) == hooks
    with torch.no_grad():
        assert torch.equal(model(prompt()[None]), theirs)


# ---- releases, in the hub library's layout, with the configs' real keys
# --------------------------------------------------

RES_JB = {  # jbloom/GPT2-Small-SAEs-Reformatted, blocks.8.hook_resid_pre/cfg.json
    "model_name": "gpt2-small",
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "use_cached_activations": False,
    "n_batches_in_buffer": 128,
    "total_training_tokens": 300000000,
    "store_batch_size": 32,
    "device": "cpu",
    "seed": 42,
    "dtype": "torch.float32",
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 32,
    "from_pretrained_path": None,
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "lr_scheduler_name": None,
    "lr_warm_up_steps": 5000,
    "train_batch_size": 4096,
    "use_ghost_grads": False,
}
OAI_V5 = {  # jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs
    "model_name": "gpt2-small",
    "hook_head_index": None,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 6},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": None,
    "prepend_bos": False,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 64,
    "normalize_activations": "layer_norm",
    "dtype": "float32",
    "device": "cpu",
    "architecture": "standard",
}
PYTHIA = {  # ctigges/pythia-70m-deduped__res-sm_processed
    "d_sae": WIDTH,
    "model_name": "EleutherAI/pythia-70m-deduped",
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": None,
    "prepend_bos": True,
    "dataset_path": "EleutherAI/the_pile_deduplicated",
    "context_size": 128,
    "normalize_activations": "none",
    "dtype": "float32",
    "device": "cpu",
}


def tensors(seed, d=D, width=WIDTH):
    random = torch.Generator().manual_seed(seed)
    made = {
        "W_enc": torch.randn(d, width, generator=random) / d**0.5,
        "W_dec": torch.randn(width, d, generator=random) / d**0.5,
    }
    return made | {"b_enc": 0.1 * torch.randn(width, generator=random), "b_dec": 0.1 * torch.randn(d, generator=random)}


def folders(hooks, config):
    def write(snapshot):
        for layer, (folder, hook) in enumerate(hooks.items()):
            (snapshot / folder).mkdir(parents=True)
            save_file(tensors(layer), snapshot / folder / "sae_weights.safetensors")
            own = (
                {"hook_point": hook, "hook_point_layer": layer}
                if "hook_point_head_index" in config
                else {"hook_name": hook, "hook_layer": layer}
            )
            (snapshot / folder / "cfg.json").write_text(json.dumps(config | own | {"d_in": D, "d_sae": WIDTH}))

    return write


def llama_scope(snapshot):
    for layer in range(3):
        folder = snapshot / f"Llama3_1-8B-Base-L{layer}R-8x"
        (folder / "checkpoints").mkdir(parents=True)
        t = tensors(layer)
        save_file(
            {
                "encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"],
                "decoder.weight": t["W_dec"].T.contiguous(), "decoder.bias": t["b_dec"],
            },
            folder / "checkpoints" / "final.safetensors",
        )  # fmt: skip
        hook = f"blocks.{layer}.hook_resid_post"
        config = {
            "hook_point_in": hook,
            "hook_point_out": hook,
            "use_decoder_bias": True,
            "apply_decoder_bias_to_pre_encoder": False,
            "expansion_factor": 8,
            "d_model": D,
            "d_sae": WIDTH,
            "norm_activation": "dataset-wise",
            "act_fn": "jumprelu",
            "dataset_average_activation_norm": {"in": 9.0, "out": 9.0},
            "jump_relu_threshold": 0.4,
            "top_k": 50,
            "sparsity_include_decoder_norm": True,
            "use_glu_encoder": False,
            "sae_type": "sae",
        }
        (folder / "hyperparams.json").write_text(json.dumps(config))


RELEASES = {
    "gpt2-small-res-jb": (
        "jbloom/GPT2-Small-SAEs-Reformatted",
        {f"blocks.{i}.hook_resid_pre": f"blocks.{i}.hook_resid_pre" for i in range(3)},
        RES_JB,
    ),
    "gpt2-small-attn-out-v5-32k": (
        "jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs",
        {f"v5_32k_layer_{i}": f"blocks.{i}.hook_attn_out" for i in range(3)},
        OAI_V5,
    ),
    "pythia-70m-deduped-res-sm": (
        "ctigges/pythia-70m-deduped__res-sm_processed",
        {f"{i}-res-sm": f"blocks.{i}.hook_resid_post" for i in range(3)},
        PYTHIA,
    ),
    "llama_scope_lxr_8x": ("fnlp/Llama3_1-8B-Base-LXR-8x", {}, {}),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_opened_by_name_from_an_offline_cache(release, hub):
    repo, names, config = RELEASES[release]
    hub_cache(hub, repo, llama_scope if not names else folders(names, config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens' own
        dictionary = tlc.load_dictionary(release, layers=range(3))
        from sae_lens.saes.sae import SAE

        entry = __import__(
            "sae_lens.loading.pretrained_saes_directory", fromlist=["x"]
        ).get_pretrained_saes_directory()[release]
        for layer in range(3):
            hook = dictionary.input_hook(layer)
            sae_id = f"l{layer}r_8x" if "llama" in release else hook
            assert sae_id in entry.saes_map
            assert_saelens_own(dictionary, SAE.from_pretrained(release, sae_id), layer)
        single = tlc.load_dictionary(release, ids=sae_id)
    assert list(single.layers) == [2] and torch.equal(single[2].W_enc, dictionary[2].W_enc)
    assert dictionary.made_for == entry.model
    assert (
        dictionary.prompt_rule.prepend is (release != "gpt2-small-attn-out-v5-32k")
        and dictionary.prompt_rule.skip_first == 1
    )
    architecture = {"gpt2": "gpt2", "pyth": "neox", "llam": "llama"}[release[:4]]
    with tlc.attach(tiny_bridge(architecture), dictionary) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)
    assert graph.completeness_error() < 1e-4 and graph.is_kind("feature").sum() > 5


def test_gemma_scope_is_jumprelu_as_its_npz_says(hub):
    """Its 16,384 features, one layer; the formula is that of the Gemma Scope tutorial."""
    d, width, random = 2304, 16384, np.random.default_rng(0)
    t = {"W_enc": np.zeros((d, width), np.float32), "W_dec": np.zeros((width, d), np.float32)}
    t["W_enc"][:, :20], t["W_dec"][:20] = random.normal(size=(d, 20)) / d**0.5, random.normal(size=(20, d)) / d**0.5
    t |= {
        "b_enc": np.zeros(width, np.float32),
        "b_dec": np.full(d, 0.1, np.float32),
        "threshold": np.full(width, 0.5, np.float32),
    }

    def write(snapshot):
        folder = snapshot / "layer_20/width_16k/average_l0_71"
        folder.mkdir(parents=True)
        np.savez_compressed(folder / "params.npz", **t)

    hub_cache(hub, "google/gemma-scope-2b-pt-res", write)
    dictionary = tlc.load_dictionary("gemma-scope-2b-pt-res-canonical", ids="layer_20/width_16k/canonical")
    assert dictionary.name == "gemma-scope-2b-pt-res-canonical//layer_*/width_16k/canonical"
    assert dictionary.input_hook(20) == dictionary.output_hook(20) == "blocks.20.hook_resid_post"
    x = torch.tensor(random.normal(size=(3, d)), dtype=torch.float32)
    pre = x @ torch.tensor(t["W_enc"])
    acts = torch.relu(pre) * (pre > 0.5)
    ours = dictionary.activate(20, dictionary.pre_activations(20, x), x)
    assert torch.allclose(ours, acts, atol=1e-5) and (ours > 0).any()  # float32, another order of sums


def test_neuronpedias_pages_are_those_of_the_ids_that_were_opened():
    from tl_circuits.dictionaries.source_sets import known_source_set

    found = known_source_set("gemma-scope-2b-pt-res-canonical//layer_*/width_65k/canonical")
    assert found.source(3) == "3-gemmascope-res-65k" and found.model == "gemma-2-2b"
    assert known_source_set("gpt2-small-attn-out-v5-32k").source(0) == "0-att_32k-oai"
    assert known_source_set("gemma-scope-2b-pt-res//layer_*/width_16k/average_l0_*") is None  # named by layer
    # The registry calls the stream behind layer 11 layer 12; layer 11's page there is that of another autoencoder.
    assert known_source_set("gpt2-small-res-jb//blocks.11.hook_resid_post") is None
    assert known_source_set("gpt2-small-res-jb//blocks.*.hook_resid_pre").source(11) == "11-res-jb"


def test_what_a_release_does_not_have_is_said(hub):
    with pytest.raises(DictionaryError, match="several autoencoders for a layer .* Choose with width="):
        tlc.load_dictionary("gemma-scope-2b-pt-res-canonical")
    with pytest.raises(DictionaryError, match="has no id 'blocks.99.hook_resid_pre'"):
        tlc.load_dictionary("gpt2-small-res-jb", ids="blocks.99.hook_resid_pre")
    with pytest.raises(DictionaryError, match="has no layers 40"):
        tlc.load_dictionary("gpt2-small-res-jb", layers=[40])
    with pytest.raises(DictionaryError, match="is of no block"):
        tlc.load_dictionary("gemma-scope-2b-pt-res", ids="embedding/width_4k/average_l0_6")
    with pytest.raises(DictionaryError, match="ids= is for a SAELens release"):
        tlc.load_dictionary("tiny-facts", ids="x")
    with pytest.raises(DownloadError, match="blocks.0.hook_resid_pre"):
        tlc.load_dictionary("gpt2-small-res-jb", layers=[0])


def test_ids_of_several_sites_of_a_layer_become_one_dictionary(hub):
    ids = ["blocks.11.hook_resid_post", "blocks.11.hook_resid_pre"]
    hub_cache(hub, "jbloom/GPT2-Small-SAEs-Reformatted", folders({one: one for one in ids}, RES_JB))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens' own
        both = tlc.load_dictionary("gpt2-small-res-jb", ids=ids)
    assert both.layers == (11,) and [place.site for place in both.places if place.layer == 11] == [
        "resid_pre",
        "resid_post",
    ]
    saved = {one: tensors(number) for number, one in enumerate(ids)}
    for _, part in both.owned:
        assert torch.equal(part[11].W_dec, saved[part.output_hook(11)]["W_dec"])


@pytest.mark.parametrize("kind", ["Standard", "Gated", "TopK"])
def test_a_folder_that_saelens_saved_is_opened(kind, tmp_path):
    for layer in range(3):
        autoencoder(kind, layer, normalize_activations="layer_norm").save_model(tmp_path / f"layer_{layer}")
    dictionary = tlc.load_dictionary(tmp_path)
    for layer in range(3):
        assert_saelens_own(dictionary, autoencoder(kind, layer, normalize_activations="layer_norm"), layer)
    (tmp_path / "layer_1" / "sae_weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(DictionaryError, match="layer_1.* cannot open"):
        tlc.load_dictionary(tmp_path)
