"""The decoder of a layer's features that write to several layers, kept as one matrix for each layer written to.

Most sets store one tensor ``[feature, slot, d_out]``. Where the decoders are tied, the features of several layers write
through one matrix, and only a factor for each feature differs. Kept apart, such a matrix is in memory (or on disk)
once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import require_finite, require_shape
from tl_circuits.dictionaries.matrices import take_rows, weighted_sum
from tl_circuits.errors import DictionaryError


@dataclass(frozen=True, eq=False)
class SlotDecoders:
    """One layer's decoder: a feature's vector for slot ``j`` is its row of ``matrices[j]`` times its ``scales[j]``.

    Args:
        matrices: ``[feature, d_out]`` for each layer written to, the own one first. Layers may share a matrix.
        scales: for each matrix one number a feature, or None for ones.
    """

    matrices: tuple[Float[Tensor, "feature d_out"], ...]
    scales: tuple[Float[Tensor, " feature"] | None, ...]

    def __post_init__(self) -> None:
        if not self.matrices or len(self.matrices) != len(self.scales):
            raise DictionaryError(
                f"{len(self.matrices)} decoder matrices and {len(self.scales)} scales: give one scale each."
            )

    def check(self, layer: int, width: int, d_out: int, finite: bool) -> None:
        """Raise DictionaryError unless shapes fit, and NotFiniteError for NaN (in matrices only if ``finite``)."""
        for j, (matrix, scale) in enumerate(zip(self.matrices, self.scales, strict=True)):
            require_shape(layer, f"W_dec to layer {layer + j}", matrix, (width, d_out))
            if scale is not None:
                require_shape(layer, f"the decoder's scale to layer {layer + j}", scale, (width,))
                require_finite(layer, f"the decoder's scale to layer {layer + j}", scale)
            if finite:
                require_finite(layer, f"W_dec to layer {layer + j}", matrix)

    def rows(self, features: Int[Tensor, " n"], slot: int) -> Float[Tensor, "n d_out"]:
        """What one unit of each feature writes through one slot."""
        found, scale = take_rows(self.matrices[slot], features), self.scales[slot]
        return found if scale is None else found * take_rows(scale, features)[:, None]

    def written(self, acts: Float[Tensor, "*batch feature"], slot: int) -> Float[Tensor, "*batch d_out"]:
        """What all features write through one slot."""
        scale = self.scales[slot]
        return weighted_sum(
            acts if scale is None else acts.float() * scale.to(acts.device).float(), self.matrices[slot]
        )

    def each(self, move: Callable[[Tensor], Tensor]) -> "SlotDecoders":
        """The same with ``move`` applied to every tensor; itself if it returns all of them unchanged."""
        matrices = tuple(map(move, self.matrices))
        scales = tuple(None if scale is None else move(scale) for scale in self.scales)
        same = all(a is b for a, b in zip(matrices + scales, self.matrices + self.scales, strict=True))
        return self if same else replace(self, matrices=matrices, scales=scales)


def slot_count(decoder: Tensor | SlotDecoders) -> int:
    """How many layers a decoder writes to; 0 if it is a tensor of another shape than ``[feature, slot, d_out]``."""
    if isinstance(decoder, SlotDecoders):
        return len(decoder.matrices)
    return decoder.shape[1] if decoder.ndim == 3 else 0


def slot_matrix(
    decoder: Float[Tensor, "feature slot d_out"] | SlotDecoders, slot: int
) -> Float[Tensor, "feature d_out"]:
    """The matrix of one slot, without its scale."""
    return decoder.matrices[slot] if isinstance(decoder, SlotDecoders) else decoder[:, slot]


def slot_rows(
    decoder: Float[Tensor, "feature slot d_out"] | SlotDecoders, features: Int[Tensor, " n"], slot: int
) -> Float[Tensor, "n d_out"]:
    """What one unit of each feature writes through one slot."""
    return decoder.rows(features, slot) if isinstance(decoder, SlotDecoders) else take_rows(decoder[:, slot], features)


def slot_sum(
    decoder: Float[Tensor, "feature slot d_out"] | SlotDecoders, acts: Float[Tensor, "*batch feature"], slot: int
) -> Float[Tensor, "*batch d_out"]:
    """What all features write through one slot."""
    return decoder.written(acts, slot) if isinstance(decoder, SlotDecoders) else weighted_sum(acts, decoder[:, slot])


def all_slots(
    decoder: Float[Tensor, "feature slot d_out"] | SlotDecoders, features: Int[Tensor, " n"]
) -> Float[Tensor, "n d_out"]:
    """What one unit of each feature writes through all slots together."""
    if isinstance(decoder, SlotDecoders):
        return torch.stack([decoder.rows(features, slot) for slot in range(len(decoder.matrices))]).sum(0)
    return take_rows(decoder, features).sum(1)
