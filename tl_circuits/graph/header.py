"""What the beginning of a graph's file says, so that a folder of large files is listed without reading them."""

from pathlib import Path

from tl_circuits.errors import GraphFileError
from tl_circuits.graph.nodes import GraphInfo
from tl_circuits.graph.storage import description, info_of, is_foreign, opened
from tl_circuits.graph.validate import require_typed
from tl_circuits.support.outputs import output
from tl_circuits.support.reading import LARGEST_GRAPH_FILE, boundary


def read_header(path: Path) -> GraphInfo | None:
    """What a graph's file is of, without reading its tables.

    A file whose beginning is right may still be damaged further on; only :func:`load_graph` finds that.

    Returns:
        The facts; None for another program's file, which has them all over the file.

    Raises:
        GraphFileError: if the file is missing, cut off, or does not begin as a graph does.
    """
    if not path.is_file():
        raise GraphFileError(f"there is no graph file at {path}.")
    with boundary(GraphFileError, path):
        if path.stat().st_size > LARGEST_GRAPH_FILE:
            raise GraphFileError(f"{path} has more than {LARGEST_GRAPH_FILE:,} bytes, which no graph has.")
        if is_foreign(path):
            return output("read the beginning of another program's file")(path)
        with opened(path) as file:
            info = info_of(description(file, path))
        require_typed(info, f"{path}: info")
        return info
