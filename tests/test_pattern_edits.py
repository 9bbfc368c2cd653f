"""Edits of attention patterns and scores."""

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import hook_state, own_bridge, prompt, tiny_bridge, transcoders
from tl_circuits.errors import EditError

HEAD = (1, 2, 7, 5)  # layer, head, query, key


def by_hand(model, point, change):
    """The model's logits with ``change`` at one cell of a hook of layer 1."""

    def hook(tensor, hook):
        tensor = tensor.clone()
        tensor[0, 2, 7, 5] = change(tensor[0, 2, 7, 5])
        return tensor

    with torch.no_grad():
        return model.run_with_hooks(prompt()[None], fwd_hooks=[(f"blocks.1.attn.{point}", hook)])[0]


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gpt2", "neox"])  # every kind of attention module
def test_pattern_and_score_edits_are_what_hooks_written_by_hand_do(architecture):
    model = tiny_bridge(architecture)
    before = hook_state(model)
    with tlc.attach(model, transcoders(model)) as replacement:
        pattern = tlc.intervene(replacement, prompt(), tlc.PatternEdit(*HEAD, value=0.9), freeze="none", layers=())
        score = tlc.intervene(replacement, prompt(), tlc.ScoreEdit(*HEAD, value=2.0), freeze="none", layers=())
        # With all else held, moving a score moves the held row to what softmax makes of it.
        held = tlc.intervene(replacement, prompt(), tlc.ScoreEdit(*HEAD, value=2.0), freeze="all", layers=())
        names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"]
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt()[None], names_filter=lambda name: name in names)
        moved = cache[names[1]][0, 2, 7].clone()
        moved[5] += 2.0
        cells = [tlc.PatternEdit(1, 2, 7, key, float(moved.softmax(-1)[key])) for key in range(8)]
        row = tlc.intervene(replacement, prompt(), cells, freeze="all", layers=())
    assert torch.allclose(pattern.logits, by_hand(model, "hook_pattern", lambda p: torch.tensor(0.9)), atol=1e-5)
    assert torch.allclose(score.logits, by_hand(model, "hook_attn_scores", lambda s: s + 2.0), atol=1e-5)
    assert torch.allclose(held.logits, row.logits, atol=1e-5)
    for result in (pattern, score, held):
        assert not torch.allclose(result.logits, result.baseline_logits, atol=1e-4)
        assert torch.allclose(result.logits[:7], result.baseline_logits[:7], atol=1e-5)  # earlier queries stay
    assert hook_state(model) == before


def test_edits_of_heads_mix_with_edits_of_features_and_with_batches():
    model = tiny_bridge("llama")
    edits = [tlc.PatternEdit(*HEAD, value=0.5), tlc.Set(0, 5, 3, value=4.0)]
    with tlc.attach(model, transcoders(model)) as replacement:
        together = tlc.intervene(replacement, prompt(), edits, freeze="attention", layers=())
        several = tlc.intervene_many(replacement, prompt(), [edits, [tlc.ScoreEdit(*HEAD, value=1.0)], []])
        strong = [tlc.PatternEdit(1, 2, 8, 5, value=30.0)]
        written = [
            tlc.generate(replacement, prompt(), strong, max_new_tokens=5, use_past_kv_cache=cached)
            for cached in (True, False)
        ]
        first = int(tlc.intervene(replacement, prompt(), strong, freeze="none", layers=()).logits[-1].argmax())
        unedited = tlc.generate(replacement, prompt(), max_new_tokens=5)
    assert torch.allclose(several[0].logits, together.logits, atol=1e-5)
    assert not torch.allclose(several[1].logits, several[2].logits, atol=1e-4)
    assert torch.allclose(several[2].logits, several[2].baseline_logits, atol=1e-5)
    assert written[0] == written[1] != unedited
    assert written[0].split()[-5] == model.tokenizer.decode([first]).strip()


