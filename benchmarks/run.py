"""The benchmark suite: the same model, weights, features and machine for us and for circuit-tracer."""

import argparse
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from benchmarks.busy import busy_table
from benchmarks.measure import matmul_rate
from benchmarks.setup import write_dictionaries
from benchmarks.speed import CASES, PEER_DEFAULT, PEER_LIMIT, run, speed_table
from tl_circuits.graph.scores import Edges, scores
from tl_circuits.models import PACKAGED

INTRODUCTION = f"""# Benchmarks

Timings, memory sizes and comparisons with other programs stand on this page; a number that belongs to one example stands with
the example. `make bench` measures and writes it, part by part (`make bench BENCH_ARGS="--only speed"`); parts that it does not
measure stay as they are.

Comparisons with circuit-tracer 0.5.0 use Gemma-3-270m in float32 and random JumpReLU transcoders of 16,384 features a layer, of
which about 60 are active at a position. Both programs get the same weights and features, one after the other in the same run. Our
times are the median of three runs. circuit-tracer runs once at each of three batch sizes; one of them is its default, {PEER_DEFAULT}. A run of
more than {PEER_LIMIT} s is stopped after its current batch, and the time of the remaining nodes is estimated from those done (marked
"about"). "Does not finish" means that it ran out of memory.

"Of the machine's rate" compares a trace with how fast this machine multiplies matrices, measured between the runs. It
counts only the products that a plain backward pass needs with the attention's weights, one at every layer and position below a node:
first over the whole time of a trace, then over the sweeps of the linear engine alone.
"""


def agreement(folder: Path, peer: str) -> list[str]:
    """Every edge among circuit-tracer's nodes, theirs against ours, and the scores of their matrix."""
    checkpoint = str(PACKAGED["gemma-3-270m"].folder)
    run([sys.executable, "-m", "benchmarks.ours", str(folder), "10", "300", "1"])
    run([peer, "benchmarks/peer.py", str(folder), checkpoint, "10", "300", "128"])
    lines = [compared("Gemma-3-270m", folder)]
    for name in ("llama", "gemma2"):
        run([sys.executable, "-m", "benchmarks.small_ours", str(folder), name])
        run([peer, "benchmarks/small_peer.py", str(folder), name])
        lines.append(compared(f"A small random {name}", folder))
    return lines


def compared(what: str, folder: Path) -> str:
    ours, theirs = load_file(folder / "ours.safetensors"), load_file(folder / "peer.safetensors")
    place = {
        (layer, position, feature): i
        for i, (kind, layer, position, feature) in enumerate(
            zip(*(ours[name].tolist() for name in ("kind", "layer", "position", "feature")), strict=True)
        )
        if kind == 0
    }
    features = [tuple(row) for row in theirs["features"].tolist()]
    kept = torch.tensor([f in place for f in features])
    rest = torch.arange(int((ours["kind"] == 0).sum()), len(ours["kind"]))
    columns = torch.cat([torch.tensor([place.get(f, 0) for f in features]), rest])
    kept = torch.cat([kept, torch.ones(len(rest), dtype=torch.bool)])
    whole = theirs["adjacency"]
    # A feature without any influence on the logits is a node of theirs, not of ours.
    unreached = whole[:, ~kept][kept].abs().max() if (~kept).any() else torch.tensor(0.0)
    if float(unreached) > 0:
        raise RuntimeError(f"{what}: a feature that acts on others is not active in ours")
    mine, reference = ours["adjacency"][columns][:, columns][kept][:, kept], whole[kept][:, kept]
    gap = ((mine - reference).abs().amax(1) / reference.abs().amax(1).clamp_min(1e-12)).max()
    target, source = whole.nonzero(as_tuple=True)
    weights = torch.zeros(len(whole))
    weights[-len(theirs["probabilities"]) :] = theirs["probabilities"]
    kinds = torch.cat([torch.zeros(len(features), dtype=ours["kind"].dtype), ours["kind"][rest]])
    found = scores(Edges(source, target, whole[target, source]), weights, kinds == 1, kinds == 2)
    peers = theirs["scores"].tolist()
    return (
        f"* {what}: edges among {int(kept.sum())} nodes differ by at most {float(gap):.1e} of the largest edge into "
        f"the same target; scores of circuit-tracer's matrix: replacement {found.replacement:.6f} against its "
        f"{peers[0]:.6f}, completeness {found.completeness:.6f} against its {peers[1]:.6f}."
    )


def intervention_lines(folder: Path, peer: str, repeats: int) -> list[str]:
    """200 single-feature ablations on a 12-token prompt, ours in batches, circuit-tracer's call by call."""
    checkpoint = str(PACKAGED["gemma-3-270m"].folder)
    ours = run([sys.executable, "-m", "benchmarks.ours_interventions", str(folder), "12", "200", str(repeats)])
    theirs = run([peer, "benchmarks/peer_interventions.py", str(folder), checkpoint, "12"])
    fast = median(ours["seconds"])
    return [
        f"{ours['runs']} single-feature ablations on a 12-token prompt, patterns and denominators held: {fast:.1f} s in batches, "
        f"circuit-tracer's `feature_intervention` {theirs['seconds']:.0f} s call by call ({theirs['seconds'] / fast:.0f} times; "
        f"{theirs['lean_seconds'] / fast:.0f} times with its `return_activations=False`). It holds patterns, but norms only where all layers are "
        f'constrained; so constrained, its changes of the logits and ours (`freeze="all"`) differ by at most {theirs["gap"]:.1e} of '
        "the largest.",
    ]


