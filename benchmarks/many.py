"""Prompts a second with one Ray worker and with two, a core each: a line of JSON.

    python -m benchmarks.many [--model gemma-3-270m] [--prompts 12] [--nodes 1000]

Counted from when every worker has finished its first prompt, so that starting Ray and opening the model
do not count.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import tl_circuits as tlc

TEXT = "Paris is the capital of France and Rome is the capital of Italy, so number {} on the list is"


def opened(model: str) -> tlc.Replacement:
    model = tlc.load_model(model, device="cpu")
    return tlc.attach(model, tlc.mlp_neurons(model))


def rate(model: str, workers: int, prompts: int, nodes: int) -> float:
    """Prompts a second on a Ray cluster of as many cores as workers."""
    import ray

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with tempfile.TemporaryDirectory() as out:
            texts = [TEXT.format(10 + i) for i in range(prompts)]
            done = tlc.trace_many(
                partial(opened, model), texts, out, workers=workers, name=model, max_nodes=nodes, progress=False
            )
            if not (done.status == "done").all():
                raise RuntimeError(f"prompts failed: {done.error.dropna().unique()}")
            ends = sorted(path.stat().st_mtime for path in Path(out).glob("*.graph.safetensors"))
    finally:
        ray.shutdown()
    return (prompts - workers) / (ends[-1] - ends[workers - 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--nodes", type=int, default=1000)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
    one, two = (rate(arguments.model, workers, arguments.prompts, arguments.nodes) for workers in (1, 2))
    facts = {"model": arguments.model, "prompts": arguments.prompts, "nodes": arguments.nodes, "one": one, "two": two}
    sys.stdout.write(json.dumps(facts | {"ratio": two / one}) + "\n")
