"""What a trace prints first: which words mattered, and the box that was tested best."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tl_circuits.graph.graph import AttributionGraph

LISTED = 8  # words printed, those with the largest shares, in the prompt's order
LEAST = 0.02  # a word below this share of all words' effects is not printed
TESTED = 2  # boxes printed, those that move the answer most
BAR = 24  # characters of the longest bar


def show_words(graph: "AttributionGraph", console: Console) -> None:
    """Print the words with the largest effects on the answer, in the prompt's order, with a bar each."""
    from tl_circuits.graph.visible import visible

    words = graph.words
    size = words.share.abs()
    shown = words[size.rank(method="first", ascending=False).le(LISTED) & size.ge(LEAST)]
    if shown.empty:
        return
    beyond = ", beyond what the others share" if graph.info.compared_with else ""
    console.print(Text(f"\nWhich words mattered{beyond}", style="bold"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in shown.itertuples():
        bar = "█" * max(1, round(BAR * abs(row.share) / float(size.max())))
        colour = "blue" if row.effect >= 0 else "dark_orange3"
        table.add_row(Text(f"“{visible(row.token)}”"), f"{row.share:+.0%}", Text(bar, style=colour))
    console.print(table)
    left = 1 - float(shown.share.abs().sum())
    rest = f"; {left:.0%} is spread over {len(words) - len(shown)} other words" if left >= LEAST else ""
    console.print(Text(f"  shares of all words' effects on the answer, over all paths{rest}", style="dim"))


def show_tested(graph: "AttributionGraph", removed: list[dict[str, Any]], console: Console) -> None:
    """Print what removing boxes did: the tested ones that moved the answer most, and how many passed."""
    own = {frozenset(ids): label for label, ids in graph.supernodes().groups}
    every = frozenset().union(*own)
    boxes = [one for one in removed if frozenset(one["nodes"]) in own and one.get("random")]
    if not boxes:
        return
    tested = sorted((one for one in boxes if one["tested"]), key=lambda one: -abs(one["after"] - one["before"]))
    console.print(Text("\nTested in the model", style="bold"))
    for one in tested[:TESTED]:
        console.print(_without(f"[{own[frozenset(one['nodes'])]}]", one))
    together = next(
        (one for one in removed if frozenset(one["nodes"]) == every and len(own) > 1 and one.get("random")), None
    )
    if together is not None:
        console.print(_without("all boxes", together))
    console.print(
        Text(
            f"  {len(tested)} of {len(boxes)} boxes move the answer as the graph says, and further than every random "
            "set of the same size",
            style="dim",
        )
    )


def _without(what: str, one: dict[str, Any]) -> Text:
    random = one["random"]
    chance = f"{random[len(random) // 2]:.0%} ({random[0]:.0%} to {random[-1]:.0%})"
    return Text(
        f"  without {what}, “{one['answer']}” goes {one['before']:.0%} → {one['after']:.0%}; "
        f"without one of {len(random)} random sets of the same size: {one['before']:.0%} → {chance}"
    )
