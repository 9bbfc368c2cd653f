"""``tl-circuits demo``: the whole story on the built-in model, without a network."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.options import AsJson, Debug, Force, refuse_early


@app.command()
def demo(
    city: Annotated[
        str, typer.Option(help="A city; the question asks for the capital of the state that contains it.")
    ] = "Lubbock",
    swap: Annotated[str, typer.Option(help="The state to put in the place of the city's own state.")] = "California",
    out: Annotated[Path, typer.Option("--out", "-o", help="The page's file name, without its ending.")] = Path(
        "tiny-facts-demo"
    ),
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Trace a two-hop question on the built-in model, write its page, swap the middle step, and say what was found."""
    with clear_errors(debug):
        page = out.with_name(out.name + ".html")
        refuse_early(page, force)
        with terminal(stderr=True).status("opening tiny-facts ..."):
            import tl_circuits as tlc
            from tl_circuits.cli.state_swap import sentences, swap_state
            from tl_circuits.graph.paths import sentence, strongest_paths

            model = tlc.load_model("tiny-facts", device="cpu")
            with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
                story = swap_state(replacement, city, swap)
        story.graph.to_html(page, overwrite=force)
        told = sentences(story)
        paths = [sentence(story.graph, path) for path in strongest_paths(story.graph, 3)]
        if as_json:
            facts = {
                "prompt": story.graph.info.prompt,
                "kept_back": story.kept_back,
                "answer": story.answer(),
                "middle": story.middle,
                "without": {"answer": story.answer(story.without)},
                "swapped": {"state": story.other.name, "answer": story.answer(story.swapped)},
                "sentences": told,
                "paths": paths,
                "page": str(page),
            }
            typer.echo(json.dumps(facts, ensure_ascii=False))
            return
        console = terminal()
        for number, text in enumerate(told, 1):
            console.print(Text(f"{number}. {text}"))
        console.print(Text("\nThe strongest ways through the graph", style="bold"))
        for text in paths:
            console.print(Text(f"   {text}"))
        console.print(f"\nThe page: {page} (open it in a browser). The model: docs/tiny-facts.md.", soft_wrap=True)
