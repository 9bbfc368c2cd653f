"""Read and write the transcoders of the built-in model; they are stored in float16 and opened in float32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.models import BUILTIN, BUILTIN_FOLDER

_TRANSCODERS = BUILTIN_FOLDER / "transcoders.safetensors"
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def open_transcoders(path: Path = _TRANSCODERS) -> TranscoderSet:
    """The JumpReLU transcoders of every layer of `tiny-facts`."""
    from safetensors.torch import load_file

    stored = load_file(path)
    layers = sorted({int(name.split(".")[0]) for name in stored})
    made = {}
    for layer in layers:
        tensors: dict[str, Any] = {name: stored[f"{layer}.{name}"].float() for name in _TENSORS}
        made[layer] = Transcoder(**tensors, activation="jumprelu")
    return TranscoderSet(made, BUILTIN)


def store_transcoders(transcoders: Mapping[int, Transcoder], path: Path = _TRANSCODERS) -> Path:
    """Write transcoders so that :func:`open_transcoders` can read them. Biases and thresholds stay in float32."""
    from safetensors.torch import save_file

    tensors = {
        f"{layer}.{n}": getattr(t, n).to(torch.float16 if getattr(t, n).ndim == 2 else torch.float32).contiguous()
        for layer, t in transcoders.items()
        for n in _TENSORS
    }
    save_file(tensors, path)
    return path
