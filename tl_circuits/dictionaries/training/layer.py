"""The training of one layer: its weights, its optimiser, and what is known of its features."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.formats.four_bit import rounded
from tl_circuits.dictionaries.training.fit import NormalEquations, add_to_equations, no_equations, solve_equations
from tl_circuits.dictionaries.training.start import Start
from tl_circuits.dictionaries.training.step import Read, Weights, gradient, read, token_weights

SKIP_EVERY = 4
"""Steps from one update of the skip connection to the next.

It starts at its least-squares fit, and its gradient takes long to compute.
"""


@dataclass(frozen=True)
class Numbers:
    """What one layer reports of a step: explained variance, active features a token, and features long silent."""

    explained_variance: float
    l0: float
    dead: int


class LayerTraining:
    """One layer's transcoder while it is trained.

    It is in units where the usual token's inputs and outputs have mean square 1.

    Args:
        start: weights to begin with, which are changed in place, and the two scales.
        k: active features a token.
        window: a feature that was silent for this many tokens is dead.
    """

    def __init__(self, start: Start, k: int, window: int) -> None:
        self.start, self.k, self.window = start, k, window
        self.tensors = start.weights.named()
        if not all(tensor.is_contiguous() for tensor in self.tensors.values()):
            # torch's fused Adam goes through memory in order, so a transposed tensor would get another number's update.
            raise ValueError("the weights that training starts with must be contiguous tensors.")
        self.optimiser = torch.optim.Adam(list(self.tensors.values()), lr=0.0, fused=True)
        self.silent: Int[Tensor, " feature"] = torch.zeros(
            len(start.weights.W_enc), dtype=torch.long, device=start.weights.W_enc.device
        )
        self.steps = 0
        self.levels: dict[str, Float[Tensor, " level"]] = {}
        """What each matrix' entries are rounded to in training; empty while they are not."""

    def explained_variance(self, squares: float, tokens: int) -> float:
        """The explained variance, from the sum of squares of an error over some tokens."""
        return 1.0 - squares / tokens / self.start.variance

    def output(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
        """What the transcoder writes for inputs of the model, in its units; with rounded weights if it has levels."""
        skip = self.rounded("W_skip") if "W_skip" in self.tensors else None
        weights = Weights(
            self.rounded("W_enc"), self.tensors["b_enc"], self.rounded("W_dec"), self.tensors["b_dec"], skip
        )
        nothing = x.new_zeros(len(x), len(weights.b_dec))
        return read(weights, x / self.start.x_scale, nothing, self.k).error * self.start.y_scale

    def rounded(self, name: str) -> Tensor:
        """A tensor as it is used: rounded to four bits if it has levels."""
        return rounded(self.tensors[name], self.levels[name]) if name in self.levels else self.tensors[name]

    def step(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], lr: float) -> Numbers:
        """Train on tokens of the model, all at once."""
        x, y = x / self.start.x_scale, y / self.start.y_scale
        found = read(self.start.weights, x, y, self.k)
        slopes = gradient(self.start.weights, x, found, token_weights(y), skip=self.steps % SKIP_EVERY == 0)
        self.update({name: getattr(slopes, name) for name in self.tensors}, lr)
        return self.noted(found)

    def update(self, slopes: Mapping[str, Tensor | None], lr: float) -> None:
        """Let the optimiser take a step along the gradient of each tensor; None leaves a tensor as it is."""
        for name, tensor in self.tensors.items():
            tensor.grad = slopes[name]
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.steps += 1

    def begin_again(self) -> None:
        """Let the optimiser forget, because the gradients that follow are of another loss."""
        self.optimiser.state.clear()

    def equations(self) -> NormalEquations:
        """Sums for :meth:`fit`, over no tokens yet."""
        return no_equations(self.start.weights)

    def add(self, equations: NormalEquations, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> None:
        """Add tokens of the model to the sums."""
        add_to_equations(equations, self.start.weights, x / self.start.x_scale, y / self.start.y_scale, self.k)

    def fit(self, equations: NormalEquations) -> None:
        """Put the best decoder, skip connection and bias for this encoder in place."""
        solve_equations(equations, self.start.weights)

    def noted(self, found: Read) -> Numbers:
        """What a step reports; features that were active are not silent any more."""
        active = found.acts > 0
        self.silent += len(active)
        self.silent[found.ids[active]] = 0
        return Numbers(
            explained_variance=self.explained_variance(float(found.error.square().sum()), len(active)),
            l0=float(active.sum(1).float().mean()),
            dead=int((self.silent >= self.window).sum()),
        )

    def folded(self) -> Weights:
        """The weights in the model's own units."""
        w, into, out = self.start.weights, 1.0 / self.start.x_scale, self.start.y_scale
        return Weights(
            w.W_enc * into, w.b_enc, w.W_dec * out, w.b_dec * out, None if w.W_skip is None else w.W_skip * (into * out)
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that a later call of :func:`restored` needs, as tensors."""
        numbers = torch.tensor([self.start.x_scale, self.start.y_scale, self.start.variance], dtype=torch.float64)
        found = {"scales": numbers, "silent": self.silent, "steps": torch.tensor(self.steps)} | self.tensors
        found |= {f"levels.{name}": levels for name, levels in self.levels.items()}
        for name, tensor in self.tensors.items():
            for key, value in self.optimiser.state[tensor].items():
                found[f"{name}.{key}"] = value
        return found


def restored(state: dict[str, Tensor], k: int, window: int) -> LayerTraining:
    """A layer's training, from its :meth:`LayerTraining.state`."""
    x_scale, y_scale, variance = state["scales"].tolist()
    weights = Weights(state["W_enc"], state["b_enc"], state["W_dec"], state["b_dec"], state.get("W_skip"))
    made = LayerTraining(Start(weights, x_scale, y_scale, variance), k, window)
    made.steps, made.silent = int(state["steps"]), state["silent"]
    made.levels = {name.removeprefix("levels."): levels for name, levels in state.items() if name.startswith("levels.")}
    for name, tensor in made.tensors.items():
        kept = {key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in state}
        if kept:
            made.optimiser.state[tensor] = kept
    return made
