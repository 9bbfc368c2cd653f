"""MLPs that no dictionary replaces, passed with their activation ratios held, for both engines."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_circuits.attribution.sources import Sources
from tl_circuits.hooks import HeldMLP, Recording, flat, held_mlp, passed_mlps, passing_points


def held_mlps(model: Any, recording: Recording, sources: Sources) -> dict[int, HeldMLP]:
    """The passed MLPs by layer, each compared with what the model's own computed.

    Raises:
        ArchitectureError: an MLP is not of a form that can be passed.
    """
    found = {}
    for layer in passed_mlps(sources.dictionary, int(model.cfg.n_layers)):
        if layer < sources.n_layers:
            read, written = (recording.sites[name] for name in passing_points(model, sources.dictionary, (layer,)))
            found[layer] = held_mlp(model, layer, read, written, sources.skipped)
    return found


def passing_hooks(model: Any, recording: Recording, sources: Sources) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Functions of the tensors at passed MLPs' hooks: values stay as recorded, gradients go through the held ratios."""
    hooks: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    for layer, mlp in held_mlps(model, recording, sources).items():
        read, written = passing_points(model, sources.dictionary, (layer,))
        with torch.inference_mode(False):  # autograd refuses tensors made in inference mode; clones made outside do
            own = replace(mlp, by_gate=None if mlp.by_gate is None else mlp.by_gate.clone(), by_in=mlp.by_in.clone())
            output = recording.sites[written].clone()
        hooks += _passing(own, read, written, output)
    return hooks


def _passing(mlp: HeldMLP, read: str, written: str, output: Tensor) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    inputs: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        inputs[:] = [x]
        return x

    def write(y: Tensor) -> Tensor:
        through = mlp.linear(inputs.pop().reshape(output.shape))
        return (output + (through - through.detach()).to(output.dtype)).reshape(y.shape)

    return [(read, keep), (written, write)]


class Keeper:
    """What autoencoders read in a differentiable run, kept before what they write replaces it."""

    def __init__(self) -> None:
        self.read: dict[int, Tensor] = {}  # by number of the place

    def replacing(self, place: int, written: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A function for the site's hook; ``written`` gives what is to stand there, from what arrives."""

        def function(tensor: Tensor) -> Tensor:
            self.read[place] = flat(tensor)[0]
            return written(flat(tensor)).reshape(tensor.shape)

        return function
