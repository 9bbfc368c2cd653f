"""What a tab may send: the shapes of its wishes and of the notes it saves, checked by pydantic."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from tl_circuits.errors import GraphFileError
from tl_circuits.support.reading import parse_json


class _Sent(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Steer(_Sent):
    """Multiply nodes by ``factor`` and say what the model says then."""

    do: Literal["steer"]
    graph: str
    nodes: list[str]
    factor: FiniteFloat = 0.0


class Heads(_Sent):
    """Say which heads carried the edge from ``source`` to ``target``."""

    do: Literal["heads"]
    graph: str
    source: str
    target: str = ""


class Labels(_Sent):
    """Label the features of a graph that have no label."""

    do: Literal["labels"]
    graph: str


class Trace(_Sent):
    """Trace a new prompt."""

    do: Literal["trace"]
    prompt: str


class SavedNotes(_Sent):
    """Notes, and which of their fields the tab has changed."""

    notes: Any
    fields: list[str]


Wish = Steer | Heads | Labels | Trace
KINDS = ("steer", "heads", "labels", "trace")
_WISH: TypeAdapter[Wish] = TypeAdapter(Annotated[Wish, Field(discriminator="do")])
_NOTES: TypeAdapter[SavedNotes] = TypeAdapter(SavedNotes)


def read_wish(text: str) -> tuple[Wish | GraphFileError, int | str | None]:
    """The wish in a message, or what is wrong with it; and the number that the tab gave it, for the answer."""
    try:
        sent = parse_json(text, "the wish", GraphFileError)
    except GraphFileError:
        sent = None
    if not isinstance(sent, dict) or sent.get("do") not in KINDS:
        return GraphFileError(f"expected a JSON object whose do is one of {', '.join(KINDS)}."), None
    number = sent.get("number")
    known = number if isinstance(number, (int, str)) else None
    try:
        return _checked(_WISH, sent, "the wish"), known
    except GraphFileError as error:
        return error, known


def read_saved_notes(body: bytes) -> SavedNotes:
    """The notes in the body of a request.

    Raises:
        GraphFileError: if the body is anything else.
    """
    return _checked(_NOTES, parse_json(body, "the body", GraphFileError), "the body")


def _checked(shape: Any, sent: Any, where: str) -> Any:
    try:
        return shape.validate_python(sent)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part not in KINDS)
        raise GraphFileError(f"{where}: {place or 'it'}: {first['msg']}.") from None
