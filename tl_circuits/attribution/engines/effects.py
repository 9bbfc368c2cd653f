"""The rows and biases that a sweep fills, also when the model's layers lie on several devices."""

import torch
from jaxtyping import Float
from torch import Tensor

COLUMNS_AT_ONCE = 2**16  # columns copied between devices in one piece, so that no second copy of all rows is made


class Effects:
    """Rows ``[n, column]`` and biases ``[n]`` of ``n`` targets, on the device of ``bias``.

    A layer on another device adds its effects to a *part* on its own device, which holds the first columns of the
    rows. :meth:`joined` adds all parts up. If all layers are on one device, the only part is the rows themselves.
    """

    def __init__(self, bias: Float[Tensor, " n"], width: int):
        self._home = bias.device
        self._parts = {self._home: (bias.new_zeros(len(bias), width), bias.clone())}

    def on(self, device: torch.device, width: int) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The part for layers on ``device``; made when first asked for, with ``width`` columns."""
        if device not in self._parts:
            n = len(self._parts[self._home][1])
            self._parts[device] = torch.zeros(n, width, device=device), torch.zeros(n, device=device)
        return self._parts[device]

    def joined(self) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The sum of all parts, as rows and biases. Call it once, at the end: the parts are freed."""
        rows, bias = self._parts.pop(self._home)
        for part, part_bias in self._parts.values():
            bias += part_bias.to(self._home)
            for into, added in zip(rows.split(COLUMNS_AT_ONCE, 1), part.split(COLUMNS_AT_ONCE, 1), strict=False):
                into[:, : added.shape[1]] += added.to(self._home)
        self._parts.clear()
        return rows, bias
