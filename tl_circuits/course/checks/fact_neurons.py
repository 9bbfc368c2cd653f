"""Assignment 5: which neurons carry a fact in a real model, and how sure one can be of it."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tl_circuits.attribution import attribute
from tl_circuits.course.checks.fact_controls import controls, how_sure
from tl_circuits.course.families import CAPITALS, LANGUAGES, Effects, Family, Neuron, recorded_effects
from tl_circuits.course.neuron_answers import neuron_effects, neuron_list
from tl_circuits.course.questions import Asking, Lab, Part, Question, open_lab, sequence, tensor
from tl_circuits.course.removal import Untouched, untouched
from tl_circuits.dictionaries.builtin.world import two_hop

FAMILIES = (CAPITALS, LANGUAGES)
CHOSEN = 200  # neurons that a choice consists of
# Enough, of what the neurons with the largest mean effect carry: most other rules reach half of it, few nine tenths.
ENOUGH = ((1, 0.5), (1, 0.9)), ((1, 0.9),)
TEXTS = (
    "Rome is the capital of Italy, and Athens is the capital of Greece.",
    "She put the kettle on the stove and waited for the water to boil.",
    "The river flows through France, Germany and the Netherlands.",
)


def effects(student: Asking, lab: Lab) -> Iterator[Part]:
    texts = [two_hop(city).prompt for city in ("Savannah", "Dallas", "Boulder")]
    graph = attribute(open_lab().ours, texts[0], baseline=texts[1:], max_nodes=120, progress=False)
    rows = graph.nodes[graph.nodes.kind == "feature"]
    places = [(int(row.layer), int(row.feature), int(row.position)) for row in rows.itertuples()]
    want = dict(zip(places, rows.total_effect.tolist(), strict=True))
    got = neuron_effects(student(lab.graph(graph)))
    hint = "wrong keys: one (layer, neuron, position) for every node of the kind `feature`, and no other node."
    if {place[2] for place in got} != {place[2] for place in want} and len(got) == len(want):
        hint = "wrong positions: take the column `position` as it is. It counts the first token, `<bos>`, as 0."
    yield Part(1, got.keys() == want.keys(), hint)
    hint = "wrong values: the column `total_effect`."
    if _same(got, {place: abs(value) for place, value in want.items()}):
        hint = "keep the sign: a neuron that holds the answer down has a negative effect."
    elif _same(got, dict(zip(places, rows.activation.tolist(), strict=True))):
        hint = "an activation says how strongly a neuron fires, not what that does to the answer: take `total_effect`."
    elif _same(got, dict(zip(places, rows.influence.tolist(), strict=True))):
        hint = "influence is the size of what a node does, without a sign, to all nodes after it: take `total_effect`."
    yield Part(2, _same(got, want), hint)


def _same(got: Effects, want: Effects) -> bool:
    return got.keys() == want.keys() and all(
        math.isclose(got[place], want[place], rel_tol=1e-3, abs_tol=1e-6) for place in want
    )


def carriers(student: Asking, lab: Lab) -> Iterator[Part]:
    often, twice, once, against, weak = ((layer, 10 * layer, 4) for layer in range(5))
    given = [
        {often: 1.0, once: 2.5, against: -3.0, twice: 1.4, weak: 0.1},
        {often: 1.0, against: -3.0, twice: 1.4, weak: 0.1},
        {often: 1.0, against: -3.0, weak: 0.3},
    ]
    small = set(neuron_list(student([dict(table) for table in given], 2)))
    hint = "wrong on three small tables: the `n` neurons whose effect, averaged over all prompts, is largest."
    if against in small:
        hint = "a neuron with a negative effect holds the answer down: choose by the signed effect, not by its size."
    elif once in small:
        hint = (
            "a neuron counts by its mean over all prompts, as 0 where a table does not have it: one prompt is no "
            "family."
        )
    yield Part(2, small == {often, twice}, hint)
    recorded = recorded_effects()
    for family, enough in zip(FAMILIES, ENOUGH, strict=True):
        tables = recorded[family.name]
        got = neuron_list(student([dict(table) for table in tables], CHOSEN), CHOSEN, lab.ours)
        clean = _untouched(lab, family, family.unseen)
        best = by_mean_effect(tables, CHOSEN)
        taken = most = _share(clean, got)
        if {*got} != {*best}:  # a run takes a second
            most = _share(clean, best)
        said = (
            f"on {len(clean.tokens)} prompts about {family.name} that were not in the tables, removing your {CHOSEN} "
            f"neurons takes {taken:.1%} of the answer's lead; the {CHOSEN} with the largest mean effect take "
            f"{most:.1%}."
        )
        for points, share in enough:
            yield Part(points, taken >= share * most, said)


def _share(clean: Untouched, neurons: Sequence[Neuron]) -> float:
    """The share of the answers' mean lead that is gone without some neurons."""
    return float(clean.lost(neurons).mean() / clean.lead.mean())


def by_mean_effect(tables: Sequence[Effects], n: int | None = None) -> list[Neuron]:
    """The ``n`` neurons with the largest mean effect over all tables, or all of them, the largest first. A neuron that
    a table does not have counts as 0 there.
    """
    total: Effects = {}
    for table in tables:
        for neuron, effect in table.items():
            total[neuron] = total.get(neuron, 0.0) + effect
    return sorted(total, key=lambda neuron: (-total[neuron], neuron))[:n]


def _untouched(lab: Lab, family: Family, pairs: tuple[tuple[str, str], ...]) -> Untouched:
    return untouched(lab.ours, family.prompts(pairs), [answer for _, answer in pairs])


