"""``tl-circuits trace``: from a prompt to a graph file, a page and a summary."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl_circuits.cli.against import Against, AlignEnd, read_against
from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.heads import show_heads
from tl_circuits.cli.loading import Features, open_replacement
from tl_circuits.cli.naming_options import LEGEND, NoExamples, TextFile, named, require_text
from tl_circuits.cli.options import (
    COMMAND_NODES,
    L0,
    AsJson,
    Debug,
    Device,
    Dtype,
    Force,
    Layers,
    Model,
    Transcoders,
    Width,
    one_of,
    refuse_early,
    with_ending,
)
from tl_circuits.cli.retrace import MaxNodes, More, read_earlier, require_goes_on
from tl_circuits.cli.words import show_tested, show_words
from tl_circuits.support.endings import OURS, stem_for

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.graph.graph import AttributionGraph
    from tl_circuits.hooks import Replacement
    from tl_circuits.interventions.faithfulness import FaithfulnessReport

PATHS_TOLD = 5
EDGES_TOLD = 3
LITTLE, MUCH = 0.4, 0.8  # correlations of predicted and measured changes, with nothing held
CONTROLS = 20  # random sets that each box is compared with
EDGES_EXPLAINED = 12  # with --heads; all of them go into the files, EDGES_TOLD are printed


@app.command()
def trace(
    prompt: Annotated[str, typer.Argument(help="The text to explain: why does the model continue it as it does?")],
    model: Model = "smollm2-135m",
    transcoders: Transcoders = "neurons",
    width: Width = None,
    l0: L0 = None,
    layer: Layers = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help=(
                "A token to explain (repeatable), or 'A - B' for the difference of two tokens. If A begins with a "
                "space, B gets one too. Default: the likeliest tokens."
            ),
        ),
    ] = None,
    against: Against = None,
    align_end: AlignEnd = False,
    position: Annotated[
        int, typer.Option(help="The position after which the answer is read; -1 is the last token.")
    ] = -1,
    prepend_special: Annotated[
        bool | None,
        typer.Option(
            "--prepend-special/--no-prepend-special",
            help=(
                "Whether to put a special token (bos, else pad, else eos) before the text. Default: as the "
                "transcoders were trained."
            ),
        ),
    ] = None,
    skip_position: Annotated[
        list[int] | None,
        typer.Option(
            "--skip-position",
            help=(
                "A position to leave out, without features and errors, such as 0 (repeatable). Default: as the "
                "transcoders were trained."
            ),
        ),
    ] = None,
    max_nodes: MaxNodes = None,
    more: More = False,
    engine: Annotated[
        str,
        typer.Option(
            help="How edges are computed: linear (fast, known architectures), autograd (any architecture) or auto.",
            callback=one_of("auto", "linear", "autograd"),
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The files' name, without its ending. Default: made from the prompt."),
    ] = None,
    force: Force = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also test the graph: remove nodes one by one, and compare the effects with what the graph predicts.",
        ),
    ] = False,
    heads: Annotated[
        bool,
        typer.Option(
            "--heads", help="Also say which attention heads carried the strongest edges, and why they looked there."
        ),
    ] = False,
    ablations: Annotated[
        bool,
        typer.Option(
            "--ablations",
            help="Also remove each box of the page in the model, so that the page can show what happens then.",
        ),
    ] = False,
    no_examples: NoExamples = False,
    text: TextFile = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Trace one PROMPT: which features, from which tokens, led to the answer?"""
    with clear_errors(debug):
        name = out if out is not None else Path(stem_for(prompt))
        files = {"graph": with_ending(name, OURS), "page": with_ending(name, ".html")}
        for path in files.values():
            refuse_early(path, force or more)
        require_text(text, no_examples)
        earlier, count = (
            read_earlier(files["graph"], max_nodes)
            if more
            else (None, COMMAND_NODES if max_nodes is None else max_nodes)
        )
        baseline, progress = read_against(against), terminal(stderr=True).is_terminal
        with open_replacement(model, Features(transcoders, width, l0, layer or None), device, dtype) as replacement:
            import tl_circuits as tlc

            graph = tlc.attribute(
                replacement,
                prompt,
                _targets(target),
                baseline=baseline,
                align="end" if align_end else None,
                position=position,
                prepend_special=prepend_special,
                skip_positions=skip_position or None,
                max_nodes=count,
                engine=cast('Literal["auto", "linear", "autograd"]', engine),
                progress=progress,
            )
            report = tlc.faithfulness(replacement, graph, progress=progress) if check else None
            graph = named(replacement, graph, text, no_examples, progress)
            if heads:
                graph = tlc.explain_heads(replacement, graph, EDGES_EXPLAINED, progress=progress)
            removed = _without_boxes(replacement, graph, progress) if ablations else None
        if earlier is not None:
            require_goes_on(earlier, graph, files["graph"])
            graph = graph.with_notes(earlier.notes.of(graph.node_ids))
        graph.save(files["graph"], overwrite=force or more)
        graph.to_html(files["page"], overwrite=force or more, ablations=removed)
        if as_json:
            facts = summary(graph, files)
            if report is not None:
                facts["faithfulness"] = report.summary().to_dict("records")
            if heads:
                facts["heads"] = graph.head_stories[:EDGES_TOLD]
            typer.echo(json.dumps(facts, ensure_ascii=False))
        else:
            show(graph, files, terminal(), removed)
            if report is not None:
                show_check(report, terminal())
            show_heads(graph, graph.head_stories[:EDGES_TOLD], terminal())


