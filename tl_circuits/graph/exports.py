"""A graph as objects and files of other libraries."""

import json
from pathlib import Path
from typing import Any

from tl_circuits.errors import OutputError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.support.extras import how_to_install
from tl_circuits.support.files import atomic_file


def to_networkx(graph: AttributionGraph) -> Any:
    """A ``networkx.DiGraph``: node ids as nodes, the columns of the nodes frame as attributes.

    Raises:
        ImportError: if networkx is not installed; it names the extra.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError(f"to_networkx needs networkx. Run: {how_to_install('networkx')}") from error
    made = networkx.DiGraph(prompt=graph.info.prompt, model=graph.info.model)
    frame = graph.nodes.set_index("id")
    made.add_nodes_from((node, row) for node, row in frame.to_dict("index").items())
    made.add_weighted_edges_from(graph.edges.itertuples(index=False, name=None))
    return made


def to_parquet(graph: AttributionGraph, folder: Path, overwrite: bool) -> tuple[Path, Path]:
    """Write the two frames into ``folder`` as ``nodes.parquet`` and ``edges.parquet``.

    Returns:
        Both paths.

    Raises:
        OutputError: if a file exists or cannot be written.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}.") from error
    paths = (folder / "nodes.parquet", folder / "edges.parquet")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise OutputError(
            f"{existing[0]} exists already. Choose another folder, or overwrite it: overwrite=True in Python, "
            "--force in a command."
        )
    for path, frame in zip(paths, (graph.nodes, graph.edges), strict=True):
        with atomic_file(path, overwrite) as file:
            parquet.write_table(pyarrow.Table.from_pandas(frame, preserve_index=False), file)
    return paths


def to_graphml(graph: AttributionGraph, path: Path, overwrite: bool) -> Path:
    r"""Write GraphML (for Gephi, Cytoscape, yEd) with the frames' columns as attributes; needs the extra ``networkx``.

    Characters that XML cannot hold are written as ``\uXXXX``.
    """
    made = to_networkx(graph)
    import networkx

    made.graph = {name: _xml_text(value) for name, value in made.graph.items()}
    for attributes in made.nodes.values():
        attributes.update({k: _xml_text(v) for k, v in attributes.items() if isinstance(v, str)})
    with atomic_file(path, overwrite) as file:
        networkx.write_graphml(made, file)
    return path


def _xml_text(text: str) -> str:
    return "".join(c if c in "\t\n\r" or (c >= " " and c not in "\ufffe\uffff") else f"\\u{ord(c):04x}" for c in text)


def to_dot(graph: AttributionGraph, path: Path, overwrite: bool) -> Path:
    """Write DOT (Graphviz): labels, signs as colours, and edges as wide as their share of their target's inputs."""
    mass = graph.edges.assign(size=graph.edges.weight.abs()).groupby("target")["size"].transform("sum")
    shapes = {"feature": "box", "embedding": "plain", "logit": "ellipse"}
    with atomic_file(path, overwrite) as file:
        file.write(b'digraph attribution {\n  rankdir="BT";\n  node [fontname="sans-serif"];\n')
        for node in graph.nodes.itertuples():
            shape = shapes.get(node.kind, "diamond")
            file.write(f"  {_quoted(node.id)} [label={_quoted(node.label)}, shape={shape}];\n".encode())
        for edge, total in zip(graph.edges.itertuples(), mass, strict=True):
            colour, width = ("#0072B2" if edge.weight > 0 else "#D55E00"), 0.2 + 4 * abs(edge.weight) / total
            ends = f"{_quoted(edge.source)} -> {_quoted(edge.target)}"
            file.write(
                f'  {ends} [weight={abs(edge.weight) / total:.4f}, color="{colour}", penwidth={width:.2f}, '
                f'label="{edge.weight:.3g}"];\n'.encode()
            )
        file.write(b"}\n")
    return path


def _quoted(text: str) -> str:
    """A DOT string. JSON escapes quotes as DOT does; its other escapes are shown literally."""
    return '"' + json.dumps(text, ensure_ascii=False)[1:-1].replace("\\n", "\\\\n").replace("\\t", "\\\\t") + '"'
