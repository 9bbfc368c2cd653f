"""Resident memory and time of one call, and the machine's rate; used inside both programs' processes."""

import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import psutil
import torch


def matmul_rate() -> float:
    """The machine's own float32 matrix-product rate now, in GFLOP/s, median of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rates = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        rates.append(2 * 2048**3 / (time.perf_counter() - began) / 1e9)
    return median(rates[1:])


def measured(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``call`` returned, the seconds it took, and the peak MB of resident memory above the start."""
    process = psutil.Process()
    start = peak = process.memory_info().rss
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    try:
        result = call()
        seconds = time.perf_counter() - began
    finally:
        running = False
        thread.join()
    return result, seconds, (peak - start) / 1e6
