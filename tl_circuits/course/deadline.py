"""Time limits for student code, so that no cell and no question uses up the time of the others."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class StillRunning(BaseException):
    """Raised in student code whose time is over. It is not an Exception, so that ``except Exception`` in a loop does
    not catch it.
    """


@dataclass(frozen=True)
class Deadline:
    """A moment, on the clock ``time.monotonic``, at which everything must be done."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """The moment ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    @contextmanager
    def half_of_the_rest(self) -> Iterator[None]:
        """Raise StillRunning in the block once it has used up half of the time that is left.

        Does nothing where Python cannot be interrupted like this: outside the main thread, and on Windows.
        """
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            yield
            return
        seconds = min(max(0.5, (self.at - time.monotonic()) / 2), 1e6)  # timers take no infinity

        def stop(*_: Any) -> None:
            raise StillRunning(f"stopped after {seconds:.2g} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


NEVER = Deadline(float("inf"))
