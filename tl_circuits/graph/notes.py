"""What a person adds to a graph: groups, pins, names, text. It is kept in a small file beside the graph."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.nodes import OPTIONAL, GraphInfo
from tl_circuits.support.files import atomic_file

NOTES_VERSION = 1
# Fields of GraphInfo that came later. They stay out of the hash, so that notes of older files still fit their graph.
LATER_FIELDS = ("recurring", "sample", "prompt_exact", "skip_positions", "prepended", "select", "baseline", "compared_with")
Groups = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Notes:
    """What a person adds to a graph: groups of nodes, pins, names and text.

    Attributes:
        groups: (label, node ids) for each group. Labels differ, and a node is in one group at most.
        pins: ids of the nodes that every picture shows.
        names: the person's names for nodes, by id.
        text: anything else.

    Raises:
        ValueError: if a label or a node is in two groups.

    Examples:
        >>> notes = tlc.Notes(pins=("L0/F308@7",)).group("Texas", ["L0/F308@7", "L0/F71@7"])
        >>> notes.groups
        (('Texas', ('L0/F308@7', 'L0/F71@7')),)
    """

    groups: Groups = ()
    pins: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        labels = [label for label, _ in self.groups]
        members = [node for _, ids in self.groups for node in ids]
        for what, items in (("label", labels), ("node", members)):
            twice = sorted({item for item in items if items.count(item) > 1}) if len(set(items)) < len(items) else []
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is in two groups. Give each group its own {what}s.")

    def group(self, label: str, ids: Iterable[str]) -> "Notes":
        """The notes with these nodes in a group of their own. They leave the groups they were in.

        Raises:
            ValueError: for a label in use, or a group without a label or nodes.
        """
        ids = tuple(dict.fromkeys(ids))
        if not label.strip() or not ids:
            raise ValueError("a group needs a label and at least one node.")
        left = tuple((name, tuple(i for i in old if i not in ids)) for name, old in self.groups)
        left = tuple((name, old) for name, old in left if old)
        if label in dict(left):
            raise ValueError(f"there is a group {label!r} already; ungroup it or take another label.")
        return replace(self, groups=(*left, (label, ids)))

    def ungroup(self, label: str) -> "Notes":
        """The notes without one group.

        Raises:
            KeyError: if there is no such group; it names those there are.
        """
        self._require(label)
        return replace(self, groups=tuple(g for g in self.groups if g[0] != label))

    def rename(self, old: str, new: str) -> "Notes":
        """The notes with the group ``old`` called ``new``.

        Raises:
            KeyError: if there is no group ``old``.
            ValueError: if ``new`` is empty or in use.
        """
        self._require(old)
        if not new.strip():
            raise ValueError("a group needs a label.")
        return replace(self, groups=tuple((new if g[0] == old else g[0], g[1]) for g in self.groups))

    def _require(self, label: str) -> None:
        if label not in dict(self.groups):
            raise KeyError(f"there is no group {label!r}; there are {[g[0] for g in self.groups]}.")

    def of(self, ids: Iterable[str]) -> "Notes":
        """The part of these notes that is about the nodes given."""
        known = set(ids)
        groups = ((label, tuple(i for i in members if i in known)) for label, members in self.groups)
        return Notes(
            tuple(g for g in groups if g[1]),
            tuple(i for i in self.pins if i in known),
            {i: name for i, name in self.names.items() if i in known},
            self.text,
        )


@dataclass(frozen=True)
class Supernodes:
    """Boxes of features for a picture, as :meth:`AttributionGraph.supernodes` makes them.

    Attributes:
        groups: (label, node ids) for each box. A person's own groups come first, unchanged; the others follow by
            influence.
        lump_error: how much is lost by drawing boxes instead of features, from 0 (nothing) to 1 (everything). For each
            feature, take where its inputs come from and where its outputs go, as shares among boxes, tokens and
            targets. The error is the total-variation distance between these shares and the mean of its box, averaged
            over features by influence.

    Examples:
        >>> found = graph.supernodes()
        >>> len(found.groups[0][1]) > 1, found.lump_error < 0.18
        (True, True)
    """

    groups: Groups
    lump_error: float


def fingerprint(info: GraphInfo, *tables: Any) -> str:
    """A hash of what was traced: prompt, model, nodes and edges, without labels and notes."""
    stored = asdict(info)
    for later in LATER_FIELDS:
        stored.pop(later, None)
    made = hashlib.sha256(json.dumps(stored, sort_keys=True).encode())
    for table in tables:
        for column in fields(table):
            if column.name in OPTIONAL:
                continue
            made.update(getattr(table, column.name).contiguous().numpy().tobytes())
    return made.hexdigest()[:32]


def notes_path(graph_path: Path) -> Path:
    """Where a graph's notes are: ``capital.notes.json`` beside ``capital.graph.safetensors``."""
    name = graph_path.name.removesuffix(graph_path.suffix).removesuffix(".graph")
    return graph_path.with_name(name + ".notes.json")


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
    try:
        if content["version"] > NOTES_VERSION:
            raise GraphFileError(f"notes of format {content['version']} need a newer tl_circuits.")
        groups = tuple((_text(label), tuple(map(_text, ids))) for label, *ids in content["groups"])
        names = {_text(node): _text(name) for node, name in content["names"].items()}
        notes = Notes(groups, tuple(map(_text, content["pins"])), names, _text(content["text"]))
        return notes, _text(content["graph"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, GraphFileError):
            raise
        raise GraphFileError(f"these are not notes of tl_circuits: {type(error).__name__}: {error}.") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def read_notes(path: Path) -> tuple[Notes, str]:
    """Notes, and the hash of the graph they were made for, from a file.

    Raises:
        GraphFileError: if it cannot be read, or is not a notes file.
    """
    try:
        return parse_notes(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise GraphFileError(f"cannot read the notes {path}: {error}") from error


def write_notes(notes: Notes, graph_hash: str, path: Path) -> None:
    """Write the notes file, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    with atomic_file(path, overwrite=True) as file:
        file.write(notes_json(notes, graph_hash).encode())
