"""The page over HTTP: several graphs, notes that are kept, and a model to steer if there is one.

By default the server listens on this machine only. Every request must carry the token that the printed address ends in.
Host and Origin are checked, so that neither another site nor a host name that points to this machine can use a person's
browser to get in. All addresses in the page are relative, so it works behind a notebook proxy.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from tl_circuits.errors import GraphFileError, TLCircuitsError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.support.endings import stem_for
from tl_circuits.support.extras import how_to_install
from tl_circuits.support.reading import parse_json
from tl_circuits.view.bundle import page_file, script
from tl_circuits.view.folder import GraphFolder, sendable
from tl_circuits.view.live_model import LABELS_AT_ONCE, LiveModel, unlabelled
from tl_circuits.view.page_data import naming_data, story_on_page

LARGEST_BODY = 2 * 1024**2
LARGEST_MESSAGE = 256 * 1024
PORTS_TRIED = 50
WISHES = ("steer", "heads", "labels", "trace")  # what a tab can ask of the model
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"


def make_app(folder: GraphFolder, token: str, hosts: tuple[str, ...] | None, live: LiveModel | None) -> Any:
    """The ASGI application.

    Args:
        folder: the graphs.
        token: what every request must carry.
        hosts: host names that requests may be for; None for any (then the token alone protects the server).
        live: the model, if there is one.
    """
    try:
        from fastapi import FastAPI, WebSocket, WebSocketDisconnect
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, Response
    except ImportError as error:
        raise ImportError(f"the server needs FastAPI and uvicorn. Run: {how_to_install('serve')}") from error

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    plain = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}

    def refused(headers: Any, given: str | None) -> str:
        host = (headers.get("host") or "").rsplit(":", 1)[0].strip("[]")
        if hosts is not None and host not in hosts:
            return f"requests for the host {host!r} are not answered."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("x-forwarded-host", headers.get("host")):
            return "requests from other sites are not answered."
        if not secrets.compare_digest((given or "").encode(), token.encode()):
            return "the token is missing or wrong: use the whole address that tl-circuits view printed."
        return ""

    @app.middleware("http")
    async def check(request: Request, call_next: Any) -> Any:
        if request.url.path.rsplit("/", 1)[-1] not in ("page.js", "page.css"):  # these two hold no secrets
            problem = refused(request.headers, request.query_params.get("token") or request.headers.get("x-token"))
            if problem:
                return JSONResponse({"error": problem}, 403, headers=plain)
        response = await call_next(request)
        response.headers.update(plain)
        return response

    @app.get("/")
    async def index() -> Any:
        return HTMLResponse(_shell(live is not None))

    @app.get("/page.js")
    async def code() -> Any:
        return Response(script("served.js"), media_type="text/javascript")

    @app.get("/page.css")
    async def style() -> Any:
        return Response(page_file("page.css"), media_type="text/css")

    @app.get("/graphs")
    def graphs() -> Any:
        where = "in the folder of this list" if folder.path.is_dir() else f"beside {sendable(folder.path.name)}"
        return [
            {"id": e.id, "name": e.name, "problem": e.problem, "saved": f"saved as {e.name} {where}" if e.traced_here else ""}
            for e in folder.entries()
        ]

    @app.get("/graphs/{graph_id}")
    def graph(graph_id: str) -> Any:
        return _answer(lambda: folder.data(graph_id))

    @app.get("/graphs/{graph_id}/notes")
    def notes(graph_id: str) -> Any:
        return _answer(lambda: folder.notes(graph_id))

    @app.put("/graphs/{graph_id}/notes")
    async def save(graph_id: str, request: Request) -> Any:
        if int(request.headers.get("content-length", LARGEST_BODY + 1)) > LARGEST_BODY:
            return JSONResponse({"error": f"notes may have at most {LARGEST_BODY} bytes."}, 413)
        body = await request.body()
        return await asyncio.to_thread(_answer, lambda: _save(folder, graph_id, body))

    @app.websocket("/live")
    async def talk(socket: WebSocket) -> None:
        if refused(socket.headers, socket.query_params.get("token")) or live is None:
            await socket.close(1008)
            return
        await socket.accept()
        try:
            await _converse(socket, folder, live)
        except WebSocketDisconnect:
            pass  # the tab was closed

    def _answer(work: Any) -> Any:
        try:
            return JSONResponse(work())
        except KeyError as error:
            return JSONResponse({"error": str(error.args[0])}, 404)
        except (TLCircuitsError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 422)

    return app


def _save(folder: GraphFolder, graph_id: str, body: bytes) -> dict[str, bool]:
    given = parse_json(body, "the body", GraphFileError)
    if not isinstance(given, dict) or not isinstance(given.get("fields"), list):
        raise GraphFileError("expected {notes, fields}.")
    folder.save_notes(graph_id, given.get("notes"), given["fields"])
    return {"saved": True}


async def _converse(socket: Any, folder: GraphFolder, live: LiveModel) -> None:
    """Answer one tab. If a later wish of the same kind comes before the model is free, the earlier one is answered with
    ``skipped``.
    """
    latest: dict[str, int] = {}
    jobs: set[asyncio.Task[None]] = set()

    async def work(wish: dict[str, Any], kind: str, number: int) -> None:
        said = wish.get("number")  # sent back as it is, so only what JSON can hold
        known = {"number": said if isinstance(said, (int, str)) else None}
        try:
            if kind == "trace":
                await socket.send_json(await _trace(socket, folder, live, str(wish.get("prompt", ""))))
                return
            graph_id = str(wish.get("graph"))
            graph = await asyncio.to_thread(folder.graph, graph_id)  # reading a file must not hold up other tabs
            if kind == "labels":
                await _label(socket, folder, live, graph_id)
                return
            result = await _asked(wish, kind, live, graph, lambda: number == latest[kind])
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
            try:
                wish = parse_json(text, "the wish", GraphFileError)
            except GraphFileError:
                wish = None
            kind = wish.get("do") if isinstance(wish, dict) else None
            if kind not in WISHES:
                await socket.send_json({"error": f"expected a JSON object whose do is one of {', '.join(WISHES)}."})
                continue
            latest[kind] = latest.get(kind, 0) + 1
            job = asyncio.create_task(work(wish, kind, latest[kind]))
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
    wish: dict[str, Any], kind: str, live: LiveModel, graph: AttributionGraph, still_wanted: Callable[[], bool]
) -> dict[str, Any] | None:
    """The answer to one question to the model; None if a later question came first."""
    if kind == "heads":
        story = await live.heads(graph, str(wish.get("source")), str(wish.get("target")), still_wanted)
        return None if story is None else story_on_page(story, set(graph.node_ids))
    nodes = [str(node) for node in wish.get("nodes", ())]
    return await live.steer(graph, nodes, float(wish.get("factor", 0)), still_wanted)


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


def _shell(live: bool) -> str:
    mark = ' data-live="yes"' if live else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>tl_circuits</title>'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="page.css"></head><body class="tlc-page">'
        f'<main id="graph"{mark}><h1>Loading the graph …</h1><progress aria-label="Loading"></progress></main>'
        '<script type="module" src="page.js"></script></body></html>'
    )


def free_port(host: str, wanted: int) -> int:
    """``wanted``, or the next port that is free on ``host``.

    Raises:
        OSError: if none of the next ports is free.
    """
    for port in range(wanted, wanted + PORTS_TRIED):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host, port))
                return port
            except OSError:
                continue
    raise OSError(f"no port from {wanted} to {wanted + PORTS_TRIED - 1} is free on {host}.")


def require_token(host: str, token: str | None) -> None:
    """Raise ValueError if other machines can reach ``host`` and no token was chosen."""
    if host not in LOOPBACK and not token:
        raise ValueError(f"--host {host} lets other machines in. Choose a token that they must give: --token SOMETHING-LONG.")


def serve(folder: GraphFolder, host: str, port: int, token: str | None, live: LiveModel | None, ready: Any, proxies: Sequence[str] = ()) -> None:
    """Serve until interrupted.

    Args:
        folder: the graphs.
        host: the address to listen on.
        port: the first port to try.
        token: what every request must carry; None for a random one.
        live: the model, if there is one.
        ready: called with address and port once the port is known.
        proxies: other host names, under which a proxy passes requests on.

    Raises:
        ValueError: if other machines can reach ``host`` and no token was chosen.
    """
    require_token(host, token)
    public = host not in LOOPBACK
    secret = token or secrets.token_urlsafe(16)
    app = make_app(folder, secret, None if public else (*LOOPBACK, *proxies), live)
    import uvicorn

    port = free_port(host, port)
    name = f"[{host}]" if ":" in host else host
    ready(f"http://{name}:{port}/?token={secret}", port)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, ws_max_size=LARGEST_MESSAGE)
