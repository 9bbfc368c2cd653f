"""Open a model and a dictionary by the names given on the command line."""

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.hooks import Replacement


def open_replacement(model_name: str, transcoders: str, device: str | None, dtype: str) -> "Replacement":
    """The model called ``model_name`` with ``transcoders`` attached; a context that detaches them."""
    kinds = ("float32", "bfloat16", "float16")
    if dtype not in kinds:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(kinds)}.")
    if transcoders != "neurons":
        raise ValueError(f"--transcoders {transcoders!r} is not known; take `neurons`.")
    with Console(stderr=True).status("loading tl_circuits and the model ..."):
        import torch

        import tl_circuits as tlc

        model = tlc.load_model(model_name, device=device, dtype=getattr(torch, dtype))
    return tlc.attach(model, tlc.mlp_neurons(model))
