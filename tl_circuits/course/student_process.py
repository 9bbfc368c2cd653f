"""The process in which a student's notebook runs, as :mod:`confine` starts it.

It reads requests from its standard input and writes messages to its standard output (see :mod:`channel`): first
``ready``, then for each cell its number, then what the notebook defines, then one answer for each request. Points are
given in another process. Whatever happens here, the worst that this one can send is a wrong answer.
"""

import json
import os
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

NETWORK = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")


def refuse_network() -> None:
    """Make every use of the network raise PermissionError, for the rest of this process."""

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event in NETWORK:
            raise PermissionError("graded code has no network")

    sys.addaudithook(hook)


def take_over() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output, for messages alone: what the notebook reads and prints goes nowhere."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return requests, answers


def main(missing: list[str], model: str) -> None:
    """Run the cells, then answer requests until there are no more.

    Args:
        missing: what :mod:`confine` could not do on this system.
        model: the model that the assignment uses.
    """
    requests, answers = take_over()
    refuse_network()
    import torch

    torch.set_num_threads(1)  # a copy of this process can wait for ever for threads that only the original has
    from tl_circuits.course.answering import answer, answer_apart
    from tl_circuits.course.assignments import find_assignment
    from tl_circuits.course.channel import receive, send
    from tl_circuits.course.deadline import Deadline
    from tl_circuits.course.handouts import Attached, Opener, with_neurons
    from tl_circuits.course.student_code import run_cells
    from tl_circuits.models import BUILTIN

    ready = {}
    if model != BUILTIN and hasattr(os, "fork"):  # opened once, for the copies of this process that answer
        ready[model] = with_neurons(model)
    else:
        Opener().open(Attached())  # the first time takes long: it imports what the model needs

    def tell(**event: Any) -> None:
        send(answers, json.dumps(event).encode())

    tell(ready=True, missing=missing)
    work = json.loads(receive(requests) or b"{}")
    torch.manual_seed(0)
    cells = [(number, source) for number, source in work["cells"]]
    namespace, failures = run_cells(cells, lambda number: tell(cell=number), Deadline.after(work["seconds"]))
    crashes = [failure.text for failure in failures if not failure.unwritten and not failure.follows]
    defined = {name: "function" if callable(value) else type(value).__name__ for name, value in namespace.items()}
    tell(crashes=crashes, defined=defined)

    def references() -> dict[str, Callable[..., Any]]:
        questions = find_assignment(work["assignment"]).questions
        return {question.function: question.reference for question in questions if question.reference}

    def respond(request: bytes) -> bytes:
        seconds = struct.unpack(">d", request[:8])[0]
        return answer_apart(seconds, lambda opened: answer(request[8:], seconds, namespace, references, opened, ready))

    while request := receive(requests):
        send(answers, respond(request))
