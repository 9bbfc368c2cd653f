"""Arguments of the wrong type are answered in one sentence of ours, wherever the public surface takes them."""

import numpy as np
import pytest
import torch

import tl_circuits as tlc
from tests.tiny import hook_state, own_bridge, prompt, tiny_bridge, transcoders
from tl_circuits.errors import ArgumentError, DictionaryError, EditError, PromptError, TLCircuitsError


@pytest.fixture(scope="module")
def traced():
    model = own_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)


def test_a_model_without_a_dictionary_is_answered_in_one_line():
    model = tiny_bridge("llama")
    before = hook_state(model)
    with pytest.raises(ArgumentError) as error:
        tlc.attribute(model, "w1")
    assert str(error.value) == (
        "attribute(replacement=...) must be a Replacement (tlc.attach(model, dictionary) makes one), got "
        "TransformerBridge."
    )
    assert isinstance(error.value, TypeError) and error.value.__cause__ is None and error.value.__context__ is None
    assert hook_state(model) == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda r, g: tlc.attribute(r, prompt(), max_nodes="many"),
            "max_nodes=...) must be a whole number, got 'many'",
        ),
        (lambda r, g: tlc.attribute(r, prompt(), max_nodes=1.5), "must be a whole number, got 1.5"),
        (lambda r, g: tlc.attribute(r, prompt(), max_nodes=True), "must be a whole number, got True"),
        (lambda r, g: tlc.attribute(r, prompt(), engine="fast"), "'auto' or 'linear' or 'autograd', got 'fast'"),
        (lambda r, g: tlc.attribute(r, prompt(), skip_positions=[0] * 50 + ["a"]), "got 'a' in the list"),
        (lambda r, g: tlc.attribute(r), "missing a required argument: 'prompt'"),
        (lambda r, g: tlc.attribute(r, prompt(), depth=3), "unexpected keyword argument 'depth'"),
        (lambda r, g: tlc.faithfulness(g, r), "must be a Replacement .*, got AttributionGraph"),
        (lambda r, g: tlc.label_features(g, r), "must be a Replacement"),
        (lambda r, g: tlc.edits_of(r, ["x"]), r"must be an AttributionGraph .*, got Replacement"),
        (lambda r, g: tlc.box_ablations(r, "graph"), "must be an AttributionGraph .*, got 'graph'"),
        (lambda r, g: tlc.circuit_curve(r, g, 3), "metric=...) must be a function, got 3"),
        (lambda r, g: tlc.head_loadings(r, g, 2.5, "logit:0"), "source=...) must be .*, got 2.5"),
        (lambda r, g: tlc.aggregate([g, 3]), "got 3 in the list"),
        (lambda r, g: tlc.trace_many(r.model, ["w1"], "out"), "must be a Replacement .*, got a bare model"),
        (lambda r, g: tlc.trace_many(3, ["w1"], "out"), "must be a Replacement"),
        (lambda r, g: tlc.attach("gemma"), "model=...) must be a TransformerLens model"),
        (
            lambda r, g: tlc.attach(transcoders(r.model), r.model),
            "must be a TransformerLens model .*, got TranscoderSet",
        ),
        (lambda r, g: tlc.mlp_neurons("gemma"), "must be a TransformerLens model"),
        (lambda r, g: tlc.load_model("tiny-facts", dtype="float32"), "must be a torch.dtype"),
        (lambda r, g: tlc.load_graph(3), "path=...) must be text or a path, got 3"),
        (lambda r, g: tlc.load_transcoders("tiny-facts", dtype="float16"), "dtype=...) must be a torch.dtype or None"),
        (lambda r, g: tlc.parse_edit(3), "must be text, got 3"),
        (lambda r, g: tlc.from_neuronpedia_url(3), "must be text, got 3"),
        (lambda r, g: tlc.add_labels(r), "must be an AttributionGraph"),
        (lambda r, g: tlc.search_features(3, "m", "s"), "must be text, got 3"),
        (lambda r, g: tlc.make_dashboards(g, [], "out"), "must be a Replacement"),
        (lambda r, g: tlc.train_transcoders(r.model, [], "out"), "model=...) must be text, got TransformerBridge"),
        (lambda r, g: tlc.dictionary_quality(r.model, [prompt()]), "must be a Replacement"),
        (lambda r, g: tlc.intervene(r.model, prompt(), []), "must be a Replacement"),
        (lambda r, g: tlc.generate(r, prompt(), max_new_tokens=2.5), "must be a whole number, got 2.5"),
        (lambda r, g: g.prune("most"), "node_threshold=...) must be a number, got 'most'"),
        (lambda r, g: g.save(3), "must be text or a path"),
        (lambda r, g: g.pin(3), "got 3 in the tuple"),
    ],
)
def test_wrong_types_are_named_with_what_is_meant(traced, call, words):
    with pytest.raises(ArgumentError, match=words.replace("...)", r"\.\.\.\)")) as error:
        call(*traced)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda r, g: tlc.faithfulness(r, g, groups={"mine": ["L9/F1@2"]}),
            EditError,
            "group 'mine': the graph has no node 'L9/F1@2'",
        ),
        (lambda r, g: tlc.faithfulness(r, g, groups={"mine": [10**6]}), EditError, "no node 1000000"),
        (lambda r, g: tlc.faithfulness(r, g, groups={"mine": [-1]}), EditError, "no node -1"),
        (lambda r, g: tlc.faithfulness(r, g, groups={"mine": [True]}), EditError, "no node True"),
        (lambda r, g: tlc.faithfulness(r, g, groups={"mine": []}), EditError, "group 'mine': an empty list"),
        (lambda r, g: tlc.faithfulness(r, g, groups={"mine": ["logit:0"]}), EditError, "'logit:0' is an output"),
        (lambda r, g: tlc.faithfulness(r, g, -1), ArgumentError, "0 or more"),
        (lambda r, g: tlc.dictionary_quality(r, []), PromptError, "no prompts"),
        (lambda r, g: tlc.dictionary_quality(r, "w1 w2"), PromptError, "a list of prompts"),
        (
            lambda r, g: tlc.feature_patching(r, prompt(), prompt(seed=4), lambda x: x[3], layers=[9]),
            DictionaryError,
            "layer 9 has no dictionary",
        ),
        (lambda r, g: tlc.intervene(r, prompt(), [], layers=[9]), DictionaryError, "layer 9 has no dictionary"),
        (
            lambda r, g: tlc.feature_patching(r, prompt(), prompt(seed=4), lambda x: x[0, -1, 5], limit=1),
            ArgumentError,
            r"logits\[token\], not logits\[0, -1",
        ),
        (
            lambda r, g: tlc.circuit_curve(r, g, lambda x: x[0, -1]),
            ArgumentError,
            r"logits\[token\], not logits\[0, -1",
        ),
        (lambda r, g: tlc.circuit_curve(r, g, lambda x: x), ArgumentError, r"got Tensor of shape \(101,\)"),
        (lambda r, g: tlc.circuit_curve(r, g, lambda x: None), ArgumentError, "got None"),
        (lambda r, g: tlc.circuit_curve(r, g, lambda x: 0.0), ArgumentError, "0 on the untouched model"),
        (lambda r, g: tlc.explain_heads(r, g, [("logit:0",)]), TLCircuitsError, "an edge is a pair"),
    ],
)
def test_values_that_do_not_exist_are_errors_in_our_words(traced, call, kind, words):
    with pytest.raises(kind, match=words):
        call(*traced)


