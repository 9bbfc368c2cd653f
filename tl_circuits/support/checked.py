"""``@checked``: check the arguments of public functions, and say in one sentence what is wrong with them.

Numbers may come from any library (NumPy, entries of frames, tensors with a single number, arrays for lists): they are
converted to Python's own, and then arguments and result are checked against the annotations.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from types import GenericAlias, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeCallHintParamViolation, BeartypeException
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor

from tl_circuits.errors import ArgumentError
from tl_circuits.hooks import shown

_F = TypeVar("_F", bound=Callable[..., Any])
_CONF = BeartypeConf(is_pep484_tower=True)  # accept an int where a float is asked for, as Python does
_TYPES = beartype(conf=_CONF)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "text",
    "Path": "a path",
    "NoneType": "None",
    "Replacement": "a Replacement (tlc.attach(model, dictionary) makes one)",
    "AttributionGraph": "an AttributionGraph (tlc.attribute or tlc.load_graph makes one)",
    "RecurringCircuit": "a RecurringCircuit (tlc.aggregate makes one)",
    "QKAttribution": "a QKAttribution (tlc.qk_attribution makes one)",
    "Dictionary": "a dictionary (tlc.load_transcoders or tlc.mlp_neurons makes one)",
    "DataFrame": "a pandas DataFrame",
    "Callable": "a function",
    "Sequence": "a list",
    "Iterable": "a list",
    "Mapping": "a dict",
    "dtype": "a torch.dtype",
}


def require_model(function: str, model: Any) -> None:
    """Raise ArgumentError unless ``model`` looks like a TransformerLens model; ``function`` is named in the message."""
    compiled = getattr(model, "_orig_mod", None)  # torch.compile's wrapper passes every other attribute on
    if compiled is not None:
        raise ArgumentError(
            f"{function}(model=...): a model that torch.compile wrapped runs without its hooks. Give the model itself, "
            "before compiling (model._orig_mod)."
        )
    if not hasattr(model, "hook_dict") or not hasattr(model, "cfg"):
        raise ArgumentError(
            f"{function}(model=...) must be a TransformerLens model (tlc.load_model opens one; so does "
            f"TransformerBridge.boot_transformers), got {_text(model)}."
        )


def checked(function: _F) -> _F:
    """Make a function check its arguments and its result against its annotations, jaxtyping's shapes included.

    An argument of the wrong type raises ArgumentError with its name, what it must be and what it was.
    """
    typed = jaxtyped(function, typechecker=_TYPES)
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{function.__name__}: {error}.") from None
        if not hints:  # at the first call, when every name in the annotations can be looked up
            hints.update(_hints(function, signature))
        for name, value in bound.arguments.items():
            if name in hints:
                bound.arguments[name] = _plain(value, hints[name])
        message = _unseen(function.__name__, bound.arguments, hints)
        if message is not None:
            raise ArgumentError(message)
        try:
            return typed(*bound.args, **bound.kwargs)
        except (TypeCheckError, BeartypeCallHintParamViolation) as error:
            message = _misfit(function.__name__, bound.arguments, hints, str(error))
            if message is None:  # the arguments are right, so the mistake is in our own code: show it as it is
                raise
        raise ArgumentError(message)

    return call  # type: ignore[return-value]  # the same signature, which mypy cannot see


def _hints(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    """The type of each argument; for ``*ids`` a tuple of the type, and ``**options`` are not checked."""
    try:
        found = get_type_hints(function)
    except NameError:  # a name that is only imported for type checkers
        found = {name: hint for name, hint in function.__annotations__.items() if not isinstance(hint, str)}
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    found = {
        name: hint
        for name, hint in found.items()
        if kinds.get(name, inspect.Parameter.VAR_KEYWORD) is not inspect.Parameter.VAR_KEYWORD
    }
    return {
        name: GenericAlias(tuple, (hint, ...)) if kinds[name] is inspect.Parameter.VAR_POSITIONAL else hint
        for name, hint in found.items()
    }


def _plain(value: Any, hint: Any) -> Any:
    """``value`` with numbers of NumPy, pandas and torch converted to Python's, unless ``hint`` asks for an array."""
    if type(value) in (int, float, str, bool) or value is None:
        return value
    module = type(value).__module__.split(".")[0]
    if module not in ("numpy", "pandas", "torch") and not isinstance(value, (list, tuple, set, frozenset, Tensor)):
        return value
    if hint is Any or _asks_for_arrays(hint):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        made = [_plain(item, None) for item in value]
        same = all(a is b for a, b in zip(made, value, strict=True))
        return value if same or type(value) not in (list, tuple, set, frozenset) else type(value)(made)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        number = value.item()
        # pandas turns a 3 into 3.0 in a row that also holds fractions.
        wanted = _parts(hint)
        return (
            int(number)
            if int in wanted and float not in wanted and isinstance(number, float) and number.is_integer()
            else number
        )
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") and _asks_for_several(hint):
        return value.tolist()
    return value


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _asks_for_arrays(hint: Any) -> bool:
    """Whether ``hint`` allows a tensor, a frame, or anything at all."""
    for part in _parts(hint):
        if part is Any or (isinstance(part, type) and (issubclass(part, Tensor) or part.__name__ == "DataFrame")):
            return True
        if hasattr(part, "array_type"):  # an annotation of jaxtyping
            return True
    return False


