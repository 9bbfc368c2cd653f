"""The prompts to compare with, as written after ``--against``."""

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tl_circuits.attribution.text_baseline import Baseline

Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        help=(
            "Explain what is here and not in this other prompt (repeatable). `The capital of {Germany,Italy} is` "
            "names several; a file has one prompt a line, or is a saved Baseline (.safetensors)."
        ),
    ),
]
AlignEnd = Annotated[
    bool,
    typer.Option(
        "--align-end",
        help="With --against: prompts of other lengths are compared position by position from their ends.",
    ),
]

_ONE_OF = re.compile(r"\{([^{}]*,[^{}]*)\}")


def read_against(given: Sequence[str] | None) -> "list[str] | Baseline | None":
    """The baseline that ``--against`` names: prompts, or a saved Baseline; None if it names nothing.

    Raises:
        ValueError: for a file without prompts, or a Baseline together with something else.
    """
    if not given:
        return None
    files = [Path(text) if _is_file(text) else None for text in given]
    if any(file is not None and file.suffix == ".safetensors" for file in files):
        if len(given) > 1:
            raise ValueError(f"--against takes one Baseline or several prompts, not both: {', '.join(given)}.")
        from tl_circuits.attribution.text_baseline import Baseline

        return Baseline.load(given[0])
    prompts: list[str] = []
    for text, file in zip(given, files, strict=True):
        prompts += expanded(text) if file is None else _lines(file)
    return list(dict.fromkeys(prompts))


def expanded(text: str) -> list[str]:
    """The texts that ``{one,other}`` in a text stands for.

    Examples:
        >>> from tl_circuits.cli.against import expanded
        >>> expanded("The capital of {Germany,Italy} is")
        ['The capital of Germany is', 'The capital of Italy is']
    """
    parts = _ONE_OF.split(text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _lines(file: Path) -> list[str]:
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--against {file} is not a text file in UTF-8: {error}.") from error
    if not found:
        raise ValueError(f"--against {file} has no prompts; write one on each line.")
    return found


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than any file's name
        return False
