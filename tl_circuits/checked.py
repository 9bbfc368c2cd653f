"""Types and shapes of public functions, checked for callers."""

from collections.abc import Callable
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

_F = TypeVar("_F", bound=Callable[..., Any])
_TYPES = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float, as everywhere in Python


def checked(function: _F) -> _F:
    """Check arguments and result of every call against the annotations, jaxtyping's shapes included."""
    return jaxtyped(function, typechecker=_TYPES)
