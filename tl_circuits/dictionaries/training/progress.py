"""What a run tells while it goes: rows of the history, held-out measures, and a line with the time that is left."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuits.dictionaries.explained_variance import Outputs
from tl_circuits.dictionaries.training.layer import LayerTraining, Numbers
from tl_circuits.dictionaries.training.network import Network, losses, watched

COLUMNS = ("step", "tokens", "layer", "explained_variance", "l0", "dead", "held_out", "loss_change")


def rows_of(
    step: int, tokens: int, numbers: Mapping[int, Numbers], held_out: Mapping[int, float], change: float
) -> list[dict[str, Any]]:
    """A row of the history for each layer; what was not measured at this step is None."""
    change_or_none = change if change == change else None
    return [
        {"step": step, "tokens": tokens, "layer": layer}
        | asdict(found)
        | {"held_out": held_out.get(layer), "loss_change": change_or_none}
        for layer, found in sorted(numbers.items())
    ]


@torch.no_grad()
def held_out_measures(
    network: Network, layers: Mapping[int, LayerTraining], pieces: Int[Tensor, "piece context"], at_once: int = 8
) -> tuple[dict[int, float], float]:
    """Each layer's explained variance on text it was not trained on, and what all of them together do to the loss.

    Position 0 is left as it is, as in training and at use.

    Args:
        network: the model.
        layers: each layer's training.
        pieces: the text.
        at_once: pieces in a forward pass.

    Returns:
        Explained variance by layer, and the mean next-token loss with all MLPs replaced minus that of the model, in
        nats.
    """
    sums = {layer: Outputs() for layer in layers}
    change = 0.0

    def compare(layer: int, x: Tensor, y: Tensor) -> None:
        x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)
        sums[layer].add(y, y - layers[layer].output(x))

    def instead(layer: int, x: Tensor, y: Tensor) -> Tensor:
        made = layers[layer].output(x[:, 1:].flatten(0, 1)).view_as(y[:, 1:])
        return torch.cat([y[:, :1], made], dim=1)

    for part in pieces.split(at_once):
        with watched(network.mlps, compare):
            clean = losses(network, part)
        with watched(network.mlps, instead):
            change += float((losses(network, part) - clean).sum())
    return {layer: found.explained_variance() for layer, found in sums.items()}, change / len(pieces)


class Line:
    """The progress line: the mean of all layers in the last step, and the time left at the speed of this call."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=not show)
        self.change: float | None = None

    def step(self, rows: list[dict[str, Any]]) -> None:
        """One step is done."""
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("explained_variance", "l0", "dead")}
        if rows[0]["loss_change"] is not None:
            self.change = rows[0]["loss_change"]
        change = "" if self.change is None else f", loss {self.change:+.2f}"
        self.bar.set_postfix_str(
            f"explained variance {mean['explained_variance']:.3f}, L0 {mean['l0']:.0f}, dead "
            f"{mean['dead']:.0f}{change}",
            refresh=False,
        )
        self.bar.update()

    def close(self) -> None:
        """The line stays as it is."""
        self.bar.close()
