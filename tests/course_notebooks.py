"""Notebooks of the course as students hand them in: starters with the reference solutions filled in, right or wrong."""

import ast
import json
from pathlib import Path

import torch

from tl_circuits.course.answering import answer
from tl_circuits.course.assignments import Assignment
from tl_circuits.course.deadline import NEVER
from tl_circuits.course.grading import grade

SOLUTIONS = Path(__file__).parent / "course_solutions"


def solution(assignment: Assignment) -> dict[str, str]:
    """The source of each function of the reference solution."""
    text = (SOLUTIONS / f"{assignment.name}.py").read_text()
    return {
        node.name: ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def filled(assignment: Assignment, functions: dict[str, str]) -> dict:
    """The starter with some functions written."""
    notebook = json.loads(assignment.starter.read_text())
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        name = source.removeprefix("def ").split("(")[0]
        if source.startswith("def ") and name in functions:
            cell["source"] = functions[name]
    return notebook


def hand_in(assignment: Assignment, functions: dict[str, str], folder: Path) -> Path:
    """Write such a notebook into ``folder``; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / assignment.starter.name).write_text(json.dumps(filled(assignment, functions)))
    return folder


def graded(questions, namespace, lab=None, deadline=NEVER, first=None, ready=None):
    """The marks, with all that is asked and answered going through messages, as between two processes. ``first``: the
    seconds that the first call may take. ``ready``: models that all calls share."""
    limits = iter([] if first is None else [first])
    defined = {name: "function" if callable(value) else type(value).__name__ for name, value in namespace.items()}
    references = {q.function: q.reference for q in questions if q.reference}

    def ask(request, seconds):
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return answer(request, next(limits, seconds), namespace, lambda: references, ready=ready)

    return {m.function: m for m in grade(questions, defined, ask, lab=lab, deadline=deadline)}
