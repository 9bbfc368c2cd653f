"""Kinds of nodes, and their ids: the one place that writes and reads ``L14/F2268@9``."""

import re
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """What a node can be. The last three occur only in graphs read from other programs' files.

    The numbers are those in a graph's tables and files; ``text`` is what frames say.
    """

    FEATURE = 0
    ERROR = 1
    EMBEDDING = 2
    LOGIT = 3
    ATTENTION_FEATURE = 4
    ATTENTION_ERROR = 5
    BIAS = 6

    @property
    def text(self) -> str:
        """The kind as frames and files say it, such as ``"attention feature"``."""
        return self.name.lower().replace("_", " ")

    @classmethod
    def of(cls, text: str) -> "Kind":
        """The kind that frames call ``text``.

        Raises:
            ValueError: for any other text; it names all kinds.
        """
        if text not in _BY_TEXT:
            raise ValueError(f"there is no kind of node {text!r}; kinds are {', '.join(_BY_TEXT)}.")
        return _BY_TEXT[text]


KINDS = tuple(kind.text for kind in Kind)
"""The texts of all kinds, in the order of their numbers."""

OURS = (Kind.FEATURE, Kind.ERROR, Kind.EMBEDDING, Kind.LOGIT)
"""The kinds that graphs traced here have."""

NUMBERED = (Kind.FEATURE, Kind.ATTENTION_FEATURE)
"""Kinds of which several nodes stand at one place, told apart by their feature."""

_BY_TEXT = {kind.text: kind for kind in Kind}


class Place(NamedTuple):
    """Where a node stands, which decides its id.

    Attributes:
        kind: the node's kind.
        layer: -1 for embeddings.
        position: the position in the prompt.
        feature: the feature's index; -1 for errors and embeddings; for logits the rank among the targets.
        site: the name of the dictionary's site if the layer has several dictionaries; else empty.
    """

    kind: Kind
    layer: int
    position: int
    feature: int
    site: str = ""


# What names sources, also in edits, where one place may name several features: "L14/F1,F5", "L3/error", "token".
# "L14.resid_post/F1" names the site, where the layer has several dictionaries.
_SITE = r"[A-Za-z]\w*(?:\.\w+)*"
_IN_LAYER = r"(?:(?P<error>error)|(?P<features>F\d+(?:\s*,\s*F\d+)*))"
SOURCE = rf"(?:L(?P<layer>\d+)(?:\.(?P<site>{_SITE}))?/{_IN_LAYER}|(?P<token>token))"
_SOURCE_ID = re.compile(rf"{SOURCE}@(?P<position>\d+)")
_LOGIT_ID = re.compile(r"logit:(?P<rank>\d+)")
SOURCE_EXAMPLES = "'L14/F2268@9', 'L3/error@2' or 'token@4'"


def is_site(text: str) -> bool:
    """Whether a site may be called so."""
    return re.fullmatch(_SITE, text) is not None


def node_id(kind: int, layer: int, position: int | str, feature: int, site: str = "") -> str:
    """The id of a node.

    Args:
        kind: a :class:`Kind` or its number.
        layer: the node's layer; not used for embeddings and logits.
        position: the position in the prompt, or the name of a slot that stands for one.
        feature: the feature's index; for logits the rank among the targets, 0 for the first.
        site: the name of the dictionary's site if the layer has several dictionaries; else empty.

    Examples:
        >>> from tl_circuits.graph.kinds import Kind, node_id
        >>> node_id(Kind.FEATURE, 14, 9, 2268), node_id(Kind.ERROR, 3, 2, -1), node_id(Kind.EMBEDDING, -1, 4, 17)
        ('L14/F2268@9', 'L3/error@2', 'token@4')
        >>> node_id(Kind.FEATURE, 14, 9, 2268, "resid_post")
        'L14.resid_post/F2268@9'
    """
    if kind == Kind.LOGIT:
        return f"logit:{feature}"
    if kind == Kind.EMBEDDING:
        return f"token@{position}"
    at = f"L{layer}.{site}" if site else f"L{layer}"
    if kind == Kind.FEATURE:
        return f"{at}/F{feature}@{position}"
    if kind == Kind.ERROR:
        return f"{at}/error@{position}"
    if kind == Kind.ATTENTION_ERROR:
        return f"L{layer}/attention-error@{position}"
    return f"L{layer}/{'attention-F' if kind == Kind.ATTENTION_FEATURE else 'bias'}{feature}@{position}"


def parse_node_id(text: str) -> Place | None:
    """Where the node with this id stands; None for any text that is not the id of a feature, error, embedding or logit.

    Examples:
        >>> from tl_circuits.graph.kinds import parse_node_id
        >>> parse_node_id("L14/F2268@9")
        Place(kind=<Kind.FEATURE: 0>, layer=14, position=9, feature=2268, site='')
    """
    logit = _LOGIT_ID.fullmatch(text)
    if logit is not None:
        return Place(Kind.LOGIT, -1, -1, int(logit["rank"]))
    match = _SOURCE_ID.fullmatch(text)
    if match is None or "," in (match["features"] or ""):
        return None
    position = int(match["position"])
    if match["token"]:
        return Place(Kind.EMBEDDING, -1, position, -1)
    site = match["site"] or ""
    if match["error"]:
        return Place(Kind.ERROR, int(match["layer"]), position, -1, site)
    return Place(Kind.FEATURE, int(match["layer"]), position, int(match["features"][1:]), site)
