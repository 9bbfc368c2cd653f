"""Group targets into sweeps: backward passes that compute many rows at once and still fit into memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets
from tl_circuits.support.memory import free_memory

SWEEP_FLOATS = 2**30  # how many numbers one sweep may hold: 4 GB of float32, but at most half of the free memory
SWEEP_FLOATS_OF_A_GPU = 2**32  # 16 GB


@dataclass(frozen=True)
class Sizes:
    """Sweep sizes that keep matrix products fast: on short prompts ``rows``, on long ones ``targets`` decides."""

    rows: int  # targets times positions
    targets: int  # at least so many targets, however long the prompt

    @classmethod
    def on(cls, device: torch.device) -> "Sizes":
        """Small enough for the cache of a CPU; larger on a GPU, whose products reach full speed only when large."""
        return cls(rows=1024, targets=64) if device.type == "cpu" else cls(rows=16384, targets=512)


@runtime_checkable
class Engine(Protocol):
    """What every engine offers: the rows of direct effects on any targets of one prompt."""

    sources: Sources

    def rows(self, targets: Targets) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The direct effect of every column on every target, and each target's bias."""


def sweeps(
    engine: Engine, targets: Targets, batch_size: int | str
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n column"], Float[Tensor, " n"]]]:
    """Compute the rows of all targets, a sweep at a time.

    Yields:
        The indices of one sweep's targets, their rows and their biases.

    Raises:
        MemoryError: one target alone does not fit into memory. (A sweep of several is halved and tried again.)
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


def sweep_chunks(targets: Targets, batch_size: int | str, sources: Sources) -> Iterator[Int[Tensor, " n"]]:
    """Divide targets into sweeps: each item holds the indices of targets to compute together, last layer first.

    A sweep computes gradients at all positions up to its last target's, for all its targets, though those at earlier
    positions need fewer. So targets at near positions go together, and a sweep is closed when the waste on its
    early targets would cost more than another sweep.

    Sizes depend on free memory only where it is short: then the same prompt may round differently (the order of
    sums changes); otherwise it gives the same bits.
    """
    order = torch.argsort(targets.position, stable=True)
    positions = targets.position[order].tolist()
    most = SWEEP_FLOATS if sources.home.type == "cpu" else SWEEP_FLOATS_OF_A_GPU
    start, floats = 0, min(most, least_free_memory({sources.home, *sources.devices}) // 8)
    for i in range(1, len(positions) + 1):
        if i < len(positions) and _takes_one_more(positions[start : i + 1], batch_size, sources, floats):
            continue
        chunk = order[start:i]
        yield chunk[torch.argsort(targets.place[chunk], descending=True, stable=True)]
        start = i


def _takes_one_more(positions: list[int], batch_size: int | str, sources: Sources, floats: int) -> bool:
    """Whether the target at the last of ``positions`` joins the sweep of the targets at those before it."""
    count = len(positions) - 1
    if isinstance(batch_size, int):
        return count < batch_size
    return count < _room(positions[-1] + 1, sources, floats) and not _wasteful(positions, sources)


def _wasteful(positions: list[int], sources: Sources) -> bool:
    """Whether one sweep for the targets at ``positions`` costs more than two would."""
    last = positions[-1]
    of_its_own = Sizes.on(sources.home).rows // 4 + 2 * (last + 1)  # measured, in targets x positions
    return sum(last - p for p in positions) > of_its_own


def _room(used: int, sources: Sources, floats: int) -> int:
    """How many targets fit into one sweep over ``used`` positions that may hold about ``floats`` numbers."""
    sizes = Sizes.on(sources.home)
    each = 5 * used * sources.tokens.shape[1] + sources.width  # gradients and their copies, one row
    return max(1, min(max(sizes.rows // used, sizes.targets), floats // each))


def least_free_memory(devices: Iterable[torch.device]) -> int:
    """Free memory in bytes on the fullest of these devices: a sweep passes them all, so this one limits it."""
    return min(free_memory(device) for device in devices)


_NO_ROOM = ("can't allocate memory", "out of memory")  # how torch says so: on the CPU; on CUDA, XPU and MPS


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in _NO_ROOM)