def _without_boxes(replacement: "Replacement", graph: "AttributionGraph", progress: bool) -> list[dict[str, Any]]:
    import tl_circuits as tlc

    # A baseline made from texts is not kept in the graph, so random sets cannot be set to it.
    controls = 0 if graph.info.compared_with and not graph.info.baseline else CONTROLS
    return tlc.box_ablations(replacement, graph, controls=controls, progress=progress)


def _targets(given: list[str] | None) -> list[Any] | None:
    from tl_circuits.attribution.targets import parse_target

    return [parse_target(text) for text in given] if given else None


def summary(graph: "AttributionGraph", files: dict[str, Path]) -> dict[str, Any]:
    """What the trace found, as JSON values."""
    from tl_circuits.graph.page_limits import LEVELS, page_graph
    from tl_circuits.graph.paths import sentence, strongest_paths
    from tl_circuits.view.page_data import finite
    from tl_circuits.view.story import carried_line, story_of

    scores = graph.scores()
    shown = page_graph(graph)
    story = story_of(shown, LEVELS[1])  # as the page shows it first
    return {
        "prompt": graph.info.prompt,
        "model": graph.info.model,
        "dictionary": graph.info.dictionary,
        "tokens": list(graph.info.tokens),
        "prepended": graph.info.prepended,
        "compared_with": list(graph.info.compared_with),
        "words": graph.words.to_dict("records"),
        "skip_positions": list(graph.info.skip_positions or ()),
        "targets": [
            {"token": name, "weight": weight}
            for name, weight in zip(graph.info.target_names, graph.info.target_probabilities, strict=True)
        ],
        "paths": [
            {"nodes": [graph.node_ids[i] for i in path.nodes], "share": path.share, "sentence": sentence(graph, path)}
            for path in strongest_paths(graph, PATHS_TOLD)
        ],
        "features_traced": int(graph.is_kind("feature").sum()),
        "features_active": graph.info.n_active,
        "replacement_score": scores.replacement,
        "completeness_score": scores.completeness,
        "carried_by_boxes": finite(story.carried.share),
        "carried_line": carried_line(story, shown),
        "coverage": graph.coverage,
        "completeness_error": graph.completeness_error(),
        "files": {kind: str(path) for kind, path in files.items()},
    }


