"""What each part of a training explains of text it was not trained on: the start, the fit, the steps, the fit at the
end.

    OMP_NUM_THREADS=2 python -m benchmarks.learning PIECES.npy --layers 2 15 --lr 0.001 0.003

PIECES.npy: token ids of SmolLM2-135M ``[piece, context]``, as ``tl-circuits train`` leaves them in
``OUT.text/pieces.npy``. Activations of the layers asked for are kept in memory: 4.6 KB a token and layer.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tl_circuits.dictionaries.training.layer import LayerTraining
from tl_circuits.dictionaries.training.network import opened, watched
from tl_circuits.dictionaries.training.start import add_tokens, no_moments, started

BATCH, HELD_OUT = 2048, 16_384
Text = tuple[list[Tensor], list[Tensor]]


def main() -> None:
    """Read the text once, then train each layer at each learning rate and print what is explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 15])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.003])
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200_000)
    args = parser.parse_args()
    with torch.no_grad():
        for layer, (x, y) in activations(
            np.load(args.pieces, mmap_mode="r"), args.layers, args.tokens + HELD_OUT
        ).items():
            for lr in args.lr:
                print(
                    f"layer {layer}, lr {lr}: "
                    + ", ".join(f"{what} {number:.3f}" for what, number in learned(x, y, lr, args)),
                    flush=True,
                )


def activations(pieces: np.ndarray, layers: list[int], tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Each layer's inputs and outputs of the MLP on the first tokens."""
    network, _ = opened("smollm2-135m", "cpu", layers)
    found: dict[int, Text] = {layer: ([], []) for layer in layers}

    def keep(layer: int, x: Tensor, y: Tensor) -> None:
        for kept, part in zip(found[layer], (x, y), strict=True):
            kept.append(part[:, 1:].flatten(0, 1).clone())

    with watched(network.mlps, keep):
        for start in range(0, min(len(pieces), -(-tokens // (pieces.shape[1] - 1))), 8):
            network.trunk(input_ids=torch.from_numpy(np.array(pieces[start : start + 8])).long(), use_cache=False)
    return {layer: (torch.cat(x)[:tokens], torch.cat(y)[:tokens]) for layer, (x, y) in found.items()}


def learned(x: Tensor, y: Tensor, lr: float, args: argparse.Namespace) -> list[tuple[str, float]]:
    """The explained variance on held-out tokens after each part."""
    held = x[-HELD_OUT:], y[-HELD_OUT:]
    batches = list(zip(x[:-HELD_OUT].split(BATCH), y[:-HELD_OUT].split(BATCH), strict=True))
    moments = no_moments(*batches[0])
    for batch in batches[:25]:
        add_tokens(moments, *batch, keep=164)
    layer = LayerTraining(started(moments, args.features, True, torch.Generator().manual_seed(0)), args.k, window=10**6)

    def explained() -> float:
        error = held[1] - layer.output(held[0])
        return 1 - float(error.square().sum() / (held[1] - held[1].mean(0)).square().sum())

    def fit(part: list[tuple[Tensor, Tensor]]) -> None:
        equations = layer.equations()
        for batch in part:
            layer.add(equations, *batch)
        layer.fit(equations)

    found = [("skip connection alone", explained())]
    fit(batches[:26])
    found.append(("decoder fitted", explained()))
    for n, batch in enumerate(batches):
        layer.step(*batch, lr * min(1.0, (n + 1) / 5) * (1 - n / len(batches)))
    found.append(("trained", explained()))
    fit(batches[-26:])
    return [*found, ("fitted again", explained())]


if __name__ == "__main__":
    main()
