"""Where a run's time goes on a GPU: products, other kernels, copies, waiting for the program."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.accelerator_worker import synchronize

TOP = 15
_WAITING = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")  # recorded as the GPU's, but no work
_PRODUCTS = ("gemm", "cutlass", "xmma", "cublas", "splitk", "mm_kernel", "nvjet")  # nvjet: cuBLAS on Hopper


def kind(name: str) -> str:
    """What a GPU kernel does, by its name."""
    low = name.lower()
    if low.startswith(("memcpy", "memset")):
        return "copies"
    if "gemv" in low or "dot_kernel" in low:
        return "matrix-vector products"
    return "matrix products" if any(part in low for part in _PRODUCTS) else "other kernels"


def busy(spans: list[tuple[int, int]]) -> int:
    """Nanoseconds in which at least one of the spans runs."""
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def profiled(device: str, call: Callable[[], Any], alone: float) -> dict[str, Any]:
    """Shares of the GPU's time by kind of kernel, its idle share, and the kernels and calls that take longest.

    Recording slows the program down, not the kernels, so the idle share is also given for ``alone``, the seconds that
    the run takes without it. On a CPU, operations stand for kernels, one within another counted twice.
    """
    on_gpu = device.startswith("cuda")
    wanted, own = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    with profile(activities=[wanted]) as recorded:
        began = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - began
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None  # the profiler has run
    spans, kinds = [], Counter[str]()
    time_of, count_of, calls, calls_time = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for event in recorded.profiler.kineto_results.events():
        name, took = event.name(), event.duration_ns()
        if name in _WAITING:
            continue
        if event.device_type() != own:
            calls[name] += 1
            calls_time[name] += took
            continue
        spans.append((event.start_ns(), event.start_ns() + took))
        kinds[kind(name)] += took
        time_of[name] += took
        count_of[name] += 1
    at_work, total = busy(spans) / 1e9, max(1, sum(kinds.values()))
    return {
        "seconds": wall,
        "seconds_alone": alone,
        "busy_seconds": at_work,
        "idle": 1 - at_work / wall,
        "idle_alone": max(0.0, 1 - at_work / alone),
        "kernels": sum(count_of.values()),
        "shares": {name: took / total for name, took in kinds.most_common()},
        "top": [[name[:100], count_of[name], took / 1e6, took / total] for name, took in time_of.most_common(TOP)],
        "calls": [[name[:60], calls[name], took / 1e6] for name, took in calls_time.most_common(8)],
    }


def profile_lines(found: dict[str, Any]) -> list[str]:
    """The profile as text."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items())
    return [
        f"{found['seconds_alone']:.2f} s alone, {found['seconds']:.2f} s recorded; GPU at work "
        f"{found['busy_seconds']:.2f} s, idle {found['idle_alone']:.0%} of the time alone ({found['idle']:.0%} "
        f"recorded); {found['kernels']} kernels: {shares}",
        *(f"  {share:6.1%} {took:10.2f} ms {count:9d} x  {name}" for name, count, took, share in found["top"]),
        *(f"  call   {took:10.2f} ms {count:9d} x  {name}" for name, count, took in found["calls"]),
    ]
