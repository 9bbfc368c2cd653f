"""Which targets go through the model together, and what happens when they do not fit."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets
from tl_circuits.support.memory import free_memory

SWEEP_FLOATS = 2**30  # in one sweep, 4 GB, and never more than half of the memory that is free


@dataclass(frozen=True)
class Sizes:
    """How many (targets x positions) make one sweep on a short prompt, and how many targets on a long one."""

    rows: int
    targets: int

    @classmethod
    def on(cls, device: torch.device) -> "Sizes":
        """Enough for matrix products at full rate: on a processor what stays in its cache, on an accelerator more."""
        return cls(rows=1024, targets=64) if device.type == "cpu" else cls(rows=16384, targets=512)


@runtime_checkable
class Engine(Protocol):
    """What computes rows; the linear and the autograd engine."""

    sources: Sources

    def rows(self, targets: Targets) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """Direct effects and biases of ``targets``."""


def sweeps(
    engine: Engine, targets: Targets, batch_size: int | str
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n column"], Float[Tensor, " n"]]]:
    """Indices, rows and biases of all targets, a sweep at a time.

    A sweep that does not fit into memory is halved. Raises MemoryError if one target alone does not fit.
    """
    waiting = list(sweep_chunks(targets, batch_size, engine.sources))[::-1]
    while waiting:
        indices = waiting.pop()
        try:
            rows, bias = engine.rows(targets[indices])
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if indices.numel() == 1:
                raise MemoryError(
                    f"not even one node's effects on {engine.sources.n_pos} tokens fit into the memory of "
                    f"{targets.vector.device}. Give a shorter prompt, a smaller dictionary or fewer layers."
                ) from error
            half = indices.numel() // 2
            waiting += [indices[half:], indices[:half]]
            continue
        yield indices, rows, bias


def sweep_chunks(
    targets: Targets, batch_size: int | str, sources: Sources
) -> Iterator[Int[Tensor, " n"]]:
    """Indices of targets to sweep together: near positions together, so that few rows are padding.

    A sweep goes up to its last target's position for all of them; one is closed when what that wastes on
    the others costs more than a sweep of its own. Each chunk stands from the last layer to the first, the
    order in which a sweep takes targets up.
    Where memory suffices, sizes depend on the prompt alone, so that the same prompt gives the same bits.
    """
    order = torch.argsort(targets.position, stable=True)
    positions = targets.position[order].tolist()
    start, floats = 0, min(SWEEP_FLOATS, least_free_memory({sources.home, *sources.devices}) // 8)
    for i in range(1, len(positions) + 1):
        if i < len(positions) and _takes_one_more(positions[start : i + 1], batch_size, sources, floats):
            continue
        chunk = order[start:i]
        yield chunk[torch.argsort(targets.layer[chunk], descending=True, stable=True)]
        start = i


def _takes_one_more(positions: list[int], batch_size: int | str, sources: Sources, floats: int) -> bool:
    """Whether the last of these positions' targets joins the sweep of all before it."""
    count = len(positions) - 1
    if isinstance(batch_size, int):
        return count < batch_size
    return count < _room(positions[-1] + 1, sources, floats) and not _wasteful(positions, sources)


def _wasteful(positions: list[int], sources: Sources) -> bool:
    """Whether sweeping these positions' targets together costs more than a sweep more would."""
    last = positions[-1]
    of_its_own = Sizes.on(sources.home).rows // 4 + 2 * (last + 1)  # measured, in targets x positions
    return sum(last - p for p in positions) > of_its_own


def _room(used: int, sources: Sources, floats: int) -> int:
    """How many targets at the first ``used`` positions make one sweep of at most about ``floats`` numbers."""
    sizes = Sizes.on(sources.home)
    each = 5 * used * sources.tokens.shape[1] + sources.width  # gradients and their copies, one row
    return max(1, min(max(sizes.rows // used, sizes.targets), floats // each))


def least_free_memory(devices: Iterable[torch.device]) -> int:
    """Bytes that can be had on the fullest of the devices a sweep passes."""
    return min(free_memory(device) for device in devices)


_NO_ROOM = ("can't allocate memory", "out of memory")  # the processor's words; CUDA's, XPU's and MPS'


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in _NO_ROOM)
