"""Open a model and a dictionary by the names given on the command line."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:  # torch and TransformerLens take seconds to import; --help should not wait for them
    from tl_circuits.hooks import Replacement

Transcoders = Annotated[str, typer.Option("--transcoders", "-t", help="`neurons` (the MLP's own, no dictionary needed), a name from `tl-circuits models`, a SAELens release, a hub repository or a folder.")]
Width = Annotated[str | None, typer.Option("--width", help="Which of several published widths, such as 16k.")]
L0 = Annotated[str | None, typer.Option("--l0", help="Which of several published sparsities, such as small, or a number.")]


def open_replacement(
    model_name: str, transcoders: str, device: str | None, dtype: str, width: str | None = None, l0: str | None = None
) -> "Replacement":
    """The model called ``model_name`` with ``transcoders`` attached; a context that detaches them."""
    kinds = ("float32", "bfloat16", "float16")
    if dtype not in kinds:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(kinds)}.")
    with Console(stderr=True).status("loading tl_circuits ..."):
        import torch

        import tl_circuits as tlc
    dictionary = None
    if transcoders != "neurons":
        shown = Console(stderr=True).is_terminal
        dictionary = tlc.load_transcoders(transcoders, width=width, l0=l0, device=device, progress=shown)
    elif width is not None or l0 is not None:
        raise ValueError("--width and --l0 choose among published transcoders; neurons have neither.")
    with Console(stderr=True).status("loading the model ..."):
        model = tlc.load_model(model_name, device=device, dtype=getattr(torch, dtype))
    return tlc.attach(model, tlc.mlp_neurons(model) if dictionary is None else dictionary)
