"""How many threads to compute with beside other programs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOOK = 0.01  # seconds
_FREE = 0.75  # of the threads; alone on the machine it is 0.9 or more, beside one program with as many threads half
_CLOCK = 1e-4  # a coarser clock cannot tell in so short a time


@contextmanager
def free_threads() -> Iterator[None]:
    """Compute in the block with as many threads as the machine has processors free, at most torch's own number.

    Threads wait for each other after every product. Where other programs take the processors, one thread that waits for
    its turn holds up the others, and fewer are faster (measured: docs/benchmarks.md, "Beside other programs"). Torch's
    number of threads is the same again after the block.

    With another number of threads the last bits of float32 sums differ. ``torch.set_num_threads(1)`` beforehand gives
    the same bits however busy the machine is.
    """
    before = torch.get_num_threads()
    try:
        if before > 1:
            got = processors_got()
            if got < _FREE * before:
                torch.set_num_threads(max(1, int(got)))
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def processors_got() -> float:
    """How many processors this program gets while it multiplies matrices with all of torch's threads.

    Infinity if the clock of this system is too coarse to say.
    """
    if time.get_clock_info("process_time").resolution > _CLOCK:
        return float("inf")
    # as much work for each of many threads as for each of two
    size = round(512 * (torch.get_num_threads() / 2) ** (1 / 3))
    matrix = torch.ones(size, size)
    matrix @ matrix  # starts the threads
    at, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - at < _LOOK:
        matrix @ matrix
    return (time.process_time() - used) / (time.perf_counter() - at)
