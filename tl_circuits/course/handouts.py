"""What questions hand out besides plain values: the model, transcoders, a cache, a graph.

The checker sends only which of these a function gets. The notebook's process opens each anew from the installed package
for every call, so nothing that a function does to one of them reaches another call, or the checker.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_circuits.dictionaries import load_transcoders
from tl_circuits.dictionaries.attaching import attach
from tl_circuits.dictionaries.neurons import mlp_neurons
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.storage import load_graph
from tl_circuits.hooks import Replacement
from tl_circuits.models import load_model


@dataclass(frozen=True)
class TinyFacts:
    """The model `tiny-facts`, without transcoders attached."""


@dataclass(frozen=True)
class Attached:
    """The model with its transcoders attached."""


@dataclass(frozen=True)
class AllTranscoders:
    """The transcoders of all layers."""


@dataclass(frozen=True)
class TranscoderOf:
    """The transcoder of one layer; ``without`` names a bias that is set to zero, or is empty."""

    layer: int
    without: str = ""


@dataclass(frozen=True)
class NeuronsOf:
    """A model that :func:`tl_circuits.load_model` knows by name, with its MLPs' own neurons attached."""

    model: str


@dataclass(frozen=True)
class Recorded:
    """The values at all hook points, by name."""

    values: dict[str, Tensor]


@dataclass(frozen=True)
class GraphOf:
    """A graph, as the bytes of its file."""

    file: Tensor

    @classmethod
    def graph(cls, graph: AttributionGraph) -> "GraphOf":
        """Hand out a graph."""
        with tempfile.TemporaryDirectory() as folder:
            data = graph.save(Path(folder) / "a.graph.safetensors").read_bytes()
        return cls(torch.frombuffer(bytearray(data), dtype=torch.uint8))


HANDOUTS: dict[str, Any] = {
    made.__name__: made for made in (TinyFacts, Attached, AllTranscoders, TranscoderOf, NeuronsOf, Recorded, GraphOf)
}


def with_neurons(name: str) -> Replacement:
    """A model, opened by name, with its MLPs' own neurons attached."""
    model = load_model(name, device="cpu")
    return attach(model, mlp_neurons(model))


class Opener:
    """Opens the handouts of one call: at most one model, whatever the call needs of it.

    Args:
        ready: models with their neurons, by name, that are open already. Only a copy of the process may use these, so
            that what a call does to one of them ends with the copy. Any other model is opened anew.
    """

    def __init__(self, ready: Mapping[str, Replacement] | None = None) -> None:
        self.ready = ready or {}

    @cached_property
    def model(self) -> Any:
        """`tiny-facts`, opened from its file."""
        return load_model("tiny-facts", device="cpu")

    @cached_property
    def transcoders(self) -> Any:
        """The transcoders, opened from their file."""
        return load_transcoders("tiny-facts")

    @cached_property
    def replacement(self) -> Replacement:
        """The model with its transcoders attached."""
        return attach(self.model, self.transcoders)

    def open(self, handout: Any) -> Any:
        """The object that a handout stands for."""
        from transformer_lens import ActivationCache

        if isinstance(handout, TinyFacts):
            return self.model
        if isinstance(handout, Attached):
            return self.replacement
        if isinstance(handout, AllTranscoders):
            return self.transcoders
        if isinstance(handout, TranscoderOf):
            whole = self.transcoders[handout.layer]
            if not handout.without:
                return whole
            return replace(whole, **{handout.without: torch.zeros_like(getattr(whole, handout.without))})
        if isinstance(handout, NeuronsOf):
            return self.ready.get(handout.model) or with_neurons(handout.model)
        if isinstance(handout, Recorded):
            return ActivationCache(dict(handout.values), self.model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.graph.safetensors"
            path.write_bytes(bytes(handout.file.numpy()))
            return load_graph(path)
