"""The largest products between two sets of vectors, found without computing all products."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 512  # vectors of either side in one matrix product


def top_pairs(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], top: int
) -> tuple[Int[Tensor, " top"], Int[Tensor, " top"], Float[Tensor, " top"]]:
    """The ``top`` pairs with the largest ``|a[i]·b[j]|``.

    This is exact. Vectors are taken in the order of their length, and a block of pairs is left out if the product of
    its largest lengths is below the smallest product kept (Cauchy-Schwarz).

    Returns:
        The indices ``i``, the indices ``j`` and the products, largest first.
    """
    order_a, order_b = (x.norm(dim=1).argsort(descending=True, stable=True) for x in (a, b))
    a, b = a[order_a], b[order_b]
    length_a, length_b = a.norm(dim=1), b.norm(dim=1)
    top = min(top, len(a) * len(b))
    values = a.new_empty(0)
    rows = columns = torch.empty(0, dtype=torch.long, device=a.device)
    for i in range(0, len(a), BLOCK):
        for j in range(0, len(b), BLOCK):
            if len(values) == top and length_a[i] * length_b[j] < values[-1].abs():
                break
            products = a[i : i + BLOCK] @ b[j : j + BLOCK].T
            best = products.abs().flatten().topk(min(top, products.numel())).indices
            found = products.flatten()[best]
            values = torch.cat([values, found])
            rows = torch.cat([rows, i + best // products.shape[1]])
            columns = torch.cat([columns, j + best % products.shape[1]])
            kept = values.abs().argsort(descending=True, stable=True)[:top]
            values, rows, columns = values[kept], rows[kept], columns[kept]
    return order_a[rows], order_b[columns], values
