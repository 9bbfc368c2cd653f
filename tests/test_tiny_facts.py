"""The built-in model: it opens offline, knows its world, and goes through the middle step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import command
from tl_circuits.cli.state_swap import sentences, swap_state
from tl_circuits.dictionaries.builtin.split import split
from tl_circuits.dictionaries.builtin.state_features import state_features, state_nodes, swap_edits
from tl_circuits.dictionaries.builtin.world import OPPOSITES, STATE_OF, STATES
from tl_circuits.errors import PromptError
from tl_circuits.models import BUILTIN_FOLDER

PROGRAM = str(Path(sys.executable).parent / "tl-circuits")


@pytest.fixture(scope="module")
def model():
    return tlc.load_model("tiny-facts", device=DEVICE)


@pytest.fixture(scope="module")
def replacement(model):
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as attached:
        yield attached


@pytest.fixture(scope="module")
def features(replacement):
    return state_features(replacement)


def accuracy(model, facts):
    tokenizer, right = model.tokenizer, 0
    by_length = {}
    for fact in facts:
        by_length.setdefault(len(fact.prompt.split()), []).append(fact)
    for group in by_length.values():
        likeliest = model([f.prompt for f in group])[:, -1].argmax(-1)
        right += sum(tokenizer.convert_ids_to_tokens(int(i)) == f.answer for i, f in zip(likeliest, group, strict=True))
    return right / len(facts)


def test_every_name_of_the_world_is_one_known_word_with_one_meaning(model):
    names = [*STATE_OF, *(s.name for s in STATES), *(s["capital"] for s in STATES), *(w for o in OPPOSITES for w in o)]
    assert len(names) == len(set(names))
    assert all(model.to_tokens(name, prepend_bos=True).shape == (1, 2) for name in names)
    assert not any(model.tokenizer.unk_token_id in model.to_tokens(name) for name in names)


@pytest.mark.parametrize(("family", "least"), [("city", 0.99), ("two-hop", 0.95), ("addition", 0.9)])
def test_facts_kept_from_training_hold(model, family, least):
    assert accuracy(model, split().held_out[family]) >= least


def test_facts_of_training_hold(model):
    assert accuracy(model, [f for group in split().train.values() for f in group]) >= 0.98


def test_kept_back_two_hop_questions_have_their_first_hop_in_training():
    facts = split()
    assert not {f.prompt for f in facts.held_out["two-hop"]} & {f.prompt for f in facts.train["two-hop"]}
    taught = {f.prompt for f in facts.train["city"]}
    for city in {f.prompt.split()[-2] for f in facts.held_out["two-hop"]}:
        assert taught & {f"{city} is in", f"the state containing {city} is"}


def test_the_state_lies_between_city_and_answer_and_swapping_it_swaps_the_answer(model, replacement, features):
    capitals = [f for f in split().held_out["two-hop"] if " capital " in f.prompt][::10]
    found = swapped = 0
    for i, fact in enumerate(capitals):
        state = STATE_OF[fact.prompt.split()[-2]]
        other = STATES[(STATES.index(state) + 1 + i) % len(STATES)]
        graph = tlc.attribute(replacement, fact.prompt, progress=False).prune()
        found += bool(state_nodes(graph, features, state.name))
        result = tlc.intervene(replacement, fact.prompt, swap_edits(features, state.name, other.name), freeze="none")
        swapped += model.tokenizer.convert_ids_to_tokens(int(result.last_logits.argmax())) == other["capital"]
    assert found >= 0.8 * len(capitals) and swapped >= 0.7 * len(capitals)


def test_the_story_says_what_was_measured(replacement):
    story = swap_state(replacement, "Lubbock", "California")
    assert story.answer() == "Austin" and story.answer(story.swapped) == "Sacramento"
    assert story.probability("Austin", story.without) < story.probability("Austin")
    told = " ".join(sentences(story))
    assert (
        story.kept_back and "goes through Texas" in told and "“Sacramento”" in told and str(len(story.middle)) in told
    )
    labels = story.graph.nodes.set_index("id").label
    assert (labels[story.middle] == "Texas (the state)").all()


def test_unknown_names_are_refused_with_the_known_ones(replacement):
    with pytest.raises(PromptError, match="knows no city 'Paris'"):
        swap_state(replacement, "Paris", "California")
    for other in ("Texas", "Dallas"):
        with pytest.raises(PromptError, match="other than Texas"):
            swap_state(replacement, "Dallas", other)


def test_the_files_are_small_and_hold_no_pickle():
    files = list(BUILTIN_FOLDER.iterdir())
    assert sum(f.stat().st_size for f in files) <= 8_000_000
    assert {f.suffix for f in files} == {".json", ".safetensors"}


def test_the_demo_runs_in_a_fresh_process_without_a_network(tmp_path):
    offline = {
        **os.environ,
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
    }
    for name in ("HF_HUB_OFFLINE", "TL_CIRCUITS_CACHE", "XDG_CACHE_HOME"):
        offline.pop(name, None)
    done = subprocess.run(
        [PROGRAM, "demo", "--json"], cwd=tmp_path, capture_output=True, text=True, env=offline, timeout=300
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["answer"] == "Austin" and facts["swapped"]["answer"] == "Sacramento" and facts["middle"]
    assert (tmp_path / facts["page"]).read_text().startswith("<!doctype html>")
    again = command("demo", cwd=tmp_path)
    assert again.exit_code == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr
