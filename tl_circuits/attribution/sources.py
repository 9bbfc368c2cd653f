"""The sources of one prompt: everything that writes to the model's tensors, each with a column in the rows of effects.

Columns follow the order of computation: the tokens, then place by place its active features (sorted by position) and
its errors (one a position). A layer has one place, or one for each of its dictionaries
(:mod:`tl_circuits.hooks.places`). A target that reads at place P is affected only by columns before those of place P,
so its row may end there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import Dictionary, LayerActive, add_by_position, rows_at_once
from tl_circuits.errors import ArchitectureError
from tl_circuits.hooks import (
    SITES,
    BlockPlace,
    FrozenNorm,
    Recording,
    by_place,
    largest_gap,
    own_site,
    passing_points,
    places,
    rounding_within,
    short_site,
    write_norm,
    written_share,
)


@dataclass(frozen=True)
class LayerSources:
    """What one dictionary's features and error write at its output site (the hook at which it rebuilds a tensor).

    The output is the sum of the features' decoder vectors times their activations, the skip connection ``skip``,
    ``constant`` (decoder biases; at skipped positions the whole output) and ``error``, which is what is missing
    (None for exact dictionaries, which have no error nodes). On its way to the residual stream it goes through the
    frozen post-norm ``norm``, if there is one, and is multiplied by ``share`` (1, but not on Granite).
    ``shared``: what a baseline writes here too, which features and errors then leave out.
    """

    active: LayerActive
    error: Float[Tensor, "pos d_out"] | None
    constant: Float[Tensor, "pos d_out"]
    norm: FrozenNorm | None
    share: float
    skip: Float[Tensor, "d_out d_in"] | None
    features_at: int  # first column of the features
    errors_at: int  # first column of its errors; also the end of its features
    shared: Float[Tensor, "pos d_out"] | None = None


@dataclass(frozen=True)
class Sources:
    """All sources of one prompt. At ``skipped`` positions there are no features; what MLPs write there is constant.

    ``layers`` has one entry for each of ``places``, and ``dictionary`` answers to numbers of places. These are the
    layers' own numbers unless some layer has several dictionaries.
    """

    dictionary: Dictionary
    n_pos: int
    places: tuple[BlockPlace, ...]
    layers: tuple[LayerSources, ...]
    tokens: Float[Tensor, "pos d_model"]
    skipped: tuple[int, ...]
    shared_tokens: Float[Tensor, "pos d_model"] | None = None

    @property
    def shared_column(self) -> int | None:
        """The column of all that a baseline writes too; None without a baseline. It stands behind the tokens."""
        return None if self.shared_tokens is None else self.n_pos

    @property
    def n_layers(self) -> int:
        """The number of recorded layers."""
        return self.places[-1].layer + 1 if self.places else 0

    @property
    def several(self) -> bool:
        """Whether some layer has several dictionaries, so that numbers of places are not those of layers."""
        return len(self.places) > self.n_layers

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites that nodes name, in the order of the forward pass; empty if no layer has several dictionaries."""
        order = [short_site(site) for site in SITES]
        found = {place.site for place in self.places if place.site}
        # A transcoder's output may be another hook of the MLP, such as mlp.out.
        return tuple(sorted(found, key=lambda site: (order.index(site if site in order else "mlp_out"), site)))

    def first_place(self, layer: int) -> int:
        """The number of a layer's first place; of the layer behind the last one, the number of places."""
        return next((number for number, place in enumerate(self.places) if place.layer >= layer), len(self.places))

    def up_to_heads(self, layer: int) -> int:
        """How many places write to the stream that a layer's heads read.

        The layer's own is among them if it rebuilds ``hook_resid_pre``.
        """
        first = self.first_place(layer)
        return first + (first < len(self.places) and own_site(self.dictionary, first) == "hook_resid_pre")

    @property
    def dictionary_layers(self) -> list[int]:
        """The places with a dictionary, as far as the recording goes (it may end below the last layer)."""
        return [layer for layer in self.dictionary.layers if layer < len(self.layers)]

    @property
    def home(self) -> torch.device:
        """The first layer's device, where rows, targets and tables lie. The rest lies on its own layer's device."""
        return self.tokens.device

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """Each place's device."""
        return tuple(source.constant.device for source in self.layers)

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.before(len(self.layers))

    def before(self, layer: int) -> int:
        """The number of columns before those of place ``layer``: how long the row of a target that reads there is."""
        if layer == 0:
            return self.n_pos + (self.shared_tokens is not None)
        last = self.layers[layer - 1]
        return last.errors_at + (0 if last.error is None else self.n_pos)

    @cached_property
    def feature_columns(self) -> Int[Tensor, " n_features"]:
        """The column of every active feature, place by place."""
        ranges = [torch.arange(s.features_at, s.errors_at) for s in self.layers]
        return torch.cat(ranges)

    @cached_property
    def error_columns(self) -> Int[Tensor, " n_errors"]:
        """The column of every error node, place by place."""
        ranges = [torch.arange(s.errors_at, s.errors_at + self.n_pos) for s in self.layers if s.error is not None]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)

    @cached_property
    def feature_table(self) -> dict[str, Tensor]:
        """``place position feature pre activation`` of every active feature, in column order (pre: pre-activation)."""
        actives = [s.active.to(self.home) for s in self.layers]
        place = [torch.full_like(a.position, i) for i, a in enumerate(actives)]
        table = {"place": torch.cat(place)}
        for name in ("position", "feature", "pre", "activation"):
            table[name] = torch.cat([getattr(a, name) for a in actives])
        if self.shared_tokens is not None:
            table["baseline"] = torch.cat(
                [a.activation.new_zeros(0) if a.baseline is None else a.baseline for a in actives]
            )
        return table


