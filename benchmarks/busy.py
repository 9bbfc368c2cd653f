"""A trace on a quiet machine and beside other programs, ours and circuit-tracer's: ``run.py --only busy`` calls it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.speed import run
from tl_circuits.models import PACKAGED

TOKENS, NODES = 10, 2000
PEER_NODES, PEER_BATCH, PEER_LIMIT = 300, 128, 600
OTHERS = (0, 1, 4)
# Another program that multiplies matrices with torch's own choice of threads, until it is ended.
OTHER = "import torch\na = torch.randn(1500, 1500)\nwhile True: a @ a"
# How ours is run: as Python imports torch; as the command line starts it; with one thread.
WAYS = {
    "in Python, as torch comes": {},
    "`OMP_WAIT_POLICY=PASSIVE`, as `tl-circuits` sets it": {"OMP_WAIT_POLICY": "PASSIVE"},
    "`OMP_NUM_THREADS=1`": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def others(count: int) -> Iterator[None]:
    """So many other programs that take all the processor time they get."""
    started = [subprocess.Popen([sys.executable, "-c", OTHER]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def note(rows: dict[str, list[float]], name: str, seconds: float, others_there: int) -> None:
    """Add a measurement to its row, and print it: the next one may take minutes."""
    rows.setdefault(name, []).append(seconds)
    print(f"beside {others_there}: {name}: {seconds:.1f} s", flush=True)


def busy_table(folder: Path, peer: str, repeats: int) -> list[str]:
    """Seconds of each program in each company, and how many times as long as alone."""
    checkpoint = str(PACKAGED["gemma-3-270m"].folder)
    ours = [sys.executable, "-m", "benchmarks.ours", str(folder), str(TOKENS), str(NODES), str(repeats)]
    theirs = [
        peer,
        "benchmarks/peer.py",
        str(folder),
        checkpoint,
        *map(str, (TOKENS, PEER_NODES, PEER_BATCH, PEER_LIMIT)),
    ]
    rows: dict[str, list[float]] = {}
    for count in OTHERS:
        with others(count):
            for name, settings in WAYS.items():
                note(
                    rows, f"tl_circuits, {NODES} nodes, {name}", median(run(ours, settings=settings)["seconds"]), count
                )
            note(rows, f"circuit-tracer, {PEER_NODES} nodes, batches of {PEER_BATCH}", run(theirs)["seconds"], count)
    lines = [
        f"Gemma-3-270m with 16,384 features a layer, {TOKENS} tokens, seconds (and how many times as long as alone), "
        "beside other programs that multiply matrices without end, each with as many threads as torch takes:",
        "",
        "| | alone | beside one | beside four |",
        "|---|---|---|---|",
    ]
    for name, seconds in rows.items():
        cells = [f"{s:.1f}" if not n else f"{s:.1f} ({s / seconds[0]:.1f})" for n, s in enumerate(seconds)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
