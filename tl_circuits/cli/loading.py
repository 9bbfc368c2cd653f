"""Open a model and a dictionary by the names given on the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from tl_circuits.models import BUILTIN

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.hooks import Replacement


@contextmanager
def open_replacement(
    model_name: str, transcoders: str, device: str | None, dtype: str
) -> "Iterator[Replacement]":
    """The model called ``model_name`` with ``transcoders`` attached, for as long as the context is open."""
    kinds = ("float32", "bfloat16", "float16")
    if dtype not in kinds:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(kinds)}.")
    if transcoders not in ("neurons", BUILTIN):
        raise ValueError(f"--transcoders {transcoders!r} is not known; take `neurons`, or `{BUILTIN}` with its model.")
    with Console(stderr=True).status("loading tl_circuits and the model ..."):
        import torch

        import tl_circuits as tlc

        model = tlc.load_model(model_name, device=device, dtype=getattr(torch, dtype))
    dictionary = tlc.mlp_neurons(model) if transcoders == "neurons" else tlc.load_transcoders(transcoders)
    with tlc.attach(model, dictionary) as replacement:
        yield replacement
