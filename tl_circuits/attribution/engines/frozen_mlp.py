"""What one layer's MLP adds to rows of direct effects: its features, error, constant and skip connection."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.sources import LayerSources, Sources
from tl_circuits.dictionaries.base import rows_at_once
from tl_circuits.hooks import ReadMap

CACHED_FLOATS = 2**22  # a layer's decoder rows are kept between sweeps if they take at most 16 MB, else gathered anew
CACHED_FLOATS_OF_A_GPU = 2**25  # 128 MB
PRODUCTS_OF_A_GPU = 2**28  # numbers in one product for several positions: 1 GB
DENSE_SHARE = 0.25  # if more than this share of features is active, a product with the whole decoder is faster


def add_position_dots(
    total: Float[Tensor, " n"], g: Float[Tensor, "pos n d"], vectors: Float[Tensor, "total_pos d"]
) -> None:
    """Add ``Σ_pos g[pos, n]·vectors[pos]`` to ``total[n]``."""
    if g.device.type != "cpu":
        total += position_dots(g, vectors).sum(0)
        return
    for here, vector in zip(g, vectors, strict=False):  # a loop is several times faster than one batched product here
        total.addmv_(here, vector)


def position_dots(g: Float[Tensor, "pos n d"], vectors: Float[Tensor, "total_pos d"]) -> Float[Tensor, "pos n"]:
    """``g[pos, n]·vectors[pos]``.

    A GPU does all positions in one product, since it waits for every launch. On a CPU a loop is several times faster.
    """
    if g.device.type != "cpu":
        return torch.bmm(g, vectors[: len(g), :, None])[..., 0]
    return (
        torch.stack([torch.mv(here, vector) for here, vector in zip(g, vectors, strict=False)])
        if len(g)
        else g.new_empty(g.shape[:2])
    )


class Decoder:
    """What the active features of layer ``writer`` write to the residual stream at ``layer``, position by position.

    The two layers are the same, except for cross-layer transcoders, whose features also write to later layers.
    """

    def __init__(self, sources: Sources, writer: int, layer: int):
        source = sources.layers[writer]
        self._active = source.active.to(sources.devices[layer])
        self._norm = sources.layers[layer].norm
        self._vectors = lambda features: sources.dictionary.decoder_vectors(writer, features, layer)
        self._first = source.features_at
        self._bounds = torch.searchsorted(
            self._active.position.contiguous(),
            torch.arange(sources.n_pos + 1, device=self._active.position.device),
        ).tolist()
        n_active, width = source.active.feature.numel(), sources.dictionary.width(writer)
        dense = n_active > DENSE_SHARE * width * max(1, sources.n_pos - len(sources.skipped))
        d_out = sources.tokens.shape[1]
        device = self._active.feature.device
        self._rows = rows_at_once(d_out, device)
        self._starts = torch.tensor(self._bounds, device=device)
        self._decoder = self._vectors(torch.arange(width, device=device)) if dense else None
        cached = CACHED_FLOATS if device.type == "cpu" else CACHED_FLOATS_OF_A_GPU
        self._kept = self._scaled(0, n_active) if not dense and n_active * d_out <= cached else None

    def _scaled(self, start: int, stop: int) -> Float[Tensor, "n d_model"]:
        """What active features ``start`` to ``stop`` write to the stream: decoder vectors times activations."""
        active = self._active
        rows = self._vectors(active.feature[start:stop]) * active.counted[start:stop, None]
        return rows if self._norm is None else self._norm.push(rows, active.position[start:stop])

    def add_effects(self, g: Float[Tensor, "used n d_model"], first: int, out: Float[Tensor, "n column"]) -> None:
        """Add each feature's direct effect on each target to its column of ``out``.

        ``g[i, n]`` is the gradient of target ``n`` at position ``first + i`` of the stream; an effect is its product
        with what the feature writes there.
        """
        if g.device.type != "cpu":
            self._add_many_positions(g, first, out)
            return
        rows, begin, end = self._kept, 0, 0 if self._kept is None else self._bounds[-1]
        for at, here in enumerate(g, start=first):
            start, stop = self._bounds[at], self._bounds[at + 1]
            if start == stop:
                continue
            columns = out[:, self._first + start : self._first + stop]
            if self._decoder is not None:
                torch.addcmul(columns, *self._dense_effects(self._decoder, here, at, start, stop), out=columns)
                continue
            if rows is None or stop > end:  # gather the next block of decoder rows, which may serve several positions
                begin, end = start, min(max(stop, start + self._rows), self._bounds[first + g.shape[0]])
                rows = self._scaled(begin, end)
            columns.addmm_(here, rows[start - begin : stop - begin].T)

    def _add_many_positions(
        self, g: Float[Tensor, "used n d_model"], first: int, out: Float[Tensor, "n column"]
    ) -> None:
        """As :meth:`add_effects`, but for many positions in one product: a GPU waits for every launch.

        Positions have different numbers of active features. All are filled up to the largest number, and what the
        filling gives is not read.
        """
        for start, stop, most in self._spans(first, first + len(g), g.shape[1]):
            begin, end = self._bounds[start], self._bounds[stop]
            if begin == end:
                continue
            here, position = g[start - first : stop - first], self._active.position[begin:end]
            at = position - start
            if self._decoder is not None:
                if self._norm is not None:
                    where = torch.arange(start, stop, device=g.device).repeat_interleave(g.shape[1])
                    here = self._norm.transpose(here.flatten(0, 1), where).view_as(here)
                found = (here @ self._decoder.T)[at, :, self._active.feature[begin:end]]
                found = found * self._active.counted[begin:end, None]
            else:
                slot = torch.arange(begin, end, device=g.device) - self._starts[position]
                rows = g.new_zeros(stop - start, most, g.shape[2])
                rows[at, slot] = self._scaled(begin, end) if self._kept is None else self._kept[begin:end]
                found = torch.bmm(here, rows.transpose(1, 2))[at, :, slot]
            out[:, self._first + begin : self._first + end] += found.T

    def _spans(self, first: int, last: int, n: int) -> Iterator[tuple[int, int, int]]:
        """Positions from ``first`` to ``last`` in spans that fit into memory; each with its most active features."""
        start, most = first, 0
        for at in range(first, last):
            active = self._bounds[at + 1] - self._bounds[at]
            if at > start and not self._fit(at + 1 - start, max(most, active), n):
                yield start, at, most
                start, most = at, 0
            most = max(most, active)
        if first < last:
            yield start, last, most

    def _fit(self, positions: int, most: int, n: int) -> bool:
        """Whether the products of ``n`` targets at so many positions fit into memory, ``most`` features at each."""
        if self._decoder is not None:
            return positions * len(self._decoder) * n <= PRODUCTS_OF_A_GPU
        return positions * most <= self._rows and positions * most * n <= PRODUCTS_OF_A_GPU

    def _dense_effects(
        self,
        decoder: Float[Tensor, "feature d_out"],
        g: Float[Tensor, "n d_model"],
        position: int,
        start: int,
        stop: int,
    ) -> tuple[Float[Tensor, "n active"], Float[Tensor, " active"]]:
        """Products of gradients with the decoder vectors of the features active here, and their activations.

        Multiplies with the whole decoder and picks the active columns afterwards.
        """
        if self._norm is not None:
            where = torch.full((g.shape[0],), position, device=g.device)
            g = self._norm.transpose(g, where)
        features = self._active.feature[start:stop]
        scores = g @ decoder.T
        scores = scores if features.numel() == scores.shape[1] else scores[:, features]
        return scores, self._active.counted[start:stop]


class FrozenMLP:
    """One layer's MLP in the local replacement model: features, error, constant, and a linear skip connection.

    ``read`` is how the dictionary reads the stream; only the skip connection needs it.
    """

    def __init__(self, sources: Sources, layer: int, read: ReadMap | None):
        source: LayerSources = sources.layers[layer]
        dictionary = sources.dictionary
        self._writers = list(dictionary.writers(layer)) if layer in dictionary.layers else []
        self._sources, self._layer, self._read, self._source = sources, layer, read, source
        self._decoders = [Decoder(sources, w, layer) for w in self._writers]
        positions = torch.arange(sources.n_pos, device=source.constant.device)
        norm = source.norm
        constant = source.constant
        # The norm's bias reaches the output through the skip connection whatever the stream is: part of the constant.
        if source.skip is not None and read is not None and read.stage == "normed" and read.norm is not None:
            from_bias = (source.skip @ read.norm.weights.bias).expand_as(constant).clone()
            from_bias[list(sources.skipped)] = 0.0  # there the whole output is constant already
            constant = constant + from_bias
        self._constant = constant if norm is None else norm.forward(constant)
        error = source.error
        self._error = norm.push(error, positions) if norm is not None and error is not None else error
        shared = source.shared
        self._shared = norm.push(shared, positions) if norm is not None and shared is not None else shared

    def add_constant(self, constant: Float[Tensor, "pos d_model"]) -> None:
        """Count ``constant`` among what this layer writes to the residual stream whatever the features do."""
        self._constant = self._constant + constant

    def add_effects(
        self,
        g: Float[Tensor, "used n d_model"],
        first: int,
        out: Float[Tensor, "n column"],
        bias: Float[Tensor, " n"],
    ) -> None:
        """Add this layer's direct effects on every target: features' and errors' to ``out``, constants' to ``bias``.

        ``g[i, n]`` is the gradient of target ``n`` at position ``first + i`` of the stream behind the MLP.
        """
        for decoder in self._decoders:
            decoder.add_effects(g, first, out)
        add_position_dots(bias, g, self._constant[first:])
        if self._shared is not None:
            add_position_dots(out[:, self._sources.shared_column], g, self._shared[first:])
        if self._error is not None:
            at = self._source.errors_at + first
            out[:, at : at + len(g)] = position_dots(g, self._error[first:]).T

    def through_skip(self, g: Float[Tensor, "used n d_model"], first: int) -> Float[Tensor, "used n d_model"] | None:
        """Gradients taken back through the skip connection, to the stream that the MLP reads; None if there is none."""
        skip = self._source.skip
        if skip is None:
            return None
        assert self._read is not None  # a skip connection belongs to a dictionary, which reads something
        used, n, d_model = g.shape
        positions = torch.arange(first, first + used, device=g.device).repeat_interleave(n)
        flat = g.reshape(used * n, d_model)
        flat = flat if self._source.norm is None else self._source.norm.transpose(flat, positions)
        at_input, _ = self._read.transpose(flat @ skip, positions)
        at_input = at_input.reshape(used, n, d_model)
        skipped = [p - first for p in self._sources.skipped if first <= p < first + used]
        at_input[skipped] = 0.0  # there the whole output counts as constant
        return at_input
