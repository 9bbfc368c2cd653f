"""Products with large matrices that may be on disk, on another device, or stored by columns."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.hooks import spread

# up to here a matrix stored by columns is multiplied faster from the other side, at 10 positions tenfold
FEW_POSITIONS = 50
FLOATS_AT_ONCE = 2**24  # large matrices kept elsewhere are brought to the device in pieces of 64 MB


def take_rows(matrix: Float[Tensor, "feature *rest"], features: Int[Tensor, " n"]) -> Float[Tensor, "n *rest"]:
    """Rows ``features`` of a matrix that may be on disk or another device; in float32, on ``features``' device."""
    # index_select copies whole rows, several times faster than indexing on the CPU.
    return matrix.index_select(0, features.to(matrix.device)).to(features.device).float()


def weighted_sum(
    acts: Float[Tensor, "*batch feature"], matrix: Float[Tensor, "feature d_out"]
) -> Float[Tensor, "*batch d_out"]:
    """``acts @ matrix`` in float32, reading only the rows of features that are active at some position.

    If gradients are being computed, all rows are read: inactive features have a gradient as well.
    """
    acts = acts.float()
    flat = acts.reshape(-1, acts.shape[-1])
    whole = acts.requires_grad and torch.is_grad_enabled()
    used = torch.arange(flat.shape[1], device=acts.device) if whole else flat.any(0).nonzero()[:, 0]
    total = flat.new_zeros(flat.shape[0], matrix.shape[1])
    for some in used.split(max(1, FLOATS_AT_ONCE // matrix.shape[1])):
        total = total + (flat if some.numel() == flat.shape[1] else flat[:, some]) @ take_rows(matrix, some)
    return total.reshape(*acts.shape[:-1], -1)


def encoded(W_enc: Float[Tensor, "feature d_in"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n feature"]:
    """``x W_encᵀ`` in float32, a piece of the encoder at a time, reading it in the order in which it lies in memory."""
    step = max(1, FLOATS_AT_ONCE // x.shape[1])
    by_columns = W_enc.T.is_contiguous() and not W_enc.is_contiguous()  # as SAELens stores it: [d_in, feature]
    if by_columns and len(x) < FEW_POSITIONS:
        parts = [x @ columns.to(x.device).float() for columns in W_enc.T.split(step, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    # This way round a matrix stored by rows is read row by row, a third faster on a few positions.
    parts = [
        rows.T.to(x.device).float().T @ x.T if by_columns else rows.to(x.device).float() @ x.T
        for rows in W_enc.split(step)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).T


def some_entries(matrix: Float[Tensor, "feature d"]) -> Float[Tensor, "3 2"]:
    """A few numbers of a large matrix, by which it is known again; nothing else of it is read from disk."""
    rows, columns = (spread(size, count).to(matrix.device) for size, count in zip(matrix.shape, (3, 2), strict=True))
    return matrix.detach()[rows[:, None], columns].float()


def to_layer(matrix: Tensor, device: torch.device) -> Tensor:
    """A large matrix moved to its layer's device, unless it is kept in the machine's memory or on disk."""
    return matrix if matrix.device.type == "cpu" else matrix.to(device)
