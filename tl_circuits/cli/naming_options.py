"""Options of `trace` that say how features are named, and the naming itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.graph.graph import AttributionGraph
    from tl_circuits.hooks import Replacement

NoExamples = Annotated[
    bool,
    typer.Option(
        "--no-examples",
        help=(
            "Name features by their weights alone. Otherwise a short text is run once for each model and dictionary, "
            "to see where features fire."
        ),
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help=(
            "A text file to look for features in, or a folder from `tl-circuits dashboards`. Default: the text that "
            "comes with the package."
        ),
    ),
]

LEGEND = (
    "  [on …] and [after …] are where a feature fires in a text; [sees …], [say …] and [suppresses …] come from its "
    "weights."
)


def require_text(text: Path | None, no_examples: bool) -> None:
    """Raise ValueError now, and not after the work, for a text that is not there or would not be used."""
    if text is not None and no_examples:
        raise ValueError(
            "--text says where to look for examples, and --no-examples that none are wanted. Leave one out."
        )
    if text is not None and not text.exists():
        raise ValueError(f"--text {text}: there is no such file or folder.")


def named(
    replacement: "Replacement", graph: "AttributionGraph", text: Path | None, no_examples: bool, progress: bool
) -> "AttributionGraph":
    """The graph with names on its features."""
    import tl_circuits as tlc

    return tlc.name_features(replacement, graph, text, examples=not no_examples, progress=progress)
