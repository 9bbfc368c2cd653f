"""What features read and write, as directions of the residual stream.

``place`` is the number of the features' dictionary (:mod:`tl_circuits.hooks.places`): its layer, unless some layer has
several.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import Dictionary
from tl_circuits.hooks import attention_weights, by_place, mlp_norms, own_site, places, read_stage, require_norm_weights

_HEADS = "attn.hook_z"


def written_directions(
    model: Any, dictionary: Dictionary, place: int, features: Int[Tensor, " n"]
) -> Float[Tensor, "n d_model"]:
    """What one unit of each feature adds to the stream; what heads write goes through their output matrices."""
    placed = by_place(dictionary)
    written = placed.output_directions(place, features)
    if own_site(placed, place) != _HEADS:
        return written
    return written @ attention_weights(model, _layer(model, placed, place)).W_O.flatten(0, 1).to(written.device)


def read_directions(
    model: Any, dictionary: Dictionary, place: int, features: Int[Tensor, " n"]
) -> Float[Tensor, "n d_model"]:
    """The direction of the stream to which each feature responds, before any norm's division.

    For features of ``attn.hook_z`` it is the direction at the positions that the heads look at.
    """
    placed = by_place(dictionary)
    read, site, layer = (
        placed.encoder_directions(place, features),
        own_site(placed, place),
        _layer(model, placed, place),
    )
    if site == _HEADS:
        W_V = attention_weights(model, layer).W_V.to(read.device)
        grouped = read.unflatten(1, (len(W_V), -1, W_V.shape[2])).sum(2)
        return torch.einsum("nke,kde->nd", grouped, W_V)
    if site is None and read_stage(model, layer, placed.input_hook(place)) == "normed":
        norm, _ = mlp_norms(model, layer)
        assert norm is not None  # only a norm makes the stage "normed"
        return read * require_norm_weights(model, norm).weight.to(read.device)
    return read


def _layer(model: Any, placed: Dictionary, place: int) -> int:
    return places(placed, int(model.cfg.n_layers))[place].layer
