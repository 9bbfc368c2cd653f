"""Grade a folder: run its notebook in a process of its own, judge its answers here, and put the result together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_circuits.course.assignments import Assignment, open_submission
from tl_circuits.course.grading import Ended, Mark, grade
from tl_circuits.course.notebook_process import GRADING, NotebookProcess
from tl_circuits.course.questions import Question, open_lab
from tl_circuits.errors import CourseError
from tl_circuits.models import PACKAGED, open_packaged

NOT_KEPT_OUT = {
    "namespaces": "This system allows no namespaces (containers often forbid them): the notebook could use the network "
    "through other programs, write wherever you can, and see and end your processes.",
    "files": "This system cannot make files read-only for one process: the notebook could write wherever you can.",
    "processes": "This system hides no processes from the notebook: it could see yours.",
}


@dataclass(frozen=True)
class Report:
    """The result of grading.

    Attributes:
        assignment: the assignment.
        marks: for each question a dict ``function task points earned remarks``.
        remarks: about the notebook as a whole.
        not_kept_out: what this system could not keep the notebook from, in words.
    """

    assignment: Assignment
    marks: tuple[dict[str, Any], ...]
    remarks: tuple[str, ...]
    not_kept_out: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        """The most points possible."""
        return sum(mark["points"] for mark in self.marks)

    @property
    def earned(self) -> int:
        """The points earned."""
        return sum(mark["earned"] for mark in self.marks)


def check(place: Path, time_limit: float | None = None) -> Report:
    """Grade the notebook in a folder, or a notebook itself.

    Args:
        place: the folder or the notebook.
        time_limit: the most seconds that running and checking it may take; None for what the assignment allows.

    Raises:
        CourseError: if there is nothing to grade, or the grading process cannot start.
        ModelError: if the assignment needs a model that is not installed; it says the command that installs it.
    """
    if time_limit is not None and not time_limit > 0:
        raise CourseError(f"the time limit must be more than 0 seconds, got {time_limit}.")
    if os.environ.get(GRADING):
        raise CourseError("a notebook that is being graded cannot grade itself.")
    submission = open_submission(place)
    model, time_limit = submission.assignment.model, time_limit or submission.assignment.seconds
    if model in PACKAGED:
        open_packaged(PACKAGED[model])  # the notebook's process could not write its checkpoint, if it is not there yet
    marks: list[Mark] = []
    with NotebookProcess(submission, time_limit) as process:
        # What judges is opened here, where no code of the notebook runs.
        lab, questions = open_lab(model), submission.assignment.questions
        process.wait_until_ready()
        ran = process.run_cells()
        where = f"in code cell {ran.cell}" if ran.cell else "at its start"

        def begun(question: Question) -> None:
            nonlocal where
            where = f"in `{question.function}`"

        try:
            for mark in grade(() if ran.ended else questions, ran.defined, process.ask, begun, lab, process.deadline):
                marks.append(mark)  # one by one, so that those before an end stay
        except Ended as error:
            ran = replace(ran, ended=str(error))
    remarks = [*ran.crashes]
    if ran.ended:
        remarks.append(f"the notebook {ran.ended} {where}; what comes after that counts 0 points.")
    return Report(
        submission.assignment, _facts(questions, marks), tuple(remarks), tuple(NOT_KEPT_OUT[m] for m in process.missing)
    )


def _facts(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[dict[str, Any], ...]:
    """The marks, and those of questions that were not reached."""
    why = ("not checked: the notebook did not get that far.",)
    missed = (Mark(q.function, q.task, q.points, 0, why) for q in questions[len(marks) :])
    names = ("function", "task", "points", "earned", "remarks")
    return tuple({name: getattr(mark, name) for name in names} for mark in (*marks, *missed))
