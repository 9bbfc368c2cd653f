"""Products with activations of which only ``k`` of a token are not zero, without a matrix of all features.

Each touches ``tokens x k`` numbers instead of ``tokens x features``; ``ids`` are the active features of each token.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


def largest(pre: Float[Tensor, "token feature"], k: int) -> Int[Tensor, "token k"]:
    """Ids of the ``k`` largest numbers of each row, in no order.

    On a CPU this is NumPy's partition, in parts on torch's number of threads: three times as fast as ``torch.topk``,
    which partitions one row after the other with the general method of C++'s library.
    """
    if pre.device.type != "cpu":
        return pre.topk(k, dim=-1, sorted=False).indices
    numbers, n = pre.numpy(), max(1, min(torch.get_num_threads(), len(pre)))

    def part(rows: np.ndarray) -> np.ndarray:
        return np.argpartition(rows, rows.shape[1] - k, axis=1)[:, rows.shape[1] - k :]

    if n == 1:
        return torch.from_numpy(part(numbers))
    with ThreadPoolExecutor(n) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(part, np.array_split(numbers, n)))))


def decoded(
    ids: Int[Tensor, "token k"], acts: Float[Tensor, "token k"], W_dec: Float[Tensor, "feature d"]
) -> Float[Tensor, "token d"]:
    """The sum of each token's active decoder rows, times their activations."""
    return embedding_bag(ids, W_dec, per_sample_weights=acts, mode="sum")


def products(
    error: Float[Tensor, "token d"], W_dec: Float[Tensor, "feature d"], ids: Int[Tensor, "token k"]
) -> Float[Tensor, "token k"]:
    """The product of each token's row of ``error`` with each of its active decoder rows."""
    if error.device.type != "cpu":  # the dense product is cheap there
        return (error @ W_dec.T).gather(1, ids)
    n, k = ids.shape
    ends = torch.arange(0, n * k + 1, k)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        # The rows' columns need not be in order for this product.
        asked = torch.sparse_csr_tensor(
            ends, ids.flatten(), error.new_zeros(n * k), (n, len(W_dec)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(asked, error, W_dec.T, beta=0.0).values().view(n, k)


def sums_by_feature(
    ids: Int[Tensor, "token k"], pairs: list[tuple[Float[Tensor, "token k"], Float[Tensor, "token _"]]], width: int
) -> list[Float[Tensor, "feature _"]]:
    """For each pair of weights and rows: the weighted sum, for each feature, of the rows of tokens where it is active.

    This is ``Aᵀ X`` with the sparse matrix ``A`` of the weights; sorting by feature is shared by all pairs.
    """
    flat = ids.flatten()
    if flat.device.type == "cpu" and width <= 1 << 15:  # NumPy sorts 16 bits by counting, in a tenth of the time
        order = torch.from_numpy(np.argsort(flat.to(torch.int16).numpy(), kind="stable"))
    else:
        order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=width)
    starts = counts.cumsum(0) - counts
    tokens = order // ids.shape[1]
    return [
        embedding_bag(tokens, rows, starts, per_sample_weights=weights.flatten()[order], mode="sum")
        for weights, rows in pairs
    ]
