"""Grade a folder: run its notebook in a process of its own, with a time limit, and put the result together."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuits.course.assignments import Assignment, open_submission
from tl_circuits.errors import CourseError

TIME_LIMIT = 120.0
START_LIMIT = 120.0  # seconds for Python to import everything; they do not count against the student's time
GRADING = "TL_CIRCUITS_GRADING"
# The student's folder must not come first on the path, or a file torch.py in it would be imported as torch.
CODE = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    "from tl_circuits.course.student_process import main; main(*sys.argv[1:])"
)


@dataclass(frozen=True)
class Report:
    """The result of grading.

    Attributes:
        assignment: the assignment.
        marks: for each question a dict ``function task points earned remarks``.
        remarks: about the notebook as a whole.
    """

    assignment: Assignment
    marks: tuple[dict[str, Any], ...]
    remarks: tuple[str, ...]

    @property
    def points(self) -> int:
        """The most points possible."""
        return sum(mark["points"] for mark in self.marks)

    @property
    def earned(self) -> int:
        """The points earned."""
        return sum(mark["earned"] for mark in self.marks)


def check(place: Path, time_limit: float = TIME_LIMIT) -> Report:
    """Grade the notebook in a folder, or a notebook itself.

    Args:
        place: the folder or the notebook.
        time_limit: the most seconds that running and checking it may take.

    Raises:
        CourseError: if there is nothing to grade, or the grading process cannot start.
    """
    if not time_limit > 0:
        raise CourseError(f"the time limit must be more than 0 seconds, got {time_limit}.")
    if os.environ.get(GRADING):
        raise CourseError("a notebook that is being graded cannot grade itself.")
    submission = open_submission(place)
    work = {"assignment": str(submission.assignment.number), "cells": submission.cells, "seconds": time_limit}
    with tempfile.TemporaryDirectory(prefix="tl-circuits-course-") as made:
        cells, log, errors = (Path(made) / name for name in ("cells.json", "events", "errors"))
        cells.write_text(json.dumps(work), encoding="utf-8")
        log.touch()
        ended = _run(cells, log, submission.path.resolve().parent, errors, time_limit)
        events = _events(log)
        said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not events:
        why = f"{START_LIMIT:g} s were not enough" if ended is None else said[-1] if said else f"exit code {ended}"
        raise CourseError(f"the grading process did not start: {why}.")
    return _report(submission.assignment, events, ended, time_limit)


def _run(cells: Path, log: Path, folder: Path, errors: Path, time_limit: float) -> int | None:
    """The exit code of the student's process; None if it took too long. Everything that it started is ended too."""
    environment = {
        **os.environ,
        GRADING: "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "TOKENIZERS_PARALLELISM": "false",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    with open(errors, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(cells), str(log)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + START_LIMIT
            while not log.stat().st_size and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            return process.wait(time_limit if log.stat().st_size else 0.1)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its children, that is, its own process group."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):  # nothing is left of it
        pass
    process.wait()


def _events(log: Path) -> list[dict[str, Any]]:
    """What the process reported. A last line that was cut off does not count."""
    events = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def _report(assignment: Assignment, events: list[dict[str, Any]], ended: int | None, time_limit: float) -> Report:
    remarks = [event["crash"] for event in events if "crash" in event]
    given = {event["mark"]["function"]: event["mark"] for event in events if "mark" in event}
    changed = next((event["changed"] for event in events if "changed" in event), None)
    why = "not checked: the notebook did not get that far."
    if changed:
        why = "not checked: the notebook changes the checker."
        remarks.append(f"the notebook changes the checker ({', '.join(changed)}). Take that out, then it will be graded.")
    elif {"state": "done"} not in events:
        last: dict[str, Any] = next((e for e in reversed(events) if "cell" in e or "question" in e), {})
        where = f"in code cell {last['cell']}" if "cell" in last else f"in `{last['question']}`" if last else "at its start"
        remarks.append(f"the notebook {_end_of(ended, time_limit)} {where}; what comes after that counts 0 points.")
    marks = []
    for question in events[0]["questions"]:
        marks.append(given.get(question["function"], question | {"earned": 0, "remarks": (why,)}))
    return Report(assignment, tuple(marks), tuple(remarks))


def _end_of(code: int | None, time_limit: float) -> str:
    """In words, how a process ended that did not get to its end."""
    if code is None:
        return f"took longer than {time_limit:g} s and was stopped"
    if code < 0 and -code in set(signal.Signals):
        hint = ", perhaps because memory ran out" if -code == 9 else ""
        return f"was ended by the system ({signal.Signals(-code).name}{hint})"
    return f"ended its process (exit code {code})"
