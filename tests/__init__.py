"""Tests. ``check`` checks the annotations of the whole package meanwhile, with the settings that callers get."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_made: dict[tuple, Callable] = {}


def check(function: Callable) -> Callable:
    """What calls ``function`` after checking its arguments.

    jaxtyping asks with functions that do nothing but have the annotations of one of ours, and asks anew whenever a
    function within another is made, as hooks are at every run. Making a checker takes longer than most runs of a
    small model, so the same annotations get the same checker.
    """
    code = function.__code__
    arguments = code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    defaults = len(function.__defaults__ or ()), tuple(function.__kwdefaults__ or ())
    key = function.__module__, function.__qualname__, arguments, defaults, tuple(function.__annotations__.items())
    try:
        found = _made.get(key)
    except TypeError:  # an annotation that cannot be looked up
        return _check(function)
    if found is None:
        found = _made[key] = _check(function)
    return found
