"""What is kept of a layer's activations while a corpus streams by: the strongest examples, and a histogram."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 40
_SMALLEST_RANGE = 2.0**-12


@dataclass
class RunningTop:
    """Sums over the texts seen so far; memory depends on features, examples and context alone.

    ``strength``: largest absolute activation of each kept example, strongest first; ``context``: the
    number of its text, -1 for none; ``window``: the activations in it. ``counts``: a histogram of
    absolute activations other than zero, of equal bins from 0 to ``range``, a power of two.
    """

    strength: Float[Tensor, "k feature"]
    context: Int[Tensor, "k feature"]
    window: Float[Tensor, "k feature pos"]
    counts: Int[Tensor, "feature bin"]
    range: Float[Tensor, " feature"]
    low: Float[Tensor, " feature"]
    high: Float[Tensor, " feature"]
    tokens: Int[Tensor, " one"]

    @staticmethod
    def empty(width: int, examples: int, length: int) -> "RunningTop":
        """Nothing seen yet."""
        return RunningTop(
            torch.zeros(examples, width),
            torch.full((examples, width), -1),
            torch.zeros(examples, width, length, dtype=torch.float16),
            torch.zeros(width, BINS, dtype=torch.long),
            torch.full((width,), _SMALLEST_RANGE),
            torch.zeros(width),
            torch.zeros(width),
            torch.zeros(1, dtype=torch.long),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def add(
        self, acts: Float[Tensor, "batch pos feature"], counted: Bool[Tensor, "batch pos"], first: int
    ) -> None:
        """Take in a batch of texts, numbered from ``first``; only ``counted`` positions count."""
        acts = acts.float().cpu() * counted[..., None]
        size = acts.abs()
        best = size.amax(1)
        numbers = torch.arange(first, first + len(acts))[:, None].expand_as(best)
        k = len(self.strength)
        every = torch.cat([self.strength, best])
        self.strength, chosen = every.topk(k, dim=0)
        numbers = torch.cat([self.context, numbers]).gather(0, chosen)
        self.context = torch.where(self.strength > 0, numbers, -1)
        old = self.window.gather(0, chosen.clamp_max(k - 1)[..., None].expand_as(self.window))
        row, feature = (chosen - k).clamp_min(0), torch.arange(acts.shape[2]).expand_as(chosen)
        new = acts.transpose(1, 2)[row, feature].half()
        self.window = torch.where((chosen < k)[..., None], old, new)
        self.low, self.high = torch.minimum(self.low, acts.amin((0, 1))), torch.maximum(self.high, acts.amax((0, 1)))
        self.tokens = self.tokens + int(counted.sum())
        self._count(size.flatten(0, 1))

    def _count(self, size: Float[Tensor, "n feature"]) -> None:
        while True:  # twice the range: two bins become one
            short = size.amax(0) > self.range
            if not short.any():
                break
            halved = self.counts[short].unflatten(1, (BINS // 2, 2)).sum(-1)
            self.counts[short] = torch.cat([halved, torch.zeros_like(halved)], 1)
            self.range[short] *= 2
        row, feature = size.nonzero(as_tuple=True)
        bins = (size[row, feature] / self.range[feature] * BINS).long().clamp_max(BINS - 1)
        width = size.shape[1]
        self.counts += torch.bincount(feature * BINS + bins, minlength=width * BINS).view(width, BINS)

    def quantiles(self, feature: int, shares: tuple[float, ...]) -> list[float]:
        """The absolute activations below which the shares of all active tokens lie, to a bin."""
        counts = self.counts[feature].double()
        total = float(counts.sum())
        if total == 0:
            return [0.0 for _ in shares]
        reached = torch.searchsorted(counts.cumsum(0), torch.tensor(shares, dtype=torch.float64) * total)
        return [(int(b) + 1) * float(self.range[feature]) / BINS for b in reached.clamp_max(BINS - 1)]
