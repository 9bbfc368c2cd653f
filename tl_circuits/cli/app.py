"""The program, and what its commands share: clear errors and exit codes."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

app = typer.Typer(
    name="tl-circuits",
    help="Attribution graphs of language models: why did the model say that?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def terminal(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """What all commands print to. Names, prompts and paths may hold square brackets, so these are never markup."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, highlight=False)


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
        sys.stderr.write(f"tl-circuits: {' '.join(text.split())}\n")
        raise typer.Exit(1) from error


def _is_ours(error: BaseException) -> bool:
    """Whether the error is one of the package's own. Importing these takes seconds, so it is asked last."""
    from tl_circuits.errors import TLCircuitsError

    return isinstance(error, TLCircuitsError)


@contextmanager
def wrong_usage(option: str) -> Iterator[None]:
    """Report a ValueError about ``option`` as wrong usage, with exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
