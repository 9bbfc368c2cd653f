"""The process in which a student's notebook runs: ``python -c ... CELLS EVENTS``.

It reads the cells from one file and writes what happens to another, one JSON object in each line. So the process that
started it knows how far it got, whatever happens to it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

NETWORK = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")


def refuse_network() -> None:
    """Make every use of the network raise PermissionError, for the rest of this process."""

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event in NETWORK:
            raise PermissionError("graded code has no network")

    sys.addaudithook(hook)


def main(cells_file: str, events_file: str) -> None:
    """Run the cells, then grade what they defined."""
    refuse_network()
    import torch

    from tl_circuits.course.assignments import find_assignment
    from tl_circuits.course.deadline import Deadline
    from tl_circuits.course.grading import grade
    from tl_circuits.course.questions import open_lab
    from tl_circuits.course.seal import Seal
    from tl_circuits.course.student_code import run_cells

    work = json.loads(Path(cells_file).read_text(encoding="utf-8"))
    # All this is opened before student code can change anything.
    questions, lab, seal = find_assignment(work["assignment"]).questions, open_lab(), Seal.now()
    with open(events_file, "a", encoding="utf-8") as file:

        def tell(**event: Any) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        torch.manual_seed(0)
        asked = [{"function": q.function, "task": q.task, "points": q.points} for q in questions]
        tell(questions=asked)
        deadline = Deadline.after(work["seconds"])
        cells = [(number, source) for number, source in work["cells"]]
        namespace, failures = run_cells(cells, lambda number: tell(cell=number), deadline)
        for failure in failures:
            if not failure.unwritten and not failure.follows:
                tell(crash=failure.text)
        if seal.broken():
            return tell(changed=seal.broken())
        for mark in grade(questions, namespace, lambda question: tell(question=question.function), lab, deadline):
            if seal.broken():
                return tell(changed=seal.broken())
            tell(mark=asdict(mark))
        tell(state="done")
