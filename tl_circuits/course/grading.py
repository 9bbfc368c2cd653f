"""From a notebook's answers to points. Nothing of this runs in the notebook's process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tl_circuits.course.deadline import NEVER, Deadline
from tl_circuits.course.ended import in_words
from tl_circuits.course.questions import Lab, Part, Question, WrongAnswer, open_lab
from tl_circuits.course.wire import pack, unpack
from tl_circuits.errors import CourseError, TLCircuitsError
from tl_circuits.support.reading import quoted

Ask = Callable[[bytes, float], bytes]
"""Sends a request to the notebook's process and returns its answer, within some seconds; see :mod:`answering`."""


@dataclass(frozen=True)
class Mark:
    """The points for one question, and what is missing.

    Attributes:
        function: the function asked for.
        task: what it does.
        points: the most points.
        earned: the points earned.
        remarks: what is wrong, in words.
        returns: False if the function was stopped, or ended its process.
    """

    function: str
    task: str
    points: int
    earned: int
    remarks: tuple[str, ...]
    returns: bool = True


class Ended(Exception):
    """The notebook's process ended, or had to be ended. The message says how: "took longer than 3 s and was
    stopped"."""


class Failed(Exception):
    """A function of the notebook did not return; ``looped`` says that it was stopped, or ended its process."""

    def __init__(self, text: str, unwritten: bool = False, looped: bool = False) -> None:
        super().__init__(text)
        self.unwritten, self.looped = unwritten, looped


@dataclass
class Student:
    """A function of the notebook: calling it sends the arguments to the notebook's process and returns the answer.

    Attributes:
        function: its name.
        ask: sends the request.
        deadline: when its calls must be done.
        instead: functions that never returned. The reference's stand in for them.
        hooks_left: the most hooks that stayed on the model that a call was given.
    """

    function: str
    ask: Ask
    deadline: Deadline
    instead: Sequence[str] = ()
    hooks_left: int = field(default=0, init=False)

    def __call__(self, *arguments: Any) -> Any:
        """The answer for some arguments.

        Raises:
            Failed: if the function raised, was stopped, or ended its process.
        """
        seconds = min(max(0.01, self.deadline.seconds), 1e6)
        request = {"function": self.function, "arguments": list(arguments), "instead": list(self.instead)}
        reply = unpack(self.ask(pack(request), seconds))
        if not isinstance(reply, dict):
            raise CourseError("the notebook's process sent no answer, but something else.")
        if "returned" in reply and isinstance(reply.get("hooks"), int):
            self.hooks_left = max(self.hooks_left, reply["hooks"])
            return reply["returned"]
        if isinstance(reply.get("ended"), int):
            raise Failed(f"it {in_words(reply['ended'])}.", looped=True)
        raise Failed(f"it raised {reply.get('raised')}.", bool(reply.get("unwritten")), bool(reply.get("looped")))


def grade(
    questions: Sequence[Question],
    defined: Mapping[str, str],
    ask: Ask,
    begun: Callable[[Question], None] = lambda question: None,
    lab: Lab | None = None,
    deadline: Deadline = NEVER,
) -> Iterator[Mark]:
    """Check one question after the other.

    Args:
        questions: the questions.
        defined: what the notebook defines: for each name ``"function"``, or its type.
        ask: sends a request to the notebook's process.
        begun: called with each question before its function is called.
        lab: holds the reference model.
        deadline: each question gets at most half of the time that is left until then.
    """
    lab = lab or open_lab()
    never_returned: list[str] = []
    for question in questions:
        begun(question)
        given = mark(question, defined, Student(question.function, ask, deadline.half(), tuple(never_returned)), lab)
        if not given.returns:
            never_returned.append(question.function)
        yield given


def mark(question: Question, defined: Mapping[str, str], student: Student, lab: Lab) -> Mark:
    """The points for one question. Parts before a part that fails keep their points."""
    name = question.function
    if defined.get(name) != "function":
        why = f"the notebook defines no function `{name}`."
        if name in defined:
            why = f"`{name}` is {defined[name]}, not a function."
        return Mark(name, question.task, question.points, 0, (why,))
    parts: list[Part] = []
    failed: list[str] = []
    returns = True
    try:
        for part in question.check(student, lab):
            parts.append(part)  # one by one, so that those before a failure stay
    except WrongAnswer as error:
        failed.append(str(error))
    except Failed as error:
        failed.append("not written yet." if error.unwritten else str(error))
        returns = not error.looped
    except Ended:
        raise
    # an answer that looks right and is not, such as an edit at no position
    except (
        TLCircuitsError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
    ) as error:
        failed.append(f"its answer cannot be judged: {quoted(str(error))}")
    remarks = (*dict.fromkeys(part.hint for part in parts if not part.right), *failed)
    earned = sum(part.points for part in parts if part.right)
    return Mark(name, question.task, question.points, earned, remarks, returns)
