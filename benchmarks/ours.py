"""One measurement of tl_circuits: a line of JSON."""

import json
import sys
import time
from pathlib import Path
from statistics import median

from safetensors.torch import load_file, save_file
from torch import Tensor

import tl_circuits as tlc
from benchmarks.measure import matmul_rate, measured
from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.targets import Targets


def load_transcoders(folder: Path) -> dict[int, tlc.Transcoder]:
    zeros = load_file(folder / "layer_0.safetensors")["threshold"] * 0
    transcoders = {}
    for layer in range(18):
        t = load_file(folder / f"layer_{layer}.safetensors")
        transcoders[layer] = tlc.Transcoder(
            t["W_enc"], t["W_dec"], zeros, zeros[:640], threshold=t["threshold"], activation="jumprelu"
        )
    return transcoders


def places_passed(graph: tlc.AttributionGraph) -> float:
    """Layers below a node times positions up to its own, summed over all nodes; the first position passes nothing
    on."""
    nodes = graph.nodes
    rows = nodes[nodes.kind.isin(["feature", "logit"])]
    return float((rows.layer * rows.position).sum())


def useful_gflop(places: float, d_model: int, d_value: int) -> float:
    """Products with attention weights of the plain backward pass, in GFLOP: one with ``W_O`` and ``W_V`` at every place
    passed.

    ``d_value``: head widths, summed over query and value heads.
    """
    return 2 * places * d_model * d_value / 1e9


def time_sweeps() -> list[float]:
    """Seconds that each of the linear engine's sweeps takes from now on."""
    seconds: list[float] = []
    rows = LinearEngine.rows

    def timed(self: LinearEngine, targets: Targets) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        try:
            return rows(self, targets)
        finally:
            seconds.append(time.perf_counter() - began)

    LinearEngine.rows = timed
    return seconds


def main(folder: Path, n_tokens: int, n_nodes: int, repeats: int) -> None:
    model = tlc.load_model("gemma-3-270m", device="cpu")
    tokens = load_file(folder / "tokens.safetensors")["tokens"][:n_tokens]
    with tlc.attach(model, load_transcoders(folder)) as replacement:
        tlc.attribute(replacement, tokens[:4], max_nodes=4, progress=False)
        sweeps, runs, in_sweeps, rates = time_sweeps(), [], [], [matmul_rate()]
        for _ in range(repeats):
            sweeps.clear()
            runs.append(measured(lambda: tlc.attribute(replacement, tokens, max_nodes=n_nodes, progress=False)))
            in_sweeps.append(sum(sweeps))
            rates.append(matmul_rate())  # it varies on shared machines
        if n_nodes <= 500 and n_tokens <= 10:
            whole = tlc.attribute(replacement, tokens, max_nodes=10**6, progress=False)
            nodes = whole._nodes
            table = {name: getattr(nodes, name).contiguous() for name in ("kind", "layer", "position", "feature")}
            save_file(table | {"adjacency": whole.adjacency()}, folder / "ours.safetensors")
    places = places_passed(runs[0][0])
    sys.stdout.write(
        json.dumps(
            {
                "tokens": n_tokens,
                "nodes": n_nodes,
                "active": runs[0][0].info.n_active,
                "places": places,
                "gflop": useful_gflop(places, 640, (4 + 1) * 256),
                "seconds": [seconds for _, seconds, _ in runs],
                "sweep_seconds": in_sweeps,
                "rate": median(rates),
                "peak_mb": max(peak for _, _, peak in runs),
                "completeness_error": runs[0][0].completeness_error(),
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
