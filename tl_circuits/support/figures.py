"""Show figures in a notebook, or write them as SVG, PNG or PDF; no window is opened."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from tl_circuits.errors import OutputError
from tl_circuits.support.extras import how_to_install
from tl_circuits.support.files import atomic_file
from tl_circuits.support.fonts import use_fonts_for

FORMATS = (".svg", ".png", ".pdf")
_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
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
    _prepare(figure)
    with _without_a_warning_a_glyph():
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return Picture(file.getvalue())


def _prepare(figure: Any) -> None:
    """Make a figure's texts drawable: no control characters, with which an SVG is no XML, and fonts that have them."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        said = text.get_text()
        if _NOT_XML.search(said):
            text.set_text(_NOT_XML.sub("\ufffd", said))
    use_fonts_for(figure)


@contextmanager
def _without_a_warning_a_glyph() -> Iterator[None]:
    """Silence matplotlib's warnings of single glyphs: :func:`use_fonts_for` has warned of all of them at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


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
        return picture_of(figure)
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"cannot draw {path}: the name must end in one of {', '.join(FORMATS)}.")
    kind = path.suffix[1:].lower()
    # No date in the file: the same graph gives the same bytes.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    import matplotlib

    same_ids = matplotlib.rc_context({"svg.hashsalt": "tl_circuits"})  # SVG ids are random otherwise
    _prepare(figure)
    with _without_a_warning_a_glyph(), same_ids, atomic_file(path, overwrite) as file:
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
    return path
