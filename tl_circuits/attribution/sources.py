"""The sources of one prompt: everything that writes to the model's tensors, each with a column in the rows of effects.

Columns follow the order of computation: the tokens, then layer by layer its active features (sorted by position) and
its errors (one a position). A target that reads the stream at layer L is affected only by columns before those of
layer L, so its row may end there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import GATHERED_FLOATS, Dictionary, LayerActive
from tl_circuits.errors import ArchitectureError
from tl_circuits.hooks import (
    FrozenNorm,
    Recording,
    largest_gap,
    own_site,
    passing_points,
    rounding_within,
    write_norm,
    written_share,
)


@dataclass(frozen=True)
class LayerSources:
    """What one layer's features and error write at its output site (the hook at which the dictionary rebuilds a tensor).

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
    features_at: int  # first column of the layer's features
    errors_at: int  # first column of its errors; also the end of its features
    shared: Float[Tensor, "pos d_out"] | None = None


@dataclass(frozen=True)
class Sources:
    """All sources of one prompt. At ``skipped`` positions there are no features; what MLPs write there is constant."""

    dictionary: Dictionary
    n_pos: int
    layers: tuple[LayerSources, ...]
    tokens: Float[Tensor, "pos d_model"]
    skipped: tuple[int, ...]
    shared_tokens: Float[Tensor, "pos d_model"] | None = None

    @property
    def shared_column(self) -> int | None:
        """The column of all that a baseline writes too; None without a baseline. It stands behind the tokens."""
        return None if self.shared_tokens is None else self.n_pos

    @property
    def dictionary_layers(self) -> list[int]:
        """The layers with a dictionary, as far as the recording goes (it may end below the last layer)."""
        return [layer for layer in self.dictionary.layers if layer < len(self.layers)]

    @property
    def home(self) -> torch.device:
        """The first layer's device, where rows, targets and tables lie. The rest lies on its own layer's device."""
        return self.tokens.device

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """Each layer's device."""
        return tuple(source.constant.device for source in self.layers)

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.before(len(self.layers))

    def before(self, layer: int) -> int:
        """The number of columns before those of ``layer``: how long the row of a target that reads there is."""
        if layer == 0:
            return self.n_pos + (self.shared_tokens is not None)
        last = self.layers[layer - 1]
        return last.errors_at + (0 if last.error is None else self.n_pos)

    @cached_property
    def feature_columns(self) -> Int[Tensor, " n_features"]:
        """The column of every active feature, layer by layer."""
        ranges = [torch.arange(s.features_at, s.errors_at) for s in self.layers]
        return torch.cat(ranges)

    @cached_property
    def error_columns(self) -> Int[Tensor, " n_errors"]:
        """The column of every error node, layer by layer."""
        ranges = [
            torch.arange(s.errors_at, s.errors_at + self.n_pos) for s in self.layers if s.error is not None
        ]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)

    @cached_property
    def feature_table(self) -> dict[str, Tensor]:
        """``layer position feature pre activation`` of every active feature, in column order (pre: pre-activation)."""
        actives = [s.active.to(self.home) for s in self.layers]
        layer = [torch.full_like(a.position, i) for i, a in enumerate(actives)]
        table = {"layer": torch.cat(layer)}
        for name in ("position", "feature", "pre", "activation"):
            table[name] = torch.cat([getattr(a, name) for a in actives])
        if self.shared_tokens is not None:
            table["baseline"] = torch.cat([a.activation.new_zeros(0) if a.baseline is None else a.baseline for a in actives])
        return table


def recorded_sites(model: Any, dictionary: Dictionary, below: int | None = None) -> list[str]:
    """The hooks whose tensors a recording must hold: all that dictionaries and passed MLPs read and write.

    ``below``: only those of layers below this one.
    """
    layers = range(int(model.cfg.n_layers) if below is None else below)
    own = [layer for layer in dictionary.layers if layer in layers]
    sites = [f(layer) for layer in own for f in (dictionary.input_hook, dictionary.output_hook)]
    return list(dict.fromkeys([*sites, *passing_points(model, dictionary, layers)]))


def find_sources(
    model: Any, dictionary: Dictionary, recording: Recording, skip_positions: Sequence[int]
) -> Sources:
    """Encode every recorded layer of one prompt, and split each MLP's output into features, error and constant.

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
    actives = {
        layer: dictionary.active(layer, recording.sites[dictionary.input_hook(layer)])
        for layer in dictionary.layers
        if layer < len(recording.patterns)
    }
    for layer in range(len(recording.patterns)):
        if layer in dictionary.layers:
            found = _dictionary_layer(model, dictionary, recording, actives, layer, keep, column)
        elif dictionary.mlps == "ratio":
            found = _passed_layer(recording, layer, column)
        else:
            found = _bare_layer(recording, layer, keep, column)
        layers.append(found)
        column = found.errors_at + (0 if found.error is None else n_pos)
    return Sources(
        dictionary=dictionary,
        n_pos=n_pos,
        layers=tuple(layers),
        tokens=recording.streams[0].float(),
        skipped=tuple(skip_positions),
    )


def _dictionary_layer(
    model: Any,
    dictionary: Dictionary,
    recording: Recording,
    actives: dict[int, LayerActive],
    layer: int,
    keep: Tensor,
    column: int,
) -> LayerSources:
    own = own_site(dictionary, layer) is not None
    share = 1.0 if own else written_share(model, recording, layer, dictionary.output_hook(layer))
    output = recording.sites[dictionary.output_hook(layer)].float()
    keep = keep.to(output.device)
    constant = dictionary.constant_on(layer, recording.sites[dictionary.input_hook(layer)])
    skip = dictionary.skip(layer)
    recons = constant.clone()
    if skip is not None:
        recons += recording.sites[dictionary.input_hook(layer)].float() @ skip.T
    for writer in dictionary.writers(layer):
        add_decoded(recons, dictionary, writer, layer, actives[writer])
    error = output - recons
    # The encoder also runs at skipped positions: what it finds there is part of `recons`, and dropped below.
    if dictionary.is_exact(layer):
        _require_rebuilt(layer, output, error, recording.dtype)
        constant, rest = constant + error, None  # this error is only rounding, so no nodes are made of it
    else:
        rest = torch.where(keep[:, None], error, 0.0)
    active = actives[layer]
    kept = keep[active.position]
    active = active[kept]
    return LayerSources(
        active=active,
        error=rest,
        constant=torch.where(keep[:, None], constant, output),
        norm=None if own else write_norm(model, recording, layer, dictionary.output_hook(layer)),
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
    """Add what ``writer``'s active features write to ``layer``, a block of decoder rows at a time."""
    active = active.to(recons.device)
    step = max(1, GATHERED_FLOATS // recons.shape[1])
    for start in range(0, active.feature.numel(), step):
        part = slice(start, start + step)
        rows = dictionary.decoder_vectors(writer, active.feature[part], layer)
        recons.index_add_(0, active.position[part], rows * active.counted[part, None])


def _require_rebuilt(
    layer: int, output: Float[Tensor, "pos d"], error: Float[Tensor, "pos d"], dtype: torch.dtype
) -> None:
    gap, tolerance = largest_gap(error, output), rounding_within(dtype)
    if gap > tolerance:
        raise ArchitectureError(
            f"layer {layer}: the neurons rebuild the MLP's output only to {gap:.1%} (tolerance "
            f"{tolerance:.1%}), so this MLP is not of a form we know. Attach transcoders instead."
        )
