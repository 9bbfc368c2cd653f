"""Show figures in a notebook, or write them as SVG, PNG or PDF; no window is opened."""

import warnings
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from tl_circuits.errors import OutputError
from tl_circuits.support.extras import how_to_install
from tl_circuits.support.files import atomic_file

FORMATS = (".svg", ".png", ".pdf")
DOTS_PER_INCH = 80  # a story is ten inches wide: 800 pixels


@dataclass(frozen=True)
class Picture:
    """A PNG picture; a notebook shows it if it is the last value of a cell."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


def picture_of(figure: Any) -> Picture:
    """A matplotlib figure as a picture; the same figure gives the same bytes."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return Picture(file.getvalue())


def figure_class() -> Any:
    """matplotlib's Figure class, which opens no window. Raises ImportError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plotting needs matplotlib. Run: {how_to_install('figure')}") from error
    return Figure


def save_figure(figure: Any, path: Path | None, overwrite: bool) -> Path | Picture:
    """Write a figure to ``path``, or return it as a picture if ``path`` is None.

    Raises:
        OutputError: ``path`` does not end in .svg, .png or .pdf, exists already, or cannot be written.
    """
    if path is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            return picture_of(figure)
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"cannot draw {path}: the name must end in one of {', '.join(FORMATS)}.")
    kind = path.suffix[1:].lower()
    # No date in the file: the same graph gives the same bytes.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    import matplotlib

    same_ids = matplotlib.rc_context({"svg.hashsalt": "tl_circuits"})  # SVG ids are random otherwise
    with warnings.catch_warnings(), same_ids, atomic_file(path, overwrite) as file:
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
    return path
