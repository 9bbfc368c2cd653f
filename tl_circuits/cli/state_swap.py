"""The demonstration: trace a two-hop question, find the middle step, take it out, and put another one in."""

from dataclasses import dataclass, replace

import pandas as pd

from tl_circuits.attribution import attribute
from tl_circuits.dictionaries.builtin.split import split
from tl_circuits.dictionaries.builtin.state_features import (
    PLACES,
    PURITY,
    SHARED,
    state_features,
    state_nodes,
    swap_edits,
)
from tl_circuits.dictionaries.builtin.world import STATE_OF, STATES, State, two_hop
from tl_circuits.errors import PromptError
from tl_circuits.feature_labels.vocabulary import label_features
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import Label
from tl_circuits.hooks import Replacement
from tl_circuits.interventions.intervene import InterventionResult, intervene_many


@dataclass(frozen=True)
class StateSwap:
    """What was found on one question.

    Attributes:
        city: the city that the question names.
        state: its state.
        other: the state that is put in its place.
        kept_back: whether the question was kept from training.
        graph: the graph, pruned and labelled.
        middle: ids of the graph's nodes that stand for the state and lie between city and answer.
        features: all features that stand for states.
        without: the run without the state's features.
        swapped: the run with the features of ``other`` in their place.
    """

    city: str
    state: State
    other: State
    kept_back: bool
    graph: AttributionGraph
    middle: list[str]
    features: pd.DataFrame
    without: InterventionResult
    swapped: InterventionResult

    def probability(self, word: str, run: InterventionResult | None = None) -> float:
        """How likely ``word`` comes next, in the untouched run or in ``run``."""
        logits = self.without.baseline_logits[-1] if run is None else run.last_logits
        return float(logits.softmax(-1)[self.without.model.tokenizer.convert_tokens_to_ids(word)])

    def answer(self, run: InterventionResult | None = None) -> str:
        """The likeliest next word, in the untouched run or in ``run``."""
        logits = self.without.baseline_logits[-1] if run is None else run.last_logits
        return self.without.model.tokenizer.convert_ids_to_tokens(int(logits.argmax()))


def swap_state(replacement: Replacement, city: str, other: str) -> StateSwap:
    """Ask `tiny-facts` for the capital of the state containing ``city``; then swap that state for ``other``.

    Its transcoders are attached.

    Raises:
        PromptError: for a city or a state that the model does not know, or for the state that the city is in.
    """
    state = STATE_OF.get(city)
    if state is None:
        raise PromptError(f"tiny-facts knows no city {city!r}; it knows {', '.join(list(STATE_OF)[::9])}, ...")
    names = {s.name: s for s in STATES}
    if other not in names or other == state.name:
        raise PromptError(
            f"give a state other than {state.name} to swap in, got {other!r}; the states are {', '.join(names)}."
        )
    fact = two_hop(city)
    features = state_features(replacement)
    graph = attribute(replacement, fact.prompt, progress=False).prune()
    graph = label_features(replacement, graph)
    middle = state_nodes(graph, features, state.name)
    label = Label(f"{state.name} (the state)", origin="experiment")
    index = {name: i for i, name in enumerate(graph.node_ids)}
    graph = replace(graph, labels=graph.labels | {index[name]: label for name in middle})
    sets = [swap_edits(features, state.name, None), swap_edits(features, state.name, other)]
    without, swapped = intervene_many(replacement, fact.prompt, sets, freeze="none")
    kept_back = any(f.prompt == fact.prompt for f in split().held_out["two-hop"])
    return StateSwap(city, state, names[other], kept_back, graph, middle, features, without, swapped)


def sentences(story: StateSwap) -> list[str]:
    """The story, for a person who has never seen an attribution graph."""
    s, capital, new = story, story.state["capital"], story.other["capital"]
    own = s.features[s.features.state == s.state.name]
    at_city = sum(name.endswith(f"@{len(s.graph.info.tokens) + PLACES['city']}") for name in s.middle)
    shared = int((own.reach >= SHARED).sum())
    n_all = int(s.graph.is_kind("feature").sum())
    trained = "It never saw this question" if s.kept_back else "It saw this question"
    told = [
        f"Asked “{s.graph.info.prompt}”, tiny-facts says “{s.answer()}” ({s.probability(s.answer()):.0%}). "
        f"{trained} in training; it did learn that {s.city} is in {s.state.name}.",
        f"{len(own)} features stand for {s.state.name}: whatever is asked about, they are active on its cities and "
        f"have at least {PURITY:.0%} of their activation there (chance: {1 / len(STATES):.0%}). {shared} of them "
        "serve several cities.",
        f"{len(s.middle)} of the {n_all} features in the pruned graph are such shared ones and lie between "
        f"“{s.city}” and the answer, {at_city} of them at the word “{s.city}”: the model goes through {s.state.name}."
        if s.middle
        else f"No shared one is among the {n_all} features of the pruned graph: here the middle step was not found.",
        f"With these features taken out, “{capital}” falls from {s.probability(capital):.0%} to "
        f"{s.probability(capital, s.without):.0%}.",
        f"With those of {s.other.name} in their place, the model says “{s.answer(s.swapped)}” "
        f"({s.probability(s.answer(s.swapped), s.swapped):.0%})"
        + (f", the capital of {s.other.name}." if s.answer(s.swapped) == new else f"; the capital would be “{new}”."),
    ]
    return told
