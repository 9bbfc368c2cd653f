"""What a graph can be turned into, by name: so that its methods need not know where pages and exports are made.

The floors of the package import downwards only (docs/contributing.md). A graph's ``to_html`` therefore asks for the
output ``"html"``, and :mod:`tl_circuits`, which knows all floors, says which function makes it.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

_homes: Mapping[str, str] = MappingProxyType({})


def fill(homes: Mapping[str, str]) -> None:
    """Say where each output is made: ``"html"`` by ``"tl_circuits.view.page_file:write_page"``. Done once, by the package."""
    global _homes
    _homes = MappingProxyType(dict(homes))


def output_names() -> tuple[str, ...]:
    """The names of all outputs."""
    return tuple(_homes)


def output(name: str) -> Callable[..., Any]:
    """The function that makes an output; its module is imported now. Raises KeyError naming the outputs there are."""
    if name not in _homes:
        raise KeyError(f"there is no output {name!r}; there are {', '.join(sorted(_homes))}.")
    module, _, function = _homes[name].partition(":")
    return getattr(import_module(module), function)
