"""Every option of load_transcoders on every kind of source: honoured, or refused by name."""

from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import cross_layer, prompt, tiny_bridge, transcoders
from tl_circuits.errors import DictionaryError


def tensors():
    made = transcoders(tiny_bridge("llama"))
    return {layer: made[layer] for layer in made.layers}


def saelens():
    pytest.importorskip("sae_lens.saes", reason="sae_lens is not installed (transformer_lens 4)")
    from tests.test_saelens import saelens_transcoder

    return {layer: saelens_transcoder("SkipTranscoder", layer) for layer in range(3)}


SOURCES = {
    "tensors": tensors,
    "list of tensors": lambda: list(tensors().values()),
    "SAELens": saelens,
    "dictionary": lambda: transcoders(tiny_bridge("llama")),
    "cross-layer": lambda: cross_layer(tiny_bridge("llama")),
    "built-in": lambda: "tiny-facts",
}
REFUSED = {
    "width": ("16k", "width='16k' is about published files"),
    "l0": ("small", "l0='small' is about published files"),
    "cache_dir": ("here", "cache_dir='here' is about published files"),
    "residency": ("disk", "in memory"),
}
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")


def decoders(made):
    return [made.decoder(layer) for layer in made.layers if made.decoder(layer) is not None]


@pytest.mark.parametrize("source", SOURCES)
def test_names_hooks_and_dtypes_asked_for_are_taken(source):
    plain = tlc.load_transcoders(SOURCES[source]())
    made = tlc.load_transcoders(
        SOURCES[source](),
        name="mine",
        input_hook="hook_resid_mid",
        output_hook="mlp.hook_out",
        dtype=torch.bfloat16,
        device="cpu",
        progress=True,
    )
    assert made.name == "mine" and type(made) is type(plain) and made.layers == plain.layers
    assert made.input_hook(1) == "blocks.1.hook_resid_mid" and made.output_hook(1) == "blocks.1.mlp.hook_out"
    every = [getattr(made[layer], n) for layer in made.layers for n in WEIGHTS] + decoders(made)
    assert {t.dtype for t in every} == {torch.bfloat16}
    assert made[1].W_enc.equal(plain[1].W_enc.to(torch.bfloat16)) and made[1].activation == plain[1].activation
    for a, b in zip(decoders(made), decoders(plain), strict=True):
        assert a.equal(b.to(torch.bfloat16))


@pytest.mark.parametrize("source", SOURCES)
def test_a_prompt_rule_is_taken_and_kept_through_other_options(source):
    rule = tlc.PromptRule(prepend=True, skip_first=1)
    made = tlc.load_transcoders(SOURCES[source](), prompt_rule=rule, name="mine", dtype=torch.bfloat16)
    assert made.prompt_rule == rule and made.name == "mine"
    again = tlc.load_transcoders(made, dtype=torch.float32, name="again")
    assert again.prompt_rule == rule and again.name == "again" and made.name == "mine"
    assert (
        tlc.load_transcoders(made, prompt_rule=tlc.PromptRule()).prompt_rule == tlc.PromptRule()
        and made.prompt_rule == rule
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("residency", ["cpu", "device"])
def test_a_residency_in_memory_is_taken_and_changes_nothing_else(source, residency):
    plain, made = (tlc.load_transcoders(SOURCES[source](), **options) for options in ({}, {"residency": residency}))
    assert made[1].W_enc.equal(plain[1].W_enc) and made.name == plain.name and made.input_hook(0) == plain.input_hook(0)


@pytest.mark.parametrize("source", SOURCES)
def test_layers_asked_for_are_all_there_are_or_the_set_says_that_it_is_whole(source):
    if source == "cross-layer":
        with pytest.raises(DictionaryError, match="cross-layer transcoder, which is taken whole"):
            tlc.load_transcoders(SOURCES[source](), layers=[1])
        assert tlc.load_transcoders(SOURCES[source](), layers=range(3)).layers == (0, 1, 2)
        return
    assert tlc.load_transcoders(SOURCES[source](), layers=torch.tensor([2, 0])).layers == (0, 2)
    with pytest.raises(DictionaryError, match="no layers 7"):
        tlc.load_transcoders(SOURCES[source](), layers=[1, 7])


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("source", SOURCES)
def test_options_that_cannot_be_honoured_are_refused_by_name(source, option):
    value, words = REFUSED[option]
    with pytest.raises(DictionaryError, match=words):
        tlc.load_transcoders(SOURCES[source](), **{option: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [1]}, "layers= cannot be honoured"),
        ({"input_hook": "ln2.hook_normalized"}, "input_hook= cannot"),
        ({"output_hook": "hook_mlp_out"}, "output_hook= cannot"),
        ({"dtype": torch.float16}, "dtype= cannot"),
        ({"device": "cpu"}, "device= cannot"),
        ({"residency": "cpu"}, "residency= cannot"),
        ({"width": 16384}, "width=16384"),
    ],
)
def test_neurons_take_a_name_and_refuse_the_rest(options, words):
    neurons = tlc.mlp_neurons(tiny_bridge("llama"))
    with pytest.raises(DictionaryError, match=words):
        tlc.load_transcoders(neurons, **options)
    assert tlc.load_transcoders(neurons, name="mine").name == "mine" and neurons.name == "mlp neurons"


def test_a_dictionary_without_options_is_the_same_object_and_with_options_stays_as_it_was():
    given = transcoders(tiny_bridge("llama"))
    assert tlc.load_transcoders(given) is given
    made = tlc.load_transcoders(given, name="mine", input_hook="hook_resid_mid", layers=[1])
    assert given.name == "transcoders" and given.input_hook(1) == "blocks.1.mlp.hook_in" and given.layers == (0, 1, 2)
    assert made.layers == (1,)


def test_hooks_with_their_block_and_dtypes_of_whole_numbers_are_refused():
    with pytest.raises(DictionaryError, match="a hook's name within a block"):
        tlc.load_transcoders(tensors(), input_hook="blocks.0.mlp.hook_in")
    with pytest.raises(DictionaryError, match="floating-point"):
        tlc.load_transcoders(tensors(), dtype=torch.int8)


def test_wrong_metadata_of_saelens_can_be_overruled():
    saes = saelens()
    for sae in saes.values():
        sae.cfg.metadata.hook_name = "blocks.9.ln2.hook_normalized"
    assert tlc.load_transcoders(saes, input_hook="mlp.hook_in").input_hook(2) == "blocks.2.mlp.hook_in"


def test_what_was_asked_for_is_what_a_graph_is_made_with():
    model = tiny_bridge("llama")
    given = transcoders(model)
    moved = tlc.load_transcoders(given, input_hook="hook_resid_mid")
    by_hand = tlc.load_transcoders(
        {layer: replace(given[layer], input_hook="hook_resid_mid") for layer in given.layers}
    )
    graphs = []
    for dictionary in (given, moved, by_hand):
        with tlc.attach(model, dictionary) as replacement:
            graphs.append(tlc.attribute(replacement, prompt(), max_nodes=30, progress=False))
    assert graphs[1] == graphs[2] and graphs[0] != graphs[1]


@pytest.mark.parametrize("make", [transcoders, cross_layer])
def test_a_dictionary_that_is_moved_or_opened_again_keeps_its_rules(make):
    rule = tlc.PromptRule(skip_first=2)
    own = make(tiny_bridge("gemma3")).with_prompt_rule(rule).with_mlps("ratio")
    for made in (own.to(torch.device("cpu")), tlc.load_transcoders(own, name="other")):
        assert (made.prompt_rule, made.mlps) == (rule, "ratio")
