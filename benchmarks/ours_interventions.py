"""Ablate single features in one batch of runs: a line of JSON, and the logits for comparison."""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tl_circuits as tlc
from benchmarks.ours import load_transcoders

COMPARED = 20  # ablations whose direct effects are compared


def main(folder: Path, n_tokens: int, count: int, repeats: int) -> None:
    model = tlc.load_model("gemma-3-270m", device="cpu")
    tokens = load_file(folder / "tokens.safetensors")["tokens"][:n_tokens]
    with tlc.attach(model, load_transcoders(folder)) as replacement:
        graph = tlc.attribute(replacement, tokens, max_nodes=count, progress=False)
        nodes = graph._nodes
        places = torch.stack([nodes.layer, nodes.position, nodes.feature], dim=1)[nodes.kind == 0]
        save_file({"places": places.contiguous()}, folder / "places.safetensors")
        sets = [[tlc.Ablate(*place)] for place in places.tolist()]
        tlc.intervene_many(replacement, tokens, sets[:2])
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            results = tlc.intervene_many(replacement, tokens, sets)
            torch.stack([result.last_logits for result in results])
            seconds.append(time.perf_counter() - began)
        direct = tlc.intervene_many(replacement, tokens, sets[:COMPARED], freeze="all")
    direct = torch.stack([result.last_logits for result in direct])
    save_file({"direct": direct}, folder / "ours_logits.safetensors")
    sys.stdout.write(json.dumps({"runs": len(sets), "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
