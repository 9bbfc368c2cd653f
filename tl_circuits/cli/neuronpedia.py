"""``tl-circuits export | upload | label | dashboards``: files for and from Neuronpedia and circuit-tracer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.loading import Features, open_replacement
from tl_circuits.cli.options import AsJson, Debug, Device, Dtype, Force, Model, one_of, refuse_early
from tl_circuits.support.endings import OURS, stem_of

if TYPE_CHECKING:  # torch takes seconds to import; --help should not wait for it
    from tl_circuits.graph.graph import AttributionGraph

Graph = Annotated[
    Path,
    typer.Argument(
        help="A graph file: one that `trace` wrote, JSON of Neuronpedia or circuit-tracer, or a .pt of circuit-tracer."
    ),
]
ModelId = Annotated[str | None, typer.Option("--model-id", help="The model's name on Neuronpedia, such as gemma-2-2b.")]
SourceSet = Annotated[
    str | None, typer.Option(help="The features' source set on Neuronpedia, such as gemmascope-transcoder-16k.")
]

_IN_FOLDERS = ("neuronpedia", "circuit-tracer", "parquet")  # these name their files themselves
_ENDINGS = {"graphml": ".graphml", "dot": ".dot", "html": ".html", "tl-circuits": OURS}
# text: with all edges of a large graph, hundreds of megabytes
_PRUNED = ("neuronpedia", "circuit-tracer", "graphml", "dot")


@app.command()
def export(
    graph: Graph,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="The format: neuronpedia, circuit-tracer, graphml, dot, parquet, html or tl-circuits.",
            callback=one_of(*_IN_FOLDERS, *_ENDINGS),
        ),
    ] = "neuronpedia",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help=(
                "The file or folder to write. Default: beside you, named after the graph's file; neuronpedia, "
                "circuit-tracer and parquet name their files themselves."
            ),
        ),
    ] = None,
    slug: Annotated[str | None, typer.Option(help="The graph's name on the page.")] = None,
    model_id: ModelId = None,
    source_set: SourceSet = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help=(
                "A folder that `tl-circuits dashboards` wrote. Its records of the graph's features are copied for "
                "circuit-tracer's page."
            )
        ),
    ] = None,
    node_threshold: Annotated[
        float | None,
        typer.Option(
            help=(
                "Keep only the nodes that carry this share of the influence, 0 to 1. Default: 0.8, and of their "
                "edges 98 %; html, parquet and tl-circuits keep all."
            )
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Keep all nodes and edges. Of a large graph, the file has hundreds of megabytes."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a graph as a file for another program."""
    with clear_errors(debug):
        if every and node_threshold is not None:
            raise ValueError("--all keeps all nodes and --node-threshold keeps some; give one of them.")
        out = _place(out, graph, target, force)
        whole = _load(graph, node_threshold)
        loaded = whole.prune() if target in _PRUNED and node_threshold is None and not every else whole
        if target in ("neuronpedia", "circuit-tracer"):
            written = [
                loaded.to_neuronpedia(
                    out, target, slug=slug, source_set=source_set, scan=model_id, features=features, overwrite=force
                )
            ]
        elif target == "parquet":
            written = list(loaded.to_parquet(out, overwrite=force))
        else:
            write = {
                "graphml": loaded.to_graphml,
                "dot": loaded.to_dot,
                "html": loaded.to_html,
                "tl-circuits": loaded.save,
            }[target]
            written = [write(out, overwrite=force)]
        if len(loaded) < len(whole) or len(loaded.edges) < len(whole.edges):
            terminal(stderr=True).print(
                f"The {len(loaded):,} nodes with 80 % of the influence are written, of {len(whole):,}, and "
                f"{len(loaded.edges):,} of {len(whole.edges):,} edges; --all writes all."
            )
        _tell(as_json, {"files": list(map(str, written))}, "\n".join(map(str, written)))


