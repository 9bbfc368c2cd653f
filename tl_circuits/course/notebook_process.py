"""The checker's side of a notebook's process: start it, run its cells, ask it, watch what it uses, end it."""

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, Any

import psutil

from tl_circuits.course import confine
from tl_circuits.course.answering import GRACE, OPENING
from tl_circuits.course.assignments import Submission
from tl_circuits.course.channel import Inbox, send_within
from tl_circuits.course.deadline import Deadline
from tl_circuits.course.ended import in_words
from tl_circuits.course.grading import Ended
from tl_circuits.errors import CourseError
from tl_circuits.models import PACKAGED
from tl_circuits.support.cache import cache_dir
from tl_circuits.support.reading import quoted

START_LIMIT = 120.0  # seconds for Python to import everything; they do not count against the student's time
SLACK = 5.0  # seconds that sending and copying may take besides the time a function is given
MEMORY = confine.MEMORY  # bytes that the notebook's processes may use together
PROCESSES = 64  # that a notebook may have at once
CELLS_SHARE = 0.75  # of the time that cells may use; the rest is kept for the questions
GRADING = "TL_CIRCUITS_GRADING"
# What a notebook's process is told of this one's environment: enough to find Python and its packages, and no keys.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT", "OMP_NUM_THREADS")
# The student's folder must not come first on the path, or a file torch.py in it would be imported as torch.
CODE = "import sys, runpy; sys.path[:] = [p for p in sys.path if p]; runpy.run_path(sys.argv[1])['main'](*sys.argv[2:])"


@dataclass(frozen=True)
class Ran:
    """What came of the cells.

    Attributes:
        defined: what the notebook defines: for each name ``"function"``, or its type.
        crashes: the cells' failures, in words.
        cell: the number of the last cell that was begun.
        ended: how the process ended, if it did.
    """

    defined: dict[str, str] = field(default_factory=dict)
    crashes: tuple[str, ...] = ()
    cell: int = 0
    ended: str = ""