def test_edits_of_heads_as_text():
    assert tlc.parse_edit("L5/H3@9>4 = 0.5") == tlc.PatternEdit(5, 3, 9, 4, 0.5)
    assert tlc.parse_edit(" L5/H3/score@-1>4 += -2") == tlc.ScoreEdit(5, 3, -1, 4, -2.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L5/H3@9>4 += 1", "only be set"),
        ("L5/H3/score@9>4 = 1", "only be added"),
        ("L5/H3@9 = 1", "cannot read the edit"),
        ("L5/H3@9>4 = much", "cannot read the number 'much'"),
    ],
)
def test_wrong_texts_show_the_grammar(text, words):
    with pytest.raises(EditError, match=words) as error:
        tlc.parse_edit(text)
    assert "L5/H3@9>4" in str(error.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (tlc.PatternEdit(9, 0, 1, 0, 1.0), r"layer 9 is not in 0\.\.3"),
        (tlc.PatternEdit(0, 4, 1, 0, 1.0), r"head 4 is not in 0\.\.3"),
        (tlc.ScoreEdit(0, 0, 99, 0, 1.0), "there is no position 99"),
        (tlc.ScoreEdit(0, 0, 1, -1, 1.0), "lies behind query 1"),
        (tlc.PatternEdit(0, 0, 3, 4, 1.0), "key 4 lies behind query 3"),
        (tlc.PatternEdit(0, 0, 1, 0, float("nan")), "finite number"),
        (tlc.ScoreEdit(0, 0, 8, 0, 1.0), "hidden by its mask"),  # layer 0 of the small Gemma looks back four tokens
    ],
)
def test_edits_of_heads_that_name_what_is_not_there_are_refused(edit, words):
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        for freeze in ("none", "attention"):
            with pytest.raises(EditError, match=words):
                tlc.intervene(replacement, prompt(), edit, freeze=freeze, layers=())


def test_one_cell_edited_twice_is_refused():
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement, pytest.raises(EditError, match="merge the two"):
        tlc.intervene(replacement, prompt(), [tlc.PatternEdit(1, 0, 8, 2, 0.1), tlc.PatternEdit(1, 0, -1, 2, 0.3)])


def test_an_edit_at_a_word_still_to_be_written_acts_there_with_and_without_cache():
    model = tiny_bridge("llama")
    edits = [tlc.PatternEdit(layer, head, 10, 2, value=5.0) for layer in range(3) for head in range(4)]
    with tlc.attach(model, transcoders(model)) as replacement:
        plain, *edited = (
            tlc.generate(replacement, prompt(), some, max_new_tokens=6, use_past_kv_cache=cached)
            for some, cached in (([], True), (edits, True), (edits, False))
        )
    assert edited[0] == edited[1] != plain


@pytest.mark.parametrize("added", [60.0, 100.0, 1e9, -100.0, -1e9])
def test_however_much_is_added_to_a_score_its_row_stays_what_softmax_makes_of_it(added):
    model = tlc.load_model("tiny-facts")
    layer, head, query, key = 1, 2, 5, 3
    tokens = tlc.hooks.to_tokens(model, "the capital of the state containing Dallas is")
    _, cache = model.run_with_cache(tokens[None])
    scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, head, query].double()
    scores[key] += added
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        moved = tlc.intervene(replacement, tokens, tlc.ScoreEdit(layer, head, query, key, added), freeze="attention")
        row = scores.softmax(-1)
        edits = [tlc.PatternEdit(layer, head, query, k, float(row[k])) for k in range(query + 1)]
        right = tlc.intervene(replacement, tokens, edits, freeze="attention")
    assert torch.allclose(moved.logits, right.logits, atol=1e-4)  # the held pattern is float32


def test_scores_are_not_added_to_a_held_pattern_that_a_users_hook_has_changed():
    model = own_bridge("llama")
    model.add_hook("blocks.1.attn.hook_pattern", lambda x, hook: 0.5 * x)
    with tlc.attach(model, transcoders(model)) as replacement:
        edit = tlc.ScoreEdit(1, 1, 7, 3, 5.0)
        with pytest.raises(EditError, match="not of this package, on blocks.1.attn.hook_pattern"):
            tlc.intervene(replacement, prompt(), edit, freeze="attention")
        assert tlc.intervene(replacement, prompt(), edit, freeze="none").kl() > 0
        tlc.intervene(replacement, prompt(), tlc.ScoreEdit(0, 1, 7, 3, 5.0), freeze="attention")
