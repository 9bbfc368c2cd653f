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

import tl_circuits as tlc
from tl_circuits.dictionaries.explained_variance import Outputs
from tl_circuits.dictionaries.training.network import losses, opened, watched


@torch.no_grad()
def measured(folder: Path, pieces: Tensor, model: str = "smollm2-135m", at_once: int = 8) -> dict[str, Any]:
    """Of each layer explained variance, active features a token and features that were never active; of all, the loss
    in nats."""
    device = pieces.device
    network, _ = opened(model, str(device), None)
    found = tlc.load_transcoders(folder, device=str(device))
    sums = {layer: Outputs() for layer in found.layers}
    counts = {layer: torch.zeros(found.width(layer), device=device) for layer in found.layers}

    def compare(layer: int, x: Tensor, y: Tensor) -> None:
        x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)
        acts = found.activate(layer, found.pre_activations(layer, x), x)
        counts[layer] += (acts > 0).sum(0)
        sums[layer].add(y, y - found.decode(layer, {layer: acts}, x))

    def instead(layer: int, x: Tensor, y: Tensor) -> Tensor:
        x = x[:, 1:]
        acts = found.activate(layer, found.pre_activations(layer, x), x)
        return torch.cat([y[:, :1], found.decode(layer, {layer: acts}, x)], dim=1)

    mlps = {layer: network.mlps[layer] for layer in found.layers}
    means = []
    for see in (compare, instead):
        with watched(mlps, see):
            means.append(float(torch.cat([losses(network, part) for part in pieces.split(at_once)]).mean()))
    clean, replaced = means
    tokens = pieces[:, 1:].numel()
    explained = [sums[layer].explained_variance() for layer in found.layers]
    return {
        "folder": str(folder),
        "tokens": tokens,
        "loss": clean,
        "loss_change": replaced - clean,
        "explained_variance": sum(explained) / len(explained),
        "by_layer": explained,
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
