"""The explained variance of a reconstruction, summed up over tokens."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Outputs:
    """Sums over tokens, in float64, from which one layer's explained variance is computed."""

    tokens: int = 0
    active: int = 0
    error: float = 0.0
    square: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, output: Float[Tensor, "n d"], error: Float[Tensor, "n d"]) -> None:
        """Add tokens: what an MLP wrote, and that minus its reconstruction."""
        output, error = output.double(), error.double()
        self.tokens += output.shape[0]
        self.error += float(error.square().sum())
        self.square += float(output.square().sum())
        self.total = self.total + output.sum(0)

    def explained_variance(self) -> float:
        """``1 - Σ|error|² / Σ|output - mean output|²``; NaN if the outputs do not vary."""
        variance = self.square - float((self.total**2).sum()) / self.tokens
        return 1.0 - self.error / variance if variance > 0 else float("nan")
