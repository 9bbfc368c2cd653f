"""attach and detach: HookPoints under SAELens' names, and nothing left behind."""

import pytest
import torch
from transformer_lens.hook_points import HookPoint

import tl_circuits as tlc
from tests.tiny import hook_state, prompt, tiny_bridge, transcoders
from tl_circuits.errors import AttachError, DictionaryError, HookFiringError, NotFiniteError, UnknownHookError
from tl_circuits.hooks.attach import POINTS

SITE = "blocks.1.hook_mlp_out"


def logits(model):
    with torch.no_grad():
        return model(prompt()[None])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("neurons", [True, False])
def test_unhooked_logits_are_bit_identical_and_nothing_is_encoded(architecture, neurons, monkeypatch):
    model = tiny_bridge(architecture)
    bare = logits(model)
    dictionary = tlc.mlp_neurons(model) if neurons else transcoders(model)
    monkeypatch.setattr(dictionary, "pre_activations", lambda *a: pytest.fail("encoded without a listener"))
    with tlc.attach(model, dictionary):
        assert torch.equal(logits(model), bare)


def test_the_six_points_have_saelens_names_and_can_be_cached():
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        assert replacement.site(1) == SITE
        names = [f"{SITE}.{point}" for point in POINTS]
        assert set(names) <= set(model.hook_dict)
        bare = logits(model)
        out, cache = model.run_with_cache(prompt()[None], names_filter=lambda name: name in names)
        assert torch.equal(out, bare)  # listening alone changes nothing
        assert cache[f"{SITE}.hook_sae_acts_post"].shape == (1, 9, 40)
        rebuilt = cache[f"{SITE}.hook_sae_recons"] + cache[f"{SITE}.hook_sae_error"]
        assert torch.allclose(rebuilt, cache[f"{SITE}.hook_sae_output"], atol=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_editing_activations_changes_the_output_by_the_change_of_the_reconstruction(in_place):
    model = tiny_bridge("llama")
    dictionary = transcoders(model)
    with tlc.attach(model, dictionary):
        _, clean = model.run_with_cache(prompt()[None])
        feature = int(clean[f"{SITE}.hook_sae_acts_post"][0, 4].argmax())

        def edit(acts, hook):
            acts = acts if in_place else acts.clone()
            acts[0, 4, feature] += 2.0
            return acts

        seen = {}
        model.run_with_hooks(
            prompt()[None],
            fwd_hooks=[(f"{SITE}.hook_sae_acts_post", edit), (SITE, lambda t, hook: seen.update(out=t.clone()))],
        )
        moved = seen["out"][0] - clean[SITE][0]
        expected = torch.zeros_like(moved)
        expected[4] = 2.0 * dictionary[1].W_dec[feature]
        assert torch.allclose(moved, expected, atol=1e-5)


def test_editing_the_error_changes_the_output_by_that_much():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)):
        _, clean = model.run_with_cache(prompt()[None])
        seen = {}
        model.run_with_hooks(
            prompt()[None],
            fwd_hooks=[
                (f"{SITE}.hook_sae_error", lambda t, hook: t * 0),
                (f"{SITE}.hook_sae_output", lambda t, hook: seen.update(out=t.clone())),
            ],
        )
        assert torch.allclose(seen["out"], clean[f"{SITE}.hook_sae_recons"], atol=1e-6)


def test_gradients_reach_activations_through_the_reconstruction():
    model = tiny_bridge("llama")
    kept = {}

    def keep(acts, hook):
        acts = acts.detach().requires_grad_()
        kept["acts"] = acts
        return acts

    with tlc.attach(model, transcoders(model)):
        out = model.run_with_hooks(prompt()[None], fwd_hooks=[(f"{SITE}.hook_sae_acts_post", keep)])
        out[0, -1, 7].backward()
    assert kept["acts"].grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "neox"])
def test_detach_restores_everything(architecture):
    model = tiny_bridge(architecture)
    before, kind = hook_state(model), type(model)
    grads = [p.requires_grad for p in model.parameters()]
    weights = [p.clone() for p in model.parameters()]
    replacement = tlc.attach(model, transcoders(model))
    replacement.detach()
    replacement.detach()
    assert hook_state(model) == before and type(model) is kind
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    with pytest.raises(AttachError, match="detached"):
        tlc.attribute(replacement, prompt(), progress=False)


def test_the_model_is_restored_after_an_exception_inside_the_context():
    model = tiny_bridge("llama")
    before = hook_state(model)
    with pytest.raises(KeyboardInterrupt), tlc.attach(model, transcoders(model)) as replacement:
        replacement.model.run_with_hooks(
            prompt()[None], fwd_hooks=[(SITE, lambda t, hook: (_ for _ in ()).throw(KeyboardInterrupt))]
        )
    assert hook_state(model) == before


