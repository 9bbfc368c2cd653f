"""What a set of transcoders explains of text: ``python -m training.measure_features FOLDER... --text held_out.npy``.

The plain Hugging Face model reads the text twice: as it is, and with every MLP but that of position 0 replaced.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tl_circuits as tlc
from tl_circuits.dictionaries.explained import Outputs
from tl_circuits.models import PACKAGED, open_packaged


@torch.no_grad()
def measured(folder: Path, pieces: Tensor, model: str = "smollm2-135m", at_once: int = 8) -> dict[str, Any]:
    """Of each layer explained variance, active features a token and features that were never active; of all, the loss in nats."""
    device = pieces.device
    network = AutoModelForCausalLM.from_pretrained(str(open_packaged(PACKAGED[model])), dtype=torch.float32).eval().to(device)
    found = tlc.load_transcoders(folder, device=str(device))
    sums = {layer: Outputs() for layer in found.layers}
    fired = {layer: torch.zeros(found.width(layer), device=device) for layer in found.layers}

    def loss(part: Tensor) -> float:
        return float(network(input_ids=part, labels=part).loss) * len(part)

    def made(layer: int, x: Tensor) -> Tensor:
        acts = found.activate(layer, found.pre_activations(layer, x), x)
        fired[layer] += (acts > 0).flatten(0, -2).sum(0)
        return found.decode(layer, {layer: acts}, x)

    def compare(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            y = output[:, 1:].flatten(0, 1)
            sums[layer].add(y, y - made(layer, args[0][:, 1:].flatten(0, 1)))

        return hook

    def instead(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :1], made(layer, args[0][:, 1:])], dim=1)

        return hook

    clean = replaced = 0.0
    counts: dict[int, Tensor] = {}
    for hook_of in (compare, instead):
        handles = [network.model.layers[layer].mlp.register_forward_hook(hook_of(layer)) for layer in found.layers]
        total = sum(loss(part) for part in pieces.split(at_once)) / len(pieces)
        if hook_of is compare:
            clean, counts = total, {layer: count.clone() for layer, count in fired.items()}
        else:
            replaced = total
        for handle in handles:
            handle.remove()
    tokens = pieces[:, 1:].numel()
    explained = [sums[layer].explained_variance() for layer in found.layers]
    return {
        "folder": str(folder), "tokens": tokens, "loss": clean, "loss_change": replaced - clean,
        "explained_variance": sum(explained) / len(explained), "by_layer": explained,
        "l0": [float(counts[layer].sum()) / tokens for layer in found.layers],
        "never_active": [int((counts[layer] == 0).sum()) for layer in found.layers],
    }


def main() -> None:
    """Print one line of JSON for each folder and text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--pieces", type=int, default=400, help="at most so many of each text")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for folder in args.folders:
        for text in args.text:
            pieces = torch.from_numpy(np.load(text)[: args.pieces].astype(np.int64)).to(device)
            sys.stdout.write(json.dumps({"text": text.name} | measured(folder, pieces)) + "\n")


if __name__ == "__main__":
    main()