def removed(student: Asking, lab: Lab) -> Iterator[Part]:
    for family, count in zip(FAMILIES, (1, 2), strict=True):
        ranked, pairs = by_mean_effect(recorded_effects()[family.name]), family.traced[: 4 - count]
        sets = [ranked[:20], ranked[-20:]][:count]  # without the second, which holds the answers down, leads rise
        clean = _untouched(lab, family, pairs)
        want = torch.stack([clean.lost(neurons) for neurons in sets])
        arguments = (family.prompts(pairs), [answer for _, answer in pairs], [list(neurons) for neurons in sets])
        got = tensor(student(lab.neurons, *arguments), want.shape, "set prompt")
        right = _agree(got, want)
        mistake = None if right else _mistake(got, want, clean, sets)
        hint = (
            "wrong values: each answer's lead on the untouched model, minus its lead when the set's neurons have "
            "their means."
        )
        yield Part(1, right or mistake is not None, hint)
        yield Part(1, right, mistake or hint)


def _agree(got: Tensor, want: Tensor) -> bool:
    """Equal up to rounding. Leads are differences of logits of size 10 or so, float32, through all layers."""
    return bool((got - want).abs().max() <= 2e-3 * max(1.0, float(want.abs().max())))


def _mistake(got: Tensor, want: Tensor, clean: Untouched, sets: Sequence[Sequence[Neuron]]) -> str | None:
    """What is wrong, if it is one of the usual mistakes in an answer that is right otherwise."""
    if _agree(got, -want):
        return "the sign: before minus after, so that a lead that falls counts as positive."
    if _agree(got, want.abs()):
        return "keep the sign: without some neurons, a lead rises."
    if _agree(got, clean.lead - want):
        return "this is the lead without the neurons; return by how much it falls: before minus after."
    if _agree(got, torch.stack([clean.lost(neurons, zero=True) for neurons in sets])):
        return (
            "these are the effects of zeros: set the neurons to their means over the prompts, which all prompts share."
        )
    if _agree(got, torch.stack([clean.lost_if_held(neurons) for neurons in sets])):
        return 'attention and norms were held: `freeze` is "attention" unless you say otherwise. Pass freeze="none".'
    return None


def fires_on(student: Asking, lab: Lab) -> Iterator[Part]:
    layer = by_mean_effect(recorded_effects()[FAMILIES[0].name], 1)[0][0]
    neuron, seen = _telling(lab, layer)
    for points, sign in ((2, 1), (1, -1)):
        want = _strongest(seen, sign, 1, 2)
        got = sequence(student(lab.neurons, list(TEXTS), layer, neuron, 2, sign), str, "a list of tokens")
        hint = (
            f"wrong for sign={sign}: in each text the token at which sign times the activation is largest; the "
            f"{len(want)} largest of them."
        )
        beside = ({*_strongest(seen, sign, 1, len(seen), shift)} for shift in (-1, 1))
        if any({*got} <= tokens for tokens in beside):
            hint = "each token is one beside the right one: leaving out the first token moves the positions by one."
        elif got == _strongest(seen, sign, 0, 2) or any(token == seen[0][0][0] for token in got):
            hint = (
                "leave out the first token, the beginning of the sequence: what neurons do there is the same for "
                "every text."
            )
        elif got == _strongest([(tokens, acts.abs()) for tokens, acts in seen], 1, 1, 2):
            hint = (
                "with sign=1 look for the largest activations alone, with sign=-1 for the most negative ones, not "
                "for either kind."
            )
        elif sorted(got) == sorted(want):
            hint = "the right tokens in the wrong order: strongest first."
        yield Part(points, got == want, hint)


Seen = tuple[list[str], Tensor]
"""A text's tokens, and a neuron's activations on them."""


def _telling(lab: Lab, layer: int) -> tuple[int, list[Seen]]:
    """A neuron of a layer that fires most on the first token of every text, and what it does on the texts.

    It finds out a function that counts the first token. Of several such neurons, the one that varies most on other
    tokens is taken; if there is none, one that fires most on the first token of as many texts as possible.
    """
    point, model = f"{lab.ours.site(layer)}.hook_sae_acts_post", lab.ours.model
    with torch.no_grad():
        acts = [model.run_with_cache(text, names_filter=point)[1][point][0] for text in TEXTS]
    first = sum((one.argmax(0) == 0).float() for one in acts)
    spread = torch.cat([one[1:] for one in acts]).std(0)
    neuron = int((first + spread / spread.max() / 2).argmax())
    return neuron, [(model.to_str_tokens(text), one[:, neuron]) for text, one in zip(TEXTS, acts, strict=True)]


def _strongest(seen: Sequence[Seen], sign: int, first: int, k: int, shift: int = 0) -> list[str]:
    """The tokens at which a neuron is strongest, one a text, strongest first; ``shift``: the tokens beside them."""
    found = []
    for tokens, acts in seen:
        strength, where = (sign * acts[first:]).max(0)
        found.append((float(strength), tokens[min(max(int(where) + first + shift, 0), len(tokens) - 1)]))
    return [token for _, token in sorted(found, key=lambda pair: -pair[0])[:k]]


QUESTIONS = (
    Question("effects", "what each neuron of a graph does to the answer", 3, effects),
    Question("carriers", "the neurons that carry the answer over a family", 5, carriers),
    Question("removed", "what the answer loses without some neurons", 4, removed),
    Question("fires_on", "the words on which a neuron fires", 3, fires_on),
    Question("controls", "random neurons to compare with", 3, controls),
    Question("how_sure", "how sure that makes you", 2, how_sure),
)
