"""Targets and prompts, good and bad."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tl_circuits as tlc
from tests.tiny import hook_state, own_bridge, prompt, transcoders
from tl_circuits.attribution.targets import parse_target, token_id
from tl_circuits.errors import ArgumentError, PromptError, TargetError


@pytest.fixture(scope="module")
def replacement():
    model = own_bridge("llama")
    with tlc.attach(model, transcoders(model)) as attached:
        yield attached


def trace(replacement, targets=None, given=None, **kwargs):
    kwargs = {"max_nodes": 30, "progress": False} | kwargs
    return tlc.attribute(replacement, prompt() if given is None else given, targets, **kwargs)


def test_default_targets_are_the_likeliest_tokens(replacement):
    graph = trace(replacement)
    with torch.no_grad():
        probabilities = replacement.model(prompt()[None])[0, -1].softmax(-1)
    top = probabilities.topk(10)
    found = graph.nodes[graph.nodes.kind == "logit"]
    assert found.feature.tolist() == top.indices[: len(found)].tolist()
    assert len(found) == 10 or float(top.values[: len(found)].sum()) >= 0.95
    assert graph.info.target_probabilities == pytest.approx(top.values[: len(found)].tolist(), abs=1e-5)


def test_tokens_and_ids_name_the_same_target(replacement):
    by_text, by_id = trace(replacement, "w14"), trace(replacement, [17])
    assert by_text.nodes.equals(by_id.nodes) and by_text.info.target_names == ("w14",)


def test_a_difference_is_the_difference_of_the_rows(replacement):
    both = trace(replacement, [17, 20], max_nodes=1000)
    difference = trace(replacement, tlc.LogitDifference("w14", 20), max_nodes=1000)
    expected = both.adjacency()[-2, :-2] - both.adjacency()[-1, :-2]
    index = {node: i for i, node in enumerate(both.node_ids)}
    columns = [index[node] for node in difference.node_ids[:-1]]
    assert torch.allclose(difference.adjacency()[-1, :-1], expected[columns], atol=1e-5)
    assert difference.completeness_error() < 1e-4


def test_a_direction_explains_the_final_stream_along_it(replacement):
    model = replacement.model
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    graph = trace(replacement, tlc.LogitDirection(vector, "mine"), position=4)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt()[None], names_filter="ln_final.hook_out")
    value = float(graph._nodes.value[graph.is_kind("logit")])
    assert value == pytest.approx(float(cache["ln_final.hook_out"][0, 4] @ vector), rel=1e-4)
    assert graph.info.target_names == ("mine",) and graph.completeness_error() < 1e-4


def test_a_feature_can_be_the_target(replacement):
    some = trace(replacement).nodes.query("kind == 'feature' and layer == 2").iloc[0]
    target = tlc.FeatureTarget(int(some.layer), int(some.position), int(some.feature))
    graph = trace(replacement, target)
    assert not graph.is_kind("logit").any()
    root = graph.nodes.loc[graph._nodes.weight.numpy() > 0]
    assert root.id.tolist() == [some.id] and graph.completeness_error() < 1e-4
    assert (graph.nodes[graph.nodes.kind == "feature"].layer <= 2).all()
    from_the_end = tlc.FeatureTarget(target.layer, target.position - prompt().numel(), target.feature)
    assert torch.equal(trace(replacement, from_the_end).adjacency(), graph.adjacency())


def test_whole_numbers_will_do_where_numbers_are_asked_for(replacement):
    whole = tlc.attribute(replacement, prompt(), max_nodes=5, row_mass=1, progress=False)
    assert whole.completeness_error() < 1e-4
    doubled = tlc.intervene(replacement, prompt(), tlc.Scale(0, 1, 3, factor=2))
    assert torch.equal(doubled.logits, tlc.intervene(replacement, prompt(), tlc.Scale(0, 1, 3, factor=2.0)).logits)


@pytest.mark.parametrize("position", [-1, 0, 3, 8])
def test_any_position_can_be_explained(replacement, position):
    graph = trace(replacement, [17], position=position)
    assert graph.completeness_error() < 1e-4
    with torch.no_grad():
        logits = replacement.model(prompt()[None])[0, position]
    assert float(graph._nodes.value[-1]) == pytest.approx(float(logits[17] - logits.mean()), abs=1e-4)
    assert (graph.nodes[graph.nodes.kind == "feature"].position <= position % 9).all()


def test_the_first_token_has_no_features_unless_asked(replacement):
    assert (trace(replacement, max_nodes=500).nodes.query("kind == 'feature'").position > 0).all()
    whole = trace(replacement, max_nodes=500, skip_positions=())
    assert (whole.nodes.query("kind == 'feature'").position == 0).any() and whole.completeness_error() < 1e-4
    without = prompt()
    without[0] = 9  # no beginning-of-sequence token, nothing to skip
    assert (trace(replacement, given=without, max_nodes=500).nodes.query("kind == 'feature'").position == 0).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([[1, 2], [3, 4]], "one sequence"),
        ([1, 101], r"0\.\.100, got 101"),
        ([1, -1], "got -1"),
        ([1.5, 2.0], "whole numbers"),
        (torch.tensor([True]), "whole numbers"),
        ({"a": 1}, "text or token ids"),
        (torch.ones(40, dtype=torch.long), "40 tokens, the model's context is 32"),
    ],
)
def test_bad_prompts_are_named_and_leave_the_model_alone(replacement, given, message):
    before = hook_state(replacement.model)
    with pytest.raises(PromptError, match=message):
        trace(replacement, given=given)
    assert hook_state(replacement.model) == before


@pytest.mark.parametrize(
    ("targets", "kwargs", "message"),
    [
        (["w1 w2"], {}, "2 tokens"),
        ([999], {}, r"not in 0\.\.100"),
        ([], {}, "empty list"),
        ([1.5], {}, "a target is"),
        (None, {"position": 9}, "outside the prompt's 9 tokens"),
        (None, {"skip_positions": [12]}, "outside the prompt"),
        (tlc.FeatureTarget(0, 1, 10_000), {}, "not active"),
        ([tlc.FeatureTarget(0, 1, 1), 5], {}, "alone"),
        (tlc.LogitDirection(torch.ones(3), "x"), {}, r"\(3,\), expected \(32,\)"),
        (tlc.LogitDirection(torch.full((32,), torch.nan), "x"), {}, "'x' holds NaN or infinity"),
        (tlc.LogitDirection(torch.full((32,), -torch.inf), "x"), {}, "holds NaN or infinity"),
        (tlc.LogitDirection(torch.full((32,), 1e38), "x"), {}, "too long for float32"),
        (["w1", 5, "w1"], {}, "'w1' is given twice"),
    ],
)
def test_bad_targets_are_named(replacement, targets, kwargs, message):
    with pytest.raises(TargetError, match=message):
        trace(replacement, targets, **kwargs)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", None, "name is None, expected a text"),
        ("vector", torch.ones(32, dtype=torch.complex64), "complex numbers"),
    ],
)
def test_a_direction_of_the_wrong_type_is_named(replacement, field, value, message):
    direction = tlc.LogitDirection(torch.ones(32), "x")
    object.__setattr__(direction, field, value)  # the tests' type checks would refuse it before the package does
    with pytest.raises(TargetError, match=message):
        trace(replacement, direction)


def test_counts_below_one_are_refused(replacement):
    with pytest.raises(ValueError, match="max_nodes must be at least 1, got 0"):
        trace(replacement, max_nodes=0)
    with pytest.raises(ValueError, match="batch_size"):
        trace(replacement, batch_size=0)


def test_one_node_is_enough(replacement):
    assert trace(replacement, max_nodes=1).is_kind("feature").sum() == 1


def test_wrong_types_are_refused_at_the_call(replacement):
    with pytest.raises(ArgumentError, match=r"max_nodes=\.\.\.\) must be a whole number, got 'many'"):
        trace(replacement, max_nodes="many")


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer whose tokens differ with a space in front, as those of large models do."""
    words = ["<unk>", " big", "big", " large", "large", " Dallas", "Dallas", " - "]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return SimpleNamespace(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"),
        cfg=SimpleNamespace(d_vocab=len(words)),
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (" big - large", (1, 3)),
        ("big - large", (2, 4)),
        (" big -  large", (1, 3)),
        ('" big" - "large"', (1, 4)),
        ('"big" - " large"', (2, 3)),
        (" large", 3),
        ("large", 4),
        (" - ", 7),
    ],
)
def test_a_written_difference_means_the_tokens_that_begin_words_where_its_first_one_does(spaced, text, meant):
    target = parse_target(text)
    if isinstance(meant, tuple):
        assert isinstance(target, tlc.LogitDifference)
        assert (token_id(spaced, target.positive), token_id(spaced, target.negative)) == meant
    else:
        assert token_id(spaced, target) == meant


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" Austin", "' Austin' is not in the model's vocabulary: .* the unknown token '<unk>'"),
        (
            " big - large",
            r"is not in the model's vocabulary.*For a difference .* tlc\.LogitDifference\(' big', ' large'\)",
        ),
        (True, "must be a whole number"),
        (1.5, "must be a whole number"),
        (None, "must be a whole number"),
        (8, r"not in 0\.\.7"),
    ],
)
def test_texts_that_the_model_does_not_know_are_no_targets(spaced, text, words):
    with pytest.raises(TargetError, match=words):
        token_id(spaced, text)
    assert token_id(spaced, "<unk>") == 0  # named outright


