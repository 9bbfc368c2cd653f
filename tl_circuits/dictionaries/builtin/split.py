"""Divide the facts of the small world into those that `tiny-facts` was trained on and those kept from it."""

import random
from dataclasses import dataclass

from tl_circuits.dictionaries.builtin.world import (
    PHRASINGS,
    STATE_OF,
    Fact,
    additions,
    opposites,
    properties_of_states,
    states_of_cities,
    translations,
    two_hop_facts,
)

FAMILIES = ("two-hop", "city", "state", "opposite", "translation", "addition")


@dataclass(frozen=True)
class Split:
    """Facts to train on and facts kept back, by family.

    ``strangers``: kept-back two-hop facts about cities of which no two-hop question was trained.
    """

    train: dict[str, list[Fact]]
    held_out: dict[str, list[Fact]]
    strangers: list[Fact]


def split(seed: int = 0) -> Split:
    """Keep back facts that follow from those that are trained.

    * city: one of the three phrasings, for half of the cities.
    * two-hop: all questions about one city of each state, and of the others 45 % of the questions
      about the capital and 25 % of the rest. Their city-to-state facts are trained in a phrasing.
    * opposite: a sixth of the French questions (the English pair and the translations are trained).
    * addition: a tenth of the sums.
    """
    rng = random.Random(seed)
    train: dict[str, list[Fact]] = {name: [] for name in FAMILIES}
    held: dict[str, list[Fact]] = {name: [] for name in FAMILIES}
    n = len(PHRASINGS)
    for i, fact in enumerate(states_of_cities()):
        if i % n == 0:
            left_out = rng.randrange(2 * n)  # a number from n on leaves no phrasing out
        (held if i % n == left_out else train)["city"].append(fact)
    strangers = {rng.choice(state.cities) for state in dict.fromkeys(STATE_OF.values())}
    for fact in two_hop_facts():
        city = fact.prompt.split()[-2]
        share = 1.0 if city in strangers else 0.45 if " capital " in fact.prompt else 0.25
        (held if rng.random() < share else train)["two-hop"].append(fact)
    for fact in opposites():
        kept = fact.prompt.startswith("le ") and rng.random() < 1 / 6
        (held if kept else train)["opposite"].append(fact)
    for fact in additions():
        (held if rng.random() < 0.1 else train)["addition"].append(fact)
    train["state"] = properties_of_states()
    train["translation"] = translations()
    return Split(train, held, [f for f in held["two-hop"] if f.prompt.split()[-2] in strangers])
