"""``tl-circuits trace --more``: the same trace with more features, in place of what the command wrote before."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tl_circuits.cli.loading import loading
from tl_circuits.cli.options import COMMAND_NODES

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.graph.graph import AttributionGraph

More = Annotated[
    bool,
    typer.Option(
        "--more",
        help=(
            "Go on from what this same command wrote before: trace twice as many features, or --max-nodes, and write "
            "the files again. Notes stay."
        ),
    ),
]
MaxNodes = Annotated[
    int | None,
    typer.Option(
        "--max-nodes",
        help=(
            f"How many features to trace, most influential first. Default: {COMMAND_NODES}; with --more, twice as "
            "many as before."
        ),
    ),
]

# What must be the same for a trace to be the earlier one with more features.
SAME = (
    "token_ids",
    "target_names",
    "model",
    "dictionary",
    "sample",
    "skip_positions",
    "baseline",
    "compared_with",
    "select",
)


def read_earlier(path: Path, asked: int | None) -> "tuple[AttributionGraph, int]":
    """The graph to go on from, and how many features to trace now. A missing one is refused before anything is
    imported.

    Args:
        path: its file.
        asked: what the person asks for; None for twice as many as before.

    Raises:
        FileNotFoundError: if there is no graph.
        ValueError: if no more are asked for than there are.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--more goes on from an earlier trace, and there is no graph at {path}. Run the command without --more "
            "first."
        )
    with loading():
        import tl_circuits as tlc
    earlier = tlc.load_graph(path)
    traced = _features(earlier)
    count = 2 * traced if asked is None else asked
    if count <= traced:
        raise ValueError(f"{path} has {traced} features already; with --more, give --max-nodes more than that.")
    return earlier, count


def require_goes_on(earlier: "AttributionGraph", now: "AttributionGraph", path: Path) -> None:
    """Refuse to write over a graph that asks something else, or if nothing was gained.

    Raises:
        ValueError: naming the first difference, or saying that all features had been traced.
    """
    for name in SAME:
        before, after = getattr(earlier.info, name), getattr(now.info, name)
        if before != after:
            shown = f"{before!r} there, {after!r} now" if len(f"{before!r}{after!r}") < 200 else "other numbers"
            raise ValueError(
                f"{path} is of another trace, so --more cannot go on from it: {name} is different ({shown}). Give "
                "the options of before, or another --out."
            )
    if _features(now) <= _features(earlier):
        raise ValueError(
            f"{path} already has all {_features(earlier)} features that act on the answer, so there are no more to "
            "trace."
        )


def _features(graph: "AttributionGraph") -> int:
    return int(graph.is_kind("feature").sum())
