"""Writes the reference of ``tl-circuits`` from the program itself, where a page says ``<!-- commands -->``."""

import html
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace(MARK, "\n".join(_section(*found) for found in commands())) if MARK in markdown else markdown


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by what a user types, such as ``tl-circuits course start``, groups left out."""
    from tl_circuits.cli.main import app

    return _leaves("tl-circuits", get_command(app))


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inside = getattr(command, "commands", None)
    if inside is None:
        yield name, command
        return
    for part in sorted(inside):
        yield from _leaves(f"{name} {part}", inside[part])


def _section(name: str, command: Any) -> str:
    # A command's own `make_metavar` differs between versions of typer; names and help do not.
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    places = " ".join(f"{a.name.upper()}{' ...' if a.nargs < 0 else ''}" for a in arguments)
    rows = [(f"`{a.name.upper()}`", a) for a in arguments]
    rows += [(", ".join(f"`{o}`" for o in (*option.opts, *option.secondary_opts)), option) for option in options]
    text = [f"## {name.removeprefix('tl-circuits ')}", "", " ".join((command.help or "").split()), ""]
    text += ["```text", f"{name} {places} [OPTIONS]" if places else f"{name} [OPTIONS]", "```", ""]
    text += [
        "| argument or option | meaning |",
        "|---|---|",
        *(f"| {shown} | {_help(parameter)} |" for shown, parameter in rows),
        "",
    ]
    return "\n".join(text)


def _help(parameter: Any) -> str:
    told = html.escape(" ".join((parameter.help or "").split()), quote=False).replace("|", "\\|")
    default = parameter.default
    shown = isinstance(default, (str, int, float)) and not isinstance(default, bool) and default != ""
    return f"{told} Default: `{default}`." if shown else told
