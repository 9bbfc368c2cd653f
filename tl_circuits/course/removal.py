"""What an answer loses without some neurons, as the judge measures it on the model itself: in one batch of prompts.

A neuron is removed by giving it its mean over the prompts at its position. Nothing is held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.course.families import Neuron
from tl_circuits.hooks import Replacement, Set, added_hooks
from tl_circuits.interventions.intervene import intervene
from tl_circuits.interventions.replaced_runs import leads, output_hooks


@dataclass(frozen=True)
class Untouched:
    """Prompts on the model as it is.

    Attributes:
        replacement: the model, its neurons attached.
        tokens: the prompts.
        answers: vocabulary ids of their answers.
        lead: each answer's lead; see :func:`leads`.
        means: by layer, each neuron's mean over the prompts at each position.
    """

    replacement: Replacement
    tokens: Int[Tensor, "prompt pos"]
    answers: Int[Tensor, " prompt"]
    lead: Float[Tensor, " prompt"]
    means: dict[int, Float[Tensor, "pos neuron"]]

    def lost(self, neurons: Sequence[Neuron], zero: bool = False) -> Float[Tensor, " prompt"]:
        """By how much each lead falls without the neurons.

        Args:
            neurons: which ones; positions may count from the end.
            zero: set them to zero instead of their means.
        """
        hooks = []
        for layer, site in output_hooks(self.replacement).items():
            here = [(position, neuron) for at, neuron, position in neurons if at == layer]
            if here:
                hooks.append((f"{site}.hook_sae_acts_post", _set_to(self.means[layer] * (not zero), here)))
        with torch.no_grad(), added_hooks(self.replacement.model, hooks):
            return self.lead - leads(self.replacement.model(self.tokens)[:, -1], self.answers)

    def lost_if_held(self, neurons: Sequence[Neuron]) -> Float[Tensor, " prompt"]:
        """The same with attention patterns and norm denominators held, the default of :func:`tl_circuits.intervene`."""
        edits = [
            Set(layer, position, neuron, value=float(self.means[layer][position, neuron]))
            for layer, neuron, position in neurons
        ]
        runs = [intervene(self.replacement, tokens, edits, freeze="attention", layers=()) for tokens in self.tokens]
        return self.lead - leads(torch.stack([run.last_logits for run in runs]), self.answers)


def untouched(replacement: Replacement, prompts: Sequence[str], answers: Sequence[str]) -> Untouched:
    """Run prompts of one length, each with an answer of one token."""
    model, means = replacement.model, {}

    def keep(layer: int) -> Any:
        def mean(acts: Float[Tensor, "prompt pos neuron"], hook: Any) -> None:
            means[layer] = acts.mean(0)

        return mean

    tokens = model.to_tokens(list(prompts))
    ids = torch.tensor([model.to_single_token(answer) for answer in answers])
    hooks = [(f"{site}.hook_sae_acts_post", keep(layer)) for layer, site in output_hooks(replacement).items()]
    with torch.no_grad(), added_hooks(model, hooks):
        lead = leads(model(tokens)[:, -1], ids)
    return Untouched(replacement, tokens, ids, lead, means)


def _set_to(means: Float[Tensor, "pos neuron"], here: Sequence[tuple[int, int]]) -> Any:
    where = torch.tensor(here)

    def put(acts: Float[Tensor, "prompt pos neuron"], hook: Any) -> Tensor:
        acts = acts.clone()
        acts[:, where[:, 0], where[:, 1]] = means[where[:, 0], where[:, 1]]
        return acts

    return put
