"""``tl-circuits circuit``: how much of an answer the graphs of a family of prompts carry."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tl_circuits.cli.app import app, clear_errors, terminal
from tl_circuits.cli.loading import Features, open_replacement
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
    refuse_early,
    with_ending,
)

if TYPE_CHECKING:
    import pandas as pd

    from tl_circuits.interventions.circuit_quality import CircuitQuality

FEWEST_PROMPTS = 2
NEARLY_ALL = 0.9  # of the metric: where nodes carry less of it, this is said


@app.command()
def circuit(
    prompts: Annotated[
        Path,
        typer.Argument(
            help=(
                "A table with the columns prompt and answer, a row for each prompt: .csv, .tsv or .jsonl. A column "
                "counterfactual is optional."
            )
        ),
    ],
    model: Model = "smollm2-135m",
    transcoders: Transcoders = "neurons",
    width: Width = None,
    l0: L0 = None,
    layer: Layers = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            help="Another such table: the nodes most important on average over PROMPTS are judged on these prompts.",
        ),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            help="A number of nodes to measure (repeatable). Default: shares of all nodes, from 0.1 % to 50 %.",
        ),
    ] = None,
    max_nodes: Annotated[int, typer.Option(help="How many features of each prompt to trace.")] = COMMAND_NODES,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write NAME.csv and NAME.svg.")] = None,
    force: Force = False,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Trace each prompt against all others, and measure how much of the answers the traced nodes carry."""
    with clear_errors(debug):
        files = {} if out is None else {"table": with_ending(out, ".csv"), "figure": with_ending(out, ".svg")}
        for path in files.values():
            refuse_early(path, force)
        rows, judged = read_table(prompts), None if held_out is None else read_table(held_out)
        features = Features(transcoders, width, l0, layer or None)
        found = _measure(rows, judged, model, features, size or None, max_nodes, device, dtype)
        if files:
            found.curve.to_csv(files["table"], index=False)
            found.plot(files["figure"], overwrite=force)
        if as_json:
            facts = {
                "nodes": found.n_nodes,
                "metric": found.metric,
                "ablate": found.ablate,
                "carried_by_nodes": found.carried_by_nodes(),
            }
            facts |= {"curve": found.curve.to_dict("records"), "areas": found.areas().to_dict("records")}
            typer.echo(json.dumps(facts | {"files": {k: str(p) for k, p in files.items()}}, ensure_ascii=False))
        else:
            _show(found, terminal())


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows with ``prompt``, ``answer`` and perhaps ``counterfactual``.

    Raises:
        ValueError: for a file that is no such table, or has fewer than two rows.
    """
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        if path.suffix == ".jsonl":
            frame = pd.DataFrame(
                [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            )
        else:
            frame = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table (.csv, .tsv or .jsonl): {error}") from error
    missing = [name for name in ("prompt", "answer") if name not in frame.columns]
    if missing:
        raise ValueError(f"{path} has the columns {', '.join(map(str, frame.columns))}, and needs prompt and answer.")
    if len(frame) < FEWEST_PROMPTS:
        raise ValueError(f"{path} has {len(frame)} rows; a family needs at least {FEWEST_PROMPTS} prompts.")
    return [{str(k): str(v) for k, v in row.items()} for row in frame.to_dict("records")]


def _measure(
    rows: list[dict[str, str]],
    judged: list[dict[str, str]] | None,
    model: str,
    features: Features,
    sizes: Any,
    max_nodes: int,
    device: str | None,
    dtype: str,
) -> "CircuitQuality":
    import tl_circuits as tlc

    console = terminal(stderr=True)
    with open_replacement(model, features, device, dtype) as replacement:
        tokenizer = replacement.model.tokenizer
        family = [row["prompt"] for row in rows]
        answers = [as_answer(tokenizer, row) for row in rows]
        graphs = []
        for number, (prompt, answer) in enumerate(zip(family, answers, strict=True), 1):
            with console.status(f"tracing {number} of {len(family)}: {prompt}"):
                others = [text for text in family if text != prompt]
                against = [other for other in dict.fromkeys(answers) if other != answer]
                target = tlc.LogitDifference(answer, against) if against else answer
                graphs.append(
                    tlc.attribute(replacement, prompt, target, baseline=others, max_nodes=max_nodes, progress=False)
                )
        circuits: Any = graphs
        if judged is not None:
            circuits, rows = tlc.common_circuit(graphs), judged
            family, answers = [row["prompt"] for row in rows], [as_answer(tokenizer, row) for row in rows]
        counterfactuals = (
            [row["counterfactual"] for row in rows] if all(row.get("counterfactual") for row in rows) else None
        )
        return tlc.circuit_quality(
            replacement,
            circuits,
            family,
            answers,
            counterfactuals=counterfactuals,
            ablate="mean" if counterfactuals is None else "counterfactual",
            sizes=sizes,
            progress=console.is_terminal,
        )


def as_answer(tokenizer: Any, row: dict[str, str]) -> str:
    """The answer as a token: with a space before it, as words have it, if that is one token."""
    answer = row["answer"]
    spaced = answer if answer.startswith(" ") or row["prompt"].endswith(" ") else f" {answer}"
    one = len(tokenizer(spaced, add_special_tokens=False)["input_ids"]) == 1
    return spaced if one else answer


def _show(found: "CircuitQuality", console: Console) -> None:
    console.print(found)
    console.print(
        Text(
            "\nF: the share of the answer that is left if everything outside the circuit is replaced (1 = all of it). "
            "C: the share that is left if the circuit itself is replaced (0 = none).",
            style="dim",
        )
    )
    if found.carried_by_nodes() < NEARLY_ALL:
        console.print(
            f"Replacing every node removes {found.carried_by_nodes():.0%} of the metric: {found.metric[1]:.2f} of "
            f"{found.metric[0]:.2f} is left. F and C are shares of that part only; the rest comes from token "
            "embeddings and skip connections, which are not nodes.",
            soft_wrap=True,
        )
    line = half_line(found.curve[found.curve.chosen == "circuit"], found.n_nodes)
    if line:
        console.print(line)


def half_line(curve: "pd.DataFrame", n_nodes: int) -> str:
    """How many nodes carry half of the answer, as far as the numbers that were tried say it; empty if they do not.

    Args:
        curve: rows with ``nodes`` and ``F``, fewest nodes first.
        n_nodes: how many nodes there are.
    """
    enough, short = curve[curve.F >= 0.5], curve[curve.F < 0.5]
    if enough.empty:
        return ""
    most = int(enough.nodes.iloc[0])
    tried = short.nodes[short.nodes < most]
    if most < n_nodes:
        return (
            f"Half of the answer is carried by {most:,} of {n_nodes:,} nodes a prompt ({most / n_nodes:.1%}), or by "
            "fewer."
        )
    return (
        f"Half of the answer is carried by more than {int(tried.max()):,} of {n_nodes:,} nodes a prompt "
        f"({tried.max() / n_nodes:.1%})."
        if len(tried)
        else ""
    )
