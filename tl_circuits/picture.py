"""A figure that is shown where it is made: what ``plot()`` without a path returns."""

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

DOTS_PER_INCH = 80  # a story is ten inches wide: 800 pixels


@dataclass(frozen=True)
class Picture:
    """A PNG picture. As the last line of a notebook cell it is shown."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


def picture_of(figure: Any) -> Picture:
    """A matplotlib figure as a picture; the same figure gives the same bytes."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return Picture(file.getvalue())
