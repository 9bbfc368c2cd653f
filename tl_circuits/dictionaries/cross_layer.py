"""Cross-layer transcoders: a feature reads one layer's MLP input and writes to the outputs of this and later MLPs."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import gaps, ranges, require_finite
from tl_circuits.dictionaries.matrices import to_layer
from tl_circuits.dictionaries.slot_decoders import SlotDecoders, all_slots, slot_count, slot_matrix, slot_rows, slot_sum
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import DictionaryError


class CrossLayerTranscoders(TranscoderSet):
    """A cross-layer transcoder: features that read layer ``s`` write to the MLP outputs of layer ``s`` and later ones.

    ``y_t = b_dec_t + Σ_{s ≤ t} act(x_s W_encᵀ + b_enc) W_dec_s[:, t - s]``, plus ``x_t W_skipᵀ`` if there is a skip
    connection (Ameisen et al. 2025, "Circuit Tracing").

    Args:
        encoders: ``{layer: Transcoder}`` with the encoder, activation, decoder bias and skip of each layer; its
            ``W_dec`` is not used.
        decoders: ``{layer: [feature, slot, d_out]}``; slot ``j`` writes to layer ``layer + j``. In place of a tensor, a
            :class:`SlotDecoders` holds one matrix for each slot.
        name: what graphs call it.
        made_for: the model it was trained on, for messages.

    Raises:
        DictionaryError: encoders and decoders do not fit together, or a layer is missing in between.

    Examples:
        >>> import torch
        >>> random = torch.Generator().manual_seed(0)
        >>> decoders = {s: torch.randn(768, 4 - s, 96, generator=random) / 100 for s in range(4)}
        >>> crossing = tlc.CrossLayerTranscoders({s: transcoders[s] for s in range(4)}, decoders)
        >>> crossing.writers(2)  # the layers whose features write to MLP output 2
        (0, 1, 2)
    """

    _wide = ("W_enc",)

    def __init__(
        self,
        encoders: Mapping[int, Transcoder],
        decoders: Mapping[int, Float[Tensor, "feature slot d_out"] | SlotDecoders],
        name: str = "cross-layer transcoders",
        made_for: str | None = None,
    ):
        super().__init__(encoders, name, made_for)
        if set(decoders) != set(self.layers):
            raise DictionaryError(f"encoders for layers {list(self.layers)}, decoders for {sorted(decoders)}.")
        self._decoders = {layer: decoders[layer] for layer in self.layers}
        if gaps(self.layers):
            raise DictionaryError(
                f"{name} is missing the layers {ranges(gaps(self.layers))}; it has {ranges(self.layers)}. A "
                "cross-layer transcoder is one whole: its features write to all layers after their own."
            )
        own = next((layer for layer in self.layers if self[layer].input_hook == self[layer].output_hook), None)
        if own is not None:
            raise DictionaryError(
                f"layer {own} reads and writes {self[own].input_hook}; a cross-layer transcoder reads an MLP's input "
                "and writes MLP outputs."
            )
        last = self.layers[-1]
        for layer, decoder in self._decoders.items():
            width, d_out = self.width(layer), self[layer].b_dec.numel()
            slots, mapped = slot_count(decoder), self[layer].forget_pages is not None
            if isinstance(decoder, SlotDecoders):
                decoder.check(layer, width, d_out, finite=not mapped)
                if slots > last - layer + 1:
                    raise DictionaryError(f"layer {layer} writes to {slots} layers, but the last one is {last}.")
                continue
            if tuple(decoder.shape) != (width, slots, d_out) or not 1 <= slots <= last - layer + 1:
                raise DictionaryError(
                    f"layer {layer}: W_dec has shape {tuple(decoder.shape)}, expected ({width}, "
                    f"1..{last - layer + 1}, {d_out})."
                )
            if not mapped:
                require_finite(layer, "W_dec", decoder)

    def decoder(self, layer: int) -> Float[Tensor, "feature slot d_out"] | SlotDecoders:
        return self._decoders[layer]

    def _own_decoder(self, layer: int) -> Float[Tensor, "feature d_out"]:
        return slot_matrix(self._decoders[layer], 0)

    def to(self, device: torch.device) -> "CrossLayerTranscoders":
        """The same dictionary with all its tensors on another device.

        Args:
            device: the device.

        Returns:
            A new dictionary.
        """
        moved = super().to(device)
        encoders = {layer: moved[layer] for layer in self.layers}
        decoders = {i: _moved(d, device) for i, d in self._decoders.items()}
        made = CrossLayerTranscoders(encoders, decoders, self.name, self.made_for)
        made.prompt_rule, made.mlps = self.prompt_rule, self.mlps
        return made

    def placed(self, devices: Mapping[int, torch.device]) -> "CrossLayerTranscoders":
        """As :meth:`TranscoderSet.placed`; a decoder goes to the device of the layer that its features read.

        Args:
            devices: the device of each layer.

        Returns:
            A new dictionary, or this one if nothing has to move.
        """
        moved = {layer: _to_layer(decoder, devices[layer]) for layer, decoder in self._decoders.items()}
        encoders = super().placed(devices)
        if encoders is self and all(moved[layer] is self._decoders[layer] for layer in moved):
            return self
        made = copy(self)
        made._decoders = moved
        made._at = {layer: replace(encoders[layer], W_dec=slot_matrix(moved[layer], 0)) for layer in self.layers}
        return made

    def writers(self, layer: int) -> Sequence[int]:
        return tuple(s for s in self.layers if s <= layer < s + slot_count(self._decoders[s]))

    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        recons = self.constant(layer).to(x.device).expand(*x.shape[:-1], -1)
        for writer in self.writers(layer):
            written = slot_sum(self._decoders[writer], acts[writer], layer - writer)
            self._used(writer, "W_dec", written, slot_matrix(self._decoders[writer], layer - writer))
            recons = recons + written.to(x.device)
        skip = self.skip(layer)
        return recons if skip is None else recons + x.float() @ skip.to(x.device).T

    def decoder_vectors(self, layer: int, features: Int[Tensor, " n"], target: int) -> Float[Tensor, "n d_out"]:
        rows = slot_rows(self._decoders[layer], features, target - layer)
        self._used(layer, "W_dec", rows, rows)
        return rows

    def output_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
        rows = all_slots(self._decoders[layer], features)
        self._used(layer, "W_dec", rows, rows)
        return rows


def _moved(decoder: Tensor | SlotDecoders, device: torch.device) -> Tensor | SlotDecoders:
    return decoder.each(lambda t: t.to(device)) if isinstance(decoder, SlotDecoders) else decoder.to(device)


def _to_layer(decoder: Tensor | SlotDecoders, device: torch.device) -> Tensor | SlotDecoders:
    return (
        decoder.each(lambda t: to_layer(t, device)) if isinstance(decoder, SlotDecoders) else to_layer(decoder, device)
    )
