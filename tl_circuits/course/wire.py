"""Values as bytes: what the checker and the process of a notebook send each other.

A message is a safetensors file: its tensors, and in its metadata a description of the value as JSON. Reading one never
runs code, and what a hostile process may send is bounded in size and depth.
"""

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor

from tl_circuits.course.handouts import HANDOUTS, Opener
from tl_circuits.errors import CourseError
from tl_circuits.hooks import Ablate, Add, Scale, Set
from tl_circuits.support.reading import boundary, quoted

LARGEST_MESSAGE = 64 * 1024**2  # bytes; the largest right answer, logits of a prompt, has some 10,000
DEEPEST = 20  # lists within lists
_EDITS: dict[str, Any] = {"Ablate": Ablate, "Set": Set, "Scale": Scale, "Add": Add}
_GROUPS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


@dataclass(frozen=True)
class Stranger:
    """Stands for an answer of a type that no question asks for.

    Attributes:
        name: the name of its type.
        number: what ``float`` makes of it, if anything.
    """

    name: str
    number: float | None = None


def pack(value: Any) -> bytes:
    """A value as a message.

    Numbers, texts, tensors, edits, handouts, and lists, tuples, sets and dicts of these stay what they are; any other
    object becomes a :class:`Stranger`. Subclasses become the class that they derive from.
    """
    tensors: dict[str, Tensor] = {}
    description = _described(value, tensors, 0)
    if sum(t.numel() * t.element_size() for t in tensors.values()) > LARGEST_MESSAGE // 2:
        tensors, description = {}, _stranger(value)
    # safetensors takes no file without a tensor's bytes only from version to version: one is always there
    tensors["-"] = torch.zeros(1)
    return save(tensors, {"value": json.dumps(description)})


def unpack(data: bytes, opener: Opener | None = None) -> Any:
    """The value of a message.

    Args:
        data: the message.
        opener: opens the handouts in it. Without one, a message that holds handouts is refused.

    Raises:
        CourseError: if it is no message of ours.
    """
    with boundary(CourseError, "a message of the notebook's process"):
        if len(data) > LARGEST_MESSAGE:
            raise CourseError(
                f"a message of the notebook's process has {len(data):,} bytes, more than {LARGEST_MESSAGE:,}."
            )
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        return _value(json.loads(header["__metadata__"]["value"]), load(data), opener, 0)


def _described(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if value is None or type(value) in (bool, float, str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else _stranger(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Tensor):
        return _tensor(value, tensors)
    if depth >= DEEPEST:
        return _stranger(value)
    return _composed(value, tensors, depth + 1)


def _composed(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """The description of what has parts."""
    for name, made in _GROUPS.items():
        if isinstance(value, made):
            return {"is": name, "items": [_described(item, tensors, depth) for item in value]}
    if isinstance(value, dict):
        pairs = [[_described(key, tensors, depth), _described(item, tensors, depth)] for key, item in value.items()]
        return {"is": "dict", "items": pairs}
    if isinstance(value, slice):
        return {
            "is": "slice",
            "items": [_described(end, tensors, depth) for end in (value.start, value.stop, value.step)],
        }
    for name, made in _EDITS.items():
        if isinstance(value, made):
            parts = {f: _described(getattr(value, f), tensors, depth) for f in _fields(made)}
            return {"is": name, "items": parts}
    if isinstance(value, pd.DataFrame):
        columns = {str(name): _described(value[name].tolist(), tensors, depth) for name in value}
        return {"is": "frame", "items": columns}
    for name, made in HANDOUTS.items():
        if isinstance(value, made):
            return {"is": name, "items": {f: _described(x, tensors, depth) for f, x in vars(value).items()}}
    return _stranger(value)


def _fields(edit: Any) -> list[str]:
    return [name for name in edit.__dataclass_fields__ if name != "of"]


def _tensor(value: Tensor, tensors: dict[str, Tensor]) -> Any:
    """Keeps the tensor's values, one by one: no views of one memory, and nothing of a subclass."""
    try:
        if value.numel() * value.element_size() > LARGEST_MESSAGE // 2 or value.is_complex():
            return _stranger(value)
        plain = torch.empty(value.shape, dtype=value.dtype)
        plain.copy_(value.detach().to_dense() if value.layout != torch.strided else value.detach())
    except (RuntimeError, NotImplementedError, TypeError):  # quantized, without values, nested
        return _stranger(value)
    tensors[str(len(tensors))] = plain
    return {"is": "tensor", "items": str(len(tensors) - 1)}


def _stranger(value: Any) -> Any:
    number = None
    try:
        number = float(value)
    except Exception:  # noqa: BLE001 - whatever a student's class does when it is asked for a number
        pass
    return {"is": "stranger", "items": [type(value).__name__[:80], number]}


def _value(description: Any, tensors: dict[str, Tensor], opener: Opener | None, depth: int) -> Any:
    if description is None or isinstance(description, (bool, int, float, str)):
        return description
    if depth > 2 * DEEPEST:
        raise ValueError("lists within lists, too deep")
    name, items = description["is"], description["items"]

    def read(part: Any) -> Any:
        return _value(part, tensors, opener, depth + 1)

    if name in _GROUPS:
        return _GROUPS[name](map(read, items))
    if name == "dict":
        return {read(key): read(item) for key, item in items}
    if name == "slice":
        return slice(*map(read, items))
    if name == "tensor":
        return tensors[items]
    if name == "stranger":
        return Stranger(quoted(str(items[0])), None if items[1] is None else float(items[1]))
    if name in _EDITS:
        return _EDITS[name](**{f: read(items[f]) for f in _fields(_EDITS[name])})
    if opener is not None and name == "frame":
        return pd.DataFrame({column: read(item) for column, item in items.items()})
    if opener is not None and name in HANDOUTS:
        return opener.open(HANDOUTS[name](**{f: read(item) for f, item in items.items()}))
    raise ValueError(f"there is no kind of value {quoted(name)}")
