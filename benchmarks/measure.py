"""Resident memory and time of one call; used inside both programs' processes."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psutil


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
