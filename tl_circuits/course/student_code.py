"""Run what a student wrote, and say in words where it failed."""

import linecache
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CELL = re.compile(r"<cell (\d+)>")


@dataclass(frozen=True)
class Failure:
    """What student code raised: in words, and whether that only means that a function is still to be written."""

    text: str
    unwritten: bool


@contextmanager
def caught(failures: list[Failure]) -> Any:
    """Append to ``failures`` whatever student code raises, its attempts to end the program included."""
    try:
        yield
    except BaseException as error:
        failures.append(Failure(describe(error), isinstance(error, NotImplementedError)))


def describe(error: BaseException) -> str:
    """The exception with cell number and line, from the innermost frame that lies in a cell."""
    said = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        said = error.msg
        frames = [(error.filename or "", error.lineno)]
    else:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    for filename, line in reversed(frames):
        match = CELL.fullmatch(filename)
        if match and line:
            source = linecache.getline(filename, line).strip()
            return f"{text} (code cell {match[1]}, line {line}: `{source}`)"
    return text


def run_cells(cells: Sequence[tuple[int, str]], started: Callable[[int], None]) -> tuple[dict[str, Any], list[Failure]]:
    """Run code cells, one after the other, going on after one that fails.

    Returns what they defined, and the failures. ``started`` is told each cell's number before it runs.
    """
    namespace: dict[str, Any] = {"__name__": "__main__", "display": lambda *_, **__: None}
    failures: list[Failure] = []
    for number, source in cells:
        started(number)
        name = f"<cell {number}>"
        source = without_magics(source)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        with caught(failures):
            exec(compile(source, name, "exec"), namespace)
    return namespace, failures


def without_magics(source: str) -> str:
    """The cell without lines for the notebook's own shell (``%pip``, ``!ls``), line numbers kept."""
    try:
        compile(source, "<cell>", "exec")
    except (SyntaxError, ValueError):
        lines = source.split("\n")
        if lines[0].startswith("%%") and not lines[0].startswith("%%time"):
            return ""
        return "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)
    return source