class NotebookProcess:
    """A notebook's process. Use it as a context manager: at the end it is ended, with everything that it started.

    Args:
        submission: the notebook.
        time_limit: the most seconds that it may take after its start.

    Attributes:
        missing: what :mod:`confine` could not do on this system.
    """

    def __init__(self, submission: Submission, time_limit: float) -> None:
        self.submission, self.time_limit = submission, time_limit
        self.missing: tuple[str, ...] = ()
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "NotebookProcess":
        """Start it. It takes some seconds to import everything."""
        self._scratch = tempfile.TemporaryDirectory(prefix="tl-circuits-course-", ignore_cleanup_errors=True)
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        try:
            self._start()
        except BaseException:  # Ctrl-C included: no process is left behind
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        scratch, model = self._scratch.name, self.submission.assignment.model
        self._process = subprocess.Popen(
            [sys.executable, "-c", CODE, confine.__file__, str(self.submission.path.resolve().parent), scratch, model],
            env=_environment(scratch, model),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout  # both are pipes
        self._requests, self._inbox = self._process.stdin, Inbox(self._process.stdout)
        self._until = time.monotonic() + START_LIMIT

    def wait_until_ready(self) -> None:
        """Wait until it has imported everything. Only then its time begins.

        Raises:
            CourseError: if it does not start.
        """
        try:
            self.missing = tuple(self._event()["missing"])
        except Ended as error:
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 10_000))
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            why = said[-1] if said and self._process.poll() is not None else f"it {error}"
            raise CourseError(f"the grading process did not start: {quoted(why)}.") from error
        self._until = time.monotonic() + self.time_limit

    @property
    def deadline(self) -> Deadline:
        """When its time is over."""
        return Deadline(self._until)

    def run_cells(self) -> Ran:
        """Run the cells."""
        assignment, cell = str(self.submission.assignment.number), 0
        work = {"assignment": assignment, "cells": self.submission.cells, "seconds": self.time_limit * CELLS_SHARE}
        try:
            self._send(json.dumps(work).encode())
            while True:
                event = self._event()
                if isinstance(event.get("cell"), int):
                    cell = event["cell"]
                if isinstance(event.get("defined"), dict) and isinstance(event.get("crashes"), list):
                    defined = {str(name): quoted(kind) for name, kind in event["defined"].items()}
                    return Ran(defined, tuple(str(text)[:2000] for text in event["crashes"][:100]), cell)
        except Ended as error:
            return Ran(cell=cell, ended=str(error))

    def ask(self, request: bytes, seconds: float) -> bytes:
        """The answer to a request, which may take some seconds; see :mod:`answering`.

        Raises:
            Ended: if the process ended, or had to be ended.
        """
        self._send(struct.pack(">d", seconds) + request)
        return self._next(time.monotonic() + seconds + OPENING + GRACE + SLACK)

    def _send(self, message: bytes) -> None:
        try:
            send_within(self._requests, message, time.monotonic() + SLACK, self._watch)
        except TimeoutError as error:
            raise Ended("stopped reading what it is asked and was stopped") from error
        except OSError as error:  # it has ended, or closed its pipe
            raise Ended(self._how()) from error

    def _event(self) -> dict[str, Any]:
        message = self._next(self._until)
        try:
            event = json.loads(message)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise Ended("wrote into the checker's pipe and was stopped")
        return event

    def _next(self, until: float) -> bytes:
        try:
            message = self._inbox.next(until, self._watch)
        except TimeoutError as error:
            limit = self.time_limit if self.missing or self._until < time.monotonic() else START_LIMIT
            raise Ended(f"took longer than {limit:g} s and was stopped") from error
        if message is None:
            raise Ended(self._how())
        return message

    def _watch(self) -> None:
        """End everything as soon as the notebook's processes are too many, or use too much memory."""
        try:
            found = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return
        self._seen = {*(p for p in self._seen if p.is_running()), *found}
        if len(found) > PROCESSES + 2:  # two of them are the checker's
            self._end()
            raise Ended(f"started more than {PROCESSES} processes and was stopped")
        # What copies of a process share counts once. Counting so takes long, so it is done only where it can matter.
        if sum(_resident(process) for process in found) > MEMORY and sum(_share(process) for process in found) > MEMORY:
            self._end()
            raise Ended(f"used more than {MEMORY / 1024**3:g} GiB of memory and was stopped")

    def _how(self) -> str:
        """How the process ended by itself."""
        try:
            code = self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "closed the checker's pipe"
        return in_words(code if code <= 128 else 128 - code)

    def _end(self) -> None:
        """End it, and everything that it started."""
        if self._process.poll() is None and hasattr(signal, "SIGKILL"):
            self._process.send_signal(signal.SIGTERM)  # the program that started it ends what it adopted
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (AttributeError, ProcessLookupError, PermissionError):  # nothing is left of the group; Windows has none
            self._process.kill()
        for process in self._seen:
            if process.is_running():
                process.kill()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        """End it, with everything that it started, and remove what it wrote."""
        if hasattr(self, "_process"):
            self._end()
            self._requests.close()
            self._inbox.close()
        self._errors.close()
        self._scratch.cleanup()


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it has ended
        return 0


def _share(process: psutil.Process) -> int:
    """The memory of a process, in which what n processes share counts an n-th."""
    try:
        full = process.memory_full_info()
        return getattr(full, "pss", full.uss)
    except psutil.Error:  # it has ended
        return 0


def _environment(scratch: str, model: str) -> dict[str, str]:
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if model in PACKAGED:  # its checkpoint lies in the user's cache, and its home folder is another one
        passed["TL_CIRCUITS_CACHE"] = str(cache_dir())
    return passed | {
        GRADING: "1",
        "HOME": scratch,
        "TMPDIR": scratch,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",  # a progress bar has a thread of its own, which the copies of the process do not have
        "MPLBACKEND": "Agg",
        "TOKENIZERS_PARALLELISM": "false",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