def recorded_sites(model: Any, dictionary: Dictionary, below: int | None = None) -> list[str]:
    """The hooks whose tensors a recording must hold: all that dictionaries and passed MLPs read and write.

    ``below``: only those of layers below this one.
    """
    layers = range(int(model.cfg.n_layers) if below is None else below)
    placed, recorded = by_place(dictionary), len(places(dictionary, len(layers)))
    own = [place for place in placed.layers if place < recorded]
    sites = [f(place) for place in own for f in (placed.input_hook, placed.output_hook)]
    return list(dict.fromkeys([*sites, *passing_points(model, dictionary, layers)]))


def find_sources(model: Any, dictionary: Dictionary, recording: Recording, skip_positions: Sequence[int]) -> Sources:
    """Encode every recorded layer of one prompt, and split what is rebuilt into features, error and constant.

    Args:
        model: the model, for the norms behind its MLPs.
        dictionary: rebuilds the MLPs' outputs.
        recording: one run of the model on the prompt.
        skip_positions: positions that get no features and errors.

    Raises:
        ArchitectureError: a dictionary that should be exact (the MLP's own neurons) does not rebuild the output.
    """
    n_pos = recording.tokens.numel()
    keep = torch.ones(n_pos, dtype=torch.bool)
    keep[list(skip_positions)] = False
    column, layers = n_pos, []
    placed, every = by_place(dictionary), places(dictionary, len(recording.patterns))
    actives = {
        number: placed.active(number, recording.sites[placed.input_hook(number)])
        for number in placed.layers
        if number < len(every)
    }
    for number, place in enumerate(every):
        if number in placed.layers:
            found = _dictionary_layer(model, placed, recording, actives, number, place.layer, keep, column)
        elif dictionary.mlps == "ratio":
            found = _passed_layer(recording, place.layer, column)
        else:
            found = _bare_layer(recording, place.layer, keep, column)
        layers.append(found)
        column = found.errors_at + (0 if found.error is None else n_pos)
    return Sources(
        dictionary=placed,
        n_pos=n_pos,
        places=every,
        layers=tuple(layers),
        tokens=recording.streams[0].float(),
        skipped=tuple(skip_positions),
    )


def output_name(sources: Sources, place: int) -> str:
    """The hook at which a place's dictionary writes; of a layer without one, that of its MLP's output."""
    dictionary = sources.dictionary
    return (
        dictionary.output_hook(place)
        if place in dictionary.layers
        else f"blocks.{sources.places[place].layer}.hook_mlp_out"
    )