def show(
    graph: "AttributionGraph", files: dict[str, Path], console: Console, removed: list[dict[str, Any]] | None = None
) -> None:
    """Print the summary for a person; ``removed`` is what removing boxes did."""
    from tl_circuits.graph.visible import visible

    facts = summary(graph, files)
    console.print()
    console.print(Text(graph.info.reads, style="bold"))
    for line in prompt_lines(graph):
        console.print(Text(line, style="dim"), soft_wrap=True)
    predictions = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for target in facts["targets"][:5]:
        bar = "█" * max(1, round(30 * min(1.0, target["weight"])))
        predictions.add_row(Text(f"“{visible(target['token'])}”"), f"{target['weight']:.1%}", Text(bar, style="blue"))
    if graph.info.compared_with:
        console.print(Text(f"\n{graph.info.question}"), style="bold")
    else:
        console.print(Text("\nWhat the model says next"), style="bold")
        console.print(predictions)
    show_words(graph, console)
    if removed:
        show_tested(graph, removed, console)
    if facts["paths"]:
        first = facts["targets"][0]["token"] if facts["targets"] else "the target"
        console.print(Text(f"\nWhat acts on “{first}” most directly, and where that came from"), style="bold")
        for path in facts["paths"]:
            console.print(Text(f"  {path['share']:6.1%}  {path['sentence']}"))
        console.print(Text(f"  shares of the answer; {LEGEND.strip()}", style="dim"))
    console.print(Text("\nHow much is explained"), style="bold")
    if facts["carried_line"]:
        console.print(Text(f"  {facts['carried_line']}"))
    console.print(
        f"  {facts['features_traced']} of {facts['features_active']} active features traced; they and the tokens "
        f"carry {facts['coverage']:.0%} of the direct effects"
    )
    if graph.info.exact:
        console.print(
            "  neurons rebuild every MLP exactly, so no MLP output is left unexplained; the rest of the direct "
            "effects comes from neurons that were not traced (--more)"
        )
    else:
        console.print(
            f"  {facts['replacement_score']:.0%} of the influence starts in tokens rather than in what features do "
            "not explain (replacement score)"
        )
        console.print(f"  {facts['completeness_score']:.0%} of nodes' inputs are explained (completeness score)")
    console.print(f"  sums check: edges and bias add up to every node within {facts['completeness_error']:.0e}")
    console.print(Text("\nFiles"), style="bold")
    console.print(f"  {files['graph']}   the graph: tlc.load_graph(...)", soft_wrap=True)
    console.print(f"  {files['page']}   open it in a browser", soft_wrap=True)


def prompt_lines(graph: "AttributionGraph") -> list[str]:
    """Lines that say what was put before the text, what is left out, and whether the text gives its tokens again."""
    info, lines = graph.info, []
    if info.prepended:
        lines.append(f"“{info.prepended}” was put before the text")
    if info.skip_positions:
        places = ", ".join(f"{p} “{info.tokens[p]}”" for p in info.skip_positions)
        lines.append(f"left out, without features and errors: position {places}")
    if not info.prompt_exact:
        lines.append("no text gives exactly these tokens: run the graph itself, not its text")
    return lines


def show_check(report: "FaithfulnessReport", console: Console) -> None:
    """Print how well the graph's predictions held."""
    console.print(Text("\nPredicted against measured, removing nodes one by one", style="bold"))
    table = Table(
        "held while removing", "pairs", "correlation", "explained variance", "same sign", "diverged", box=None
    )
    for row in report.summary().itertuples():
        table.add_row(
            row.freeze,
            str(row.pairs),
            f"{row.correlation:.3f}",
            f"{row.explained_variance:.3f}",
            f"{row.sign_agreement:.0%}",
            str(row.diverged),
        )
    console.print(table)
    rows = report.summary().set_index("freeze")
    if "none" in rows.index:
        console.print(Text(f"  {_what_follows(float(rows.correlation['none']))}", style="dim"))


def _what_follows(correlation: float) -> str:
    """What the last row of the check means for a reader."""
    if not correlation >= LITTLE:  # also for NaN
        return (
            "With nothing held, the predictions say little about the model: trust what removing a box does, not what "
            "the graph predicts."
        )
    if correlation < MUCH:
        return "With nothing held, the predictions hold only in part: they say what matters, not by how much."
    return "With nothing held, the predictions still hold."
