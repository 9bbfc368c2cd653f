"""Decoder, skip connection and bias in closed form: what explains the outputs best while the encoder stays as it is.

With the encoder held, a transcoder's output is linear in its decoder, its skip connection and its bias, so the best
ones solve the normal equations of a ridge regression. Training begins and ends with it: gradient steps find the
encoder, and need far more text to find a decoder as good.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.training.sparse import sums_by_feature
from tl_circuits.dictionaries.training.step import Weights, read, token_weights

RIDGE = 1e-3
"""Share of each input's sum of squares that is added to it, so that what is rarely active stays small."""


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Sums over tokens for one layer; ``input`` counts features, then the MLP's inputs if there is a skip, then 1."""

    products: Float[Tensor, "input input"]
    outputs: Float[Tensor, "input d_out"]


def no_equations(weights: Weights) -> NormalEquations:
    """Sums over no tokens yet, for a transcoder of the size of ``weights``."""
    n = n_inputs(weights)
    return NormalEquations(weights.W_enc.new_zeros(n, n), weights.W_enc.new_zeros(n, len(weights.b_dec)))


def n_inputs(weights: Weights) -> int:
    """How many numbers each output is a sum of: features, inputs of the skip connection, 1."""
    return len(weights.W_enc) + (0 if weights.W_skip is None else weights.W_enc.shape[1]) + 1


def equations_bytes(weights: Weights) -> int:
    """The size of :func:`no_equations` in bytes."""
    return 4 * n_inputs(weights) * (n_inputs(weights) + len(weights.b_dec))


def add_to_equations(
    equations: NormalEquations,
    weights: Weights,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"],
    k: int,
) -> None:
    """Add tokens, in the units of training, each by its weight in the loss."""
    found, counts, width = read(weights, x, y, k), token_weights(y), len(weights.W_enc)
    inputs = x.new_zeros(len(x), len(equations.products))
    inputs.scatter_(1, found.ids, found.acts)
    if weights.W_skip is not None:
        inputs[:, width:-1] = x
    inputs[:, -1] = 1.0
    features, outputs = sums_by_feature(
        found.ids, [(found.acts * counts[:, None], part) for part in (inputs, y)], width
    )
    others = inputs[:, width:] * counts[:, None]
    equations.products[:width] += features
    equations.products[width:] += others.T @ inputs
    equations.outputs[:width] += outputs
    equations.outputs[width:] += others.T @ y


def solve_equations(equations: NormalEquations, weights: Weights) -> None:
    """Put the best decoder, skip connection and bias into ``weights``."""
    width = len(weights.W_enc)
    squares = equations.products.diagonal()
    ridge = RIDGE * squares
    # features that were silent
    ridge[:width].clamp_min_(RIDGE * float(squares[:width].mean()) + torch.finfo(ridge.dtype).tiny)
    ridge[-1] = 0.0
    products = (equations.products + ridge.diag()).double()
    solved = torch.linalg.solve(products, equations.outputs.double()).to(weights.W_dec.dtype)
    weights.W_dec.copy_(solved[:width])
    if weights.W_skip is not None:
        weights.W_skip.copy_(solved[width:-1].T)
    weights.b_dec.copy_(solved[-1])
