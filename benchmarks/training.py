"""What a training step costs beside what it cannot do without: the forward pass and the encoders' products.

    OMP_NUM_THREADS=2 python -m benchmarks.training --layers 6

Measures in turn, several times, on 2,048 tokens of SmolLM2-135M: the blocks without the head, ``x W_encᵀ`` of each
layer, and a whole step of training. Prints medians, and the median of the steps' ratio to the two others' sum.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from tl_circuits.dictionaries.training.layer import LayerTraining
from tl_circuits.dictionaries.training.network import opened, watched
from tl_circuits.dictionaries.training.start import Start
from tl_circuits.dictionaries.training.step import Weights


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    network, _ = opened("smollm2-135m", "cpu", range(args.layers))
    d, n = network.d_model, 8 * 256
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, network.d_vocab, (8, 256), generator=random)
    x = torch.randn(n, d, generator=random)
    layers = {}
    for layer in network.mlps:
        W_enc, W_dec = (torch.randn(args.features, d, generator=random) / d**0.5 for _ in range(2))
        weights = Weights(W_enc, torch.zeros(args.features), W_dec, torch.zeros(d), torch.zeros(d, d))
        layers[layer] = LayerTraining(Start(weights, 1.0, 1.0, float(d)), args.k, window=10**6)

    def learn(layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        layers[layer].step(x.flatten(0, 1), y.flatten(0, 1), 1e-4)

    def forward() -> None:
        network.trunk(input_ids=ids, use_cache=False)

    def encoders() -> None:
        for layer in layers.values():
            x @ layer.tensors["W_enc"].T

    def step() -> None:
        with watched(network.mlps, learn):
            forward()

    parts = {"forward": forward, "encoders": encoders, "step": step}
    with torch.no_grad():
        times = [{name: _seconds(part) for name, part in parts.items()} for _ in range(args.repeats + 1)][1:]
    for name in parts:
        print(f"{name:9} {median(t[name] for t in times) / n / args.layers * 1e6:.1f} us a token and layer")
    ratios = sorted(t["step"] / (t["forward"] + t["encoders"]) for t in times)
    print(f"step / (forward + encoders): median {median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


def _seconds(part: Callable[[], None]) -> float:
    began = time.perf_counter()
    part()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
