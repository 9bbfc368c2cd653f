"""``tl-circuits aggregate``: what recurs over the graphs of many prompts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.options import AsJson, Debug, Force, refuse_early, with_ending
from tl_circuits.support.endings import OURS

if TYPE_CHECKING:
    from tl_circuits.recurring.aggregate import RecurringCircuit

FEATURES_SHOWN = 15


@app.command()
def aggregate(
    files: Annotated[
        list[str],
        typer.Argument(help="Saved graphs of the same model and dictionary, such as DIR/*.graph.safetensors."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The files' name, without its ending.")],
    min_share: Annotated[
        float, typer.Option(help="The share of the prompts in which a feature or edge must be found, 0 to 1.")
    ] = 0.5,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Combine the graphs of many prompts, aligned from their ends, into one graph of mean effects."""
    with clear_errors(debug):
        paths = {"graph": with_ending(out, OURS), "page": with_ending(out, ".html")}
        for path in paths.values():
            refuse_early(path, force)
        import tl_circuits as tlc

        with terminal(stderr=True).status(f"reading {len(files)} graphs ..."):
            circuit = tlc.aggregate(files, min_share=min_share)
            graph = circuit.graph(min_share)
        graph.save(paths["graph"], overwrite=force)
        graph.to_html(paths["page"], overwrite=force)
        if as_json:
            facts = {
                "prompts": list(circuit.prompts),
                "features": circuit.features.to_dict("records"),
                "coverage": graph.coverage,
                "completeness_error": graph.completeness_error(),
                "files": {kind: str(path) for kind, path in paths.items()},
            }
            typer.echo(json.dumps(facts, ensure_ascii=False))
        else:
            _show(circuit, paths, terminal())


def _show(circuit: "RecurringCircuit", paths: dict[str, Path], console: Console) -> None:
    from tl_circuits.graph.visible import visible
    from tl_circuits.recurring.template import in_template

    features = circuit.features
    console.print(
        f"\n{len(features)} features and {len(circuit.edges)} edges are found in at least {circuit.min_share:.0%} of "
        f"{len(circuit.prompts)} prompts,"
    )
    console.print(visible("".join(in_template(texts) for texts in circuit.tokens)), markup=False, soft_wrap=True)
    words = {slot: visible(in_template(texts)) for slot, texts in zip(circuit.slots, circuit.tokens, strict=True)}
    table = Table("feature", "at", "prompts", "mean influence", "", box=None, padding=(0, 3, 0, 0))
    for row in features.sort_values("influence", ascending=False, kind="stable").head(FEATURES_SHOWN).itertuples():
        table.add_row(
            row.id, Text(words[row.slot].strip()), f"{row.share:.0%}", f"{row.influence:.3f}", Text(visible(row.label))
        )
    console.print(table)
    console.print(f"\n  {paths['graph']}   the graph: tlc.load_graph(...)", soft_wrap=True)
    console.print(f"  {paths['page']}   open it in a browser", soft_wrap=True)
