"""``tl-circuits doctor``: say what is installed, what is usable, and what to run for the rest."""

import importlib.util
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.loading import Features, open_replacement
from tl_circuits.cli.options import L0, AsJson, Debug, Device, Dtype, Layers, Transcoders, Width
from tl_circuits.models import PACKAGED, cache_dir
from tl_circuits.support.extras import EXTRAS, how_to_install, installed

NEEDED = ("torch", "transformer_lens", "transformers", "jaxtyping", "beartype", "safetensors", "pandas")

# Plain text of several kinds, one prompt each. --text replaces it.
SAMPLE = (
    "The capital of France is Paris, and the capital of Italy is Rome. Both cities are older than the countries they "
    "govern.",
    "To bake bread, mix flour, water, salt and yeast, let the dough rise for two hours, and bake it until the crust "
    "is brown.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, 1))\n",
    "In 1969 two astronauts walked on the moon while a third stayed in orbit. They came home four days later, all of "
    "them well.",
)
TOKENS_A_PROMPT = 128
PIECES, CHARACTERS = 8, 600  # of a long text file: pieces spread evenly, each long enough for TOKENS_A_PROMPT


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Measure the transcoders on this model.")] = None,
    transcoders: Transcoders = "neurons",
    width: Width = None,
    l0: L0 = None,
    layer: Layers = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Text files to measure on (repeatable). Default: a few sentences."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what is installed and usable. With --model and --transcoders: measure how well those fit together."""
    with clear_errors(debug):
        if model is not None:
            with open_replacement(model, Features(transcoders, width, l0, layer or None), device, dtype) as replacement:
                _show_quality(replacement, text, as_json)
            return
        if transcoders != "neurons":
            raise ValueError("--transcoders needs --model: quality is measured on a model.")
        rows = [*_packages(), *_devices(), *_models()]
        if as_json:
            typer.echo(json.dumps([dict(zip(("what", "ok", "detail"), row, strict=True)) for row in rows]))
            return
        table = Table(show_header=False, box=None)
        for what, ok, detail in rows:
            table.add_row("✓" if ok else "–", Text(what), Text(detail, overflow="fold"))  # Text: "[train]" is no markup
        terminal().print(table)


def _show_quality(replacement: Any, files: list[Path] | None, as_json: bool) -> None:
    from tl_circuits.dictionaries.quality import dictionary_quality, hook_hint
    from tl_circuits.hooks import text_to_ids, to_tokens

    texts = SAMPLE if not files else [part for file in files for part in _parts(file.read_text(encoding="utf-8"))]
    model = replacement.model
    limit = min(TOKENS_A_PROMPT, int(model.cfg.n_ctx))
    prompts = [to_tokens(model, text_to_ids(model, text, replacement.dictionary.prompt_rule)[:limit]) for text in texts]
    prompts = [tokens for tokens in prompts if tokens.numel() > 1]
    if not prompts:
        raise ValueError("--text holds no two tokens in a row to measure on.")
    quality = dictionary_quality(replacement, prompts, progress=terminal(stderr=True).is_terminal)
    hint = hook_hint(replacement, quality, prompts[0])
    dictionary = replacement.dictionary
    made_for = getattr(dictionary, "made_for", None)
    first = dictionary.layers[0]
    facts = {
        "dictionary": dictionary.name,
        "made_for": made_for,
        "prompt_rule": str(dictionary.prompt_rule),
        "model": str(replacement.model.cfg.model_name),
        "reads": dictionary.input_hook(first),
        "writes": dictionary.output_hook(first),
        "width": dictionary.width(first),
        "layers": quality.to_dict("records"),
        "hint": hint,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    console = terminal()
    console.print(
        f"{facts['dictionary']} ({facts['width']} features a layer{f', made for {made_for}' if made_for else ''})"
    )
    more = " (and so on, layer by layer)" if len(dictionary.layers) > 1 else ""
    console.print(
        f"on {facts['model']}, reading {facts['reads']} and writing {facts['writes']}{more}\n", soft_wrap=True
    )
    table = Table("layer", "L0", "explained variance", "change in loss", box=None)
    for row in quality.itertuples():
        name = "all" if row.layer == -1 else str(row.layer)
        table.add_row(name, f"{row.l0:.1f}", f"{row.explained_variance:.3f}", f"{row.loss_change:+.4f}")
    console.print(table)
    console.print(
        "\nL0: active features a token. Change in loss: nats a token, with what that layer's dictionary rebuilds (in "
        "the last row: all) in place of the model's own."
    )
    if hint:
        console.print(f"\n{hint}", soft_wrap=True)


def _parts(text: str) -> list[str]:
    """A text in pieces: all of it, or some pieces of a long text."""
    step = max(CHARACTERS, len(text) // PIECES)
    return [text[i : i + CHARACTERS] for i in range(0, len(text), step) if text[i : i + CHARACTERS].strip()]


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
    sae_lens = _found("sae_lens")
    rows.append(
        ("sae_lens", sae_lens is not None, sae_lens or "SAELens objects and releases; install it: pip install sae_lens")
    )
    for extra, (_, use) in EXTRAS.items():
        there = installed(extra)
        rows.append((f"extra {extra}", there, use if there else f"{use}; install it: {how_to_install(extra)}"))
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
