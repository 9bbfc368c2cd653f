"""The one model behind a server: one job at a time, and of one tab's wishes only the latest."""

import asyncio
from collections.abc import Callable
from typing import Any

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement
from tl_circuits.view.box_effects import measure_boxes

LONGEST_PROMPT = 2000  # characters
MOST_STEERED = 2000  # nodes
LARGEST_FACTOR = 100.0


class LiveModel:
    """Steers and traces with one attached model. Jobs run one after the other in a thread of their own."""

    def __init__(self, replacement: Replacement, max_nodes: int = 1000) -> None:
        self.replacement = replacement
        self.max_nodes = max_nodes  # features traced of a new prompt
        self._turn = asyncio.Lock()

    async def steer(
        self, graph: AttributionGraph, nodes: list[str], factor: float, still_wanted: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """What multiplying these nodes does; None if a later wish came before the model was free.

        Raises EditError for nodes that cannot be edited, ValueError for too many or too far.
        """
        if not 0 < len(nodes) <= MOST_STEERED or not abs(factor) <= LARGEST_FACTOR:
            raise ValueError(f"steer 1 to {MOST_STEERED} nodes by a factor between -{LARGEST_FACTOR} and {LARGEST_FACTOR}.")
        async with self._turn:
            if not still_wanted():
                return None
            return (await asyncio.to_thread(measure_boxes, self.replacement, graph, [nodes], factor))[0]

    async def trace(self, prompt: str, tell: Callable[[str], None]) -> AttributionGraph:
        """A new graph of ``prompt``; ``tell`` gets what is being done, from another thread."""
        if not 0 < len(prompt) <= LONGEST_PROMPT:
            raise ValueError(f"a prompt has 1 to {LONGEST_PROMPT} characters.")
        async with self._turn:
            return await asyncio.to_thread(self._trace, prompt, tell)

    def _trace(self, prompt: str, tell: Callable[[str], None]) -> AttributionGraph:
        import tl_circuits as tlc

        tell("tracing the strongest features")
        graph = tlc.attribute(self.replacement, prompt, progress=False, max_nodes=self.max_nodes)
        tell("labelling them")
        return tlc.label_features(self.replacement, graph)
