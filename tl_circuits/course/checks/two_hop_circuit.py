"""Assignment 3: find the state between city and capital, and swap it."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch

from tl_circuits.course.questions import Asking, Lab, Part, Question, WrongAnswer, close, near, number, sequence, tensor
from tl_circuits.dictionaries.builtin.state_features import state_features as features_of_states
from tl_circuits.dictionaries.builtin.state_features import swap_edits as known_swap
from tl_circuits.dictionaries.builtin.world import STATE_OF, STATES, two_hop
from tl_circuits.hooks import Ablate, Set
from tl_circuits.interventions.intervene import intervene


def city_activations(student: Asking, lab: Lab) -> Iterator[Part]:
    for layer, cities, position in ((1, ["Seattle", "Tacoma", "Miami"], -2), (3, ["Boulder"], -1)):
        point = f"blocks.{layer}.hook_mlp_out.hook_sae_acts_post"
        acts = torch.stack([lab.cache(two_hop(city).prompt)[point][0] for city in cities])
        want = acts[:, position]
        got = tensor(student(lab.replacement, layer, list(cities), position), want.shape, "city feature")
        hint = f"wrong values at position {position}: `hook_sae_acts_post` of that layer there, one row a city."
        yield Part(2, close(got, want), hint)


def state_features(student: Asking, lab: Lab) -> Iterator[Part]:
    reach = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 3.0]])
    right = True
    for at_least, want in ((2, [0, 3]), (1, [0, 1, 3])):
        got = sequence(student(reach.clone(), torch.zeros(5, 4), at_least), int, "a list of feature numbers")
        right = right and sorted(got) == want
    yield Part(2, right, "a feature must be active on at least `at_least` of the state's own cities.")
    own = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    others = torch.tensor([[0.0, 9.0, 5.0, 8.0], [0.0, 0.0, 4.0, 0.9], [1.0, 0.0, 1.0, 0.2]])
    got = sequence(student(own, others, 1), int, "a list of feature numbers")
    hint = "at least a quarter of all activation (own and other cities together, summed) must be on the state's own."
    yield Part(2, sorted(got) == [0, 1], hint)


def _edges(*pairs: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame([(a, b, 1.0) for a, b in pairs], columns=["source", "target", "weight"])


def between(student: Asking, lab: Lab) -> Iterator[Part]:
    short = _edges(("c", "a"), ("a", "z"), ("c", "b"), ("d", "z"), ("e", "a"))
    got = sequence(student(short, "c", "z"), str, "a set of node ids")
    hint = (
        "wrong on a graph of two steps: only nodes that the start leads to and that lead to the end, without the two."
    )
    yield Part(2, set(got) == {"a"}, hint)
    long = _edges(
        ("c", "a"), ("a", "b"), ("b", "d"), ("d", "z"), ("a", "dead"), ("x", "b"), ("c", "z"), ("c", "y"), ("y", "d")
    )
    got = sequence(student(long, "c", "z"), str, "a set of node ids")
    yield Part(2, set(got) == {"a", "b", "d", "y"}, "wrong on a longer graph: a path may have any number of steps.")


def swap_edits(student: Asking, lab: Lab) -> Iterator[Part]:
    old = [(0, -2, 11), (0, -2, 12), (1, -1, 5)]
    new = {(0, -2, 12): 1.5, (1, -2, 40): 0.25}
    answer = sequence(student(list(old), dict(new)), object, "a list of edits")
    ablated, put = set(), {}
    for edit in answer:
        if not isinstance(edit, (Ablate, Set)):
            raise WrongAnswer(f"it returned {edit!r} among the edits; expected only tlc.Ablate and tlc.Set.")
        for feature in [edit.feature] if isinstance(edit.feature, int) else list(edit.feature):
            where = (edit.layer, edit.position, feature)
            if isinstance(edit, Set):
                put[where] = number(edit.value)
            else:
                ablated.add(where)
    hint = "ablate the old state's features."
    if ablated == set(old):
        hint = "a feature that both states have is set, so it must not be ablated too."
    yield Part(2, ablated == {old[0], old[2]}, hint)
    right = put.keys() == new.keys() and all(near(put[where], new[where]) for where in new)
    yield Part(2, right, "set every feature of the new state to its mean activation.")


def share_swapped(student: Asking, lab: Lab) -> Iterator[Part]:
    table = features_of_states(lab.ours)
    names = [state.name for state in STATES]
    experiments = []
    for city, other in (("Houston", "California"), ("Tacoma", "Ohio"), ("Miami", "Maine")):
        capital = STATES[names.index(other)]["capital"]
        experiments.append((two_hop(city).prompt, known_swap(table, STATE_OF[city].name, other), capital))
    weak = [(two_hop("Boulder").prompt, [Ablate(0, -2, 3)], "Augusta")]
    trivial = [(two_hop("Boulder").prompt, [Ablate(0, -2, 3)], "Denver")]
    hints = (
        "wrong share: of the experiments, those whose likeliest last word (freeze='none') is the one expected.",
        "experiments in which the untouched model already says the word prove nothing: leave them out.",
    )
    for extra, hint in zip(([], trivial), hints, strict=True):
        hits = [_answer(lab, prompt, edits) == word for prompt, edits, word in experiments + weak]
        got = number(student(lab.replacement, experiments + weak + extra))
        yield Part(2, near(got, sum(hits) / len(hits)), hint)


def _answer(lab: Lab, prompt: str, edits: list[Any]) -> str:
    logits = intervene(lab.ours, prompt, edits, freeze="none", layers=()).last_logits
    return lab.ours.model.tokenizer.convert_ids_to_tokens(int(logits.argmax()))


QUESTIONS = (
    Question("city_activations", "feature activations at a word", 4, city_activations),
    Question("state_features", "the features that stand for a state", 4, state_features),
    Question("between", "the nodes on a way from city to answer", 4, between),
    Question("swap_edits", "edits that put another state in", 4, swap_edits),
    Question("share_swapped", "how often the swap changes the answer", 4, share_swapped),
)
