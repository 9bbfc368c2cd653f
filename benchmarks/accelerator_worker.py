"""What both programs' processes share: answer jobs one by one, measure time and the device's memory, stop in time."""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 3  # a measurement is repeated so often, if a quarter of its time is enough for that


class Stopped(Exception):
    """The run took longer than it may."""


class Progress:
    """The nodes done in one run, and how long the whole run would take if the rest were as fast as those.

    Work on a GPU goes on after the call that started it, so the device is waited for before a time is read.
    """

    def __init__(self, device: str, limit: float):
        self._device, self._limit = device, limit
        self.done, self.elapsed = 0, 0.0
        self.began = time.perf_counter()
        self._features_began: float | None = None

    def begin_features(self) -> None:
        """Call before each batch of feature nodes."""
        if self._features_began is None:
            synchronize(self._device)
            self._features_began = time.perf_counter()

    def add(self, nodes: int) -> None:
        """Call after each batch of feature nodes.

        Raises:
            Stopped: the time is over.
        """
        self.done += nodes
        if time.perf_counter() - self.began > self._limit:
            synchronize(self._device)
            self.elapsed = time.perf_counter() - self.began
            raise Stopped

    def reckoned(self, nodes: int) -> float:
        """Seconds of the whole run with ``nodes`` nodes, after it was stopped."""
        assert self._features_began is not None  # a run is stopped after a batch of feature nodes
        in_features = self.elapsed - (self._features_began - self.began)
        return self.elapsed + (nodes - self.done) * in_features / self.done


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def tidy(device: str) -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def measured(device: str, call: Callable[[], Any], first: bool = True) -> tuple[Any, float, dict[str, float]]:
    """What ``call`` returned, the seconds it took, and the GPU's memory in GB: of weights, and at the peak.

    ``first``: start without memory that torch keeps from earlier runs; repeated runs use that of the first.
    """
    if first:
        tidy(device)
    on_gpu = device.startswith("cuda")
    weights = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    began = time.perf_counter()
    found = call()
    synchronize(device)
    seconds = time.perf_counter() - began
    if not on_gpu:
        return found, seconds, {}
    sizes = {
        "weights": weights,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
    return found, seconds, {f"{name}_gb": round(size / 1e9, 3) for name, size in sizes.items()}


def tell(found: dict[str, Any]) -> None:
    """Write one line of JSON to the process that asked."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def answer(device: str, do: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do the jobs that arrive on standard input, a line of JSON each, and tell what each gave, or its error."""
    for line in sys.stdin:
        try:
            found = do(json.loads(line))
        except Exception as error:  # noqa: BLE001  (whatever fails is recorded, and the next job is done)
            sys.stderr.write(traceback.format_exc())
            said = f"{type(error).__name__}: {error}"
            lost = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in said.lower()
            found = {"error": "out of memory" if lost else said[:2000]}
        tidy(device)  # outside of `except`: there the error still holds the failed run's tensors
        tell(found)
