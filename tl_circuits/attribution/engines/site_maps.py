"""What the any-site engine knows of one prompt: every block's frozen maps and constants, compared with the model's own.

A block is cut at the sites of autoencoders. Between two sites everything is affine: attention with its pattern held,
norms with their denominators held, MLPs with their activation ratios held (docs/method.md, "Any site").
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.engines.checks import (
    require_full_share,
    require_same,
    require_same_logits,
    require_same_streams,
)
from tl_circuits.attribution.engines.passed import held_mlps
from tl_circuits.attribution.sources import Sources
from tl_circuits.errors import ArchitectureError
from tl_circuits.hooks import (
    FrozenAttention,
    FrozenHeads,
    FrozenNorm,
    HeldMLP,
    ReadMap,
    Recording,
    frozen_attention,
    frozen_heads,
    frozen_norm,
    own_site,
    passing_points,
    read_map,
    resid_mid,
    write_norm,
)

MLP = "MLP"  # where a transcoder or neurons stand in a block


@dataclass(frozen=True)
class PassedMLP:
    """A passed MLP as a map of the residual stream: norm before it, MLP with held ratios, norm behind it."""

    read: ReadMap
    mlp: HeldMLP
    norm: FrozenNorm | None
    const: Float[Tensor, "pos d_model"]

    def linear(self, x: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """What the MLP adds to the stream, without the constant, from streams at some positions."""
        y = self.mlp.linear_at(x if self.read.norm is None else self.read.norm.push(x, positions), positions)
        return y if self.norm is None else self.norm.push(y, positions)

    def transpose(self, g: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Gradients at the stream that the MLP reads, from gradients at what it adds to the stream."""
        g = g if self.norm is None else self.norm.transpose(g, positions)
        return replace(self.read, rounding=None).transpose(self.mlp.transpose(g, positions), positions)[0]


@dataclass(frozen=True)
class BlockMaps:
    """One block: where its dictionaries stand, its attention, and its MLP if that is passed.

    ``places``: the number of the place of each dictionary, by the site of an autoencoder, or :data:`MLP` for a
    transcoder, neurons, or an MLP that is one error node a position. ``read``: how these read the stream. ``rounding``:
    the stream behind the block minus the sum of what was written to it, which is not zero in half precision;
    ``before_mid``: the same for the stream in the block's middle, if an autoencoder is there. Both are None in float32.
    """

    places: dict[str, int]
    attention: FrozenAttention
    heads: FrozenHeads | None
    passed: PassedMLP | None
    read: ReadMap | None
    rounding: Float[Tensor, "pos d_model"] | None
    before_mid: Float[Tensor, "pos d_model"] | None

    @property
    def at_mlp(self) -> int | None:
        """The place of what writes in the MLP's stead: a transcoder, neurons or an autoencoder behind it."""
        return self.places.get(MLP, self.places.get("hook_mlp_out"))

    @property
    def own_heads(self) -> FrozenHeads:
        """The two halves of attention, which a block with an autoencoder of ``attn.hook_z`` has."""
        assert self.heads is not None
        return self.heads

    @property
    def own_passed(self) -> PassedMLP:
        """The passed MLP, which a block with an autoencoder has."""
        assert self.passed is not None
        return self.passed

    @property
    def own_read(self) -> ReadMap:
        """How transcoders or neurons read the stream, in a block that has them."""
        assert self.read is not None
        return self.read


def block_maps(model: Any, recording: Recording, sources: Sources) -> list[BlockMaps]:
    """The maps of every recorded block, compared with what the model computed on this prompt.

    Raises:
        ArchitectureError: a map gives something else than the model, so the closed form does not know this
            architecture.
    """
    if len({*sources.devices, recording.resid_final.device}) > 1:
        raise ArchitectureError(
            "the model's layers lie on several devices, and the closed form with autoencoders or passed MLPs knows "
            'one only. Use engine="autograd".'
        )
    dictionary, held = sources.dictionary, held_mlps(model, recording, sources)
    exact = recording.dtype == torch.float32
    writes = [n in dictionary.layers or sources.layers[n].error is not None for n in range(len(sources.places))]
    blocks = []
    for layer in range(sources.n_layers):
        here = [n for n, place in enumerate(sources.places) if place.layer == layer and writes[n]]
        at = {own_site(dictionary, number) or MLP: number for number in here}
        attention = _attention(model, recording, layer)
        heads = _heads(model, recording, layer, attention) if "attn.hook_z" in at else None
        passed = _passed(model, recording, sources, layer, held[layer]) if layer in held else None
        read = _read(model, recording, sources, layer, at[MLP]) if at.get(MLP) in dictionary.layers else None
        rounding = None if exact else _behind(recording, sources, layer, read, at)
        before_mid = _before_mid(recording, layer) if "hook_resid_mid" in at and not exact else None
        blocks.append(BlockMaps(at, attention, heads, passed, read, rounding, before_mid))
    require_same_streams(recording)
    return blocks


