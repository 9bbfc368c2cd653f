"""``tl-circuits heads``: which attention heads carried an edge, and what made them look where they looked."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.loading import Features, features_named, loading, open_replacement
from tl_circuits.cli.options import AsJson, Debug, Device, Dtype

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.graph.graph import AttributionGraph

PAIRS_TOLD = 5
_WORD = re.compile(r"@\d+")


@app.command()
def heads(
    graph: Annotated[Path, typer.Argument(help="A graph file that `tl-circuits trace` wrote.")],
    edge: Annotated[
        str,
        typer.Argument(
            help=(
                "The edge as 'SOURCE > TARGET': '@2 > logit:0' for all that stands at position 2, or two node ids, "
                "such as 'token@3 > logit:0' and 'L2/F71@3 > L9/F5@8'."
            )
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model of the graph. Default: the one that the graph names.")
    ] = None,
    transcoders: Annotated[
        str | None,
        typer.Option(
            "--transcoders",
            "-t",
            help="The transcoders that the graph was traced with, as for `trace`. Default: those that the graph names.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--heads", min=0, help="How many heads to explain, largest share of the edge first.")
    ] = 3,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Say which attention heads carried EDGE of a traced graph, and which features made them look there."""
    with clear_errors(debug):
        ends = [end.strip() for end in edge.split(">")]
        if len(ends) != 2 or not all(ends):
            raise ValueError(f"cannot read the edge {edge!r}; write 'SOURCE > TARGET', such as 'token@3 > logit:0'.")
        if not graph.is_file():
            raise FileNotFoundError(f"there is no graph file at {graph}.")
        with loading():
            import tl_circuits as tlc
            from tl_circuits.attention.stories import edge_stories, story_data, word_stories

            loaded = tlc.load_graph(graph)
        features = Features(transcoders or features_named([loaded.info]))
        with open_replacement(model or loaded.info.model, features, device, dtype) as replacement:
            progress = terminal(stderr=True).is_terminal
            if _WORD.fullmatch(ends[0]):
                (story,) = word_stories(
                    replacement, loaded, [int(ends[0][1:])], ends[1], heads=count, progress=progress
                )
            else:
                (story,) = edge_stories(replacement, loaded, [(ends[0], ends[1])], heads=count, progress=progress)
        facts = story_data(loaded, story)
        if as_json:
            typer.echo(json.dumps(facts, ensure_ascii=False))
            return
        show_heads(loaded, [facts], terminal())


def show_heads(graph: "AttributionGraph", stories: Sequence[dict[str, Any]], console: Console) -> None:
    """Print which heads carried each edge, and the largest pairs behind the scores of these heads."""
    for facts in stories:
        console.print(Text(f"\n{_told(graph, facts['source'])} → {_told(graph, facts['target'])}", style="bold"))
        console.print(
            f"direct effect {facts['weight']:+.4f}: residual stream {facts['residual']:+.4f}", highlight=False
        )
        table = Table("head", "loading", "share", box=None, padding=(0, 2, 0, 2))
        for name, value in loading_rows(facts):
            share = round(100 * value / facts["weight"]) if facts["weight"] else 0
            table.add_row(name, f"{value:+.4f}", f"{share}%")
        console.print(table)
        several = sum(abs(value) for _, value in facts["chains"]) + abs(facts["rest"])
        if facts["weight"] and several > abs(facts["weight"]) / 2:
            console.print(
                Text(
                    "  More than half of it went through several heads one after another, so no single head explains "
                    "it.",
                    style="dim",
                )
            )
        for head in facts["heads"]:
            if "pairs" in head:
                _show_score(graph, facts, head, console)


def loading_rows(facts: dict[str, Any]) -> list[tuple[str, float]]:
    """The largest heads and chains by name, then all others together. With the residual stream they add up to the
    edge."""
    heads = [(f"layer {head['layer']} head {head['head']}", head["loading"]) for head in facts["heads"]]
    chains = [tuple(chain) for chain in facts["chains"]]
    rest = facts["rest"] + sum(value for _, value in chains[PAIRS_TOLD:])
    listed = facts["residual"] + facts["rest"] + sum(value for _, value in [*heads, *chains])
    beyond = facts.get("other_heads", facts["weight"] - listed)  # stories of earlier versions do not say it
    shown = heads[:PAIRS_TOLD]
    if len(heads) > PAIRS_TOLD or beyond:
        shown = [*shown, ("other heads", beyond + sum(value for _, value in heads[PAIRS_TOLD:]))]
    return [*shown, *chains[:PAIRS_TOLD], ("other chains", rest)]


def _show_score(graph: "AttributionGraph", facts: dict[str, Any], head: dict[str, Any], console: Console) -> None:
    from tl_circuits.graph.visible import visible

    tokens, other = [visible(token) for token in graph.info.tokens], head["baseline"]
    instead = f" ({other['score']:+.3f} against “{tokens[other['key']]}” ({other['key']}))" if other else ""
    console.print(
        Text(
            f"  layer {head['layer']} head {head['head']} looks from “{tokens[head['query']]}” ({head['query']}) to "
            f"“{tokens[head['key']]}” ({head['key']}) with {head['attention']:.0%} of its attention: "
            f"score {head['score']:.3f}{instead}, because of",
        )
    )
    table = Table("query side", "key side", "part of the score", box=None, padding=(0, 2, 0, 4))
    for query, key, weight in head["pairs"][:PAIRS_TOLD]:
        table.add_row(
            Text(_told(graph, query, facts["labels"])), Text(_told(graph, key, facts["labels"])), f"{weight:+.3f}"
        )
    console.print(table)


def _told(graph: "AttributionGraph", name: str, labels: dict[str, str] | None = None) -> str:
    """A node's id with its token, or with its label if it is a feature of the graph."""
    from tl_circuits.graph.visible import visible

    if _WORD.fullmatch(name):
        return f"“{visible(graph.info.tokens[int(name[1:])])}” ({name[1:]}), all that stands there"
    if name.startswith("token@"):
        return f"{name} “{visible(graph.info.tokens[int(name[6:])])}”"
    if labels is not None:
        return visible(f"{name} {labels[name]}") if name in labels and "/F" in name else name
    index = graph.node_ids.index(name)
    return visible(f"{name} {graph.label(index)}")
