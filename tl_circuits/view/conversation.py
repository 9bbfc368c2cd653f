"""What one tab asks of the model, and what it is answered, over a websocket."""

import asyncio
from collections.abc import Callable
from typing import Any

from tl_circuits.errors import GraphFileError, TLCircuitsError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.support.endings import stem_for
from tl_circuits.view.folder import GraphFolder
from tl_circuits.view.live_model import LABELS_AT_ONCE, LiveModel, unlabelled
from tl_circuits.view.messages import Heads, Labels, Steer, Trace, Wish, read_wish
from tl_circuits.view.page_data import naming_data, story_on_page

LARGEST_MESSAGE = 256 * 1024  # characters


async def converse(socket: Any, folder: GraphFolder, live: LiveModel) -> None:
    """Answer one tab. If a later wish of the same kind comes before the model is free, the earlier one is answered with
    ``skipped``.
    """
    latest: dict[str, int] = {}
    jobs: set[asyncio.Task[None]] = set()

    async def work(wish: Wish, known: dict[str, Any], number: int) -> None:
        try:
            if isinstance(wish, Trace):
                await socket.send_json(await _trace(socket, folder, live, wish.prompt))
                return
            graph = await asyncio.to_thread(folder.graph, wish.graph)  # reading a file must not hold up other tabs
            if isinstance(wish, Labels):
                await _label(socket, folder, live, wish.graph)
                return
            result = await _asked(wish, live, graph, lambda: number == latest[wish.do])
            await socket.send_json(known | ({"skipped": True} if result is None else {"result": result}))
        except Exception as error:  # every wish gets an answer, or its tab waits for ever
            if _is_gone(socket):
                return
            ours = isinstance(error, (TLCircuitsError, ValueError, KeyError, TypeError))
            text = str(error.args[0] if error.args else error)
            await socket.send_json(known | {"error": text if ours else f"{type(error).__name__}: {text}"})

    try:
        while True:
            text = await socket.receive_text()
            if len(text) > LARGEST_MESSAGE:
                await socket.close(1009)
                return
            wish, said = read_wish(text)
            known = {"number": said}  # sent back as it came
            if isinstance(wish, GraphFileError):
                await socket.send_json(known | {"error": str(wish)})
                continue
            latest[wish.do] = latest.get(wish.do, 0) + 1
            job = asyncio.create_task(work(wish, known, latest[wish.do]))
            jobs.add(job)
            job.add_done_callback(jobs.discard)
    finally:
        latest = dict.fromkeys(latest, -1)
        for job in jobs:
            job.cancel()


def _is_gone(socket: Any) -> bool:
    """Whether the tab was closed, so that no answer can be sent."""
    return "DISCONNECTED" in (socket.client_state.name, socket.application_state.name)


async def _asked(
    wish: Steer | Heads, live: LiveModel, graph: AttributionGraph, still_wanted: Callable[[], bool]
) -> dict[str, Any] | None:
    """The answer to one question to the model; None if a later question came first."""
    if wish.do == "heads":
        story = await live.heads(graph, wish.source, wish.target, still_wanted)
        return None if story is None else story_on_page(story, set(graph.node_ids))
    return await live.steer(graph, wish.nodes, wish.factor, still_wanted)


async def _label(socket: Any, folder: GraphFolder, live: LiveModel, graph_id: str) -> None:
    """Label features that have no label, the strongest first, while the tab already shows the picture."""
    graph = await asyncio.to_thread(folder.graph, graph_id)
    todo, ours = unlabelled(graph), folder.find(graph_id).traced_here
    for start in range(0, len(todo), LABELS_AT_ONCE):
        graph = await live.label(await asyncio.to_thread(folder.graph, graph_id))
        last = start + LABELS_AT_ONCE >= len(todo)
        await asyncio.to_thread(folder.keep_labels, graph_id, graph, last and ours)
        if start == 0 or last:
            await socket.send_json({"labels": await asyncio.to_thread(naming_data, graph)})


async def _trace(socket: Any, folder: GraphFolder, live: LiveModel, prompt: str) -> dict[str, Any]:
    loop = asyncio.get_running_loop()

    def report(text: str) -> None:
        asyncio.run_coroutine_threadsafe(socket.send_json({"progress": text}), loop)

    folder.require_writable()
    made = await live.trace(prompt, report, lambda graph: folder.add(graph, stem_for(prompt)))
    return {"traced": made.id, "file": made.name}
