"""Options that several commands share, and the names of the files that a command writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

COMMAND_NODES = 1000  # fewer than in Python: a person waits for a command


def one_of(*known: str) -> Callable[[str], str]:
    """A check for an option that takes only these words: anything else is wrong usage, with exit code 2."""

    def check(value: str) -> str:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}.")
        return value

    return check


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A name from `tl-circuits models`, any TransformerLens model name, or a checkpoint folder.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: TransformerLens chooses.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Precision of the model: float32, bfloat16 or float16.", callback=one_of("float32", "bfloat16", "float16")
    ),
]
Transcoders = Annotated[
    str,
    typer.Option(
        "--transcoders",
        "-t",
        help=(
            "Where the features come from: `neurons` (the MLP's own, no dictionary needed), a name from `tl-circuits "
            "models`, a SAELens release, a hub repository or a folder."
        ),
    ),
]
Width = Annotated[
    str | None, typer.Option("--width", help="Which of several published sets, by its width, such as 16k.")
]
L0 = Annotated[
    str | None, typer.Option("--l0", help="Which of several published sets, by its sparsity: small, or a number.")
]
Layers = Annotated[
    list[int] | None,
    typer.Option(
        "--layer",
        help="Use only this layer's transcoder (repeatable). The MLPs of all other layers become error nodes.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def with_ending(name: Path, ending: str) -> Path:
    """``name`` with ``ending`` added. Dots in the name are kept."""
    return name.with_name(name.name + ending)


def refuse_early(path: Path, force: bool) -> None:
    """Raise an OSError now, and not after the work, if the result could not be written.

    It is a plain one, because importing our own takes seconds.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Choose another --out, or overwrite it with --force.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist.")
