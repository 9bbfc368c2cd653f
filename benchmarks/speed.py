"""Time and memory of whole traces, ours and circuit-tracer's, on prompts of growing length."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tl_circuits.models import PACKAGED

# Prompt tokens, nodes, circuit-tracer's batch sizes. On 4,096 tokens it runs out of this machine's memory; ours runs
# once.
CASES = [
    (10, 2000, (32, 128, 512)),
    (64, 512, (32, 128, 512)),
    (256, 256, (16, 64, 512)),
    (1024, 256, (1, 4, 512)),
    (4096, 256, ()),
]
PEER_DEFAULT = 512  # circuit-tracer's own batch size
PEER_LIMIT = 150  # seconds, after which its run is stopped and the rest reckoned from the nodes done
HEADER = [
    "| prompt tokens / nodes | tl_circuits nodes/s | of the machine's rate | in its sweeps | circuit-tracer as it "
    "comes | ratio | circuit-tracer's best (batch) | ratio | peak MB above weights | circuit-tracer's least | ratio |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]


def run(command: list[str], limit: float = 3600, settings: dict[str, str] | None = None) -> dict[str, Any]:
    """The line of JSON that a measurement prints, run with ``settings`` added to the environment's variables.

    Raises RuntimeError with its last words if there is none.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ | (settings or {}))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{' '.join(command)} gave no result:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def speed_table(folder: Path, peer: str, cases: list[tuple[int, int]], repeats: int) -> list[str]:
    """The table's lines, and below it how time per node grows with the prompt."""
    lines, per_node, per_place = list(HEADER), {}, {}
    checkpoint = str(PACKAGED["gemma-3-270m"].folder)
    for tokens, nodes, batches in CASES:
        if (tokens, nodes) not in cases:
            continue
        times = repeats if batches else 1
        ours = run([sys.executable, "-m", "benchmarks.ours", str(folder), str(tokens), str(nodes), str(times)])
        theirs = {
            batch: attempted(
                [peer, "benchmarks/peer.py", str(folder), checkpoint, *map(str, (tokens, nodes, batch, PEER_LIMIT))],
                nodes,
            )
            for batch in batches
        }
        seconds = median(ours["seconds"])
        per_node[tokens] = seconds / nodes
        per_place[tokens] = median(ours["sweep_seconds"]) / ours["places"]
        lines.append(f"| {' | '.join(cells(ours, {b: t for b, t in theirs.items() if t}, seconds, bool(batches)))} |")
        print(lines[-1], flush=True)
    return [*lines, "", *growth(per_node, per_place)]


def cells(ours: dict[str, Any], theirs: dict[int, dict[str, Any]], seconds: float, tried: bool) -> list[str]:
    """One row of the table: ours against their default and against their best."""
    fast, rate = ours["nodes"] / seconds, ours["rate"]
    finite = {batch: t for batch, t in theirs.items() if not t.get("beyond")}
    missing = "does not finish" if tried else "not tried"
    best = min(finite, key=lambda batch: finite[batch]["seconds"], default=None)
    least = min((t["peak_mb"] for t in finite.values()), default=None)

    def against(batch: int | None) -> tuple[str, str]:
        if batch not in theirs:
            return missing, ""
        measured = theirs[batch]
        speed = measured["nodes"] / measured["seconds"]
        about, more = ("below ", "above ") if measured.get("beyond") else ("" if measured["finished"] else "about ", "")
        return f"{about}{speed:.2g}" + ("" if batch == PEER_DEFAULT else f" ({batch})"), f"{more}{fast / speed:.1f}"

    return [
        f"{ours['tokens']} / {ours['nodes']}",
        f"{fast:.3g}",
        f"{ours['gflop'] / seconds / rate:.0%}",
        f"{ours['gflop'] / median(ours['sweep_seconds']) / rate:.0%}",
        *against(PEER_DEFAULT),
        *against(best),
        f"{ours['peak_mb']:.0f}",
        missing if least is None else f"{least:.0f}",
        "" if least is None else f"{ours['peak_mb'] / least:.2f}",
    ]


def growth(per_node: dict[int, float], per_place: dict[int, float]) -> list[str]:
    """How time grows with the prompt: that of the nodes taken, and that of a node which stays in its place.

    Nodes lie deeper and later on long prompts. One at a given layer of the last token passes layers times tokens
    places.
    """
    if len(per_node) < 3:
        return []
    told = ", ".join(f"{seconds:.3g} s at {tokens}" for tokens, seconds in per_node.items())
    places = ", ".join(f"{1e6 * seconds:.2f} µs at {tokens}" for tokens, seconds in per_place.items())
    return [
        f"Seconds per node: {told} tokens; they grow with the {_slope(per_node):.2f}th power of the prompt's length.",
        f"Seconds of sweeps per node, layer and position passed: {places} tokens. So the time of a node at the same "
        f"layer of the last token grows with the {1 + _slope(per_place):.2f}th power of the prompt's length (1: "
        "linear).",
    ]


def _slope(seconds: dict[int, float]) -> float:
    """The slope of a straight line on logarithmic axes."""
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


def attempted(command: list[str], nodes: int) -> dict[str, Any] | None:
    """What a measurement gave; None where the program ran out of memory. Preparing, or one batch, that goes on far too
    long is cut off."""
    try:
        return run(command, 3 * PEER_LIMIT)
    except subprocess.TimeoutExpired:
        return {"nodes": nodes, "seconds": 3 * PEER_LIMIT, "beyond": True}
    except RuntimeError:
        return None
