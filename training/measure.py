"""What the finished model does, measured on the files as the package opens them."""

import random
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

import tl_circuits as tlc
from tl_circuits.dictionaries.builtin.state_features import SHARED, state_features, state_nodes, swap_edits
from tl_circuits.dictionaries.builtin.world import STATE_OF, STATES, Fact
from tl_circuits.hooks import Replacement

AT_ONCE = 512


def grouped(model: object, facts: list[Fact]) -> list[tuple[Tensor, Tensor]]:
    """Prompts of one length as tokens, with their answers' ids."""
    tokenizer = model.tokenizer
    by_length: dict[int, list[tuple[list[int], int]]] = {}
    for fact in facts:
        ids = tokenizer(fact.prompt)["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, tokenizer.convert_tokens_to_ids(fact.answer)))
    groups = []
    for rows in by_length.values():
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            groups.append((torch.tensor([ids for ids, _ in part]), torch.tensor([answer for _, answer in part])))
    return groups


@torch.no_grad()
def accuracy(model: object, facts: list[Fact]) -> float:
    """The share of facts whose answer is the likeliest next token."""
    right = sum(int((model(ids)[:, -1].argmax(-1) == answer).sum()) for ids, answer in grouped(model, facts))
    return right / max(1, len(facts))


@torch.no_grad()
def transcoder_table(replacement: Replacement, facts: list[Fact]) -> pd.DataFrame:
    """A row a layer: L0, explained variance, and the loss on answers with the layer's MLP output
    replaced by its reconstruction, and by nothing. The first position is left out throughout.
    """
    model, dictionary = replacement.model, replacement.dictionary
    groups = grouped(model, facts)
    total = sum(len(answer) for _, answer in groups)

    def loss(hooks: list) -> float:
        parts = [
            torch.nn.functional.cross_entropy(
                model.run_with_hooks(ids, fwd_hooks=hooks)[:, -1].float(), answer, reduction="sum"
            )
            for ids, answer in groups
        ]
        return float(torch.stack(parts).sum()) / total

    def nothing(tensor: Tensor, hook: HookPoint) -> Tensor:
        return torch.cat([tensor[:, :1], torch.zeros_like(tensor[:, 1:])], 1)

    clean, rows = loss([]), []
    for layer in dictionary.layers:
        site = dictionary.output_hook(layer)
        read, l0, left, seen = dictionary.input_hook(layer), 0.0, 0.0, []
        for ids, _ in groups:
            _, cache = model.run_with_cache(ids, names_filter=[read, site])
            x, y = cache[read][:, 1:].flatten(0, 1), cache[site][:, 1:].flatten(0, 1)
            acts = dictionary.activate(layer, dictionary.pre_activations(layer, x), x)
            l0 += float((acts != 0).sum())
            left += float((dictionary.decode(layer, {layer: acts}, x) - y).pow(2).sum())
            seen.append(y)
        outputs = torch.cat(seen)
        variance = float((outputs - outputs.mean(0)).pow(2).sum())
        replaced, removed = loss([(f"{site}.hook_sae_error", nothing)]), loss([(site, nothing)])
        rows.append(
            {
                "layer": layer,
                "features": dictionary.width(layer),
                "L0": l0 / len(outputs),
                "explained variance": 1 - left / variance,
                "loss": clean,
                "loss replaced": replaced,
                "loss removed": removed,
                "loss recovered": (removed - replaced) / (removed - clean),
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class MiddleStep:
    """Shares of two-hop prompts about one property. ``found``: a shared feature of the state is in the pruned graph,
    between city and answer. ``swapped``: with another state's features in place of the state's, the likeliest answer is
    the other's property. ``removed``: without the state's features the answer is no longer the likeliest.
    """

    prompts: int
    found: float
    swapped: float
    removed: float
    features_a_state: float
    shared_a_state: float


def middle_step(replacement: Replacement, facts: list[Fact], seed: int = 0, freeze: str = "none") -> MiddleStep:
    """Look for the state in each fact's graph and swap it for another state drawn at random."""
    rng = random.Random(seed)
    features = state_features(replacement)
    shared = int((features.reach >= SHARED).sum())
    tokenizer = replacement.model.tokenizer
    found = swapped = removed = 0
    for fact in facts:
        state = STATE_OF[fact.prompt.split()[-2]]
        other = rng.choice([s for s in STATES if s is not state])
        graph = tlc.attribute(replacement, fact.prompt, fact.answer, progress=False).prune()
        found += bool(state_nodes(graph, features, state.name))
        sets = [swap_edits(features, state.name, name) for name in (other.name, None)]
        if not all(sets):
            continue
        after, without = tlc.intervene_many(replacement, fact.prompt, sets, freeze=freeze)
        answers = [tokenizer.convert_ids_to_tokens(int(r.last_logits.argmax())) for r in (after, without)]
        swapped += answers[0] == other[fact.prompt.split()[1]]
        removed += answers[1] != fact.answer
    n = len(facts)
    return MiddleStep(n, found / n, swapped / n, removed / n, len(features) / len(STATES), shared / len(STATES))
