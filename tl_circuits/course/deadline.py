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

    @property
    def seconds(self) -> float:
        """How many seconds are left."""
        return self.at - time.monotonic()

    def half(self) -> "Deadline":
        """The moment at which half of the time that is left will be used up, at least half a second from now."""
        return Deadline.after(min(max(0.5, self.seconds / 2), 1e6))  # timers take no infinity

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise StillRunning in the block once the moment has come.

        Does nothing where Python cannot be interrupted like this: outside the main thread, and on Windows.
        """
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            yield
            return
        seconds = max(0.01, self.seconds)

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
