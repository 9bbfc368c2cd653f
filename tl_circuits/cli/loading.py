"""Open a model and a dictionary by the names given on the command line."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tl_circuits.cli.app import terminal

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.graph.nodes import GraphInfo
    from tl_circuits.hooks import Replacement


@dataclass(frozen=True)
class Features:
    """Which dictionary the options ask for, and which part of it."""

    transcoders: str
    width: str | None = None
    l0: str | None = None
    layers: list[int] | None = None

    def __str__(self) -> str:
        parts = (self.transcoders, self.width, self.l0, self.layers and f"layers {self.layers}")
        return " ".join(part for part in parts if part)


def features_named(infos: "Iterable[GraphInfo]") -> str:
    """The dictionary to open for the graphs with these facts: the one that all name, or neurons if there are none.

    Raises:
        ValueError: if they name several.
    """
    named = dict.fromkeys(info.dictionary for info in infos)
    if len(named) > 1:
        raise ValueError(
            f"the graphs are of several dictionaries ({', '.join(map(repr, named))}): say which to load with "
            "--transcoders."
        )
    name = next(iter(named), "mlp neurons")
    return "neurons" if name == "mlp neurons" else name


def loading() -> Any:
    """Says at once that the libraries are being imported, which takes seconds; for a ``with`` statement."""
    return terminal(stderr=True).status("loading tl_circuits ...")


def open_replacement(model_name: str, features: Features, device: str | None, dtype: str) -> "Replacement":
    """The model called ``model_name`` with the features attached. As a context manager, it detaches them."""
    with loading():
        import torch

        if device is not None:
            try:
                torch.empty(0, device=device)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error

        import tl_circuits as tlc
    dictionary = None
    if features.transcoders != "neurons":
        dictionary = tlc.load_transcoders(
            features.transcoders,
            width=features.width,
            l0=features.l0,
            layers=features.layers,
            device=device,
            progress=terminal(stderr=True).is_terminal,
        )
    elif features != Features("neurons"):
        raise ValueError("--width, --l0 and --layer choose among transcoders; with neurons, all of them are used.")
    with terminal(stderr=True).status("loading the model ..."):
        model = tlc.load_model(model_name, device=device, dtype=getattr(torch, dtype))
    return tlc.attach(model, tlc.mlp_neurons(model) if dictionary is None else dictionary)
