"""What it costs to prove that a model's patterns and denominators stay as they are held: seconds, and as a share of a
trace.

Run ``python -m benchmarks.proof``; prints one line a model.
"""

import sys
import time
from statistics import median

import tl_circuits as tlc
from tl_circuits.hooks import to_tokens

PROMPT = "The capital of France is"
NODES = 2000
MODELS = ("smollm2-135m", "gemma-3-270m")


def line(name: str, repeats: int = 3) -> str:
    """The proof, and a trace of :data:`NODES` neurons after it, medians."""
    model = tlc.load_model(name)
    proofs, traces = [], []
    for _ in range(repeats):
        with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
            started = time.perf_counter()
            replacement.holds(to_tokens(model, PROMPT))
            proved = time.perf_counter()
            tlc.attribute(replacement, PROMPT, max_nodes=NODES, progress=False)
            traces.append(time.perf_counter() - proved)
            proofs.append(proved - started)
    proof, trace = median(proofs), median(traces)
    return (
        f"* {name}: {proof:.2f} s once an attachment, {proof / trace:.1%} of a trace of {NODES:,} neurons "
        f"({trace:.1f} s)."
    )


def main() -> None:
    sys.stdout.write("\n".join(line(name) for name in MODELS) + "\n")


if __name__ == "__main__":
    main()