def _asks_for_several(hint: Any) -> bool:
    return any(
        getattr(get_origin(part), "__name__", "") in ("Sequence", "Iterable", "list", "tuple") for part in _parts(hint)
    )


def _unseen(function: str, arguments: dict[str, Any], hints: dict[str, Any]) -> str | None:
    """A message about what beartype overlooks, or None.

    It takes True for a number, and of a list it checks a single entry only.
    """
    for name, value in arguments.items():
        wrong = isinstance(value, bool) and name in hints and _is_number(hints[name])
        wrong = wrong or (
            isinstance(value, (list, tuple)) and name in hints and _bad_entry(value, hints[name]) is not None
        )
        if wrong:
            return f"{function}({name}=...) must be {_expected(hints[name])}, got {_got(value, hints[name])}."
    return None


def _is_number(hint: Any) -> bool:
    parts = _parts(hint)
    return (int in parts or float in parts) and not any(part in (bool, Any, object) for part in parts)


def _bad_entry(values: Any, hint: Any) -> int | None:
    """The index of a list's first entry whose type ``hint`` does not allow; None if all are allowed."""
    parts = _parts(hint)
    if Any in parts or any(
        isinstance(part, type) and get_origin(part) is None and isinstance(values, part) for part in parts
    ):
        return None
    for part in parts:
        inner = get_args(part)
        listed = get_origin(part) is tuple and inner[1:] == (Ellipsis,)
        listed = listed or getattr(get_origin(part), "__name__", "") in ("Sequence", "Iterable", "list")
        if listed and inner and inner[0] is not Any:
            bad = (
                i
                for i, item in enumerate(values)
                if (isinstance(item, bool) and _is_number(inner[0])) or not _fits(item, inner[0])
            )
            return next(bad, None)
    return None


def _fits(value: Any, hint: Any) -> bool:
    try:
        return is_bearable(value, hint, conf=_CONF)
    except BeartypeException:  # an annotation that cannot be checked outside of its function
        return True


def _misfit(function: str, arguments: dict[str, Any], hints: dict[str, Any], said: str) -> str | None:
    """A sentence about the first argument that does not fit its annotation; None if all fit."""
    for name, value in arguments.items():
        if name not in hints:
            continue
        if not _fits(value, hints[name]):
            return f"{function}({name}=...) must be {_expected(hints[name])}, got {_got(value, hints[name])}."
    if said.startswith("Type-check error whilst checking the parameters") and f".{function}" in said.split("\n")[0]:
        shapes = [f"{name}: {shown(value)}" for name, value in arguments.items() if hasattr(value, "shape")]
        return f"{function}: the shapes of its arguments do not fit together ({', '.join(shapes)})."
    return None


def _got(value: Any, hint: Any) -> str:
    """What was given, for a message: of a list whose entries are wrong, the first wrong one."""
    at = _bad_entry(value, hint) if isinstance(value, (list, tuple)) else None
    return _text(value) if at is None else f"{_text(value[at])} in the {type(value).__name__}"


def _text(value: Any) -> str:
    return shown(value) if isinstance(value, (str, int, float, complex, type(None))) else type(value).__name__


def _expected(hint: Any) -> str:
    """An annotation in words, such as "a whole number or None"."""
    parts = _parts(hint)
    words = list(dict.fromkeys(_one(part) for part in parts if part is not type(None)))
    words += ["None"] if type(None) in parts else []
    return " or ".join(words)


def _one(part: Any) -> str:
    origin = get_origin(part)
    if origin is Literal:
        return " or ".join(map(repr, get_args(part)))
    name = getattr(origin or part, "__name__", str(part))
    word = _WORDS.get(name, f"a {name}" if origin is None else name)
    inner = [p for p in get_args(part) if p is not Ellipsis]
    if name in ("Sequence", "Iterable", "list", "tuple") and inner and inner[0] is not Any:
        return f"a list, each entry {_expected(inner[0])}"
    return word
