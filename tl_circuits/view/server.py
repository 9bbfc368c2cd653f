"""The page over HTTP: several graphs, notes that are kept, and a model to steer if there is one.

By default the server listens on this machine only. Every request for graphs, notes or the model must carry the token
that the printed address ends in; the page takes it out of the address bar and keeps it for its tab. Wrong tokens are
answered one after the other, slowly.
Host and Origin are checked, so that neither another site nor a host name that points to this machine can use a person's
browser to get in. All addresses in the page are relative, so it works behind a notebook proxy.
"""

import asyncio
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from tl_circuits.errors import TLCircuitsError
from tl_circuits.support.extras import how_to_install
from tl_circuits.view.bundle import page_file, script
from tl_circuits.view.folder import GraphFolder, sendable
from tl_circuits.view.live_model import LiveModel

LARGEST_BODY = 2 * 1024**2
PORTS_TRIED = 50
SHORTEST_TOKEN, FEWEST_KINDS = 16, 8  # characters of a token that other machines may guess at, and how many differ
SECONDS_TO_CLOSE = 5  # that open connections get after Ctrl-C
WRONG_TOKEN = "the token is missing or wrong: use the whole address that tl-circuits view printed."
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)


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

        from tl_circuits.view.conversation import converse
        from tl_circuits.view.messages import read_saved_notes
        from tl_circuits.view.timeouts import SECONDS_FOR_BODY, Guesses
    except ImportError as error:
        raise ImportError(f"the server needs FastAPI and uvicorn. Run: {how_to_install('serve')}") from error

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    guesses = Guesses()
    plain = {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    def refused_place(headers: Any) -> str:
        host = (headers.get("host") or "").rsplit(":", 1)[0].strip("[]")
        if hosts is not None and host not in hosts:
            return f"requests for the host {host!r} are not answered."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("x-forwarded-host", headers.get("host")):
            return "requests from other sites are not answered."
        return ""

    def knows_token(given: str | None) -> bool:
        return secrets.compare_digest((given or "").encode("utf-8", "replace"), token.encode())

    @app.middleware("http")
    async def check(request: Request, call_next: Any) -> Any:
        problem = refused_place(request.headers)
        if problem:
            return JSONResponse({"error": problem}, 403, headers=plain)
        open_to_all = request.url.path.rsplit("/", 1)[-1] in ("", "page.js", "page.css")  # these hold no secrets
        if not open_to_all and not knows_token(request.query_params.get("token") or request.headers.get("x-token")):
            if not await guesses.wait():
                return JSONResponse({"error": "too many wrong tokens; try again later."}, 429, headers=plain)
            return JSONResponse({"error": WRONG_TOKEN}, 403, headers=plain)
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
            {
                "id": e.id,
                "name": e.name,
                "problem": e.problem,
                "saved": f"saved as {e.name} {where}" if e.traced_here else "",
            }
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
        try:
            body = await asyncio.wait_for(request.body(), SECONDS_FOR_BODY)
        except TimeoutError:
            return JSONResponse({"error": "the notes did not arrive in time."}, 408)
        return await asyncio.to_thread(_answer, lambda: _saved(graph_id, body))

    @app.websocket("/live")
    async def talk(socket: WebSocket) -> None:
        known = knows_token(socket.query_params.get("token"))
        if not known:
            await guesses.wait()
        if refused_place(socket.headers) or not known or live is None:
            await socket.close(1008)
            return
        await socket.accept()
        try:
            await converse(socket, folder, live)
        except WebSocketDisconnect:
            pass  # the tab was closed

    def _saved(graph_id: str, body: bytes) -> dict[str, bool]:
        given = read_saved_notes(body)
        folder.save_notes(graph_id, given.notes, given.fields)
        return {"saved": True}

    def _answer(work: Any) -> Any:
        try:
            return JSONResponse(work())
        except KeyError as error:
            return JSONResponse({"error": str(error.args[0])}, 404)
        except (TLCircuitsError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 422)

    return app


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
    """Raise ValueError if other machines can reach ``host`` and no token was chosen, or one that can be guessed."""
    if host in LOOPBACK:
        return
    example = f"such as --token {secrets.token_urlsafe(16)}"
    if not token:
        raise ValueError(f"--host {host} lets other machines in. Choose a token that they must give, {example}.")
    if len(token) < SHORTEST_TOKEN or len(set(token)) < FEWEST_KINDS:
        raise ValueError(
            f"--host {host} lets other machines in, and this --token can be guessed. Choose one of at least "
            f"{SHORTEST_TOKEN} characters, {FEWEST_KINDS} of them different, {example}."
        )


def serve(
    folder: GraphFolder,
    host: str,
    port: int,
    token: str | None,
    live: LiveModel | None,
    ready: Any,
    proxies: Sequence[str] = (),
) -> None:
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
        ValueError: if other machines can reach ``host`` and no token was chosen, or one that can be guessed.
    """
    require_token(host, token)
    public = host not in LOOPBACK
    secret = token or secrets.token_urlsafe(16)
    app = make_app(folder, secret, None if public else (*LOOPBACK, *proxies), live)
    import uvicorn

    port = free_port(host, port)
    name = f"[{host}]" if ":" in host else host
    ready(f"http://{name}:{port}/?token={quote(secret, safe='')}", port)
    with suppress(KeyboardInterrupt):  # uvicorn ends in order and then raises it again; for a person that is no failure
        uvicorn.Server(settings(app, host, port)).run()


def settings(app: Any, host: str, port: int) -> Any:
    """uvicorn's settings for the application: quiet, with bounds on sizes and on waiting."""
    import uvicorn

    from tl_circuits.view.conversation import LARGEST_MESSAGE
    from tl_circuits.view.timeouts import ImpatientProtocol

    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        ws_max_size=LARGEST_MESSAGE,
        http=ImpatientProtocol,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
    )
