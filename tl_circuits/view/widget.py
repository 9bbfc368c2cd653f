"""The page in a notebook (extra ``widget``): JupyterLab, VS Code, Colab and all others that anywidget supports."""

from typing import Any

from tl_circuits.errors import ArgumentError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.notes import Notes
from tl_circuits.hooks import shown
from tl_circuits.support.extras import how_to_install
from tl_circuits.view.bundle import page_file, script
from tl_circuits.view.page_data import packed_json, page_data

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError(f"the notebook widget needs anywidget. Run: {how_to_install('widget')}") from error


class Widget(anywidget.AnyWidget):
    """The graph's page in a notebook cell. What you do in the page changes the widget's attributes, and the reverse.

    Args:
        graph: the graph.
        ablations: what :func:`tl_circuits.box_ablations` measured, for "remove this box" in the page.

    Attributes:
        selection: ids of the chosen nodes. If you set it, the page chooses the box of exactly these nodes, else the
            first node.
        groups: your groups, ``[label, id, ...]`` each.
        pins: ids of the pinned nodes.
        names: your names for nodes, by id.
        text: your notes.

    Raises:
        ArgumentError: if ``graph`` is not a graph.

    Examples:
        >>> widget = tlc.Widget(graph)
        >>> widget.pins = ["L0/F308@7"]
        >>> widget.graph.pins        # the graph with your notes
        ('L0/F308@7',)
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
            raise ArgumentError(
                "Widget(graph=...) must be an AttributionGraph (tlc.attribute or tlc.load_graph makes one), got "
                f"{shown(graph)}."
            )
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
        """The graph with the notes as they are now.

        Raises:
            ValueError: if the notes name a node that the graph does not have.
        """
        groups = tuple((label, tuple(ids)) for label, *ids in self.groups)
        return self._graph.with_notes(Notes(groups, tuple(self.pins), dict(self.names), self.text))
