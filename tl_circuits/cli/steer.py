"""``tl-circuits steer``: what the model says with features edited, compared with what it says without."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.loading import Features, loading, open_replacement
from tl_circuits.cli.options import L0, AsJson, Debug, Device, Dtype, Layers, Model, Transcoders, Width, one_of


@app.command()
def steer(
    prompt: Annotated[str, typer.Argument(help="The text the model reads.")],
    edit: Annotated[
        list[str],
        typer.Option(
            "--edit",
            "-e",
            help="An edit: 'L14/F2268@9 = 0', 'L20/F15589@-1 *= -2', 'L3/error@2 *= 0', 'token@4 *= 0' (repeatable).",
        ),
    ],
    model: Model = "smollm2-135m",
    transcoders: Transcoders = "neurons",
    width: Width = None,
    l0: L0 = None,
    layer: Layers = None,
    freeze: Annotated[
        str,
        typer.Option(
            help=(
                "What is held in the run for the table of next tokens: all (attention, norms and MLPs), attention "
                "(attention and norms) or none."
            ),
            callback=one_of("all", "attention", "none"),
        ),
    ] = "attention",
    tokens: Annotated[
        int, typer.Option("--tokens", help="Also let the model write this many tokens, without and with the edits.")
    ] = 0,
    temperature: Annotated[
        float, typer.Option(help="For the written tokens: 0 takes the likeliest, above 0 samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Makes sampling repeatable.")] = 0,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Run PROMPT with edits, and compare with the untouched model."""
    with clear_errors(debug):
        with loading():
            import tl_circuits as tlc
            from tl_circuits.graph.visible import visible

            edits = [tlc.parse_edit(text) for text in edit]
        with open_replacement(model, Features(transcoders, width, l0, layer or None), device, dtype) as replacement:
            result = tlc.intervene(replacement, prompt, edits, freeze=freeze, layers=())
            written = None
            if tokens:
                options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed}
                written = [tlc.generate(replacement, prompt, some, **options) for some in ((), edits)]
        top = result.top(5)
        if as_json:
            facts = {
                "prompt": prompt,
                "edits": edit,
                "freeze": freeze,
                "kl": result.kl(),
                "top": top.to_dict("records"),
            }
            if written:
                facts |= {"before": written[0], "after": written[1]}
            typer.echo(json.dumps(facts, ensure_ascii=False))
            return
        console = terminal()
        table = Table("next token", "before", "after", box=None, padding=(0, 3, 0, 0))
        for row in top.itertuples():
            table.add_row(Text(f"“{visible(row.token)}”"), f"{row.before:.1%}", f"{row.after:.1%}")
        console.print(Text(f"\n{model} on “{prompt}” with {'; '.join(edit)}\n", style="bold"))
        console.print(table)
        console.print(f"\nThe edits move the next token's distribution by {result.kl():.3f} nats (KL), {freeze} held.")
        if written:
            side = Table("without", "with the edits", padding=(0, 2, 0, 0))
            side.add_row(Text(written[0]), Text(written[1]))
            console.print(side)
