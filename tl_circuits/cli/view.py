"""``tl-circuits view``: graphs in a browser, with a model to steer where one is named."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tl_circuits.cli.app import app, clear_errors, wrong_usage
from tl_circuits.cli.loading import Features, features_named, open_replacement


@app.command()
def view(
    path: Annotated[Path, typer.Argument(help="A graph file, or a folder of them.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Also load this model: boxes can be steered and prompts traced in the page.")] = None,
    transcoders: Annotated[str | None, typer.Option("--transcoders", "-t", help="What the graphs were traced with, as `trace` takes it. Default: what the graphs name.")] = None,
    host: Annotated[str, typer.Option(help="Which address to listen on; anything but this machine's own needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The first port to try.")] = 7860,
    token: Annotated[str | None, typer.Option(help="What the address must carry; default: a new random one.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option("--allow-host", help="Also answer under this name: that of a proxy, such as a JupyterHub (repeatable).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; default: what the model takes.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Show graphs in a browser, served from this machine to this machine."""
    with clear_errors(debug), ExitStack() as stack:
        from tl_circuits.errors import GraphFileError

        if not path.exists():
            raise GraphFileError(f"there is no file or folder {path}.")
        from tl_circuits.view.folder import GraphFolder
        from tl_circuits.view.live_model import LiveModel, foreign
        from tl_circuits.view.server import require_token, serve

        with wrong_usage("--host"):
            require_token(host, token)
        live = None
        if model is not None:
            features = Features(transcoders or features_named(GraphFolder(path).graphs()))
            replacement = stack.enter_context(open_replacement(model, features, device, dtype))
            live = LiveModel(replacement)
            for other in foreign(replacement, GraphFolder(path)):
                typer.echo(other, err=True)

        def ready(address: str, taken: int) -> None:
            if taken != port:
                typer.echo(f"Port {port} is taken; using {taken}.", err=True)
            Console(soft_wrap=True).print(f"Open {address}\nCtrl-C ends it.", highlight=False)

        serve(path, host, port, token, live, ready, allow_host or ())
