"""``tl-circuits train``: train transcoders for your own model."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tl_circuits.cli.app import app, clear_errors, terminal


@app.command()
def train(
    model: Annotated[str, typer.Option("--model", "-m", help="A name from `tl-circuits models`, a checkpoint folder or a hub name.")],
    text: Annotated[list[Path], typer.Option("--text", help="Text files to train on (repeatable).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")],
    layer: Annotated[list[int] | None, typer.Option("--layer", help="Only this layer (repeatable). Default: all.")] = None,
    expansion: Annotated[int, typer.Option(help="Number of features in each layer, as a multiple of d_model.")] = 16,
    k: Annotated[int, typer.Option(help="Number of active features for each token.")] = 32,
    skip: Annotated[bool, typer.Option(help="Whether the transcoders have a linear skip connection.")] = True,
    context: Annotated[int, typer.Option(help="Tokens in each piece of text.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Pieces in each step.")] = 8,
    epochs: Annotated[int, typer.Option(help="How many times to go through the text.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: computed from the number of features.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Train transcoders on text files. Afterwards, --transcoders takes the folder."""
    with clear_errors(debug):
        with terminal(stderr=True).status("loading tl_circuits ..."):
            from tl_circuits.dictionaries.training import train_transcoders
        began = time.monotonic()
        history = train_transcoders(
            model, text, out, layers=layer, expansion=expansion, k=k, skip=skip, context=context, batch_size=batch_size,
            epochs=epochs, lr=lr, save_every=save_every, resume=resume, device=device,
        )
        minutes = (time.monotonic() - began) / 60
        steps = history.step.max() + 1
        window = max(1, steps // 20)
        early = history[history.step < window].groupby("layer").explained_variance.mean()
        late = history[history.step >= steps - window].groupby("layer").explained_variance.mean()
        if as_json:
            typer.echo(json.dumps({"folder": str(out), "steps": int(steps), "first": early.to_dict(), "last": late.to_dict()}))
            return
        console = terminal()
        table = Table("layer", "explained variance at first", "at last", box=None, padding=(0, 3, 0, 0))
        for number in late.index:
            table.add_row(str(number), f"{early[number]:.3f}", f"{late[number]:.3f}")
        console.print(table)
        console.print(f"\n{out}: {steps} steps of {batch_size * context:,} tokens, {minutes:.1f} minutes. What now:", soft_wrap=True)
        chosen = " ".join([f"--model {model} --transcoders {out}", *(f"--layer {number}" for number in layer or [])])
        console.print(f"  tl-circuits doctor {chosen} --text {text[0]}", soft_wrap=True)
        console.print(f'  tl-circuits trace "The capital of France is" {chosen}', soft_wrap=True)