def output_of(sources: Sources, recording: Recording, place: int) -> Float[Tensor, "pos d_out"]:
    """What the model computed at :func:`output_name`."""
    if place in sources.dictionary.layers:
        return recording.sites[output_name(sources, place)]
    return recording.mlp_out[sources.places[place].layer]


def _dictionary_layer(
    model: Any,
    dictionary: Dictionary,
    recording: Recording,
    actives: dict[int, LayerActive],
    place: int,
    layer: int,
    keep: Tensor,
    column: int,
) -> LayerSources:
    own = own_site(dictionary, place) is not None
    share = 1.0 if own else written_share(model, recording, layer, dictionary.output_hook(place))
    output = recording.sites[dictionary.output_hook(place)].float()
    keep = keep.to(output.device)
    constant = dictionary.constant_on(place, recording.sites[dictionary.input_hook(place)])
    skip = dictionary.skip(place)
    recons = constant.clone()
    if skip is not None:
        recons += recording.sites[dictionary.input_hook(place)].float() @ skip.T
    for writer in dictionary.writers(place):
        add_decoded(recons, dictionary, writer, place, actives[writer])
    error = output - recons
    # The encoder also runs at skipped positions: what it finds there is part of `recons`, and dropped below.
    if dictionary.is_exact(place):
        _require_rebuilt(layer, output, error, recording.dtype)
        constant, rest = constant + error, None  # this error is only rounding, so no nodes are made of it
    else:
        rest = torch.where(keep[:, None], error, 0.0)
    active = actives[place]
    kept = keep[active.position]
    active = active[kept]
    return LayerSources(
        active=active,
        error=rest,
        constant=torch.where(keep[:, None], constant, output),
        norm=None if own else write_norm(model, recording, layer, dictionary.output_hook(place)),
        share=share,
        skip=skip,
        features_at=column,
        errors_at=column + active.feature.numel(),
    )


def _bare_layer(recording: Recording, layer: int, keep: Tensor, column: int) -> LayerSources:
    """A layer without a dictionary: at each position its whole MLP output is one error node."""
    output = recording.mlp_out[layer].float()
    keep = keep.to(output.device)
    return LayerSources(
        active=_none_active(output),
        error=torch.where(keep[:, None], output, 0.0),
        constant=torch.where(keep[:, None], 0.0, output),
        norm=None,
        share=1.0,
        skip=None,
        features_at=column,
        errors_at=column,
    )


def _passed_layer(recording: Recording, layer: int, column: int) -> LayerSources:
    """A layer without sources of its own: its MLP is passed, with its ratios held."""
    output = recording.mlp_out[layer].float()
    return LayerSources(
        active=_none_active(output),
        error=None,
        constant=torch.zeros_like(output),
        norm=None,
        share=1.0,
        skip=None,
        features_at=column,
        errors_at=column,
    )


def _none_active(like: Tensor) -> LayerActive:
    none = torch.empty(0, dtype=torch.long, device=like.device)
    return LayerActive(none, none, like.new_empty(0), like.new_empty(0))


def add_decoded(
    recons: Float[Tensor, "pos d_out"], dictionary: Dictionary, writer: int, layer: int, active: LayerActive
) -> None:
    """Add what the active features of place ``writer`` write at place ``layer``, a block of decoder rows at a time."""
    active = active.to(recons.device)
    step = rows_at_once(recons.shape[1], recons.device)
    for start in range(0, active.feature.numel(), step):
        part = slice(start, start + step)
        rows = dictionary.decoder_vectors(writer, active.feature[part], layer)
        add_by_position(recons, active.position[part], rows, active.counted[part])


def _require_rebuilt(
    layer: int, output: Float[Tensor, "pos d"], error: Float[Tensor, "pos d"], dtype: torch.dtype
) -> None:
    gap, tolerance = largest_gap(error, output), rounding_within(dtype)
    if gap > tolerance:
        raise ArchitectureError(
            f"layer {layer}: the neurons rebuild the MLP's output only to {gap:.1%} (tolerance "
            f"{tolerance:.1%}), so this MLP is not of a form we know. Attach transcoders instead."
        )
