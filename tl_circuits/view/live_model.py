"""The one model behind a server. It does one job at a time, and only the latest wish of each tab."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tl_circuits.attention.stories import edge_stories, story_data
from tl_circuits.attribution.expand import MAX_NODES
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.errors import BelongingError
from tl_circuits.feature_labels.vocabulary import label_features
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement
from tl_circuits.interventions.box_effects import measure_boxes
from tl_circuits.view.folder import Entry, GraphFolder

LONGEST_PROMPT = 2000  # characters
MOST_STEERED = 2000  # nodes
LARGEST_FACTOR = 100.0
HEADS_EXPLAINED = 2
LABELS_AT_ONCE = 200  # between two of them, another job may have its turn


def unlabelled(graph: AttributionGraph) -> list[int]:
    """The features that have no label, most influential first."""
    features = [i for i in graph.is_kind("feature").nonzero()[:, 0].tolist() if i not in graph.labels]
    return sorted(features, key=lambda i: -float(graph.influence[i]))


def foreign(replacement: Replacement, folder: GraphFolder) -> list[str]:
    """A sentence for each graph of another model or dictionary. Such a graph can be looked at, but the model is not
    asked about it.
    """
    told = []
    for entry, info in folder.infos():
        try:
            require_belonging(replacement, info)
        except BelongingError as error:
            told.append(f"{entry.name} can be looked at, not steered or labelled: {error}")
    return told


class LiveModel:
    """Steers and traces with one attached model. Jobs run one after the other, in a thread of their own."""

    def __init__(self, replacement: Replacement, max_nodes: int = MAX_NODES) -> None:
        self.replacement = replacement
        self.max_nodes = max_nodes  # features traced of a new prompt
        # One thread owns the model. A tab that is closed ends its waiting, not the work: the next job starts when the
        # model is free, never beside another one.
        self._worker = ThreadPoolExecutor(1, "model")

    async def _done(self, work: Callable[..., Any], *args: Any, still_wanted: Callable[[], bool] = lambda: True) -> Any:
        """What ``work(*args)`` gives, once the model is free; None if it is no longer wanted by then."""

        def job() -> Any:
            return work(*args) if still_wanted() else None

        return await asyncio.wrap_future(self._worker.submit(job))

    async def steer(
        self, graph: AttributionGraph, nodes: list[str], factor: float, still_wanted: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """What multiplying these nodes by ``factor`` does; None if a later wish came before the model was free.

        Raises:
            EditError: for nodes that cannot be edited.
            ValueError: for too many nodes or too large a factor.
        """
        if not 0 < len(nodes) <= MOST_STEERED or not abs(factor) <= LARGEST_FACTOR:
            raise ValueError(
                f"steer 1 to {MOST_STEERED} nodes by a factor between -{LARGEST_FACTOR} and {LARGEST_FACTOR}."
            )
        found = await self._done(measure_boxes, self.replacement, graph, [nodes], factor, still_wanted=still_wanted)
        return None if found is None else found[0]

    async def heads(
        self, graph: AttributionGraph, source: str, target: str, still_wanted: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Which heads carried an edge and why the largest of them looked there.

        None if a later wish came before the model was free.

        Raises:
            TargetError: for edges that do not exist, or that are not those of this model and dictionary.
        """
        return await self._done(self._heads, graph, source, target, still_wanted=still_wanted)

    def _heads(self, graph: AttributionGraph, source: str, target: str) -> dict[str, Any]:
        (story,) = edge_stories(self.replacement, graph, [(source, target)], heads=HEADS_EXPLAINED)
        return story_data(graph, story)

    async def label(self, graph: AttributionGraph) -> AttributionGraph:
        """The graph with labels on the :data:`LABELS_AT_ONCE` most influential features that have none."""
        return await self._done(label_features, self.replacement, graph, unlabelled(graph)[:LABELS_AT_ONCE])

    async def trace(
        self, prompt: str, report: Callable[[str], None], keep: Callable[[AttributionGraph], Entry]
    ) -> Entry:
        """Trace ``prompt``, and give the new graph to ``keep``, also if nobody waits for it any longer by then.

        Args:
            prompt: the text.
            report: called, from another thread, with what is being done.
            keep: called, from another thread, with the graph.

        Returns:
            What ``keep`` returned.

        Raises:
            ValueError: for a prompt that is empty or too long.
        """
        if not 0 < len(prompt) <= LONGEST_PROMPT:
            raise ValueError(f"a prompt has 1 to {LONGEST_PROMPT} characters.")
        return await self._done(self._trace, prompt, report, keep)

    def _trace(self, prompt: str, report: Callable[[str], None], keep: Callable[[AttributionGraph], Entry]) -> Entry:
        from tl_circuits.attribution import attribute

        report("tracing the strongest features")
        return keep(attribute(self.replacement, prompt, progress=False, max_nodes=self.max_nodes))
