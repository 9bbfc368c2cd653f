"""``tl-circuits view``: show graphs in a browser, and steer them if a model is named."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from tl_circuits.cli.app import app, clear_errors, harmless, terminal, wrong_usage
from tl_circuits.cli.loading import Features, features_named, open_replacement
from tl_circuits.cli.options import COMMAND_NODES, Debug, Device, Dtype


@app.command()
def view(
    path: Annotated[Path, typer.Argument(help="A graph file, or a folder of them.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=(
                "Also load this model. In the page you can then steer boxes and trace new prompts; their graphs are "
                "saved in the folder, or beside the file, under a name made from the prompt."
            ),
        ),
    ] = None,
    transcoders: Annotated[
        str | None,
        typer.Option(
            "--transcoders",
            "-t",
            help=(
                "The transcoders that the graphs were traced with, as for `trace`. Default: those that the graphs name."
            ),
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. If other machines can reach it, --token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The first port to try.")] = 7860,
    token: Annotated[
        str | None, typer.Option(help="The token that every request must carry. Default: a new random one.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="Also answer requests for this host name, such as that of a JupyterHub (repeatable)."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Show graphs in a browser. The page is served by this machine, and only to this machine unless --host says
    otherwise.
    """
    with clear_errors(debug), ExitStack() as stack:
        from tl_circuits.errors import GraphFileError

        if not path.exists():
            raise GraphFileError(f"there is no file or folder {path}.")
        from tl_circuits.view.folder import GraphFolder
        from tl_circuits.view.live_model import LiveModel, foreign
        from tl_circuits.view.server import require_token, serve

        with wrong_usage("--host"):
            require_token(host, token)
        folder, live = GraphFolder(path), None
        if model is not None:
            features = Features(transcoders or features_named(info for _, info in folder.infos()))
            replacement = stack.enter_context(open_replacement(model, features, device, dtype))
            live = LiveModel(replacement, COMMAND_NODES)
            for other in foreign(replacement, folder):
                typer.echo(harmless(other), err=True)

        def ready(address: str, taken: int) -> None:
            if taken != port:
                typer.echo(f"Port {port} is taken; using {taken}.", err=True)
            saved = (
                "" if live is None else f"\nGraphs that you trace in the page are saved in {folder.home.absolute()}."
            )
            terminal(soft_wrap=True).print(f"Open {address}{saved}\nCtrl-C ends it.", highlight=False)

        serve(folder, host, port, token, live, ready, allow_host or ())