def test_a_metric_of_one_number_in_any_form_is_taken(traced):
    replacement, graph = traced
    forms = (lambda x: x[5], lambda x: float(x[5]), lambda x: x[[5]], lambda x: np.float32(x[5]))
    found = [
        tlc.circuit_curve(replacement, graph, form, thresholds=(0.8,), random_sets=1).kept.iloc[0] for form in forms
    ]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_mistakes_further_in_are_not_taken_for_the_callers(traced):
    replacement, graph = traced

    def metric(logits):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        tlc.circuit_curve(replacement, graph, metric)


def test_graphs_are_compared_by_content_and_can_be_kept_in_sets(traced, tmp_path):
    replacement, graph = traced
    again = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
    assert graph == graph and graph == again and not graph != again and hash(graph) == hash(again)  # noqa: PLR0124
    assert tlc.load_graph(graph.save(tmp_path / "a.graph.safetensors")) == graph
    others = [
        graph.prune(0.5),
        graph.pin("token@1"),
        tlc.label_features(replacement, graph),
        tlc.attribute(replacement, prompt(seed=5), max_nodes=20, progress=False),
    ]
    assert all(graph != other for other in others) and graph != "graph" and len({graph, again, *others}) == 5
    assert bool(torch.isnan(graph._nodes.value).any())  # of which each differs from itself
