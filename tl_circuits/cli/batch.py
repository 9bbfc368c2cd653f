"""``tl-circuits batch``: graphs of many prompts, on one or several workers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.loading import Features, open_replacement
from tl_circuits.cli.options import COMMAND_NODES, L0, AsJson, Debug, Device, Dtype, Layers, Model, Transcoders, Width

if TYPE_CHECKING:
    import pandas as pd

    from tl_circuits.hooks import Replacement

FAILURES_SHOWN = 10


@dataclass(frozen=True)
class Opener:
    """Opens model and dictionary by their names, in whatever process it is called."""

    model: str
    features: Features
    device: str | None
    dtype: str

    def __call__(self) -> "Replacement":
        return open_replacement(self.model, self.features, self.device, self.dtype)


@app.command()
def batch(
    prompts: Annotated[
        Path,
        typer.Argument(help="A file with one JSON object in each line: prompt, and optionally id, targets, position."),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="The folder to write to, or any address that fsspec can write to.")
    ],
    model: Model = "smollm2-135m",
    transcoders: Transcoders = "neurons",
    width: Width = None,
    l0: L0 = None,
    layer: Layers = None,
    max_nodes: Annotated[
        int, typer.Option(help="How many features of each prompt to trace, most influential first.")
    ] = COMMAND_NODES,
    workers: Annotated[int | None, typer.Option(help="Number of Ray workers. Default: trace in this process.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster. Default: start one here.")
    ] = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Trace all prompts in the file PROMPTS. Called again, it skips those that are finished. Exit code 1 if one
    failed."""
    with clear_errors(debug):
        import tl_circuits as tlc

        features = Features(transcoders, width, l0, layer or None)
        summary = tlc.trace_many(
            Opener(model, features, device, dtype),
            prompts,
            out,
            workers=workers,
            ray_address=ray_address,
            name=f"{model} {features} {dtype}",
            max_nodes=max_nodes,
            progress=terminal(stderr=True).is_terminal,
        )
        if as_json:
            typer.echo(summary.to_json(orient="records", force_ascii=False))
        else:
            _show(summary, out, terminal())
        failed = int((summary.status == "failed").sum())
        if failed:
            typer.echo(f"tl-circuits: {failed} of {len(summary)} prompts failed; the table says why.", err=True)
            raise typer.Exit(1)


def _show(summary: "pd.DataFrame", out: str, console: Console) -> None:
    from tl_circuits.graph.visible import visible

    done, failed = summary[summary.status == "done"], summary[summary.status == "failed"]
    console.print(
        f"{len(done)} graphs in {out}, {len(failed)} prompts failed; the table is {out.rstrip('/')}/summary.parquet"
    )
    if len(failed):
        table = Table("prompt", "why", title="Failed", title_justify="left")
        for row in failed.head(FAILURES_SHOWN).itertuples():
            table.add_row(visible(row.id), visible(row.error))
        console.print(table)
