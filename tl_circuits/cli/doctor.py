"""``tl-circuits doctor``: what is installed, what is usable, and what to run for the rest."""

import importlib.util
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tl_circuits.cli.app import app, clear_errors
from tl_circuits.models import PACKAGED, cache_dir

NEEDED = ("torch", "transformer_lens", "transformers", "jaxtyping", "beartype", "safetensors", "pandas")
OPTIONAL = {
    "sae_lens": "SAELens transcoders as objects; pip install sae_lens",
    "gguf": "models from the package index; pip install 'tl_circuits[gguf]'",
    "networkx": "graph.to_networkx(); pip install 'tl_circuits[networkx]'",
}


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Say what is installed, which models and devices are usable, and what to run for the rest."""
    with clear_errors(debug):
        rows = [*_packages(), *_devices(), *_models()]
        if as_json:
            typer.echo(json.dumps([dict(zip(("what", "ok", "detail"), row, strict=True)) for row in rows]))
            return
        table = Table(show_header=False, box=None)
        for what, ok, detail in rows:
            table.add_row("✓" if ok else "–", what, detail)
        Console().print(table)


def _found(package: str) -> str | None:
    try:
        return version(package) if importlib.util.find_spec(package) else None
    except PackageNotFoundError:
        return None


def _packages() -> list[tuple[str, bool, str]]:
    rows = [("Python", True, platform.python_version()), ("tl_circuits", True, version("tl_circuits"))]
    for package in NEEDED:
        found = _found(package)
        rows.append((package, found is not None, found or f"missing; pip install {package}"))
    for package, use in OPTIONAL.items():
        found = _found(package)
        rows.append((package, found is not None, found or f"not installed: {use}"))
    return rows


def _devices() -> list[tuple[str, bool, str]]:
    import torch

    rows = [("device cpu", True, f"{torch.get_num_threads()} threads")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows += [(f"device cuda:{i}", True, torch.cuda.get_device_name(i)) for i in range(count)]
    if count == 0:
        rows.append(("device cuda", False, "none found"))
    if torch.backends.mps.is_available():
        rows.append(("device mps", True, "Apple GPU"))
    return rows


def _models() -> list[tuple[str, bool, str]]:
    rows = []
    for model in PACKAGED.values():
        if model.folder.is_dir():
            rows.append((f"model {model.name}", True, f"ready in {model.folder}"))
        elif model.installed:
            rows.append((f"model {model.name}", True, "installed; opened at first use"))
        else:
            rows.append((f"model {model.name}", False, f"not installed; run: {model.command}"))
    rows.append(("cache", True, str(cache_dir())))
    return rows
