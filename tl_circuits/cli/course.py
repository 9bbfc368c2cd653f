"""``tl-circuits course``: five graded assignments, without a network."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.options import AsJson, Debug

course = typer.Typer(help="Five graded assignments, the last on a real model.", no_args_is_help=True)
app.add_typer(course, name="course")


@course.command("list")
def list_assignments(
    as_json: AsJson = False,
) -> None:
    """List the assignments."""
    from tl_circuits.course.assignments import ASSIGNMENTS

    if as_json:
        typer.echo(
            json.dumps([{"number": a.number, "title": a.title, "notebook": a.starter.name} for a in ASSIGNMENTS])
        )
        return
    for assignment in ASSIGNMENTS:
        typer.echo(f"{assignment.number}  {assignment.title}")
    typer.echo("\nBegin with: tl-circuits course start 1 FOLDER")


@course.command()
def start(
    number: Annotated[str, typer.Argument(help="Which assignment: 1 to 5.")],
    folder: Annotated[Path, typer.Argument(help="A folder to create for its notebook.")],
    debug: Debug = False,
) -> None:
    """Copy the starter notebook of assignment NUMBER into a new FOLDER."""
    with clear_errors(debug):
        from tl_circuits.course.assignments import find_assignment
        from tl_circuits.course.assignments import start as copy

        path = copy(find_assignment(number), folder)
        typer.echo(f"{path}\nOpen it in Jupyter, fill in the functions, then: tl-circuits course check {folder}")


@course.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The folder that `tl-circuits course start` made, or a notebook.")],
    time_limit: Annotated[
        float | None,
        typer.Option(help="The most seconds that running and checking the notebook may take; 120, for the fifth 240."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the notebook in FOLDER, call its functions with other inputs, and give points."""
    with clear_errors(debug):
        with terminal(stderr=True).status("running the notebook and checking its functions ..."):
            from tl_circuits.course.report import check as grade

            report = grade(folder, time_limit)
        if as_json:
            facts = {"assignment": report.assignment.number, "title": report.assignment.title, "points": report.points}
            facts |= {"earned": report.earned, "questions": report.marks, "remarks": report.remarks}
            typer.echo(json.dumps(facts | {"not_kept_out": report.not_kept_out}))
            return
        console = terminal()
        console.print(Text(f"\n{report.assignment.number}. {report.assignment.title}\n", style="bold"))
        table = Table("function", "points", "", box=None, padding=(0, 3, 0, 0))
        for given in report.marks:
            said = "\n".join(given["remarks"]) or given["task"]
            table.add_row(Text(given["function"]), f"{given['earned']} of {given['points']}", Text(said))
        console.print(table)
        for remark in report.remarks:
            console.print(Text(f"\nIn the notebook: {remark}"))
        for remark in report.not_kept_out:
            console.print(Text(f"\n{remark}", style="dim"))
        console.print(f"\n{report.earned} of {report.points} points", style="bold")
