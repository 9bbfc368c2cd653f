"""Accept numbers of any library: Python's, NumPy's, entries of data frames, tensors with a single number."""

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .errors import ArgumentError, TLCircuitsError


def whole(value: Any, what: str = "a whole number", error: type[TLCircuitsError] = ArgumentError) -> int:
    """A whole number of any library as a Python int.

    Accepts Python's and NumPy's integers, tensors and arrays that hold a single number, and floats without a
    fraction (a row of a data frame with mixed columns turns 3 into 3.0). Booleans are refused.

    Args:
        value: the number.
        what: how an error message names it.
        error: the error raised for anything that is not a whole number.

    Examples:
        >>> import numpy, torch
        >>> whole(numpy.int64(3)), whole(torch.tensor(3)), whole(3.0)
        (3, 3, 3)
    """
    if not _is_boolean(value) and getattr(value, "ndim", 0) == 0:
        try:
            return operator.index(value)
        except TypeError:
            pass
        try:
            number = float(value.item() if hasattr(value, "item") else value) if _is_real(value) else math.nan
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if number.is_integer():
            return int(number)
    raise error(f"{what} must be a whole number, got {shown(value)}.")


def wholes(values: Any, what: str = "whole numbers", error: type[TLCircuitsError] = ArgumentError) -> tuple[int, ...]:
    """Several whole numbers (a list, range, array, column of a frame, tensor) as ints; see :func:`whole`."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise error(f"{what} must be whole numbers, got {shown(values)}.")
    each = values.tolist() if hasattr(values, "tolist") else values
    return tuple(whole(value, f"each of {what}", error) for value in each)


def real(value: Any, what: str = "a number", error: type[TLCircuitsError] = ArgumentError) -> float:
    """A finite number of any library as a float; otherwise ``error`` is raised, which calls it ``what``."""
    if not _is_boolean(value) and getattr(value, "ndim", 0) == 0 and _is_real(value):
        try:
            number = float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise error(f"{what} must be a finite number, got {shown(value)}.")


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number of any library (see :func:`whole`)."""
    try:
        whole(value)
    except ArgumentError:
        return False
    return True


def shown(value: Any) -> str:
    """A value for an error message: numbers and short texts as they are, anything else by type and shape."""
    if isinstance(value, (str, int, float, complex, slice, type(None))):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return f"{value.item()!r} ({type(value).__name__})"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _is_real(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex()
    return hasattr(value, "__float__") and not isinstance(value, (str, bytes, complex))
