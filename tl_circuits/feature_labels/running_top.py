"""What is kept of a layer's activations while a corpus streams by: the strongest examples and a histogram."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 40
_SMALLEST_RANGE = 2.0**-12


@dataclass
class RunningTop:
    """Sums over the texts seen so far. Their memory depends only on features, examples and context.

    Attributes:
        strength: the largest absolute activation of each kept example, strongest first.
        context: the number of each example's text; -1 for none.
        window: the activations in that text.
        counts: a histogram of absolute activations other than zero, with equal bins from 0 to ``range``.
        range: the upper end of the histogram, a power of two.
        low: the smallest activation.
        high: the largest activation.
        tokens: how many tokens were counted.
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
        """The sums before any text."""
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
        """All sums by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def add(self, acts: Float[Tensor, "batch pos feature"], counted: Bool[Tensor, "batch pos"], first: int) -> None:
        """Take in a batch of texts, numbered from ``first``. Only ``counted`` positions count."""
        acts = acts.float().cpu() * counted[..., None]
        self._keep_strongest(acts, first)
        self.low, self.high = torch.minimum(self.low, acts.amin((0, 1))), torch.maximum(self.high, acts.amax((0, 1)))
        self.tokens = self.tokens + int(counted.sum())
        self._count(acts.flatten(0, 1).abs_())

    def _keep_strongest(self, acts: Float[Tensor, "batch pos feature"], first: int) -> None:
        best = torch.maximum(acts.amax(1), -acts.amin(1))
        # Only features that beat their weakest example need work: fewer and fewer of them as texts go by.
        risen = (best.amax(0) > self.strength[-1]).nonzero()[:, 0]
        numbers = torch.arange(first, first + len(acts))[:, None].expand(-1, len(risen))
        k = len(self.strength)
        strength, chosen = torch.cat([self.strength[:, risen], best[:, risen]]).topk(k, dim=0)
        self.strength[:, risen] = strength
        self.context[:, risen] = torch.where(
            strength > 0, torch.cat([self.context[:, risen], numbers]).gather(0, chosen), -1
        )
        old = self.window[chosen.clamp_max(k - 1), risen]
        new = acts[(chosen - k).clamp_min(0), :, risen].half()
        self.window[:, risen] = torch.where((chosen < k)[..., None], old, new)

    def _count(self, size: Float[Tensor, "n feature"]) -> None:
        while True:  # while something lies beyond the range, double it: two bins become one
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

    def quantiles(self, features: Int[Tensor, " n"], shares: tuple[float, ...]) -> list[list[float]]:
        """For each feature, the absolute activations below which the given shares of its active tokens lie.

        They are exact to the width of a bin.
        """
        counts = self.counts[features].double()
        wanted = torch.tensor(shares, dtype=torch.float64) * counts.sum(1, keepdim=True)
        reached = torch.searchsorted(counts.cumsum(1), wanted).clamp_max(BINS - 1)
        values = (reached + 1).double() * self.range[features, None].double() / BINS
        return torch.where(wanted > 0, values, 0.0).tolist()
