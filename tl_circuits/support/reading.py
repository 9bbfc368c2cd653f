"""Read files that may be damaged or hostile: the bounds of every reader, and one boundary where errors become ours.

A reader does its work inside :func:`boundary`. Whatever a damaged file makes a library raise then becomes the error
that the reader documents, with the file's name. Ctrl-C and errors of ours pass through as they are.
"""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_circuits.errors import TLCircuitsError

# Bounds, in one place. A graph of 4,000 features with all their edges takes about 0.5 GB as JSON.
LARGEST_GRAPH_FILE = 2 * 1024**3  # bytes
LARGEST_JSON = 1024**3  # bytes of text, after unpacking
LARGEST_NOTES = 16 * 1024**2  # bytes
LARGEST_CONFIG = 1024**2  # bytes; a larger file is no config
LARGEST_RECORD = 16 * 1024**2  # bytes of one feature's record, packed and unpacked
MOST_VALUES = 100_000  # of a config, counting what its references repeat
MOST_NODES = 200_000
MOST_LAYERS = 1_000
DEEPEST = 100  # lists within lists
LONGEST_TEXT = 1_000_000  # characters of one label, name or note
LONGEST_QUOTED = 80  # characters of a value in an error message
MOST_SQUEEZED = 200  # an archive that unpacks to more than this factor is a bomb; graphs as JSON reach about 30

_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


def quoted(value: Any) -> str:
    """A value as messages show it: at most :data:`LONGEST_QUOTED` characters, and no control characters.

    Examples:
        >>> from tl_circuits.support.reading import quoted
        >>> quoted("a" * 200)[-4:]
        'aaa…'
    """
    if isinstance(value, (str, bytes)):
        value = value[: 2 * LONGEST_QUOTED]  # a long text is not copied as a whole
    elif isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    text = "".join(c if c.isprintable() else "�" for c in (value if isinstance(value, str) else repr(value)))
    return text if len(text) <= LONGEST_QUOTED else text[:LONGEST_QUOTED] + "…"


@contextmanager
def boundary(made: type[TLCircuitsError], where: object) -> Iterator[None]:
    """Turn every error of the block into ``made``, with the place ``where`` in its message.

    Errors of ours keep their class and words; so does ImportError, which says what to install.
    """
    try:
        yield
    except (TLCircuitsError, ImportError):
        raise
    except OSError as error:
        raise made(f"cannot read {where}: {error.strerror or quoted(str(error))}.") from error
    except RecursionError as error:
        raise made(f"{where} is nested too deeply to be read.") from error
    except Exception as error:  # the boundary: whatever a damaged file makes a library raise
        said = quoted(" ".join(str(error).split()))
        raise made(f"{where} is damaged: {type(error).__name__}: {said}.") from error


def read_bytes(path: Path, most: int, made: type[TLCircuitsError]) -> bytes:
    """The bytes of a file that has at most ``most`` of them."""
    with boundary(made, path):
        size = path.stat().st_size
        if size > most:
            raise made(f"{path} has {size:,} bytes; at most {most:,} are read.")
        with path.open("rb") as file:
            return file.read(most)


def gunzip(path: Path, most: int, made: type[TLCircuitsError]) -> bytes:
    """What a gzip file unpacks to. It is unpacked piece by piece, and no further than the bounds.

    Raises ``made`` if it unpacks to more than ``most`` bytes, or to more than real data can.
    """
    import zlib

    allowed = min(most, path.stat().st_size * MOST_SQUEEZED + LARGEST_CONFIG)
    try:
        with boundary(made, path), gzip.open(path) as file:
            data = file.read(allowed + 1)
    except made as error:
        if isinstance(error.__cause__, (OSError, EOFError, zlib.error)):
            raise made(
                f"{path} is not a whole gzip file ({quoted(str(error.__cause__))}). Was it cut off?"
            ) from error.__cause__
        raise
    if len(data) > allowed:
        raise made(
            f"{path} unpacks to more than {allowed:,} bytes, which a graph of its size never does. It is not unpacked."
        )
    return data


def parse_json(data: bytes | str, where: object, made: type[TLCircuitsError]) -> Any:
    """The parsed JSON. Half of a surrogate pair, which no file can be written with, becomes ``\\ufffd``."""
    try:
        with boundary(made, where):
            text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
            if "\\ud" in text or "\\uD" in text:
                text = _ESCAPE.sub(lambda found: "\\ufffd" if found[1] else found[0], text)
            return json.loads(text)
    except made as error:
        if isinstance(error.__cause__, (ValueError, RecursionError)):
            raise made(f"{where} is not JSON, or was cut off ({quoted(str(error.__cause__))}).") from error.__cause__
        raise


def require_plain(
    value: Any, where: object, made: type[TLCircuitsError], most: int = MOST_VALUES, finite: bool = False
) -> None:
    """Raise ``made`` unless ``value`` is made of text, numbers, lists and mappings, and stays within the bounds.

    ``finite``: refuse NaN and infinity too, where ``value`` is to be written as JSON again, which has no such numbers.

    A reference to a part counts as often as it stands there: a YAML file of a few lines can repeat one list a billion
    times.
    """
    sizes: dict[int, int] = {}

    def size(part: Any, depth: int) -> int:
        if part is None or isinstance(part, (str, int, float)):
            if finite and isinstance(part, float) and not abs(part) < float("inf"):
                raise made(f"{where} holds {part}, and JSON has only finite numbers.")
            return 1
        if not isinstance(part, (list, tuple, dict)):
            raise made(f"{where} holds a {type(part).__name__}; expected text, numbers, lists and mappings.")
        if depth > DEEPEST:
            raise made(f"{where} holds more than {DEEPEST} lists within lists.")
        if id(part) not in sizes:
            inner = [*part, *part.values()] if isinstance(part, dict) else part
            sizes[id(part)] = 1 + sum(size(one, depth + 1) for one in inner)
        if sizes[id(part)] > most:
            raise made(f"{where} holds more than {most:,} values.")
        return sizes[id(part)]

    size(value, 0)
