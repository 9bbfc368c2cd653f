"""Where training starts: scales, biases and the skip connection by least squares, features from tokens of the text."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.training.step import Weights, token_weights

RIDGE = 1e-4
"""Share of the inputs' mean variance that is added to each in the least squares."""


@dataclass
class Moments:
    """Sums over tokens of one layer's inputs and outputs, in float64, and some of the inputs themselves.

    ``x_usual`` and ``y_usual``: the median token's mean square. ``n``, ``x``, ``y``, ``xx`` and ``xy`` count each token
    by its weight in the loss; ``all_n``, ``all_y`` and ``all_yy`` count each as one, for the explained variance.
    """

    x_usual: float
    y_usual: float
    n: float
    x: Float[Tensor, " d_in"]
    y: Float[Tensor, " d_out"]
    xx: Float[Tensor, "d_in d_in"]
    xy: Float[Tensor, "d_in d_out"]
    all_n: int
    all_y: Float[Tensor, " d_out"]
    all_yy: float
    kept: list[Float[Tensor, "token d_in"]]


def no_moments(x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> Moments:
    """Sums over no tokens yet; ``x`` and ``y`` are the first that will be added, and say what is usual."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=x.device)

    d_in, d_out = x.shape[1], y.shape[1]
    x_usual, y_usual = (float(part.square().mean(1).median()) or 1.0 for part in (x, y))
    return Moments(
        x_usual,
        y_usual,
        0.0,
        zeros(d_in),
        zeros(d_out),
        zeros(d_in, d_in),
        zeros(d_in, d_out),
        0,
        zeros(d_out),
        0.0,
        [],
    )


def add_tokens(moments: Moments, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], keep: int) -> None:
    """Add tokens to the sums, and keep the inputs of the first ``keep``."""
    counts = token_weights(y, moments.y_usual)
    weighted = x * counts[:, None]
    moments.n += float(counts.sum(dtype=torch.float64))
    moments.x += weighted.sum(0).double()
    moments.y += (counts @ y).double()
    moments.xx += (weighted.T @ x).double()
    moments.xy += (weighted.T @ y).double()
    moments.all_n += len(y)
    moments.all_y += y.sum(0).double()
    moments.all_yy += float(y.square().sum(dtype=torch.float64))
    moments.kept.append(x[:keep].clone())


@dataclass(frozen=True, eq=False)
class Start:
    """What training starts with: weights, the two scales of inputs and outputs, and the outputs' variance.

    Weights are in units where the usual token's inputs and outputs have mean square 1. ``variance`` is in these units
    and the sum over coordinates, so ``1 - |error|² / variance`` is the explained variance.
    """

    weights: Weights
    x_scale: float
    y_scale: float
    variance: float


def resumed(moments: Moments, weights: Weights) -> Start:
    """Weights in the model's own units, as training goes on with them."""
    x, y = moments.x_usual**0.5, moments.y_usual**0.5
    w = weights
    skip = None if w.W_skip is None else w.W_skip * (x / y)
    return Start(Weights(w.W_enc * x, w.b_enc.clone(), w.W_dec / y, w.b_dec / y, skip), x, y, _variance(moments))


def _variance(moments: Moments) -> float:
    """The outputs' variance, in units where the usual token's mean square is 1."""
    total = moments.all_yy / moments.all_n - float((moments.all_y / moments.all_n).square().sum())
    return max(total / moments.y_usual, 1e-12)


def started(moments: Moments, width: int, skip: bool, random: torch.Generator) -> Start:
    """Fit what has a closed form, and take features from tokens.

    The skip connection and the output's bias are the ridge regression of outputs on inputs, tokens weighted as
    in the loss. A feature's encoder is the
    direction that tells one token ``t`` best from all others if these have a normal distribution (Fisher's
    discriminant), ``Σ⁻¹ (x_t - mean)``, scaled so that it is a standard score on the text. The decoder is zero:
    :mod:`fit` or the first steps find it.
    """
    d_in, n = len(moments.x), moments.n
    x_scale, y_scale = moments.x_usual**0.5, moments.y_usual**0.5
    mean_x, mean_y = moments.x / n / x_scale, moments.y / n / y_scale
    xx = moments.xx / n / x_scale**2 - mean_x[:, None] * mean_x
    xy = moments.xy / n / x_scale / y_scale - mean_x[:, None] * mean_y
    xx += RIDGE * xx.trace() / d_in * torch.eye(d_in, dtype=xx.dtype, device=xx.device)
    solved = torch.linalg.solve(xx, xy) if skip else torch.zeros_like(xy)
    x = torch.cat(moments.kept).double() / x_scale - mean_x
    chosen = torch.randint(len(x), (width,), generator=random).to(x.device)
    toward = torch.linalg.solve(xx, x[chosen].T).T
    W_enc = toward / (toward * x[chosen]).sum(1, keepdim=True).clamp_min(1e-6).sqrt()
    return Start(
        Weights(
            W_enc.contiguous().float(),
            (-W_enc @ mean_x).float(),
            solved.new_zeros(width, len(mean_y)).float(),
            (mean_y - mean_x @ solved).float(),
            solved.T.contiguous().float() if skip else None,
        ),
        x_scale,
        y_scale,
        _variance(moments),
    )
