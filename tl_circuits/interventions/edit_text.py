"""Edits as text: ``L14/F2268@9 = 0``, ``L20/F15589@-1 *= -2``, ``L3/error@2 *= 0``, ``token@4 *= 0.5``."""

import re
from typing import Any

from tl_circuits.errors import EditError
from tl_circuits.graph.kinds import SOURCE
from tl_circuits.hooks import Ablate, Add, Edit, ErrorEdit, PatternEdit, Scale, ScoreEdit, Set, TokenEdit
from tl_circuits.support.checked import checked

GRAMMAR = """an edit is PLACE OPERATOR NUMBER:
  PLACE     L14/F2268@9   feature 2268 of layer 14 at position 9
            L14/F1,F5@9   several features
            L3/error@2    the error term of layer 3
            L3.resid_post/F7@9   feature 7 at one of several sites of layer 3
            token@4       a prompt token
            L5/H3@9>4     how much head 3 of layer 5 attends from position 9 to 4 (= only)
            L5/H3/score@9>4   its score there, before softmax (+= only)
            positions: @9  @-1  @2:5  @8: (and on in generated tokens)  @* (all)
  OPERATOR  = set   *= multiply   += add   (errors and tokens: *= only)
examples: "L14/F2268@9 = 0"   "L20/F15589@-1 *= -2"   "token@4 *= 0\""""

_HEAD = re.compile(
    r"^\s*L(?P<layer>\d+)/H(?P<head>\d+)(?P<score>/score)?@(?P<query>-?\d+)>(?P<key>-?\d+)"
    r"\s*(?P<operator>\*=|\+=|=)\s*(?P<number>\S+)\s*$"
)
_EDIT = re.compile(
    rf"^\s*{SOURCE}"
    r"@(?P<where>\*|-?\d+|-?\d*:-?\d*)\s*(?P<operator>\*=|\+=|=)\s*(?P<number>\S+)\s*$"
)


@checked
def parse_edit(text: str) -> Edit:
    """The edit that a text stands for, as on the command line.

    Args:
        text: a place, an operator and a number. Places are ``L14/F2268@9`` (a feature), ``L14/F1,F5@9`` (several),
            ``L3/error@2`` (an error term), ``token@4``, ``L5/H3@9>4`` (how much a head attends from position 9 to 4)
            and ``L5/H3/score@9>4`` (its score there); positions are ``9``, ``-1``, ``2:5``, ``8:`` or ``*``. Operators
            are ``=`` (set), ``*=`` (multiply) and ``+=`` (add); errors and tokens can only be multiplied, heads only be
            set, and scores only be added to.

    Returns:
        For features Ablate (``= 0``), Set, Scale or Add; else ErrorEdit, TokenEdit, PatternEdit or ScoreEdit.

    Raises:
        EditError: for a text that cannot be read; it explains the form.

    Examples:
        >>> tlc.parse_edit("L0/F308@7 *= -2")
        Scale(layer=0, position=7, feature=308, factor=-2.0)
        >>> tlc.parse_edit("token@4 *= 0")
        TokenEdit(position=4, factor=0.0)
    """
    head = _HEAD.match(text)
    if head is not None:
        return _head_edit(text, head)
    match = _EDIT.match(text)
    if match is None:
        unplaced = "" if "@" in text else " It names no position: @9, or @-1 for the last token, or @* for all."
        raise EditError(f"cannot read the edit {text!r}.{unplaced}\n\n{GRAMMAR}")
    number = _number(text, match["number"])
    where, operator = _where(match["where"]), match["operator"]
    if match["token"] or match["error"]:
        if operator != "*=":
            raise EditError(f"{text!r}: tokens and errors can only be multiplied (*=).\n\n{GRAMMAR}")
        return (
            TokenEdit(where, number)
            if match["token"]
            else ErrorEdit(int(match["layer"]), where, number, site=match["site"])
        )
    features: Any = [int(f.strip()[1:]) for f in match["features"].split(",")]
    features = features[0] if len(features) == 1 else tuple(features)
    place = (int(match["layer"]), where, features)
    if operator == "=":
        return Ablate(*place, site=match["site"]) if number == 0 else Set(*place, value=number, site=match["site"])
    return (
        Scale(*place, factor=number, site=match["site"])
        if operator == "*="
        else Add(*place, value=number, site=match["site"])
    )


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise EditError(f"cannot read the number {number!r} in the edit {text!r}.\n\n{GRAMMAR}") from None


def _head_edit(text: str, match: re.Match[str]) -> Edit:
    kind, operator = (ScoreEdit, "+=") if match["score"] else (PatternEdit, "=")
    if match["operator"] != operator:
        raise EditError(f"{text!r}: patterns can only be set (=) and scores only be added to (+=).\n\n{GRAMMAR}")
    layer, head, query, key = (int(match[part]) for part in ("layer", "head", "query", "key"))
    return kind(layer, head, query, key, value=_number(text, match["number"]))


def _where(text: str) -> int | slice | None:
    if text == "*":
        return None
    if ":" not in text:
        return int(text)
    start, stop = (int(part) if part else None for part in text.split(":"))
    return slice(start, stop)
