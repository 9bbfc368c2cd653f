"""Notebooks of the course as students hand them in: starters with the reference solutions filled in, right or wrong."""

import ast
import json
from pathlib import Path

from tl_circuits.course.assignments import Assignment

SOLUTIONS = Path(__file__).parent / "course_solutions"


def solution(assignment: Assignment) -> dict[str, str]:
    """The source of each function of the reference solution."""
    text = (SOLUTIONS / f"{assignment.name}.py").read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


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
