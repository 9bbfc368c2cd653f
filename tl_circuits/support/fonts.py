"""Fonts for what a figure says: those of the system are searched for characters that matplotlib's own font lacks."""

import warnings
from collections.abc import Iterable
from typing import Any

OWN_FONT = "DejaVu Sans"  # comes with matplotlib
MOST_QUOTED = 5
_BLANK = 0x2000, 0x200F  # spaces, joiners and direction marks, which nothing is drawn for


def use_fonts_for(figure: Any) -> None:
    """Let every text of a figure be drawn with fonts that have its characters, where the system has such fonts.

    Warns once, in words, if characters are left that no font has: they are drawn as boxes.
    """
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    missing = _missing({c for text in texts for c in text.get_text() if _is_drawn(c)}, OWN_FONT)
    if not missing:
        return
    found, left = _fonts_with(missing)
    for text in texts:
        if missing & set(text.get_text()):
            text.set_fontfamily([OWN_FONT, *found])
    if left:
        some = ", ".join(f"“{c}”" for c in sorted(left)[:MOST_QUOTED])
        more = f" and {len(left) - MOST_QUOTED} more" if len(left) > MOST_QUOTED else ""
        warnings.warn(
            f"no font of this computer has the characters {some}{more}, so the figure shows boxes in their place. "
            "Install one that has them, such as Noto Sans CJK for Chinese, Japanese and Korean (Debian and Ubuntu: "
            "apt install fonts-noto-cjk), and draw again.",
            UserWarning,
            stacklevel=2,
        )


def _is_drawn(character: str) -> bool:
    return character > "\x7f" and not character.isspace() and not _BLANK[0] <= ord(character) <= _BLANK[1]


def _missing(characters: Iterable[str], font: str) -> set[str]:
    """Those of the characters that a font, by its name, does not have."""
    from matplotlib.font_manager import findfont, get_font

    has = get_font(findfont(font)).get_charmap()
    return {c for c in characters if ord(c) not in has}


def _fonts_with(characters: set[str]) -> tuple[list[str], set[str]]:
    """Names of fonts that together have as many of the characters as possible, and the characters that none has."""
    from matplotlib.font_manager import findSystemFonts, fontManager, get_font

    # matplotlib remembers the system's fonts of its first run; one that was installed since is not among them.
    known = {entry.fname for entry in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        try:
            fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError):  # a damaged file
            continue
    has: dict[str, set[str]] = {}
    for entry in sorted(
        fontManager.ttflist, key=lambda e: (e.name, e.style != "normal", abs(_weight(e.weight) - 400), e.fname)
    ):
        if entry.name in has or entry.style != "normal":
            continue  # one face a family tells what the family has
        try:
            font = get_font(entry.fname)
        except (OSError, RuntimeError):
            continue
        if font.scalable:  # coloured bitmaps cannot be drawn
            charmap = font.get_charmap()
            has[entry.name] = {c for c in characters if ord(c) in charmap}
    found, left = [], set(characters)
    while left:
        best = max(has, key=lambda name: len(has[name] & left), default=None)  # the first of several equals
        if best is None or not has[best] & left:
            break
        found.append(best)
        left -= has[best]
    return found, left


def _weight(weight: int | str) -> int:
    return weight if isinstance(weight, int) else {"bold": 700, "light": 300}.get(weight, 400)
