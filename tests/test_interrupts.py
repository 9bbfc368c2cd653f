"""Ctrl-C at any line leaves nothing on a model, and ``tlc.detach(model)`` takes off whatever else may be left."""

import signal

import pytest
import torch

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.interrupting import Operation, chosen, differences, try_all, whole_state
from tests.sites import autoencoders
from tests.tiny import prompt, tiny_bridge, tiny_folder, transcoders
from tl_circuits.errors import ArgumentError, AttachError
from tl_circuits.hooks import added_hooks, resolve
from tl_circuits.hooks.interrupts import interrupts_wait
from tl_circuits.hooks.owned import put_hook

SITE = "blocks.1.hook_mlp_out"


def _logits(model):
    with torch.no_grad():
        return model(prompt()[None])


def _bridge():
    """A bridge that has run once, so that whatever TransformerLens remembers is remembered."""
    model = tiny_bridge("llama")
    _logits(model)
    return model


def _attribute(replacement, engine):
    replacement._remembered.clear()  # so that the proof runs each time
    return tlc.attribute(replacement, prompt(), max_nodes=10, engine=engine, progress=False)


def _operations(model):
    dictionary = transcoders(model)
    sites = autoencoders(model, {0: "hook_resid_pre", 1: "attn.hook_z"})
    edit = tlc.Scale(1, 4, 0, factor=3.0)
    with tlc.attach(model, dictionary) as replacement:
        graph = _attribute(replacement, "linear")
    yield Operation("attach and detach", model, lambda m: tlc.attach(m, dictionary).detach())
    yield Operation("attribute", model, lambda r: _attribute(r, "linear"), dictionary)
    yield Operation("attribute by autograd", model, lambda r: _attribute(r, "autograd"), dictionary)
    yield Operation("attribute at sites", model, lambda r: _attribute(r, "linear"), sites)
    yield Operation("intervene", model, lambda r: tlc.intervene(r, prompt(), edit, freeze="all"), dictionary)
    yield Operation("faithfulness", model, lambda r: tlc.faithfulness(r, graph, n=2, progress=False), dictionary)


@pytest.fixture(scope="module")
def operations():
    """Operations, each with the lines that it executes."""
    return [(operation, operation.lines()) for operation in _operations(_bridge())]


@pytest.mark.parametrize("by_signal", [False, True], ids=["raised", "sigint"])
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(operations, by_signal):
    """A sample of the lines in ``hooks``, where models are changed; ``python -m benchmarks.interrupts`` tries all
    lines."""
    tried = 0
    for seed, (operation, lines) in enumerate(operations, start=6 * by_signal):
        own = [n for n in chosen(lines, 2, seed=seed) if "hooks" in lines[n][0]]
        trials = try_all(operation, own[seed :: max(1, len(own) // 3)], by_signal)
        tried += len(trials)
        assert [trial for trial in trials if trial.left and not trial.whole] == [], operation.name
        assert all(trial.mended for trial in trials)
    assert tried > 12


def test_detach_takes_off_what_a_lost_replacement_and_a_hook_left_behind():
    model = _bridge()
    expected, before = _logits(model), whole_state(model)
    lost = tlc.attach(model, transcoders(model))
    put_hook(resolve(model, SITE), lambda tensor, hook: 2 * tensor)
    assert not torch.equal(_logits(model), expected)
    for _ in range(2):
        tlc.detach(model)
        assert differences(before, whole_state(model)) == [] and torch.equal(_logits(model), expected)
    assert not lost.attached
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        lost.detach()  # is not its own any more
        assert replacement.attached


@pytest.mark.parametrize("table", ["fwd_hooks", "_forward_hooks"])
def test_detach_finds_a_hook_that_transformer_lens_has_only_half_of(table):
    model = _bridge()
    expected, before = _logits(model), whole_state(model)
    point = resolve(model, SITE)
    put_hook(point, lambda tensor, hook: 2 * tensor)
    getattr(point, table).pop(*([] if table == "fwd_hooks" else [next(reversed(point._forward_hooks))]))
    tlc.detach(model)
    assert differences(before, whole_state(model)) == [] and torch.equal(_logits(model), expected)


def test_detach_leaves_hooks_of_others_and_models_without_a_dictionary_alone():
    model = _bridge()
    model.add_hook(SITE, lambda tensor, hook: 2 * tensor)
    try:
        theirs, before = _logits(model), whole_state(model)
        tlc.detach(model)
        tlc.attach(model, transcoders(model))
        tlc.detach(model)
        assert differences(before, whole_state(model)) == [] and torch.equal(_logits(model), theirs)
    finally:
        model.reset_hooks()
    with pytest.raises(ArgumentError, match="TransformerLens model"):
        tlc.detach(tlc.mlp_neurons(model))


def test_detach_restores_a_hooked_transformer():
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("transformer_lens 4 has no HookedTransformer")
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=32,
        n_ctx=32,
        d_head=8,
        n_heads=4,
        d_mlp=48,
        d_vocab=101,
        device=DEVICE,
        seed=0,
        act_fn="gelu",
    )
    model = HookedTransformer(config).eval()
    expected, before = _logits(model), whole_state(model)
    tlc.attach(model, tlc.mlp_neurons(model))
    tlc.detach(model)
    assert differences(before, whole_state(model)) == [] and torch.equal(_logits(model), expected)


def test_detach_gives_back_what_saelens_had_attached():
    pytest.importorskip("sae_lens")  # does not install beside transformer_lens 4
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    from tests.test_saelens import saelens_transcoder

    model = SAETransformerBridge.boot_transformers(tiny_folder("gemma3"), device=DEVICE)
    for layer in range(4):
        model.add_sae(saelens_transcoder("SkipTranscoder", layer))
    expected, before = _logits(model), whole_state(model)
    lost = tlc.attach(model)
    assert not torch.equal(_logits(model), expected)
    tlc.detach(model)
    assert torch.equal(_logits(model), expected) and not lost.attached
    assert differences(before, whole_state(model)) == []


def test_a_second_attachment_is_refused_with_advice_that_exists_on_the_model():
    model = _bridge()
    with tlc.attach(model, transcoders(model)):
        with pytest.raises(AttachError, match=r"tlc\.detach\(model\)") as refusal:
            tlc.attach(model, transcoders(model))
        assert "reset_saes" not in str(refusal.value) and not hasattr(model, "reset_saes")


def test_ctrl_c_waits_for_a_short_section_and_the_second_one_does_not():
    passed = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_wait(), interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            passed.append("the first")
    with pytest.raises(KeyboardInterrupt):
        with interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            passed.append("the second")
    assert passed == ["the first"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_hooks_for_one_run_are_gone_when_their_undo_fails():
    model = _bridge()
    expected, before = _logits(model), whole_state(model)
    point = resolve(model, SITE)
    with pytest.raises(KeyboardInterrupt):
        with added_hooks(model, [(SITE, lambda tensor, hook: 2 * tensor)]):
            point.fwd_hooks = _Interrupting(point.fwd_hooks)
    point.fwd_hooks = list(point.fwd_hooks)
    assert [name for name in differences(before, whole_state(model)) if name != "fwd_hooks"] == []
    assert point.fwd_hooks == [] and torch.equal(_logits(model), expected)


class _Interrupting(list):
    """A list whose entries cannot be removed without Ctrl-C."""

    def remove(self, entry):
        raise KeyboardInterrupt
