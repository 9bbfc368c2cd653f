"""``tl-circuits train``: train transcoders for your own model."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.options import AsJson, Debug


@app.command()
def train(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from `tl-circuits models`, a checkpoint folder or a hub name.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Text files (.gz too), folders of them, or .npy token ids (repeatable)."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset with a column `text`: its hub name or folder.")] = None,
    generate: Annotated[int, typer.Option(help="Tokens that the model writes itself, to train on.")] = 0,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="Only this layer (repeatable). Default: all.")
    ] = None,
    features: Annotated[int | None, typer.Option(help="Number of features in each layer.")] = None,
    expansion: Annotated[
        int | None, typer.Option(help="Instead of --features: as a multiple of d_model. Default: 16.")
    ] = None,
    k: Annotated[int, typer.Option(help="Number of active features for each token.")] = 32,
    skip: Annotated[bool, typer.Option(help="Whether the transcoders have a linear skip connection.")] = True,
    context: Annotated[int, typer.Option(help="Tokens in each piece of text.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Pieces in each step.")] = 8,
    epochs: Annotated[int, typer.Option(help="How many times to go through the text.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="Train on so many tokens at most.")] = None,
    together: Annotated[
        int,
        typer.Option(
            help=(
                "Then train all layers together on so many tokens, so that the model still says the same with all "
                "MLPs replaced."
            )
        ),
    ] = 0,
    local: Annotated[
        float, typer.Option(help="With --together: how much a layer's own error counts beside the model's predictions.")
    ] = 0.4,
    four_bits: Annotated[
        bool, typer.Option("--four-bits", help="Also write the set with four bits a number, in OUT.four_bits.")
    ] = False,
    begin_with: Annotated[
        str | None, typer.Option(help="Go on from this set of such transcoders. --tokens 0 leaves the steps together.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Text to measure on. Default: a part of the text, at random.")
    ] = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 10.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train transcoders on text, a dataset, or what the model writes. Afterwards, --transcoders takes the folder."""
    with clear_errors(debug):
        with terminal(stderr=True).status("loading tl_circuits ..."):
            from pandas import notna

            from tl_circuits.dictionaries.training.train import train_transcoders
        began = time.monotonic()
        history = train_transcoders(
            model,
            text or [],
            out,
            dataset=dataset,
            generate=generate,
            layers=layer,
            features=features,
            expansion=expansion,
            k=k,
            skip=skip,
            context=context,
            batch_size=batch_size,
            epochs=epochs,
            tokens=tokens,
            together=together,
            four_bits=four_bits,
            local=local,
            begin_with=begin_with,
            held_out=held_out,
            lr=lr,
            save_minutes=save_minutes,
            resume=resume,
            device=device,
        )
        minutes = (time.monotonic() - began) / 60
        steps = int(history.step.max()) + 1
        window = max(1, steps // 20)
        early = history[history.step < window].groupby("layer").explained_variance.mean()
        late = history[history.step >= steps - window].groupby("layer").explained_variance.mean()
        last = history[history.step == steps - 1].set_index("layer")
        change = last.loss_change.iloc[0]
        if as_json:
            facts = {
                "first": early.to_dict(),
                "last": late.to_dict(),
                "l0": last.l0.to_dict(),
                "dead": last.dead.to_dict(),
            }
            measured = {"held_out": last.held_out.to_dict(), "loss_change": change} if notna(change) else {}
            typer.echo(json.dumps({"folder": str(out), "steps": steps} | facts | measured))
            return
        console = terminal()
        table = Table(
            "layer", "explained variance at first", "at last", "held out", "L0", "dead", box=None, padding=(0, 3, 0, 0)
        )
        for number, row in last.iterrows():
            held = f"{row.held_out:.3f}" if notna(row.held_out) else ""
            table.add_row(
                str(number), f"{early[number]:.3f}", f"{late[number]:.3f}", held, f"{row.l0:.0f}", f"{row.dead:.0f}"
            )
        console.print(table)
        if notna(change):
            console.print(
                f"\nWith all of these MLPs replaced, the loss on held-out text changes by {change:+.3f} nats.",
                soft_wrap=True,
            )
        console.print(
            f"\n{out}: {steps} steps of {batch_size * context:,} tokens, {minutes:.1f} minutes. What now:",
            soft_wrap=True,
        )
        chosen = " ".join([f"--model {model} --transcoders {out}", *(f"--layer {number}" for number in layer or [])])
        example = f" --text {text[0]}" if text and text[0].suffix == ".txt" else ""
        console.print(f"  tl-circuits doctor {chosen}{example}", soft_wrap=True)
        console.print(f'  tl-circuits trace "The capital of France is" {chosen}', soft_wrap=True)
