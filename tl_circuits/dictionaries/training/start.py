"""Where training starts: scales, biases and the skip connection by least squares, features from tokens of the text."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.training.step import Weights

RIDGE = 1e-4
"""Share of the inputs' mean variance that is added to each in the least squares."""


@dataclass
class Moments:
    """Sums over tokens of one layer's inputs and outputs, in float64, and some of the tokens themselves."""

    n: int
    x: Float[Tensor, " d_in"]
    y: Float[Tensor, " d_out"]
    xx: Float[Tensor, "d_in d_in"]
    xy: Float[Tensor, "d_in d_out"]
    yy: float
    kept: list[tuple[Tensor, Tensor]]


def no_moments(d_in: int, d_out: int, device: torch.device) -> Moments:
    """Sums over no tokens."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return Moments(0, zeros(d_in), zeros(d_out), zeros(d_in, d_in), zeros(d_in, d_out), yy=0.0, kept=[])


def add_tokens(moments: Moments, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], keep: int) -> None:
    """Add tokens to the sums, and keep the first ``keep`` of them as they are."""
    moments.n += len(x)
    moments.x += x.sum(0).double()
    moments.y += y.sum(0).double()
    moments.xx += (x.T @ x).double()
    moments.xy += (x.T @ y).double()
    moments.yy += float(y.square().sum(dtype=torch.float64))
    moments.kept.append((x[:keep].clone(), y[:keep].clone()))


@dataclass(frozen=True, eq=False)
class Start:
    """Weights in units where inputs and outputs have mean square 1, the two scales, and the outputs' variance in these units.

    ``variance`` is the sum over coordinates, so ``1 - |error|² / variance`` is the explained variance.
    """

    weights: Weights
    x_scale: float
    y_scale: float
    variance: float


def started(moments: Moments, width: int, skip: bool, random: torch.Generator) -> Start:
    """Fit what has a closed form, and take features from tokens.

    The skip connection and the output's bias are the ridge regression of outputs on inputs. A feature's encoder is the
    direction that tells one token ``t`` best from all others if these have a normal distribution (Fisher's discriminant),
    ``Σ⁻¹ (x_t - mean)``, scaled so that it is a standard score on the text; its decoder is a small step along what the
    regression leaves unexplained at ``t``.
    """
    d_in, d_out, n = len(moments.x), len(moments.y), moments.n
    x_scale = float(moments.xx.trace() / n / d_in) ** 0.5 or 1.0
    y_scale = (moments.yy / n / d_out) ** 0.5 or 1.0
    mean_x, mean_y = moments.x / n / x_scale, moments.y / n / y_scale
    xx = moments.xx / n / x_scale**2 - mean_x[:, None] * mean_x
    xy = moments.xy / n / x_scale / y_scale - mean_x[:, None] * mean_y
    xx += RIDGE * xx.trace() / d_in * torch.eye(d_in, dtype=xx.dtype, device=xx.device)
    variance = moments.yy / n / y_scale**2 - float(mean_y.square().sum())
    solved = torch.linalg.solve(xx, xy) if skip else torch.zeros_like(xy)
    x, y = (torch.cat(part).double() for part in zip(*moments.kept, strict=True))
    x, y = x / x_scale - mean_x, y / y_scale - mean_y
    chosen = torch.randint(len(x), (width,), generator=random).to(x.device)
    toward = torch.linalg.solve(xx, x[chosen].T).T
    W_enc = toward / (toward * x[chosen]).sum(1, keepdim=True).clamp_min(1e-6).sqrt()
    W_dec = 0.01 * (y - x @ solved)[chosen]
    return Start(
        Weights(
            W_enc.contiguous().float(), (-W_enc @ mean_x).float(), W_dec.contiguous().float(), (mean_y - mean_x @ solved).float(),
            solved.T.contiguous().float() if skip else None,
        ),
        x_scale, y_scale, max(variance, 1e-12),
    )
