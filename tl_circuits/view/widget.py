"""The page in a notebook: JupyterLab, VS Code, Colab and others that anywidget knows (extra ``widget``)."""

from typing import Any

from tl_circuits.errors import ArgumentError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.notes import Notes
from tl_circuits.hooks import shown
from tl_circuits.view.bundle import page_file, script
from tl_circuits.view.page_data import packed_json, page_data

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError("the notebook widget needs anywidget. Run: pip install 'tl_circuits[widget]'") from error


class Widget(anywidget.AnyWidget):
    """``tlc.Widget(graph)`` shows the graph's page; what a person does there arrives here, and the reverse.

    ``selection``: ids of the chosen nodes; set, it chooses the box of just these, else the first. ``groups`` (``[label, id, ...]`` each), ``pins``,
    ``names`` (id to text) and ``text``: the notes, to read and to set. ``widget.graph`` is the graph
    with them. ``ablations``: as for ``graph.to_html``.
    """

    _esm = script("widget.js")
    _css = page_file("page.css")
    _data = traitlets.Unicode().tag(sync=True)
    selection = traitlets.List(traitlets.Unicode()).tag(sync=True)
    groups = traitlets.List(traitlets.List(traitlets.Unicode())).tag(sync=True)
    pins = traitlets.List(traitlets.Unicode()).tag(sync=True)
    names = traitlets.Dict().tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)

    def __init__(self, graph: AttributionGraph, ablations: list[dict[str, Any]] | None = None) -> None:
        if not isinstance(graph, AttributionGraph):
            raise ArgumentError(f"Widget(graph=...) must be an AttributionGraph (tlc.attribute or tlc.load_graph makes one), got {shown(graph)}.")
        self._graph = graph
        super().__init__(
            _data=packed_json(page_data(graph, ablations)),
            groups=[[label, *ids] for label, ids in graph.groups],
            pins=list(graph.pins),
            names=dict(graph.notes.names),
            text=graph.notes.text,
        )

    @property
    def graph(self) -> AttributionGraph:
        """The graph with the notes as they are now; raises ValueError for ids it does not have."""
        groups = tuple((label, tuple(ids)) for label, *ids in self.groups)
        return self._graph.with_notes(Notes(groups, tuple(self.pins), dict(self.names), self.text))
