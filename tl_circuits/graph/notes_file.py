"""Notes as files beside their graph. A person's notes are never lost: not by tracing again, not to another graph.

The file is named after the whole name of the graph's file: ``why.graph.safetensors.notes.json``. Earlier versions left
the ending out (``why.notes.json``), so that two graphs could share one file. Such a file is still read, and its notes
move to the new name when they are next written.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuits.errors import GraphFileError, OutputError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.notes import Notes
from tl_circuits.support.files import atomic_file
from tl_circuits.support.reading import LARGEST_NOTES, boundary, parse_json, read_bytes

NOTES_VERSION = 1
ENDING = ".notes.json"
ASIDE = ".other"
MOST_ASIDE = 10_000


@dataclass(frozen=True)
class NotesFile:
    """A notes file that was read: where it is, what it says, and the hash of the graph it was made for."""

    path: Path
    notes: Notes
    made_for: str


def notes_path(graph_path: Path) -> Path:
    """Where a graph's notes are written.

    Those of ``capital.graph.safetensors`` are in ``capital.graph.safetensors.notes.json`` beside it.
    """
    return graph_path.with_name(graph_path.name + ENDING)


def earlier_notes_path(graph_path: Path) -> Path:
    """Where earlier versions wrote them: ``capital.notes.json``."""
    return graph_path.with_name(graph_path.name.removesuffix(graph_path.suffix).removesuffix(".graph") + ENDING)


def belongs(made_for: str, graph: AttributionGraph) -> bool:
    """Whether notes made for the graph with this hash are notes of ``graph``."""
    return made_for in (graph.fingerprint, graph.earlier_fingerprint)


def find_notes(graph: AttributionGraph, graph_path: Path) -> NotesFile | None:
    """The notes beside a graph's file that belong to the graph; else those of another graph there; None if none are.

    Raises:
        GraphFileError: if a notes file is there but cannot be read.
    """
    others = []
    for path in (notes_path(graph_path), earlier_notes_path(graph_path)):
        if path.is_file():
            found = read_notes(path)
            if belongs(found.made_for, graph):
                return found
            others.append(found)
    return others[0] if others else None


def with_notes_beside(graph: AttributionGraph, graph_path: Path) -> AttributionGraph:
    """``graph`` with the notes beside its file, if there are any and they belong to it.

    Raises:
        GraphFileError: if a notes file is there but cannot be read, or names nodes that the graph does not have.
    """
    found = find_notes(graph, graph_path)
    if found is None or not belongs(found.made_for, graph):
        return graph
    try:
        return graph.with_notes_read(found.notes)
    except ValueError as error:
        raise GraphFileError(f"cannot use the notes {found.path}: {error}") from error


def save_notes_beside(graph: AttributionGraph, graph_path: Path) -> None:
    """Write a graph's notes beside its file, and lose none that are there.

    * A graph without notes leaves the file alone, unless it was read together with the notes that are now taken back.
    * Notes of another graph, damaged notes, and notes of this graph that say what the new ones lack are put aside
      under a new name, unless the graph was read together with them.

    Raises:
        OutputError: if a file cannot be written or renamed.
    """
    known = graph._notes_read
    if graph.notes == Notes() and known is None:
        return
    for path in (notes_path(graph_path), earlier_notes_path(graph_path)):
        if path.is_file() and not _is_readable(path):
            put_aside(path)
    found = find_notes(graph, graph_path)
    if found is not None and belongs(found.made_for, graph):
        if found.notes == graph.notes:
            return
        if found.notes != known and not graph.notes.holds(found.notes):
            if graph.notes == Notes():
                return
            put_aside(found.path)
    elif graph.notes == Notes():
        return
    replace_notes(graph, graph.notes, graph_path)


def replace_notes(graph: AttributionGraph, notes: Notes, graph_path: Path) -> None:
    """Write ``notes`` as those of ``graph``. A file of another graph in the way is put aside; this graph's own earlier
    file is removed once the new one is written.

    Raises:
        GraphFileError: if the file in the way cannot be read.
        OutputError: if the file cannot be written.
    """
    target, earlier = notes_path(graph_path), earlier_notes_path(graph_path)
    if target.is_file() and not belongs(read_notes(target).made_for, graph):
        put_aside(target)
    with atomic_file(target, overwrite=True) as file:
        file.write(notes_json(notes, graph.fingerprint).encode())
    if (
        earlier != target
        and earlier.is_file()
        and _is_readable(earlier)
        and belongs(read_notes(earlier).made_for, graph)
    ):
        earlier.unlink()


def put_aside(path: Path) -> Path:
    """Rename a notes file to ``NAME.other``, or to ``NAME.other-2`` and so on where that is taken.

    Returns:
        The new path.

    Raises:
        OutputError: if it cannot be renamed.
    """
    for number in range(1, MOST_ASIDE):
        aside = path.with_name(path.name + ASIDE + (f"-{number}" if number > 1 else ""))
        try:
            # Only one process can make the empty file, so two of them never rename to the same name.
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(path, aside)
            return aside
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(
                f"cannot put the notes {path} aside as {aside.name}: {error.strerror or error}."
            ) from error
    raise OutputError(f"{path.name}{ASIDE} and {MOST_ASIDE} more names are taken. Remove some of them.")


def notes_json(notes: Notes, graph_hash: str) -> str:
    """The notes file's text."""
    groups = [[label, *ids] for label, ids in notes.groups]
    content = {"version": NOTES_VERSION, "graph": graph_hash, "pins": list(notes.pins), "groups": groups}
    return json.dumps(content | {"names": notes.names, "text": notes.text}, ensure_ascii=False, indent=1) + "\n"


def parse_notes(content: Any) -> tuple[Notes, str]:
    """Notes, and the hash of the graph they were made for, from the JSON of a notes file.

    Raises:
        GraphFileError: if the JSON is not that of a notes file.
    """
    with boundary(GraphFileError, "the text given as notes"):
        if content["version"] > NOTES_VERSION:
            raise GraphFileError(f"notes of format {content['version']} need a newer tl_circuits.")
        groups = tuple((_text(label), tuple(map(_text, ids))) for label, *ids in content["groups"])
        names = {_text(node): _text(name) for node, name in content["names"].items()}
        notes = Notes(groups, tuple(map(_text, content["pins"])), names, _text(content["text"]))
        return notes, _text(content["graph"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def read_notes(path: Path) -> NotesFile:
    """A notes file.

    Raises:
        GraphFileError: if it cannot be read, or is not a notes file.
    """
    try:
        return NotesFile(
            path, *parse_notes(parse_json(read_bytes(path, LARGEST_NOTES, GraphFileError), path, GraphFileError))
        )
    except GraphFileError as error:
        raise GraphFileError(f"cannot read the notes {path}: {error}") from error


def _is_readable(path: Path) -> bool:
    try:
        read_notes(path)
        return True
    except GraphFileError:
        return False
