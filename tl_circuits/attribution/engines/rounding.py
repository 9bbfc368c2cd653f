"""Rounding of models in half precision, measured on the prompt and counted as constants.

A bfloat16 model keeps eight bits of every number, so by a few parts in a thousand its residual stream is not the sum
of what was written to it, and a norm's output is not exactly that of the norm's formula. On one prompt these
differences are fixed numbers. They are added to the constants of the frozen maps; then edges and biases add up to
the model's own values to float32 precision.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.sources import Sources
from tl_circuits.hooks import FrozenAttention, ReadMap, Recording, resid_mid


def rounded_attention(attention: list[FrozenAttention], recording: Recording) -> list[FrozenAttention]:
    """The frozen attention maps, each with the model's own output minus the map's added to its constant."""
    gaps = (
        out.float() - block.forward(resid)
        for block, resid, out in zip(attention, recording.resid_pre, recording.attn_out, strict=True)
    )
    return [replace(block, const=block.const + gap) for block, gap in zip(attention, gaps, strict=True)]


def rounded_reads(reads: dict[int, ReadMap], model: Any, recording: Recording, sources: Sources) -> dict[int, ReadMap]:
    """The read maps with ``rounding`` set: the model's own tensor at the dictionary's input, minus the map's."""
    made = {}
    for layer in sources.dictionary_layers:
        read = reads[layer]
        site = recording.sites[sources.dictionary.input_hook(layer)].float()
        made[layer] = replace(read, rounding=site - read.forward(resid_mid(recording, model, layer)))
    return made


def stream_rounding(
    recording: Recording, sources: Sources, reads: dict[int, ReadMap], layer: int
) -> Float[Tensor, "pos d_model"]:
    """The stream after ``layer`` minus the sum it should be: stream before, attention's output and MLP's output."""
    after = recording.streams[layer + 1].float()
    source = sources.layers[layer]
    written = recording.mlp_out[layer].float()
    if source.norm is not None:  # the sweep takes the site before the post-norm and applies the norm itself
        written = source.norm.forward(recording.sites[sources.dictionary.output_hook(layer)])
    gap = after.to(written.device) - recording.resid_pre[layer].float() - recording.attn_out[layer].float() - written
    if source.skip is not None:
        rounding = reads[layer].rounding
        assert rounding is not None  # rounded_reads has set it
        through = rounding @ source.skip.T
        through[list(sources.skipped)] = 0.0  # there the whole output is constant already
        positions = torch.arange(sources.n_pos, device=through.device)
        gap = gap + (through if source.norm is None else source.norm.push(through, positions))
    return gap
