"""``tl-circuits models``: list what --model and --transcoders can name."""

import json

import typer
from rich.table import Table

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.options import AsJson, Debug
from tl_circuits.models import BUILTIN, BUILTIN_DESCRIPTION, PACKAGED


@app.command()
def models(
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the models that --model can name, and the transcoders that --transcoders can name."""
    with clear_errors(debug):
        # Imported here because it imports torch, and --help should not wait for that.
        from tl_circuits.dictionaries.references import SHORT_NAMES

        rows = [{"name": BUILTIN, "description": BUILTIN_DESCRIPTION, "state": "ready", "command": ""}]
        rows += [
            {
                "name": m.name,
                "description": m.description,
                "state": _state(m.installed, m.folder.is_dir()),
                "command": m.command,
            }
            for m in PACKAGED.values()
        ]
        sets = [
            {
                "name": s.name,
                "reference": s.reference,
                "model": s.model,
                "description": s.description,
                "prompt_rule": str(s.prompt_rule),
            }
            for s in SHORT_NAMES.values()
        ]
        if as_json:
            typer.echo(json.dumps({"models": rows, "transcoders": sets}))
            return
        table = Table("name", "what it is", "state", box=None)
        for row in rows:
            table.add_row(row["name"], row["description"], row["state"])
        console = terminal()
        console.print(table)
        for row in rows:
            if row["state"] == "not installed":
                console.print(f"\nTo get {row['name']}: {row['command']}", soft_wrap=True, highlight=False)
        console.print("\nAlso: any name that TransformerLens opens (google/gemma-2-2b, gpt2, ...), and any folder")
        console.print("with a Hugging Face checkpoint. Features: --transcoders neurons needs no dictionary.\n")
        listed = Table("transcoders", "for the model", "what they are", "text and positions", "on the hub", box=None)
        for row in sets:
            listed.add_row(row["name"], row["model"], row["description"], row["prompt_rule"], row["reference"])
        console.print(listed)
        console.print(
            "\nAlso: any SAELens release of transcoders, hub repository (org/name) or folder; see docs/transcoders.md."
        )


def _state(installed: bool, opened: bool) -> str:
    if opened:
        return "ready"
    return "installed, opened at first use" if installed else "not installed"
