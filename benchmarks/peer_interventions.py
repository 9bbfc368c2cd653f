"""The same single-feature ablations with circuit-tracer, one call each: a line of JSON."""

import json
import sys
import time
from pathlib import Path

import torch
from peer import load
from safetensors.torch import load_file


def main(folder: Path, checkpoint: str, n_tokens: int) -> None:
    model = load(folder, checkpoint)
    tokens = load_file(folder / "tokens.safetensors")["tokens"][:n_tokens]
    places = load_file(folder / "places.safetensors")["places"].tolist()
    ours = load_file(folder / "ours_logits.safetensors")["direct"]
    with torch.no_grad():
        baseline = model(tokens[None])[0, -1]
        # Only with all layers constrained does it hold the norms, as ours does: then only direct effects are left.
        gap, every = 0.0, range(model.cfg.n_layers)
        for place, mine in zip(places, ours, strict=False):
            logits, _ = model.feature_intervention(tokens, [(*place, 0.0)], constrained_layers=every)
            change, theirs = mine - baseline, logits[0, -1] - baseline
            gap = max(gap, float((change - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)))
        began = time.perf_counter()
        for place in places:
            model.feature_intervention(tokens, [(*place, 0.0)])
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        for place in places[:20]:
            model.feature_intervention(tokens, [(*place, 0.0)], return_activations=False)
        lean = (time.perf_counter() - began) * len(places) / 20
    sys.stdout.write(json.dumps({"seconds": seconds, "lean_seconds": lean, "gap": gap}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
