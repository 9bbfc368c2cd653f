"""Let a Ctrl-C wait while a model is half-changed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Waiting:
    """A handler of SIGINT that remembers the first signal for later, and passes on the second at once."""

    def __init__(self, before: Any):
        self._before = before
        self._first: tuple[int, Any] | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self._first is None:
            self._first = (number, frame)
            return
        self.put_back()
        self._before(number, frame)

    def put_back(self) -> None:
        """Install the handler that was there before, if this one is still installed."""
        installed: Any = signal.getsignal(signal.SIGINT)
        if installed is self:
            signal.signal(signal.SIGINT, self._before)

    def pass_on(self) -> None:
        """Handle the signal that came in the meantime, if any; only once."""
        first, self._first = self._first, None
        if first is not None:
            self._before(*first)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let a Ctrl-C wait until the context is left; a second Ctrl-C comes through at once.

    For sections of milliseconds that take hooks off a model. Only the main thread receives signals, so in other threads
    nothing is done. Handlers that are not Python functions, and a context within another, are left alone.
    """
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(before) or isinstance(before, _Waiting):
        yield
        return
    waiting = _Waiting(before)
    try:
        try:
            signal.signal(signal.SIGINT, waiting)
            yield
        finally:
            waiting.put_back()
    finally:  # once more: an exception of another kind may be raised between any two lines above
        waiting.put_back()
        waiting.pass_on()
