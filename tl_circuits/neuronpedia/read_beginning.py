"""Judge by its beginning whether a file of another program is a graph, without reading megabytes of JSON."""

import gzip
import json
import zipfile
from pathlib import Path

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.nodes import GraphInfo
from tl_circuits.neuronpedia.read import GZIP, PICKLE, ZIP, read_foreign
from tl_circuits.neuronpedia.read_json import content_of
from tl_circuits.support.reading import parse_json

BEGINNING = 64 * 1024  # bytes
_KEYS = ('"metadata"', '"nodes"', '"graph_data"')


def read_beginning(path: Path) -> GraphInfo | None:
    """None if the file begins as a graph does. If the beginning does not tell, the whole file is read.

    Returns:
        What the graph is of, if the whole file was read; else None.

    Raises:
        GraphFileError: if the file is no graph.
    """
    with path.open("rb") as file:
        data = file.read(BEGINNING)
    if data.startswith((ZIP, PICKLE)):
        return None if _is_torch_archive(path) else read_foreign(path).info
    if data.startswith(GZIP):
        try:
            with gzip.open(path) as packed:
                data = packed.read(BEGINNING)
        except (OSError, EOFError):  # damaged: reading the whole file says how
            return read_foreign(path).info
    if len(data) < BEGINNING:  # the file ends here, so this is all of it
        content_of(parse_json(data, path, GraphFileError), str(path))
        return None
    text = data.decode(json.detect_encoding(data), "ignore")
    return None if any(key in text for key in _KEYS) else read_foreign(path).info


def _is_torch_archive(path: Path) -> bool:
    """Whether the file is a whole zip file with a pickle, as torch writes it. Nothing in it is unpacked."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())
