"""Read graph files of other programs. The first bytes say which program wrote the file."""

import gzip
import zlib
from pathlib import Path

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.graph import AttributionGraph

_GZIP, _ZIP, _PICKLE = b"\x1f\x8b", b"PK\x03\x04", b"\x80"


def read_foreign(path: Path) -> AttributionGraph:
    """The graph in a file of another program.

    Raises:
        GraphFileError: if the file cannot be read; it says what is wrong and where.
    """
    from tl_circuits.neuronpedia.read_json import graph_from_json, parse

    data = path.read_bytes()
    if data.startswith((_ZIP, _PICKLE)):
        from tl_circuits.neuronpedia.read_pt import read_pt

        return read_pt(path)
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise GraphFileError(f"{path} is not a whole gzip file ({error}). Was it cut off?") from error
    return graph_from_json(parse(data, str(path)), str(path))