def many_lines() -> list[str]:
    """Ray workers against one, a core each."""
    found = run([sys.executable, "-m", "benchmarks.many"])
    return [
        f"{found['prompts']} prompts of {found['model']} (its neurons, {found['nodes']} nodes) on Ray, a core a "
        f"worker: one worker {60 * found['one']:.1f} prompts a minute, two {60 * found['two']:.1f} "
        f"({found['ratio']:.2f} times)."
    ]


def memory_lines(folder: Path, clt_folder: Path | None) -> list[str]:
    """What opened sets cost, on one core; the cross-layer one only where 20 GB may be written."""
    gemma = run([sys.executable, "-m", "benchmarks.load_memory", "gemma", str(folder / "gemma")])
    disk, cpu = gemma["disk"], gemma["cpu"]
    lines = [
        "Random weights on disk, opened and used on one core; memory is the process's, mapped pages in use included:",
        "",
        "| | disk | in memory |",
        "|---|---|---|",
        "| Gemma-2-2b-shaped set (26 × 16,384, bfloat16, 3.9 GB), opened and ten tokens encoded: peak | "
        f"{disk['peak_gb']:.2f} GB | {cpu['peak_gb']:.2f} GB |",
        f"| second prompt, encoding all layers | {disk['second_s']:.1f} s | {cpu['second_s']:.1f} s |",
    ]
    if clt_folder is not None:
        found = run([sys.executable, "-m", "benchmarks.load_memory", "clt", str(clt_folder)])
        lines.append(
            f"| Llama-3.2-1B-shaped CLT (524k features, 20 GB), ten tokens traced with {found['active']:,} active "
            f"features, model included: peak | {found['peak_rss_gb']:.1f} GB; {found['trace_s']:.0f} s; sums to "
            f"{found['sums_check']:.0e} | |"
        )
    return lines


def printed(module: str, *arguments: str) -> list[str]:
    """What a benchmark module prints, as a block of text."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments], capture_output=True, text=True, timeout=3600
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.{module} failed:\n{done.stderr[-3000:]}")
    return [f"`python -m benchmarks.{module}` printed:", "", "```text", *done.stdout.strip().splitlines(), "```"]


def parts(arguments: argparse.Namespace, folder: Path, rate: float) -> dict[str, tuple[str, Callable[[], list[str]]]]:
    """Every part's name on the command line, its heading, and what measures it."""
    cases = [case[:2] for case in CASES]
    if arguments.cases:
        cases = [tuple(map(int, case.split("/"))) for case in arguments.cases.split(",")]
    peer, repeats = arguments.peer, arguments.repeats
    return {
        "edges": ("Edges against circuit-tracer's", lambda: agreement(folder, peer)),
        "interventions": ("Interventions", lambda: intervention_lines(folder, peer, repeats)),
        "proof": ("Proving what is held", lambda: printed("proof")),
        "speed": ("Time and memory of a trace", lambda: speed_table(folder, peer, cases, repeats)),
        "busy": ("Beside other programs", lambda: busy_table(folder, peer, repeats)),
        "many": ("Many prompts", many_lines),
        "memory": ("Opened sets", lambda: memory_lines(folder, arguments.clt)),
        "attention": ("Heads and scores", lambda: printed("attention", "transcoders")),
        "neuronpedia": ("Neuronpedia", lambda: printed("neuronpedia")),
        "page": ("The page", lambda: printed("page")),
        "tabs": ("Twenty tabs on one server", lambda: printed("tabs")),
        "boxes": ("Removing boxes", lambda: printed("boxes")),
    }


def put(path: Path, heading: str, lines: list[str]) -> None:
    """Write one section of the file, in the place of what it said before."""
    before, *sections = path.read_text().split("\n## ") if path.is_file() else [""]
    found = dict(section.split("\n", 1) for section in sections)
    found[heading] = "\n" + "\n".join(lines) + "\n"
    path.write_text("\n## ".join([INTRODUCTION, *(f"{title}\n{body}" for title, body in found.items())]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="Python of an environment with circuit-tracer 0.5.0")
    parser.add_argument("--only", help="parts, such as speed,interventions; the others stay as they are in the file")
    parser.add_argument("--cases", help="such as 10/2000,64/512")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clt", type=Path, help="folder for 20 GB of random weights: also measure a CLT, ten minutes more"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rate = matmul_rate()
        known = parts(arguments, folder, rate)
        wanted = arguments.only.split(",") if arguments.only else list(known)
        if unknown := set(wanted) - set(known):
            parser.error(f"no such part: {', '.join(sorted(unknown))}. There are {', '.join(known)}.")
        if {"busy", "edges", "interventions", "speed"} & set(wanted):
            write_dictionaries(folder)
        machine = (
            f"*{platform.machine()}, {torch.get_num_threads()} threads, matrix products at {rate:.0f} GFLOP/s; Python "
            f"{platform.python_version()}, torch {torch.__version__}, transformer_lens {version('transformer_lens')}.*"
        )
        for name in wanted:
            heading, measure = known[name]
            lines = [*measure(), "", machine]
            put(arguments.out, heading, lines)
            print(f"## {heading}", "", *lines, "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
