"""The fenced blocks of a page."""

import re
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def fences(path: Path) -> Iterator[tuple[str, str, int, str]]:
    """Language, code, line and what stands between it and the fence before, for every fenced block of a page."""
    text, end = path.read_text(), 0
    for found in FENCE.finditer(text):
        yield found[2], found[3], text.count("\n", 0, found.start()) + 1, text[end : found.start()]
        end = found.end()
