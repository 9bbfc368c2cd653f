"""Messages over a pipe: eight bytes of length, then the message. A reader never waits longer than it is told to."""

import queue
import struct
import threading
import time
from collections.abc import Callable
from typing import IO

from tl_circuits.course.wire import LARGEST_MESSAGE
from tl_circuits.errors import CourseError


def send(file: IO[bytes], message: bytes) -> None:
    """Write one message."""
    file.write(struct.pack(">Q", len(message)) + message)
    file.flush()


def receive(file: IO[bytes]) -> bytes | None:
    """The next message; None at the end, also if it is cut off.

    Raises:
        CourseError: if it is announced to be larger than any message is.
    """
    head = file.read(8)
    size = int.from_bytes(head, "big")
    if size > LARGEST_MESSAGE:
        raise CourseError(f"the notebook's process announced a message of {size:,} bytes; the most is {LARGEST_MESSAGE:,}.")
    message = file.read(size) if len(head) == 8 else b""
    return message if len(head) == 8 and len(message) == size else None


class Inbox:
    """What a process sends, read by a thread of its own, so that waiting for it can end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._messages: queue.Queue[bytes | None] = queue.Queue(maxsize=4)
        self._file = file
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        message: bytes | None = b""
        while message is not None:
            try:
                message = receive(self._file)
            except (OSError, ValueError):  # closed meanwhile, or no message of ours
                message = None
            self._messages.put(message)

    def next(self, until: float, meanwhile: Callable[[], None]) -> bytes | None:
        """The next message; None if there will be no more.

        Args:
            until: when to stop waiting, on the clock ``time.monotonic``.
            meanwhile: called about ten times a second; what it raises ends the waiting.

        Raises:
            TimeoutError: if it is not there by then.
        """
        while True:
            try:
                return self._messages.get(timeout=min(0.1, max(0.0, until - time.monotonic())))
            except queue.Empty:
                meanwhile()
                if time.monotonic() >= until:
                    raise TimeoutError from None

