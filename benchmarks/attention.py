"""Head loadings and QK attributions on Gemma-3-270m: seconds, by dictionary.

Run ``python -m benchmarks.attention``; prints one line of JSON a measurement. The transcoders are
random, JumpReLU, with about 60 active features a position.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import tl_circuits as tlc
from benchmarks.measure import measured

PROMPT = "When Mary and John went to the store, John gave a drink to"
ACTIVE = 60


def random_transcoders(model: Any, tokens: torch.Tensor, width: int) -> tlc.TranscoderSet:
    """One transcoder a layer whose threshold lets about :data:`ACTIVE` features a position through."""
    names = [f"blocks.{layer}.mlp.hook_in" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name in names)
    d, generator = int(model.cfg.d_model), torch.Generator().manual_seed(0)
    layers = {}
    for layer, name in enumerate(names):
        W_enc, W_dec = (torch.randn(width, d, generator=generator) / d**0.5 for _ in range(2))
        pre = (cache[name][0, 1:] @ W_enc.T).flatten()
        threshold = pre.topk(ACTIVE * (len(tokens) - 1)).values[-1]
        layers[layer] = tlc.Transcoder(
            W_enc,
            W_dec,
            torch.zeros(width),
            torch.zeros(d),
            threshold=threshold.expand(width).clone(),
            activation="jumprelu",
        )
    return tlc.load_transcoders(layers)


def report(name: str, dictionary: str, call: Callable[[], Any], repeats: int, **facts: Any) -> None:
    started = time.process_time()
    runs = [measured(call) for _ in range(repeats)]
    facts["cpu_seconds"] = round((time.process_time() - started) / repeats, 3)  # tells more on a busy machine
    line = {"what": name, "dictionary": dictionary, "seconds": round(median(s for _, s, _ in runs), 3)}
    sys.stdout.write(json.dumps(line | {"peak_mb": round(max(mb for _, _, mb in runs))} | facts) + "\n")
    sys.stdout.flush()


def main(dictionaries: list[str], n_tokens: int, width: int, repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = tlc.load_model("gemma-3-270m", device="cpu")
    tokens = model.to_tokens(PROMPT)[0][:n_tokens]
    for name in dictionaries:
        dictionary = tlc.mlp_neurons(model) if name == "neurons" else random_transcoders(model, tokens, width)
        with tlc.attach(model, dictionary) as replacement:
            graph = tlc.attribute(replacement, tokens, max_nodes=1000, progress=False)
            facts = {
                "tokens": len(tokens),
                "active": graph.info.n_active,
                "edges": len(graph._edges),
                "threads": threads,
            }
            loads = lambda: tlc.top_head_loadings(replacement, graph, 100)  # noqa: E731, B023
            report("loadings of the 100 strongest edges", name, loads, repeats, **facts)
            for layer in (5, 11, 17):
                qk = lambda: tlc.qk_attribution(replacement, graph, layer, 1, -1, 3)  # noqa: E731, B023
                report(f"QK attribution, layer {layer}", name, qk, repeats, **facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dictionaries", nargs="*", default=["transcoders", "neurons"])
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--width", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    main(asked.dictionaries, asked.tokens, asked.width, asked.repeats, asked.threads)
