"""Where a sweep writes direct effects: rows and biases, in parts where its layers lie on several devices."""

import torch
from jaxtyping import Float
from torch import Tensor

COLUMNS_AT_ONCE = 2**16  # of a part on their way to the rows it belongs to


class Effects:
    """Rows ``[n, column]`` and biases ``[n]`` of ``n`` targets, on the device ``bias`` lies on.

    Layers elsewhere add to a part of the same shape on their own device; :meth:`joined` adds all up.
    With one device there is one part, the rows themselves.
    """

    def __init__(self, bias: Float[Tensor, " n"], width: int):
        self._home = bias.device
        self._parts = {self._home: (bias.new_zeros(len(bias), width), bias.clone())}

    def on(self, device: torch.device, width: int) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The part that layers on ``device`` add to; made with ``width`` columns when first asked for."""
        if device not in self._parts:
            n = len(self._parts[self._home][1])
            self._parts[device] = torch.zeros(n, width, device=device), torch.zeros(n, device=device)
        return self._parts[device]

    def joined(self) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """All parts together; ends the gathering."""
        rows, bias = self._parts.pop(self._home)
        for part, part_bias in self._parts.values():
            bias += part_bias.to(self._home)
            for into, added in zip(rows.split(COLUMNS_AT_ONCE, 1), part.split(COLUMNS_AT_ONCE, 1), strict=False):
                into[:, : added.shape[1]] += added.to(self._home)
        self._parts.clear()
        return rows, bias
