"""Outputs by name (pages, figures, exports), so that a graph's methods need not import the modules that make them.

The folders of the package import downwards only (docs/contributing.md), and pages are made above graphs. So a graph's
``to_html`` asks here for the output ``"html"``, and ``tl_circuits/__init__.py`` says which function that is.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

_homes: Mapping[str, str] = MappingProxyType({})


def fill(homes: Mapping[str, str]) -> None:
    """Set the table, such as ``{"html": "tl_circuits.view.page_file:write_page"}``; the package does this once."""
    global _homes
    _homes = MappingProxyType(dict(homes))


def output_names() -> tuple[str, ...]:
    """The names of all outputs."""
    return tuple(_homes)


def output(name: str) -> Callable[..., Any]:
    """The function that makes an output; its module is imported now. Raises KeyError for an unknown name."""
    if name not in _homes:
        raise KeyError(f"there is no output {name!r}; there are {', '.join(sorted(_homes))}.")
    module, _, function = _homes[name].partition(":")
    return getattr(import_module(module), function)