def test_on_the_built_in_model_differences_as_text_and_unknown_words_are_refused_everywhere():
    model = tlc.load_model("tiny-facts")
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        given = "the capital of the state containing Dallas is"
        for targets, words in (
            ("Austin - Sacramento", r"LogitDifference\('Austin', 'Sacramento'\)"),
            (["Parisian"], "unknown token '<unk>'"),
            (tlc.LogitDifference("Austin", "Parisian"), "'Parisian' is not in"),
            (tlc.LogitDifference("Austin", " Austin"), "and itself"),
        ):
            with pytest.raises(TargetError, match=words):
                trace(replacement, targets, given)
        with pytest.raises(TargetError, match="unknown token"):
            tlc.intervene(replacement, given, []).logit_difference("Austin", "Parisian")
        assert trace(replacement, parse_target("Austin - Sacramento"), given).info.target_names == (
            "Austin − Sacramento",
        )


def test_a_token_that_the_tokenizer_reads_as_another_is_refused():
    class Reader:
        unk_token_id = unk_token = None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [3]}

        def decode(self, ids):
            return "Texas"

    model = SimpleNamespace(tokenizer=Reader(), cfg=SimpleNamespace(d_vocab=9))
    with pytest.raises(TargetError, match="reads the target 'Austin' as 'Texas'"):
        token_id(model, "Austin")
    assert token_id(model, " texas") == 3
