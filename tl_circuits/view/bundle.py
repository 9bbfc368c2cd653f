"""The page's JavaScript modules as one script. A file, a server and a notebook all run the same text."""

import re
from functools import cache
from importlib.resources import files

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+\.js)";\n', re.M)


@cache
def script(entry: str) -> str:
    """The module ``entry`` and everything it imports as one text: imports first, each once.

    All modules then share one scope, so top-level names must differ between the files.
    """
    done: dict[str, str] = {}
    _add(entry, done)
    return "".join(done.values())


def _add(name: str, done: dict[str, str]) -> None:
    if name in done:
        return
    text = page_file(name)
    for needed in _IMPORT.findall(text):
        _add(needed, done)
    done[name] = _IMPORT.sub("", text)


@cache
def page_file(name: str) -> str:
    """The text of one of the page's files."""
    return (files("tl_circuits.view") / "page" / name).read_text(encoding="utf-8")
