"""In the notebook's process: call a function with what the checker sent, and send back what it returned."""

import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tl_circuits.course.deadline import Deadline
from tl_circuits.course.handouts import Opener
from tl_circuits.course.student_code import Failure, caught
from tl_circuits.course.wire import LARGEST_MESSAGE, pack, unpack
from tl_circuits.hooks import Replacement

BEGUN = b"+"
FAULT = 70  # the exit code of a copy in which something else than the function went wrong
OPENING = 60.0  # seconds that opening the arguments, such as a model, may take on a busy machine
GRACE = 1.0  # seconds that a function gets to end after it was interrupted


def answer(
    request: bytes,
    seconds: float,
    namespace: dict[str, Any],
    references: Callable[[], dict[str, Any]],
    opened: Callable[[], None] = lambda: None,
    ready: Mapping[str, Replacement] | None = None,
) -> bytes:
    """Call a function of the notebook.

    Args:
        request: a packed dict: ``function``, ``arguments``, and in ``instead`` the names of functions that never
            returned. The reference's stand in for those.
        seconds: how long the function may take.
        namespace: what the notebook defined.
        references: gives reference functions by name.
        opened: called when the arguments are there and the function's time begins.
        ready: models that are open already; see :class:`~tl_circuits.course.handouts.Opener`.

    Returns:
        A packed dict: ``returned`` and ``hooks`` (how many stayed on the model), or ``raised`` and more of its failure.
    """
    opener = Opener(ready)
    asked = unpack(request, opener)
    if asked["instead"]:
        theirs = references()
        namespace.update({name: theirs[name] for name in asked["instead"] if name in theirs})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    opened()
    failures: list[Failure] = []
    returned, hooks = None, 0
    with caught(failures), Deadline.after(seconds).interrupting():
        returned = namespace[asked["function"]](*asked["arguments"])
        hooks = n_hooks(opener)
        returned = pack({"returned": returned, "hooks": hooks})
    if isinstance(returned, bytes) and not failures:
        return returned
    failure = failures[0]
    return pack({"raised": failure.text, "unwritten": failure.unwritten, "looped": failure.looped})


def n_hooks(opener: Opener) -> int:
    """How many hooks are on the model of a call; 0 if the call had none."""
    if "model" not in vars(opener):
        return 0
    return sum(len(point.fwd_hooks) for point in opener.model.hook_dict.values())


def answer_apart(seconds: float, run: Callable[[Callable[[], None]], bytes]) -> bytes:
    """Let a copy of this process answer, so that whatever happens in it ends with it.

    Args:
        seconds: how long it may take. After :data:`GRACE` more, the copy is ended.
        run: makes the answer. It is given a function to call when its time begins.

    Returns:
        Its answer, or a packed dict ``looped`` or ``ended`` (its exit code) with ``raised`` in words.
    """
    if not hasattr(os, "fork"):
        return run(lambda: None)
    message, code = _answered(seconds, run)
    if message is None and code == FAULT:  # not the function's fault, so it gets another try
        message, code = _answered(seconds, run)
    if message is not None:
        return message
    if code is None:
        return pack({"raised": f"StillRunning: ended after {seconds:.2g} s", "unwritten": False, "looped": True})
    return pack({"raised": "", "ended": code, "unwritten": False, "looped": True})


def _answered(seconds: float, run: Callable[[Callable[[], None]], bytes]) -> tuple[bytes | None, int | None]:
    """The answer of a copy of this process, or None; and the copy's exit code, None if its time was over."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = FAULT
        try:  # whatever happens, this copy must not run on as if it were the process itself
            os.setpgid(0, 0)
            message = run(partial(_tell, writer))
            with os.fdopen(writer, "wb") as file:
                file.write(struct.pack(">Q", len(message)) + message)
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    os.close(writer)
    try:
        return _collected(child, reader, seconds)
    finally:
        os.close(reader)


def _tell(writer: int) -> None:
    os.write(writer, BEGUN)


def _collected(child: int, reader: int, seconds: float) -> tuple[bytes | None, int | None]:
    until = time.monotonic() + OPENING
    data, wanted, code = b"", 1, None  # one byte says that it has begun, eight the length of what follows
    while len(data) < wanted and time.monotonic() < until:
        if select.select([reader], [], [], 0.05)[0]:
            part = os.read(reader, min(wanted - len(data), 1 << 20))
            if not part:
                break
            data += part
            if len(data) == 1:
                until, wanted = time.monotonic() + seconds + GRACE, 9
            elif len(data) == 9:
                wanted += min(int.from_bytes(data[1:], "big"), LARGEST_MESSAGE)
        elif code is not None:  # ended, and the pipe is empty: only something that it started still holds the pipe
            break
        else:
            code = _exit_code(child, os.WNOHANG)
    late = time.monotonic() >= until
    _end_group(child)
    if code is None:
        code = _exit_code(child)
    whole = len(data) == wanted and wanted > 9
    return data[9:] if whole else None, None if late else code


def _exit_code(child: int, how: int = 0) -> int | None:
    ended, status = os.waitpid(child, how)
    return os.waitstatus_to_exitcode(status) if ended else None


def _end_group(child: int) -> None:
    """End a child with its process group. It may have ended already, or not have made its group yet."""
    for end in (os.killpg, os.kill):
        try:
            end(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
