"""From the functions in a notebook to points."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tl_circuits.course.deadline import NEVER, Deadline
from tl_circuits.course.questions import Lab, Part, Question, WrongAnswer, open_lab
from tl_circuits.course.student_code import Failure, caught


@dataclass(frozen=True)
class Mark:
    """The points for one question, and what is missing."""

    function: str
    task: str
    points: int
    earned: int
    remarks: tuple[str, ...]


def grade(
    questions: Sequence[Question],
    namespace: Mapping[str, Any],
    begun: Callable[[Question], None] = lambda question: None,
    lab: Lab | None = None,
    deadline: Deadline = NEVER,
) -> Iterator[Mark]:
    """Check one question after the other.

    Args:
        questions: the questions.
        namespace: what the notebook defined.
        begun: called with each question before its function is called.
        lab: holds the reference model. Open it before student code runs.
        deadline: each question gets at most half of the time that is left until then.
    """
    ours = (lab or open_lab()).ours
    for question in questions:
        begun(question)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        yield mark(question, namespace, Lab(ours), deadline)


def mark(question: Question, namespace: Mapping[str, Any], lab: Lab, deadline: Deadline = NEVER) -> Mark:
    """The points for one question. Parts before a part that fails keep their points."""
    name = question.function
    student = namespace.get(name)
    if not callable(student):
        why = f"the notebook defines no function `{name}`."
        if student is not None:
            why = f"`{name}` is {type(student).__name__}, not a function."
        return Mark(name, question.task, question.points, 0, (why,))
    parts: list[Part] = []
    failures: list[Failure] = []
    wrong: list[str] = []
    with caught(failures), deadline.half_of_the_rest():
        try:
            for part in question.check(student, lab):
                parts.append(part)  # one by one, so that those before a failure stay
        except WrongAnswer as error:
            wrong.append(str(error))
    remarks = [*dict.fromkeys(part.hint for part in parts if not part.right), *wrong]
    for failure in failures:
        remarks.append("not written yet." if failure.unwritten else f"it raised {failure.text}.")
    earned = sum(part.points for part in parts if part.right)
    return Mark(name, question.task, question.points, earned, tuple(remarks))

