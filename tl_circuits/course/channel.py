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
    left = memoryview(struct.pack(">Q", len(message)) + message)
    while left:
        left = left[file.write(left) :]
    file.flush()


def send_within(file: IO[bytes], message: bytes, until: float, meanwhile: Callable[[], None]) -> None:
    """Write one message to a process that may have stopped reading.

    Args:
        file: the pipe.
        message: the message.
        until: when to stop waiting, on the clock ``time.monotonic``.
        meanwhile: called about ten times a second; what it raises ends the waiting.

    Raises:
        OSError: if nothing reads the pipe any more.
        TimeoutError: if it is not written by then.
    """
    failures: list[OSError | ValueError] = []

    def write() -> None:
        try:
            send(file, message)
        except (OSError, ValueError) as error:  # the other end, or this one, is closed
            failures.append(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(0.1)
    while writer.is_alive():
        meanwhile()
        if time.monotonic() >= until:
            raise TimeoutError
        writer.join(0.1)
    if failures:
        raise BrokenPipeError(str(failures[0]))


def receive(file: IO[bytes]) -> bytes | None:
    """The next message; None at the end, also if it is cut off.

    Raises:
        CourseError: if it is announced to be larger than any message is.
    """
    head = _read(file, 8)
    size = int.from_bytes(head, "big")
    if size > LARGEST_MESSAGE:
        raise CourseError(
            f"the notebook's process announced a message of {size:,} bytes; the most is {LARGEST_MESSAGE:,}."
        )
    message = _read(file, size) if len(head) == 8 else b""
    return message if len(head) == 8 and len(message) == size else None


def _read(file: IO[bytes], size: int) -> bytes:
    """As many bytes, or fewer at the end. A pipe without a buffer gives them piece by piece."""
    parts = []
    while size and (part := file.read(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class Inbox:
    """What a process sends, read by a thread of its own, so that waiting for it can end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._messages: queue.Queue[bytes | None] = queue.Queue(maxsize=4)
        self._file, self._closed = file, False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        message: bytes | None = b""
        while message is not None:
            try:
                message = receive(self._file)
            except (OSError, ValueError):  # closed meanwhile, or no message of ours
                message = None
            while not self._closed:
                try:
                    self._messages.put(message, timeout=0.1)
                    break
                except queue.Full:  # nobody asked for the last ones yet
                    continue
            if self._closed:
                return

    def close(self) -> None:
        """Close the pipe.

        If something still holds its other end, the thread waits on, and ends with Python.
        """
        self._closed = True
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._file.close()

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
