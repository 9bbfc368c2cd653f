"""Run what a student wrote, and say in words where it failed."""

import ast
import linecache
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dis import opmap
from typing import Any

from tl_circuits.course.deadline import NEVER, Deadline, StillRunning

CELL = re.compile(r"<cell (\d+)>")


@dataclass(frozen=True)
class Failure:
    """What student code raised, in words.

    Attributes:
        text: the exception and where it was raised.
        unwritten: whether it only means that a function is not written yet.
        name: the name that is missing, if one is.
        looped: whether it was stopped because its time was over.
        follows: whether it only follows from the failure of an earlier cell, which would have defined ``name``.
    """

    text: str
    unwritten: bool
    name: str = ""
    looped: bool = False
    follows: bool = False


@contextmanager
def caught(failures: list[Failure]) -> Any:
    """Append to ``failures`` whatever student code raises, also if it tries to end the program."""
    try:
        yield
    except BaseException as error:  # students' code may raise SystemExit and KeyboardInterrupt, too
        missing = error.name if isinstance(error, NameError) else None
        failures.append(Failure(describe(error), _unwritten(error), missing or "", isinstance(error, StillRunning)))


def describe(error: BaseException) -> str:
    """The exception, with the number and line of the code cell in which it was raised."""
    said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    for filename, line in reversed(_frames(error)):
        match = CELL.fullmatch(filename)
        if match and line:
            return f"{text} (code cell {match[1]}, line {line}: `{linecache.getline(filename, line).strip()}`)"
    return text


def _frames(error: BaseException) -> list[tuple[str, int | None]]:
    if isinstance(error, SyntaxError):
        return [(error.filename or "", error.lineno)]
    return [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]


def _unwritten(error: BaseException) -> bool:
    """Whether a ``raise`` in a cell raised NotImplementedError, as the starters do. Libraries raise it for other
    reasons.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not isinstance(error, NotImplementedError):
        return False
    code = last.tb_frame.f_code
    return bool(CELL.fullmatch(code.co_filename)) and code.co_code[last.tb_lasti] == opmap["RAISE_VARARGS"]


def run_cells(
    cells: Sequence[tuple[int, str]], started: Callable[[int], None], deadline: Deadline = NEVER
) -> tuple[dict[str, Any], list[Failure]]:
    """Run code cells one after the other. A cell that fails, or uses up half of the time that is left, does not stop
    the next.

    Args:
        cells: number and source of each cell.
        started: called with each cell's number before it runs.
        deadline: when everything must be done.

    Returns:
        What the cells defined, and the failures.
    """
    namespace: dict[str, Any] = {"__name__": "__main__", "display": lambda *_, **__: None}
    failures: list[Failure] = []
    missing: set[str] = set()  # what cells that failed would have defined, and names that were missed already
    for number, source in cells:
        started(number)
        name = f"<cell {number}>"
        source = without_magics(source)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        known = len(failures)
        with caught(failures), deadline.half().interrupting():
            exec(compile(source, name, "exec"), namespace)
        if len(failures) > known:
            failures[-1] = replace(failures[-1], follows=failures[-1].name in missing)
            missing |= {failures[-1].name, *defined(source)} - {""}
    return namespace, failures


def defined(source: str) -> set[str]:
    """The names that a cell defines. If the cell is not valid Python: the names of its functions."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return set(re.findall(r"^def (\w+)", source, re.MULTILINE))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {(a.asname or a.name).split(".")[0] for a in nodes if isinstance(a, ast.alias)}


def without_magics(source: str) -> str:
    """The cell without lines for the notebook's own shell (``%pip``, ``!ls``). Line numbers stay the same."""
    try:
        compile(source, "<cell>", "exec")
    except (SyntaxError, ValueError):
        lines = source.split("\n")
        if lines[0].startswith("%%") and not lines[0].startswith("%%time"):
            return ""
        return "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)
    return source
