"""Matrices kept with four bits a number: ``value[r, c] = scale[r] * levels[code[r, c]]``, with sixteen levels a matrix.

A row is divided by its root mean square, each of its numbers becomes the nearest level, and the row's scale is then the
one that leaves the least squared error (its root mean square to begin with). The levels are those that leave the least
squared error on the matrix itself (Lloyd 1982, "Least squares quantization in PCM"); on Gaussian numbers that error is
1 % of the variance. ``four_bit_files.py`` is the folder of such matrices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tl_circuits.errors import DictionaryError, NotFiniteError

N_LEVELS = 16
_QUANTILES = 1024  # from which the first levels are taken
_ROUNDS = 1000  # of Lloyd's algorithm at most; a Gaussian takes about 300


@dataclass(frozen=True, eq=False)
class FourBit:
    """A matrix ``[rows, columns]`` with four bits a number.

    Args:
        codes: two numbers a byte: the even column in the low four bits, the odd one in the high four. With an odd
            number of columns, the last byte's high bits are 0 and not used.
        scale: a factor for each row.
        levels: the sixteen numbers that codes stand for, in ascending order.
        columns: how many columns the matrix has.
    """

    codes: UInt8[Tensor, "rows half"]
    scale: Float[Tensor, " rows"]
    levels: Float[Tensor, " 16"]
    columns: int


@torch.no_grad()
def quantised(
    matrix: Float[Tensor, "rows columns"], levels: Float[Tensor, " 16"] | None = None, *, refit: bool = True
) -> FourBit:
    """A matrix with four bits a number, on the matrix' device.

    Args:
        matrix: finite numbers, of any floating-point type.
        levels: sixteen numbers in ascending order, for rows that are divided by their root mean square; None for
            :func:`fitted_levels` of the matrix.
        refit: whether each row's scale is then the one with the least squared error for its codes; else it is the row's
            root mean square.

    Returns:
        The codes, levels and scales in float32. A scale that float16 can hold to its usual precision is one that
        float16 holds exactly, so that it can be stored as such without another error.

    Raises:
        DictionaryError: the matrix is empty or the levels are not such.
        NotFiniteError: either holds NaN or infinity.

    Examples:
        >>> import torch
        >>> from tl_circuits.dictionaries.formats.four_bit import dequantised, quantised
        >>> matrix = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
        >>> kept = quantised(matrix)
        >>> kept.codes.shape, kept.scale.shape, kept.levels.shape
        (torch.Size([200, 48]), torch.Size([200]), torch.Size([16]))
        >>> error = dequantised(kept) - matrix
        >>> round((error.square().mean() / matrix.square().mean()).item(), 3)
        0.009
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise DictionaryError(
            f"expected a matrix [rows, columns] with numbers in it, got the shape {tuple(matrix.shape)}."
        )
    if not torch.isfinite(matrix).all():
        raise NotFiniteError("the matrix holds NaN or infinity, which no level is near to.")
    levels = fitted_levels(matrix) if levels is None else _checked(levels).to(matrix.device)
    codes, scale = _coded(matrix, levels, refit)
    return FourBit(_packed(codes.to(torch.uint8)), scale, levels, matrix.shape[1])


@torch.no_grad()
def dequantised(kept: FourBit) -> Float[Tensor, "rows columns"]:
    """The numbers of a matrix that :func:`quantised` made, in float32, on the device of its codes."""
    codes = torch.stack((kept.codes & 15, kept.codes >> 4), dim=2).flatten(1)[:, : kept.columns]
    return kept.scale.float()[:, None] * _at(kept.levels.float(), codes.int())


@torch.no_grad()
def rounded(
    matrix: Float[Tensor, "rows columns"], levels: Float[Tensor, " 16"], *, refit: bool = True
) -> Float[Tensor, "rows columns"]:
    """``dequantised(quantised(matrix, levels))``, quickly: for training with rounded weights.

    Nothing is packed, checked or waited for on a GPU: the matrix must be finite, and the levels in ascending order on
    its device. There are no gradients; ``w + (rounded(w, levels) - w).detach()`` passes them straight through.
    """
    codes, scale = _coded(matrix, levels, refit)
    return scale[:, None] * _at(levels.float(), codes)


@torch.no_grad()
def fitted_levels(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " 16"]:
    """The sixteen levels that leave the least squared error on a matrix' rows, each divided by its root mean square.

    Found by Lloyd's algorithm on all numbers, with exact means: each level is the mean of the numbers nearest to it.
    The same matrix gives the same levels. A matrix with fewer than sixteen different numbers repeats some.
    """
    values = (matrix.float() / _nonzero(_root_mean_square(matrix))).flatten().sort().values.cpu().double().numpy()
    # To begin with: as dense as the cube root of the numbers' density, which is best where levels are many (Panter and
    # Dite 1951).
    points = values[np.linspace(0, len(values) - 1, _QUANTILES + 1).round().astype(np.int64)]
    shares = np.concatenate(([0.0], np.cumsum(np.diff(points) ** (2 / 3))))
    levels = np.interp((np.arange(N_LEVELS) + 0.5) / N_LEVELS * shares[-1], shares, points)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    for _ in range(_ROUNDS):
        ends = np.concatenate(
            ([0], np.searchsorted(values, (levels[1:] + levels[:-1]) / 2, side="right"), [len(values)])
        )
        count = np.diff(ends)
        means = np.where(count > 0, np.diff(sums[ends]) / np.maximum(count, 1), levels)
        if np.abs(means - levels).max() < 1e-6:
            break
        levels = means
    return torch.tensor(np.sort(levels), dtype=torch.float32, device=matrix.device)


def _coded(
    matrix: Float[Tensor, "rows columns"], levels: Float[Tensor, " 16"], refit: bool
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, " rows"]]:
    """The code of each number and the scale of each row."""
    matrix, levels = matrix.float(), levels.float()
    scale = _root_mean_square(matrix)
    values = matrix / _nonzero(scale)
    codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    if refit:
        chosen = _at(levels, codes)
        squares = chosen.square().sum(1, keepdim=True)
        scale = scale * torch.where(squares > 0, (values * chosen).sum(1, keepdim=True) / squares, 1.0)
    return codes, _as_halves(scale[:, 0])


def _root_mean_square(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows 1"]:
    """The root mean square of each row. Rows are divided by their largest entry first, so that no square overflows."""
    matrix = matrix.float()
    largest = _nonzero(matrix.abs().amax(1, keepdim=True))
    return (matrix / largest).square().mean(1, keepdim=True).sqrt() * largest


def _nonzero(scale: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    return torch.where(scale > 0, scale, 1.0)


def _as_halves(scale: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Each scale rounded to float16 where that costs at most float16's usual error (2^-11), else as it is; float32."""
    half = scale.half().float()
    return torch.where((half - scale).abs() <= scale.abs() * 2**-11, half, scale)


def _at(levels: Float[Tensor, " 16"], codes: Int[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return levels.index_select(0, codes.flatten()).view(codes.shape)


def _packed(codes: UInt8[Tensor, "rows columns"]) -> UInt8[Tensor, "rows half"]:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _checked(levels: Float[Tensor, " 16"]) -> Float[Tensor, " 16"]:
    if tuple(levels.shape) != (N_LEVELS,):
        raise DictionaryError(f"levels has the shape {tuple(levels.shape)}, expected ({N_LEVELS},).")
    if not torch.isfinite(levels).all():
        raise NotFiniteError("levels hold NaN or infinity.")
    if bool((levels.diff() < 0).any()):
        raise DictionaryError("levels must be in ascending order: sort them.")
    return levels.float()
