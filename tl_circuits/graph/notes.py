"""What a person adds to a graph: groups, pins, names, text. ``notes_file.py`` keeps it beside the graph."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

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
            twice = sorted(item for item, count in Counter(items).items() if count > 1)
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is in two groups. Give each group its own {what}s.")

    def group(self, label: str, ids: Iterable[str]) -> "Notes":
        """The notes with these nodes in a group of their own. They leave the groups they were in.

        Args:
            label: the group's label.
            ids: the nodes' ids.

        Returns:
            New notes.

        Raises:
            ValueError: for a label in use, or a group without a label or nodes.

        Examples:
            >>> notes = tlc.Notes().group("Texas", ["L0/F308@7", "L0/F71@7"])
            >>> notes.group("Dallas", ["L0/F71@7"]).groups
            (('Texas', ('L0/F308@7',)), ('Dallas', ('L0/F71@7',)))
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

        Args:
            label: the group's label.

        Returns:
            New notes.

        Raises:
            KeyError: if there is no such group; it names those there are.

        Examples:
            >>> tlc.Notes().group("Texas", ["L0/F308@7"]).ungroup("Texas").groups
            ()
        """
        self._require(label)
        return replace(self, groups=tuple(g for g in self.groups if g[0] != label))

    def rename(self, old: str, new: str) -> "Notes":
        """The notes with the group ``old`` called ``new``.

        Args:
            old: the group's label.
            new: its new label.

        Returns:
            New notes.

        Raises:
            KeyError: if there is no group ``old``; it names those there are.
            ValueError: if ``new`` is empty or in use.

        Examples:
            >>> tlc.Notes().group("Texas", ["L0/F308@7"]).rename("Texas", "in Texas").groups
            (('in Texas', ('L0/F308@7',)),)
        """
        self._require(old)
        if not new.strip():
            raise ValueError("a group needs a label.")
        return replace(self, groups=tuple((new if g[0] == old else g[0], g[1]) for g in self.groups))

    def _require(self, label: str) -> None:
        if label not in dict(self.groups):
            raise KeyError(f"there is no group {label!r}; there are {[g[0] for g in self.groups]}.")

    def holds(self, other: "Notes") -> bool:
        """Whether these notes say all that other notes say.

        Args:
            other: the other notes.

        Returns:
            True if all groups of ``other`` are here, with at least the same nodes, and so are all its pins, names and
            its text.

        Examples:
            >>> notes = tlc.Notes().group("Texas", ["L0/F308@7"])
            >>> notes.holds(tlc.Notes()), tlc.Notes().holds(notes)
            (True, False)
        """
        groups = {label: set(ids) for label, ids in self.groups}
        return (
            all(label in groups and set(ids) <= groups[label] for label, ids in other.groups)
            and set(other.pins) <= set(self.pins)
            and other.names.items() <= self.names.items()
            and other.text in ("", self.text)
        )

    def of(self, ids: Iterable[str]) -> "Notes":
        """The part of these notes that is about the nodes given.

        Args:
            ids: the nodes' ids.

        Returns:
            New notes with groups, pins and names of these nodes alone, and the whole text. A group without any of them
            is left out.

        Examples:
            >>> tlc.Notes().group("Texas", ["L0/F308@7", "L0/F71@7"]).of(["L0/F308@7"]).groups
            (('Texas', ('L0/F308@7',)),)
        """
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
