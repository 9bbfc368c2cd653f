"""Runs of a family of prompts in which the features outside a circuit take other values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuits.hooks import Replacement, added_hooks, by_place

Metric = Callable[[Float[Tensor, "prompt d_vocab"]], Float[Tensor, " prompt"]]


def leads(logits: Float[Tensor, "prompt d_vocab"], answers: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """Each prompt's lead: its answer's logit minus the mean logit of the other prompts' answers that differ from it."""
    answers = answers.to(logits.device)
    of_answers = logits.float()[:, answers]
    other = (answers[:, None] != answers[None]).float()
    return of_answers.diagonal() - (of_answers * other).sum(1) / other.sum(1)


@dataclass(frozen=True)
class Values:
    """Features' activations and errors of some prompts, place by place."""

    acts: dict[int, Float[Tensor, "prompt pos feature"]]
    errors: dict[int, Float[Tensor, "prompt pos d_out"]]

    def mean(self) -> "Values":
        """The mean over the prompts, at each position, for every prompt."""
        return Values(
            *({at: t.mean(0, keepdim=True).expand_as(t) for at, t in part.items()} for part in (self.acts, self.errors))
        )

    def zero(self) -> "Values":
        """Zeros of the same shapes."""
        return Values(*({at: torch.zeros_like(t) for at, t in part.items()} for part in (self.acts, self.errors)))


@dataclass(frozen=True)
class Kept:
    """For each prompt, which features and errors are left as the model computes them; all others are replaced."""

    acts: dict[int, Bool[Tensor, "prompt pos feature"]]
    errors: dict[int, Bool[Tensor, "prompt pos"]]

    def others(self) -> "Kept":
        """The complement."""
        return Kept(*({at: ~mask for at, mask in part.items()} for part in (self.acts, self.errors)))


@dataclass(frozen=True)
class Runs:
    """A family's prompts with what replaces everything outside a circuit.

    ``always``: positions at which nothing is replaced, such as the beginning-of-sequence token's.
    """

    replacement: Replacement
    tokens: Int[Tensor, "prompt pos"]
    metric: Metric
    others: Values
    always: tuple[int, ...]

    def measure(self, kept: Kept) -> Float[Tensor, " prompt"]:
        """The metric of each prompt with everything outside ``kept`` replaced; nothing is frozen."""
        hooks: list[tuple[str, Any]] = []
        for place, site in output_hooks(self.replacement).items():
            acts = kept.acts[place].clone()
            acts[:, list(self.always)] = True
            hooks.append((f"{site}.hook_sae_acts_post", _replaced(acts, self.others.acts[place])))
            if place in kept.errors:
                errors = kept.errors[place].clone()
                errors[:, list(self.always)] = True
                hooks.append((f"{site}.hook_sae_error", _replaced(errors[..., None], self.others.errors[place])))
        with torch.no_grad(), added_hooks(self.replacement.model, hooks):
            return self.metric(self.replacement.model(self.tokens)[:, -1].float())

    def number(self, kept: Kept) -> float:
        """The metric's mean over the prompts with everything outside ``kept`` replaced."""
        return float(self.measure(kept).mean())

    def gradients(self, share: float = 1.0) -> dict[int, Tensor]:
        """Gradients of the summed metric by every activation and error, with nothing frozen.

        They are given by number of the place; those by errors under ``-1 - place``. ``share``: how far the token
        embeddings are on the way from their mean over the family to each prompt's own.
        """
        leaves: dict[int, Tensor] = {}
        hooks: list[tuple[str, Any]] = []
        if share != 1.0:
            hooks.append(("blocks.0.hook_resid_pre", lambda x, hook: x.mean(0, keepdim=True) * (1 - share) + x * share))
        for place, site in output_hooks(self.replacement).items():
            hooks.append((f"{site}.hook_sae_acts_post", _leaf(leaves, place)))
            if place in self.others.errors:
                hooks.append((f"{site}.hook_sae_error", _leaf(leaves, -1 - place)))
        with torch.enable_grad(), added_hooks(self.replacement.model, hooks):
            total = self.metric(self.replacement.model(self.tokens)[:, -1].float()).sum()
            found = torch.autograd.grad(total, list(leaves.values()))
        return {at: grad.detach() for at, grad in zip(leaves, found, strict=True)}


def output_hooks(replacement: Replacement) -> dict[int, str]:
    """The hook at which each dictionary writes, by the number of its place (:mod:`tl_circuits.hooks.places`)."""
    dictionary = by_place(replacement.dictionary)
    return {place: dictionary.output_hook(place) for place in dictionary.layers}


def values_of(replacement: Replacement, tokens: Int[Tensor, "prompt pos"]) -> Values:
    """Activations and errors on the model as it is."""
    acts: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    hooks: list[tuple[str, Any]] = []
    exact = replacement.dictionary.exact
    for place, site in output_hooks(replacement).items():
        hooks.append((f"{site}.hook_sae_acts_post", _kept_in(acts, place)))
        if not exact:
            hooks.append((f"{site}.hook_sae_error", _kept_in(errors, place)))
    with torch.no_grad(), added_hooks(replacement.model, hooks):
        replacement.model(tokens)
    return Values(acts, errors)


def nothing(values: Values) -> Kept:
    """A circuit without any node."""
    return Kept(
        {at: torch.zeros_like(t, dtype=torch.bool) for at, t in values.acts.items()},
        {at: torch.zeros(t.shape[:2], dtype=torch.bool, device=t.device) for at, t in values.errors.items()},
    )


def everything(values: Values) -> Kept:
    """The circuit of all nodes: the model as it is."""
    return nothing(values).others()


Nodes = Sequence[tuple[int, int, int]]  # number of the place, position, feature; feature -1 for an error


def circuit(values: Values, nodes: Sequence[Nodes]) -> Kept:
    """The circuit that keeps the nodes of each prompt."""
    made = nothing(values)
    for prompt, listed in enumerate(nodes):
        table = torch.tensor(listed, dtype=torch.long).reshape(-1, 3)
        for place in table[:, 0].unique().tolist():
            here = table[table[:, 0] == place]
            features = here[here[:, 2] >= 0]
            made.acts[place][prompt, features[:, 1], features[:, 2]] = True
            if place in made.errors:
                made.errors[place][prompt, here[here[:, 2] < 0][:, 1]] = True
    return made


def _replaced(mask: Tensor, other: Tensor) -> Callable[..., Tensor]:
    def replace(tensor: Tensor, hook: Any) -> Tensor:
        return torch.where(mask.to(tensor.device), tensor, other.to(tensor.device, tensor.dtype))

    return replace


def _leaf(into: dict[int, Tensor], at: int) -> Callable[..., Tensor]:
    """Add zeros that want a gradient, so that the gradient is the activation's own, with all after it following."""

    def add(tensor: Tensor, hook: Any) -> Tensor:
        into[at] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + into[at]

    return add


def _kept_in(into: dict[int, Tensor], at: int) -> Callable[..., None]:
    def keep(tensor: Tensor, hook: Any) -> None:
        into[at] = tensor.detach().clone()

    return keep
