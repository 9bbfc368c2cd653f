"""The five assignments: names and starter notebooks, and how the assignment of a folder is recognised."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_circuits.errors import CourseError, OutputError
from tl_circuits.models import BUILTIN
from tl_circuits.support.reading import read_bytes

if TYPE_CHECKING:
    from tl_circuits.course.questions import Question

LARGEST_NOTEBOOK = 64 * 1024**2  # bytes, with its pictures
STARTERS = Path(__file__).parent / "notebooks"


@dataclass(frozen=True)
class Assignment:
    """One assignment.

    Attributes:
        number: 1 to 5.
        name: the name of its notebook, and of the module with its checks.
        title: what it is about.
        model: the model that it uses.
        seconds: how long running and checking its notebook may take.
    """

    number: int
    name: str
    title: str
    model: str = BUILTIN
    seconds: float = 120.0

    @property
    def starter(self) -> Path:
        """The notebook that students start from."""
        return STARTERS / f"{self.name}.ipynb"

    @property
    def questions(self) -> "tuple[Question, ...]":
        """The questions. Importing them imports torch and the model."""
        return import_module(f"tl_circuits.course.checks.{self.name}").QUESTIONS


ASSIGNMENTS = (
    Assignment(1, "hooks_and_features", "Hooks and features by hand"),
    Assignment(2, "two_layer_graph", "An attribution graph from scratch for two layers"),
    Assignment(3, "two_hop_circuit", "Find and test a two-hop circuit"),
    Assignment(4, "faithfulness", "How faithful a graph is, and where it lies"),
    Assignment(
        5,
        "fact_neurons",
        "The neurons that carry a fact in a real model, and how sure you can be",
        "smollm2-135m",
        240.0,
    ),
)


def find_assignment(number: str) -> Assignment:
    """The assignment with a number or name, given as text.

    Raises:
        CourseError: if there is none; it names all.
    """
    for assignment in ASSIGNMENTS:
        if number.strip() in (str(assignment.number), assignment.name):
            return assignment
    known = "; ".join(f"{a.number} {a.title}" for a in ASSIGNMENTS)
    raise CourseError(f"there is no assignment {number!r}; there are: {known}.")


def start(assignment: Assignment, folder: Path) -> Path:
    """Copy the starter notebook into a new folder, and return the notebook's path.

    Raises:
        OutputError: if ``folder`` exists or cannot be made.
    """
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} exists already; give a folder that does not, so that no work is overwritten.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".course-") as made:
            whole = Path(made) / "whole"
            whole.mkdir()
            shutil.copyfile(assignment.starter, whole / assignment.starter.name)
            os.replace(whole, folder)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror or error}.") from error
    return folder / assignment.starter.name


@dataclass(frozen=True)
class Submission:
    """A notebook handed in: its assignment, and its code cells with their numbers, counted from 1 as Jupyter does."""

    assignment: Assignment
    path: Path
    cells: tuple[tuple[int, str], ...]


def open_submission(place: Path) -> Submission:
    """The notebook in a folder, or a notebook itself.

    Raises:
        CourseError: if there is none, more than one, or one that cannot be read.
    """
    if not place.exists():
        raise CourseError(f"{place} does not exist; `tl-circuits course start N {place}` makes it.")
    paths = sorted(p for p in place.glob("*.ipynb") if p.is_file()) if place.is_dir() else [place]
    if not paths:
        raise CourseError(f"{place} holds no notebook (*.ipynb); `tl-circuits course start N FOLDER` makes one.")
    known = [path for path in paths if _by_name(path)] or paths
    if len(known) > 1:
        names = ", ".join(path.name for path in known)
        raise CourseError(f"{place} holds several notebooks ({names}); give the one to check.")
    path = known[0]
    notebook = _read(path)
    assignment = _by_name(path) or _by_metadata(notebook)
    if assignment is None:
        names = ", ".join(a.starter.name for a in ASSIGNMENTS)
        raise CourseError(
            f"{path} is none of the assignments' notebooks. Rename it to its original name, one of {names}."
        )
    sources = [_source(cell) for cell in notebook["cells"] if cell.get("cell_type") == "code"]
    return Submission(assignment, path, tuple(enumerate(sources, 1)))


def _by_name(path: Path) -> Assignment | None:
    return next((a for a in ASSIGNMENTS if path.name == a.starter.name), None)


def _by_metadata(notebook: dict[str, Any]) -> Assignment | None:
    metadata = notebook.get("metadata")
    number = metadata.get("tl_circuits_assignment") if isinstance(metadata, dict) else None
    return next((a for a in ASSIGNMENTS if a.number == number), None)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():  # opening a pipe would wait for ever
        raise CourseError(f"{path} is not a file; give the notebook or its folder.")
    try:
        notebook = json.loads(read_bytes(path, LARGEST_NOTEBOOK, CourseError).decode("utf-8"))
    except CourseError:
        raise
    except (ValueError, RecursionError) as error:
        raise CourseError(f"{path} is not a notebook: {error}. Save it again from Jupyter.") from error
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise CourseError(
            f"{path} is not a notebook of format 4 (it has no list of cells). Save it again from Jupyter."
        )
    return notebook


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(map(str, source))
