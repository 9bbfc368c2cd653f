"""Text as it is shown: signs for what cannot be seen."""

import re

ALONE = re.compile("^ +$|(?<=“) +(?=”)")  # tokens of nothing but spaces, also quoted


def visible(text: str) -> str:
    """``text`` with signs for line breaks, tabs, and spaces that stand alone."""
    shown = text.replace("\n", "⏎").replace("\t", "→")
    return ALONE.sub(lambda spaces: "␣" * len(spaces[0]), shown)