@pytest.mark.parametrize("engine", ["linear", "autograd"])
def test_a_user_hook_survives_an_attribution_that_raises(engine, monkeypatch):
    model = tiny_bridge("llama")
    fired = []
    model.add_hook("blocks.0.hook_mlp_out", lambda t, hook: fired.append(1))
    before = hook_state(model)
    try:
        with tlc.attach(model, transcoders(model)) as replacement:
            monkeypatch.setattr(replacement.dictionary, "read_vectors", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tlc.attribute(replacement, prompt(), engine=engine, progress=False)
        assert hook_state(model) == before
        fired.clear()
        logits(model)
        assert fired == [1]
    finally:
        model.reset_hooks()


def test_a_failing_attach_leaves_nothing(monkeypatch):
    model = tiny_bridge("llama")
    before = hook_state(model)
    dictionary = transcoders(model)
    real = dictionary.output_hook
    monkeypatch.setattr(dictionary, "output_hook", lambda layer: "blocks.2.nowhere" if layer == 2 else real(layer))
    with pytest.raises(UnknownHookError):
        tlc.attach(model, dictionary)
    assert hook_state(model) == before


def test_attaching_twice_says_so():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)):
        with pytest.raises(AttachError, match="detach"):
            tlc.attach(model, transcoders(model))
        assert f"{SITE}.hook_sae_output" in model.hook_dict


def test_reset_hooks_does_not_break_an_attachment():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        model.reset_hooks(including_permanent=True)
        graph = tlc.attribute(replacement, prompt(), max_nodes=10, progress=False)
        _, cache = model.run_with_cache(prompt()[None])
    assert len(graph._edges) and f"{SITE}.hook_sae_acts_post" in cache


def test_a_dictionary_of_the_wrong_width_names_layer_and_shapes():
    model = tiny_bridge("llama")
    wrong = {0: tlc.Transcoder(torch.ones(5, 16), torch.ones(5, 16), torch.ones(5), torch.ones(16))}
    with pytest.raises(DictionaryError, match=r"layer 0: W_enc.*\(5, 16\), expected \(5, 32\)"):
        tlc.attach(model, wrong)


def test_layers_the_model_lacks_and_gaps_are_refused():
    model = tiny_bridge("llama")
    with pytest.raises(DictionaryError, match="layer 5 does not exist"):
        tlc.attach(model, transcoders(model, layers=[4, 5]))
    with pytest.raises(DictionaryError, match=r"layer 3 does not exist: the model has layers 0\.\.2"):
        tlc.attach(model, transcoders(model, layers=[2, 3]))
    some = {layer: transcoders(model)[layer] for layer in (0, 2)}
    with pytest.raises(DictionaryError, match=r"the set is missing the layers 1; it has 0, 2.*layers=\[0, 2\]"):
        tlc.attach(model, some)
    with pytest.raises(DictionaryError, match="the set has no layers 1; it has 0, 2"):
        tlc.load_transcoders(some, layers=[1, 2])


def test_nan_in_weights_names_the_tensor():
    model = tiny_bridge("llama")
    good = transcoders(model)[0]
    with pytest.raises(NotFiniteError, match="layer 0: b_enc"):
        tlc.load_transcoders({0: tlc.Transcoder(good.W_enc, good.W_dec, good.b_enc * float("nan"), good.b_dec)})


def test_hooks_a_transcoder_cannot_read_or_write_are_refused():
    model = tiny_bridge("llama")
    with pytest.raises(UnknownHookError, match="can read"):
        tlc.attach(model, transcoders(model, input_hook="attn.hook_z"))
    with pytest.raises(UnknownHookError, match="can write"):
        tlc.attach(model, transcoders(model, output_hook="hook_resid_post"))


def test_a_hook_that_does_not_fire_is_an_error(monkeypatch):
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        point = HookPoint()
        monkeypatch.setitem(model._hook_registry, "blocks.1.attn.hook_pattern", point)
        with pytest.raises(HookFiringError, match="blocks.1.attn.hook_pattern"):
            tlc.attribute(replacement, prompt(), progress=False)


def test_nan_in_activations_names_the_tensor():
    model = tiny_bridge("llama")
    model.add_hook("blocks.1.hook_attn_out", lambda t, hook: t * float("nan"))
    try:
        with tlc.attach(model, transcoders(model)) as replacement, pytest.raises(NotFiniteError, match="blocks.1"):
            tlc.attribute(replacement, prompt(), progress=False)
    finally:
        model.reset_hooks()
