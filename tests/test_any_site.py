"""Autoencoders at any site: sums, engines, brute force, the plain Hugging Face model, and a graph computed by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tl_circuits as tlc
from tests.oracles import removal_gap
from tests.sites import SITES, at, autoencoders, plain_effects
from tests.tiny import hook_state, prompt, tiny_bridge, tiny_folder, transcoders
from tl_circuits.errors import ArchitectureError, DictionaryError, EditError
from tl_circuits.hooks import to_tokens
from tl_circuits.hooks.any_site import require_effective

# float32 sums over a few hundred terms and a handful of layers: a few units in the last place.
SUMS, AGREE, MEASURED = 1e-4, 1e-4, 1e-3
MODELS = ("llama", "gpt2", "gemma2", "neox")
MIXED = {0: "hook_resid_post", 1: "hook_mlp_out", 2: "hook_attn_out"}
WHERE = {site: lambda n, site=site: at(site, n) for site in SITES} | {
    "mixed": lambda n: MIXED,
    "one layer": lambda n: {1: "hook_resid_pre"},
}


def sites_of(model, where):
    return WHERE[where](int(model.cfg.n_layers))


def both(model, dictionary, max_nodes=40):
    with tlc.attach(model, dictionary) as replacement:
        return [
            tlc.attribute(replacement, prompt(), max_nodes=max_nodes, engine=e, progress=False)
            for e in ("linear", "autograd")
        ]


def assert_agree(linear, autograd):
    assert linear.info.engine == "linear" and autograd.info.engine == "autograd"
    assert linear.is_kind("feature").sum() > 20
    assert linear.completeness_error() < SUMS and autograd.completeness_error() < SUMS
    assert linear.node_ids == autograd.node_ids
    ours, reference = linear.adjacency(), autograd.adjacency()
    # Relative to the largest edge into the same target: entries near zero are differences of large ones.
    scale = reference.abs().amax(1, keepdim=True).clamp_min(1e-12)
    assert ((ours - reference).abs() / scale).max() < AGREE
    assert (linear._nodes.bias - autograd._nodes.bias).abs().max() < 1e-3 * linear._nodes.value.nan_to_num().abs().max()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("architecture", MODELS)
def test_edges_and_bias_add_up_engines_agree_and_every_removal_is_minus_its_edges(architecture, where):
    model = tiny_bridge(architecture)
    dictionary = autoencoders(model, sites_of(model, where))
    linear, autograd = both(model, dictionary)
    assert_agree(linear, autograd)
    with tlc.attach(model, dictionary) as replacement:
        gap, count = removal_gap(replacement, linear)  # brute force: the model itself, everything held
    assert gap < MEASURED and count > 20


@pytest.mark.parametrize(
    ("activation", "normalize"), [("relu", "layer_norm"), ("topk", "constant_norm_rescale"), ("topk", "none")]
)
@pytest.mark.parametrize("where", ["hook_resid_post", "attn.hook_z", "mixed"])
def test_normalising_autoencoders_add_up_and_agree(where, activation, normalize):
    model = tiny_bridge("gpt2")
    dictionary = autoencoders(model, sites_of(model, where), activation, normalize)
    linear, autograd = both(model, dictionary)
    assert_agree(linear, autograd)
    with tlc.attach(model, dictionary) as replacement:
        assert removal_gap(replacement, linear)[0] < MEASURED


@pytest.mark.parametrize(
    ("where", "normalize"),
    [
        *((where, "none") for where in WHERE),
        ("hook_resid_post", "layer_norm"),
        ("attn.hook_z", "constant_norm_rescale"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_edges_are_those_of_the_plain_model_differentiated_with_the_same_things_held(architecture, where, normalize):
    """The reference shares no code with the package: Hugging Face modules, PyTorch's autograd, formulas of the
    tests."""
    model = tiny_bridge(architecture)
    reference = (
        AutoModelForCausalLM.from_pretrained(tiny_folder(architecture), attn_implementation="eager").float().eval()
    )
    dictionary = autoencoders(model, sites_of(model, where), normalize=normalize)
    with tlc.attach(model, dictionary) as replacement:
        graph = tlc.attribute(replacement, prompt(), [5, 17], max_nodes=400, progress=False)
    nodes, rows = graph._nodes, graph.adjacency()
    deep = graph.is_kind("feature").nonzero()[:, 0].tolist()[-5:]
    asked = [
        ("logit", 5),
        ("logit", 17),
        *((int(nodes.layer[i]), int(nodes.position[i]), int(nodes.feature[i])) for i in deep),
    ]
    places = [*graph.is_kind("logit").nonzero()[:, 0].tolist(), *deep]
    found = plain_effects(reference, dictionary, prompt(), asked)
    for row, (effects, value) in zip(places, found, strict=True):
        assert abs(float(nodes.value[row]) - value) < 1e-4 * max(1.0, abs(value))  # another order of float32 sums
        expected = torch.zeros(len(graph))
        for i in range(len(graph)):
            kind, layer, position, feature = (
                int(getattr(nodes, n)[i]) for n in ("kind", "layer", "position", "feature")
            )
            name = (
                ("token", position)
                if kind == 2
                else ("error", layer, position)
                if kind == 1
                else (layer, position, feature)
            )
            expected[i] = effects.get(name, 0.0) if kind < 3 else 0.0
        assert (rows[row] - expected).abs().max() < AGREE * expected.abs().max()
        assert expected.abs().sum() > 0


def test_nothing_passes_a_rebuilt_stream():
    """Behind one rebuilt stream every edge comes from its features and errors, and tokens reach only what is before
    it."""
    model = tiny_bridge("llama")
    graph = both(model, autoencoders(model, {0: "hook_resid_post", 1: "hook_resid_post"}))[0]
    nodes, rows = graph._nodes, graph.adjacency()
    logit = rows[graph.is_kind("logit")]
    assert (logit[:, (nodes.layer < 1)] == 0).all() and (logit[:, nodes.layer == 1] != 0).any()
    second = (nodes.kind == 0) & (nodes.layer == 1)
    assert (rows[second][:, graph.is_kind("embedding")] == 0).all() and (rows[second][:, nodes.layer == 0] != 0).any()


def test_what_attention_adds_is_rebuilt_and_the_stream_passes_beside_it():
    model = tiny_bridge("llama")
    graph = both(model, autoencoders(model, {1: "hook_attn_out"}))[0]
    assert (graph.adjacency()[graph.is_kind("logit")][:, graph.is_kind("embedding")] != 0).any()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("architecture", ["llama", "neox"])
def test_the_model_computes_the_same_bits_when_nobody_listens_and_is_given_back(architecture, site):
    model = tiny_bridge(architecture)
    before = hook_state(model)
    with torch.no_grad():
        bare = model(prompt()[None])
        with tlc.attach(model, autoencoders(model, at(site, 3))) as replacement:
            assert torch.equal(model(prompt()[None]), bare)
            tlc.attribute(replacement, prompt(), max_nodes=5, progress=False)
            name = f"blocks.1.{site}.hook_sae_acts_post"
            logits, cache = model.run_with_cache(prompt()[None])
            assert torch.equal(logits, bare)  # listening alone changes nothing
            assert (cache[name] > 0).any() and cache[name].shape == (1, 9, 40)
    assert hook_state(model) == before


@pytest.mark.parametrize("site", SITES)
def test_a_hook_on_activations_changes_the_model_by_the_change_of_the_reconstruction(site):
    model = tiny_bridge("gpt2")
    dictionary = autoencoders(model, at(site, 3))
    name = f"blocks.1.{site}"
    with tlc.attach(model, dictionary), torch.no_grad():
        _, cache = model.run_with_cache(prompt()[None])
        acts = cache[f"{name}.hook_sae_acts_post"]
        position, feature = acts[0].nonzero()[-1].tolist()

        def drop(tensor, hook):
            edited = tensor.clone()
            edited[0, position, feature] = 0.0
            return edited

        edited = model.run_with_hooks(prompt()[None], fwd_hooks=[(f"{name}.hook_sae_acts_post", drop)])
        step = acts[0, position, feature] * dictionary[1].W_dec[feature]

        def by_hand(tensor, hook):
            changed = tensor.clone()
            changed[0, position] -= step.reshape(tensor.shape[2:])
            return changed

        expected = model.run_with_hooks(prompt()[None], fwd_hooks=[(name, by_hand)])
    assert torch.allclose(edited, expected, atol=1e-5)  # float32, another order of sums
    assert not torch.allclose(edited, model(prompt()[None]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", WHERE)
def test_half_precision_models_add_up(where, dtype):
    """What the model rounds away counts as constant."""
    model = tiny_bridge("llama", dtype)
    with tlc.attach(model, autoencoders(model, sites_of(model, where))) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, engine="linear", progress=False)
    assert graph.completeness_error() < SUMS


@pytest.mark.parametrize("architecture", ["gemma2", "neox"])
@pytest.mark.parametrize("kind", ["transcoders", "skip", "neurons"])
def test_autoencoders_mix_with_transcoders_and_neurons(architecture, kind):
    model = tiny_bridge(architecture)
    other = {
        "transcoders": lambda: transcoders(model, layers=[1]),
        "skip": lambda: transcoders(model, layers=[1], skip=True),
        "neurons": lambda: tlc.mlp_neurons(model, layers=[1]),
    }[kind]()
    dictionary = tlc.load_dictionary([autoencoders(model, {0: "hook_resid_post", 2: "hook_mlp_out"}), other])
    linear, autograd = both(model, dictionary)
    assert_agree(linear, autograd)
    assert set(linear._nodes.layer[linear.is_kind("feature")].tolist()) == {0, 1, 2}
    with tlc.attach(model, dictionary) as replacement:
        assert removal_gap(replacement, linear)[0] < MEASURED


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_mlps_without_a_transcoder_are_passed_by_their_ratios_if_asked(architecture):
    model = tiny_bridge(architecture)
    some = transcoders(model, layers=[0, 2])
    graphs = {}
    for mlps in ("error", "ratio"):
        with tlc.attach(model, some, mlps=mlps) as replacement:
            linear, autograd = (
                tlc.attribute(replacement, prompt(), max_nodes=80, engine=e, progress=False)
                for e in ("linear", "autograd")
            )
            assert_agree(linear, autograd)
            assert removal_gap(replacement, linear)[0] < MEASURED
            graphs[mlps] = linear
    of_layer_1 = {mlps: int(((g._nodes.kind == 1) & (g._nodes.layer == 1)).sum()) for mlps, g in graphs.items()}
    assert of_layer_1 == {"error": 9, "ratio": 0}


def test_neurons_passed_by_ratio_carry_what_their_own_nodes_would():
    """A graph in which layer 1 is passed gives tokens what a graph with that layer's neurons gives over one more
    step."""
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model, layers=[0]), mlps="ratio") as replacement:
        passed = tlc.attribute(replacement, prompt(), [5], max_nodes=400, progress=False)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        whole = tlc.attribute(replacement, prompt(), [5], max_nodes=2000, progress=False)
    rows, nodes = whole.adjacency().double(), whole._nodes
    later = (nodes.kind == 0) & (nodes.layer > 0)
    # From the target through neurons of later layers only: w (A + A² + A³).
    total = step = rows[whole.is_kind("logit")][0]
    for _ in range(2):
        step = (step * later / torch.where(later, nodes.activation, 1.0).double()) @ rows
        total = total + step
    expected = {whole.node_ids[i]: float(total[i]) for i in range(len(whole)) if nodes.layer[i] < 1}
    row = passed.adjacency()[passed.is_kind("logit")][0]
    ours = {passed.node_ids[i]: float(row[i]) for i in range(len(passed)) if not passed.is_kind("logit")[i]}
    size = max(map(abs, expected.values()))
    assert max(abs(ours[name] - expected[name]) for name in ours) < 1e-4 * size  # two ways of adding in float32


def test_bad_sites_are_refused_in_one_sentence():
    model = tiny_bridge("neox")
    tensors = autoencoders(model, {1: "hook_resid_post"})[1]
    from dataclasses import replace

    def given(**changes):
        return tlc.load_dictionary({1: replace(tensors, **changes)}, layers=[1])

    with pytest.raises(DictionaryError, match="parallel, so a block has no hook_resid_mid"):
        tlc.attach(model, given(input_hook="hook_resid_mid", output_hook="hook_resid_mid"))
    with pytest.raises(DictionaryError, match="reads and writes one of hook_resid_pre"):
        tlc.attach(model, given(input_hook="mlp.hook_in", output_hook="mlp.hook_in"))
    with pytest.raises(KeyError, match="can read .* of its own block"):  # no forward pass has them in this order
        tlc.attach(model, given(input_hook="hook_mlp_out", output_hook="hook_resid_pre"))
    with pytest.raises(DictionaryError, match="no skip connection"):
        given(W_skip=torch.zeros(32, 32))
    with pytest.raises(DictionaryError, match="shape .*expected"):
        tlc.attach(model, given(W_dec=torch.zeros(40, 8), b_dec=torch.zeros(8)))
    with pytest.raises(DictionaryError, match='mlps="error" is for transcoders'):
        tlc.attach(model, given(), mlps="error")
    with pytest.raises(DictionaryError, match="two dictionaries are at one site, blocks.1.hook_resid_post"):
        tlc.load_dictionary([given(), given()])
    with pytest.raises(DictionaryError, match="layer 1 would have two dictionaries of its MLP"):
        behind = given(input_hook="hook_mlp_out", output_hook="hook_mlp_out")
        tlc.load_dictionary([behind, transcoders(model, layers=[1])])


def test_a_stream_that_passes_beside_its_hook_is_refused():
    """On a bridge, hook_resid_mid is what the MLP's norm reads: an edit there does not reach the stream."""
    model = tiny_bridge("llama")
    with pytest.raises(DictionaryError, match="only what the MLP's norm reads"):
        tlc.attach(model, autoencoders(model, {1: "hook_resid_mid"}))


def test_a_hook_whose_edits_do_not_reach_the_model_is_refused(monkeypatch):
    """The step is added where the hook says; here the model is made to pass on something else."""
    model = tiny_bridge("llama")
    with tlc.attach(model, autoencoders(model, {1: "hook_resid_post"})) as replacement:
        handle = model.blocks[2].register_forward_pre_hook(lambda mod, args: (args[0] * 1.5, *args[1:]))
        try:
            with pytest.raises(ArchitectureError, match="does not show what the block passes on"):
                require_effective(model, to_tokens(model, prompt()), replacement.dictionary)
        finally:
            handle.remove()
        require_effective(model, to_tokens(model, prompt()), replacement.dictionary)


def test_an_error_that_is_no_node_cannot_be_edited():
    model = tiny_bridge("llama")
    with tlc.attach(model, autoencoders(model, {1: "hook_resid_post"})) as replacement:
        with pytest.raises(EditError, match="layer 0 has no error node, .* is passed"):
            tlc.intervene(replacement, prompt(), tlc.ErrorEdit(0, 3, 0.0))