def final_map(model: Any, recording: Recording) -> ReadMap:
    """How logits read the stream; the stream itself if the recording ends below the last layer."""
    if recording.logits is None:
        return ReadMap("residual", None)
    final = ReadMap("normed", frozen_norm(model, recording, "ln_final"))
    require_same_logits(model, recording, final)
    return final


def _attention(model: Any, recording: Recording, layer: int) -> FrozenAttention:
    attention = frozen_attention(model, recording, layer)
    x, models = recording.resid_pre[layer], recording.attn_out[layer].float()
    ours = attention.forward(x)
    require_same(f"attention of layer {layer}", ours, models, recording.dtype)
    return attention if recording.dtype == torch.float32 else replace(attention, const=attention.const + models - ours)


def _heads(model: Any, recording: Recording, layer: int, attention: FrozenAttention) -> FrozenHeads:
    """Attention cut at ``attn.hook_z``; both halves are compared with the model."""
    made = frozen_heads(model, recording, layer, attention)
    z, added = recording.sites[f"blocks.{layer}.attn.hook_z"].float(), recording.attn_out[layer].float()
    arriving, leaving = made.into.forward(recording.resid_pre[layer]), made.out(z)
    require_same(f"attn.hook_z of layer {layer}", arriving, z, recording.dtype)
    require_same(f"attention of layer {layer} behind hook_z", leaving, added, recording.dtype)
    if recording.dtype == torch.float32:
        return made
    return replace(
        made, into=replace(made.into, const=made.into.const + z - arriving), const=made.const + added - leaving
    )


def _passed(model: Any, recording: Recording, sources: Sources, layer: int, mlp: HeldMLP) -> PassedMLP:
    hook_in, hook_out = passing_points(model, sources.dictionary, (layer,))
    x, written = resid_mid(recording, model, layer), recording.sites[hook_out].float()
    read = read_map(model, recording, layer, hook_in)
    require_same(hook_in, read.forward(x), recording.sites[hook_in], recording.dtype)
    norm = write_norm(model, recording, layer, hook_out)
    made = PassedMLP(read, mlp, norm, torch.zeros_like(x))
    models = recording.mlp_out[layer].float()
    added = written if norm is None else norm.forward(written)
    require_same(f"{hook_out}, as it is added to the stream", added, models, recording.dtype)
    # At the prompt the held ratios give the MLP's own output (held_mlp compares them); the rest is a constant.
    return replace(made, const=models - made.linear(x, torch.arange(len(x), device=x.device)))


def _read(model: Any, recording: Recording, sources: Sources, layer: int, place: int) -> ReadMap:
    require_full_share(layer, sources.layers[place])
    hook = sources.dictionary.input_hook(place)
    read = read_map(model, recording, layer, hook)
    ours, models = read.forward(resid_mid(recording, model, layer)), recording.sites[hook].float()
    require_same(hook, ours, models, recording.dtype)
    return read if recording.dtype == torch.float32 else replace(read, rounding=models - ours)


def _behind(
    recording: Recording, sources: Sources, layer: int, read: ReadMap | None, at: dict[str, int]
) -> Float[Tensor, "pos d_model"]:
    """The stream behind a block minus the sum of what was written to it, from the block's input or its middle on."""
    source, written = None if MLP not in at else sources.layers[at[MLP]], recording.mlp_out[layer].float()
    # the sweep takes the site before the post-norm and applies the norm itself
    if source is not None and source.norm is not None:
        written = source.norm.forward(recording.sites[sources.dictionary.output_hook(at[MLP])])
    before = recording.resid_pre[layer].float() + recording.attn_out[layer].float()
    if "hook_resid_mid" in at:
        before = recording.sites[f"blocks.{layer}.hook_resid_mid"].float()
    gap = recording.streams[layer + 1].float() - written - before
    if source is not None and source.skip is not None and read is not None and read.rounding is not None:
        through = read.rounding @ source.skip.T
        through[list(sources.skipped)] = 0.0  # there the whole output is constant already
        gap = gap + (
            through if source.norm is None else source.norm.push(through, torch.arange(len(gap), device=gap.device))
        )
    return gap


def _before_mid(recording: Recording, layer: int) -> Float[Tensor, "pos d_model"]:
    """The stream in a block's middle minus the block's input and what attention added."""
    middle = recording.sites[f"blocks.{layer}.hook_resid_mid"].float()
    return middle - recording.resid_pre[layer].float() - recording.attn_out[layer].float()