@app.command()
def upload(
    graph: Graph,
    slug: Annotated[str, typer.Option(help="The graph's name on Neuronpedia: letters, digits, _ . -")],
    model_id: ModelId = None,
    source_set: SourceSet = None,
    description: Annotated[str, typer.Option(help="A text that is shown with the graph.")] = "",
    node_threshold: Annotated[
        float | None,
        typer.Option(help="Keep only the nodes that carry this share of the influence, 0 to 1. Default: all nodes."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put a graph on Neuronpedia. The key comes from NEURONPEDIA_API_KEY or the keyring."""
    with clear_errors(debug):
        url = _load(graph, node_threshold).upload(slug, model=model_id, source_set=source_set, description=description)
        _tell(as_json, {"url": url}, url)


@app.command()
def label(
    graph: Graph,
    source: Annotated[
        str, typer.Option(help="Where labels come from: neuronpedia, or a folder that `tl-circuits dashboards` wrote.")
    ] = "neuronpedia",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help=(
                "The graph file to write; NAME.json for Neuronpedia's format. Default: the file given, if `trace` "
                "wrote it (this needs --force), else one of our own beside it."
            ),
        ),
    ] = None,
    model_id: ModelId = None,
    source_set: SourceSet = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only what this computer remembers; ask no server.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put labels on a graph's features, and save the graph."""
    with clear_errors(debug):
        import tl_circuits as tlc

        loaded = _load(graph, None)
        shown = terminal(stderr=True).is_terminal
        made = tlc.add_labels(loaded, source, model=model_id, source_set=source_set, offline=offline, progress=shown)
        written = _labelled(made, graph, out, force)
        n, features = len(made.labels), int(made.is_kind("feature").sum())
        fresh = sum(made.labels[i] != loaded.labels.get(i) for i in made.labels)
        _tell(
            as_json,
            {"file": str(written), "labelled": n, "new": fresh, "features": features},
            f"{n} of {features} features have a label, {fresh} of them new: {written}",
        )


@app.command()
def dashboards(
    text: Annotated[list[Path], typer.Option("--text", help="A text file to run through the model (repeatable).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the feature files.")],
    model: Model = "smollm2-135m",
    transcoders: Annotated[
        str, typer.Option("--transcoders", "-t", help="`neurons`: the MLP's own neurons, no dictionary needed.")
    ] = "neurons",
    layers: Annotated[str | None, typer.Option(help="Which layers: 3, 0-5 or 0,4,8. Default: all.")] = None,
    context: Annotated[int, typer.Option(help="Number of tokens in one example.")] = 64,
    examples: Annotated[int, typer.Option(help="How many examples to keep for each feature.")] = 10,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write down what features do over texts: examples, histograms, logits. An interrupted run is continued."""
    with clear_errors(debug):
        chosen = _layers(layers)
        with open_replacement(model, Features(transcoders), device, dtype) as replacement:
            import tl_circuits as tlc

            files = tlc.make_dashboards(
                replacement, text, out, layers=chosen, context=context, examples=examples, max_tokens=max_tokens,
                progress=terminal(stderr=True).is_terminal,
            )  # fmt: skip
        told = f"{files.folder}   label a graph with them: tl-circuits label GRAPH --source {out}"
        _tell(as_json, {"folder": str(files.folder), "layers": files.layers}, told)


def _load(path: Path, node_threshold: float | None) -> "AttributionGraph":
    import tl_circuits as tlc

    graph = tlc.load_graph(path)
    return graph if node_threshold is None else graph.prune(node_threshold=node_threshold)


def _place(out: Path | None, graph: Path, target: str, force: bool) -> Path:
    """Where to write: a folder for formats that name their files, else a file with the format's ending.

    Raises:
        OSError: if the file exists and ``force`` is False.
    """
    if target in _IN_FOLDERS:
        place = Path(".") if out is None else out
        if not place.suffix:
            place.mkdir(parents=True, exist_ok=True)
        return place
    ending = _ENDINGS[target]
    place = (
        Path(f"{stem_of(graph)}{ending}") if out is None else out / f"{stem_of(graph)}{ending}" if out.is_dir() else out
    )
    if not place.suffix:
        place = place.with_name(place.name + ending)
    refuse_early(place, force)
    return place


def _labelled(made: "AttributionGraph", graph: Path, out: Path | None, force: bool) -> Path:
    """Save a labelled graph: a file of ours in place, another program's beside it, or as ``out`` says."""
    ours = graph.name.endswith(".safetensors")
    place = out if out is not None else graph if ours else graph.with_name(stem_of(graph) + OURS)
    if place.suffix == ".json":
        return made.to_neuronpedia(place, overwrite=force)
    return made.save(place, overwrite=force)


def _layers(text: str | None) -> list[int] | None:
    """``3``, ``0-5`` or ``0,4,8`` as numbers.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    made: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--layers {text!r} cannot be read; write 3, 0-5 or 0,4,8.")
        made += range(int(first), int(last if dash else first) + 1)
    return sorted(set(made))


def _tell(as_json: bool, facts: dict[str, object], text: str) -> None:
    typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else text)
