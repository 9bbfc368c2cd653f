"""The program, and what its commands share: clear errors and exit codes."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderHook
from rich.segment import Segment

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters, without tab and line break

app = typer.Typer(
    name="tl-circuits",
    help="Attribution graphs of language models: why did the model say that?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def harmless(text: str) -> str:
    """``text`` with a sign for each character that would steer the terminal, such as escape.

    Files, tokens and names of files may hold such characters. Line breaks and tabs stay.

    Examples:
        >>> from tl_circuits.cli.app import harmless
        >>> harmless("a\x1b[31mb")
        'a�[31mb'
    """
    return _STEERING.sub("\ufffd", text)


class _Harmless:
    """What a command prints, each part of its text made harmless."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


class _MakeHarmless(RenderHook):
    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [_Harmless(renderable) for renderable in renderables]


def terminal(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """What all commands print to. Names, prompts and paths may hold square brackets, so these are never markup; nor do
    control characters in them reach the terminal.
    """
    console = Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, highlight=False)
    console.push_render_hook(_MakeHarmless())
    return console


@contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    """Turn any failure into one line on stderr and exit code 1. ``debug`` adds the traceback."""
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        known = isinstance(error, (ValueError, OSError, ImportError)) or interrupted or _is_ours(error)
        text = "interrupted" if interrupted else (str(error) or type(error).__name__)
        if not known and not interrupted:
            text = f"unexpected {type(error).__name__}: {text} (run again with --debug for the traceback)"
        # What an error of ours says after an empty line is help, which keeps its lines. The error itself comes last.
        said, _, help_text = text.partition("\n\n") if _is_ours(error) else (text, "", "")
        if help_text:
            sys.stderr.write(f"{harmless(help_text)}\n")
        sys.stderr.write(f"tl-circuits: {harmless(' '.join(said.split()))}\n")
        raise typer.Exit(1) from error


def _is_ours(error: BaseException) -> bool:
    """Whether the error is one of the package's own. Importing these takes seconds; where they were not, it is none."""
    errors = sys.modules.get("tl_circuits.errors")
    return errors is not None and isinstance(error, errors.TLCircuitsError)


@contextmanager
def wrong_usage(option: str) -> Iterator[None]:
    """Report a ValueError about ``option`` as wrong usage, with exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
