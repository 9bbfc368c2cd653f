"""Read graph files of other programs. The first bytes say which program wrote the file."""

from pathlib import Path

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.support.reading import LARGEST_JSON, gunzip, parse_json, read_bytes

GZIP, ZIP, PICKLE = b"\x1f\x8b", b"PK\x03\x04", b"\x80"


def read_foreign(path: Path) -> AttributionGraph:
    """The graph in a file of another program.

    Raises:
        GraphFileError: if the file cannot be read; it says what is wrong and where.
    """
    from tl_circuits.neuronpedia.read_json import graph_from_json

    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((ZIP, PICKLE)):
        from tl_circuits.neuronpedia.read_pt import read_pt

        return read_pt(path)
    zipped = head.startswith(GZIP)
    data = gunzip(path, LARGEST_JSON, GraphFileError) if zipped else read_bytes(path, LARGEST_JSON, GraphFileError)
    return graph_from_json(parse_json(data, path, GraphFileError), str(path))
