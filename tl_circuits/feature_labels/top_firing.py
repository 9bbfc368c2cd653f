"""What is kept of a layer's features while a text streams by: where each fires most, on either side of zero."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EXAMPLES = 8
BEFORE, AFTER = 11, 4  # tokens kept around the strongest one of an example
WINDOW = BEFORE + 1 + AFTER
BYTES_A_FEATURE = 2 * EXAMPLES * (4 + 4 + 2 + 2 * WINDOW)


@dataclass(frozen=True)
class TopFiring:
    """Where a layer's features fire most. The first axis is the side: 0 above zero, 1 below.

    Each piece of text gives one example at most, the place where the feature is strongest in it.

    Attributes:
        feature: which features.
        strength: the absolute activation at each example's strongest token, strongest first; 0 for none.
        piece: the number of the example's piece of text; -1 for none.
        place: the strongest token's position in the piece.
        window: the activations around it, from ``BEFORE`` tokens before to ``AFTER`` tokens after; 0 beyond the piece.
        sums: over all tokens counted, the sum of the activation and of its square.
        tokens: how many tokens were counted.
    """

    feature: Int[Tensor, " feature"]
    strength: Float[Tensor, "side k feature"]
    piece: Int[Tensor, "side k feature"]
    place: Int[Tensor, "side k feature"]
    window: Float[Tensor, "side k feature near"]
    sums: Float[Tensor, "moment feature"]
    tokens: Int[Tensor, " one"]

    @staticmethod
    def empty(feature: Int[Tensor, " feature"]) -> "TopFiring":
        """The sums before any text."""
        n = len(feature)
        return TopFiring(
            feature.to(torch.int32),
            torch.zeros(2, EXAMPLES, n),
            torch.full((2, EXAMPLES, n), -1, dtype=torch.int32),
            torch.zeros(2, EXAMPLES, n, dtype=torch.int16),
            torch.zeros(2, EXAMPLES, n, WINDOW, dtype=torch.float16),
            torch.zeros(2, n, dtype=torch.float64),
            torch.zeros(1, dtype=torch.long),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All columns by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def with_batch(
        self,
        acts: Float[Tensor, "batch pos feature"],
        counted: Bool[Tensor, "batch pos"],
        numbers: Int[Tensor, " batch"],
        start: int,
    ) -> "TopFiring":
        """These sums with a batch of pieces added.

        Args:
            acts: the activations of the features.
            counted: which positions count.
            numbers: the number of each piece.
            start: the position of each piece's first own token, after special ones.
        """
        acts = acts.masked_fill(~counted[..., None], 0.0)
        sums = self.sums + torch.stack([acts.sum(1), torch.linalg.vector_norm(acts, dim=1).square()]).sum(
            1, dtype=torch.float64
        )
        made = replace(self, sums=sums, tokens=self.tokens + int(counted.sum()))
        numbers = numbers.to(torch.int32)[:, None]
        for side, (best, place) in enumerate((acts.max(1), acts.min(1))):
            best = best if side == 0 else -best
            # Only features that beat their weakest example need work: fewer and fewer of them as texts go by.
            risen = (best.amax(0) > made.strength[side, -1]).nonzero()[:, 0]
            if len(risen):
                made._keep(side, risen, acts, best[:, risen], place[:, risen], numbers, start)
        return made

    def _keep(
        self, side: int, risen: Tensor, acts: Tensor, best: Tensor, place: Tensor, numbers: Tensor, start: int
    ) -> None:
        """Put the batch's examples of the features ``risen`` where they are stronger than those kept."""
        padded = torch.nn.functional.pad(acts[:, :, risen], (0, 0, BEFORE, AFTER))
        near = place[:, None] + torch.arange(WINDOW)[None, :, None]  # shifted by BEFORE, as `padded` is
        window = padded.gather(1, near).transpose(1, 2).half()
        strength, chosen = torch.cat([self.strength[side][:, risen], best]).topk(EXAMPLES, dim=0)
        new = {"piece": numbers.expand(-1, len(risen)), "place": (place - start).to(torch.int16), "window": window}
        for name, values in new.items():
            kept = getattr(self, name)[side]
            both = torch.cat([kept[:, risen], values.to(kept.dtype)])
            index = chosen[..., None].expand(-1, -1, WINDOW) if both.ndim == 3 else chosen
            kept[:, risen] = both.gather(0, index)
        self.strength[side][:, risen] = strength
        self.piece[side][:, risen] = torch.where(strength > 0, self.piece[side][:, risen], -1)

    def row(self, feature: int) -> int | None:
        """Where a feature stands in the columns; None if it is not among them."""
        found = int(torch.searchsorted(self.feature, torch.tensor(feature, dtype=self.feature.dtype)))
        return found if found < len(self.feature) and int(self.feature[found]) == feature else None

    def mean_and_spread(self, row: int) -> tuple[float, float]:
        """A feature's mean activation over the tokens counted, and its standard deviation."""
        n = max(1, int(self.tokens))
        mean, square = (float(s) / n for s in self.sums[:, row])
        return mean, max(0.0, square - mean**2) ** 0.5
