"""Per-layer transcoders as a dictionary: a :class:`Transcoder` for each of some layers."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.dictionaries.base import (
    Dictionary,
    LayerActive,
    require_finite,
    require_layers,
    require_shape,
)
from tl_circuits.dictionaries.matrices import FLOATS_AT_ONCE, encoded, some_entries, take_rows, weighted_sum
from tl_circuits.dictionaries.transcoder import Transcoder, check_tensors, moved_to, placed_on
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import (
    Sample,
    mlp_norms,
    own_site,
    read_stage,
    require_site,
    resolve,
    rounded,
    shown,
    was_folded,
    whole,
    width_of,
    write_stage,
)

# A prompt is encoded in pieces of at most so many positions and activations, so that memory stays small: 128 MB.
POSITIONS_AT_ONCE = 256
ACTIVATIONS_AT_ONCE = 2**25


def _nonzero(acts: Float[Tensor, "pos feature"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Positions and features of all active features, sorted by position, then feature."""
    if acts.stride(1) == 1:
        position, feature = acts.nonzero(as_tuple=True)
        return position, feature
    feature, position = acts.T.nonzero(as_tuple=True)  # `acts` lies feature by feature in memory
    order = position.argsort(stable=True)
    return position[order], feature[order]


class TranscoderSet(Dictionary):
    """Per-layer transcoders: a :class:`Transcoder` for each of some layers. ``tlc.load_transcoders`` makes one.

    Args:
        transcoders: ``{layer: Transcoder}``.
        name: what graphs call the set.
        made_for: the model it was trained on, for messages.

    Raises:
        DictionaryError: there are no layers, or a layer's tensors do not fit together.

    Examples:
        >>> transcoders.layers, transcoders.width(0)
        ((0, 1, 2, 3), 768)
        >>> transcoders.input_hook(2), transcoders.output_hook(2)
        ('blocks.2.mlp.hook_in', 'blocks.2.hook_mlp_out')
        >>> _, cache = model.run_with_cache(prompt)
        >>> active = transcoders.active(2, cache[transcoders.input_hook(2)][0])  # every active feature of layer 2
        >>> most = active.activation.argmax()
        >>> active.position[most].item(), active.feature[most].item(), round(active.activation[most].item(), 2)
        (8, 603, 0.41)
    """

    _wide: tuple[str, ...] = ("W_enc", "W_dec")  # the large matrices, which :meth:`placed` moves only between devices

    def __init__(self, transcoders: Mapping[int, Transcoder], name: str = "transcoders", made_for: str | None = None):
        if not isinstance(transcoders, Mapping) or not all(isinstance(t, Transcoder) for t in transcoders.values()):
            raise DictionaryError(
                f"a {type(self).__name__} is made of {{layer: tlc.Transcoder}}, got {shown(transcoders)}."
            )
        self.name = name
        self.made_for = made_for
        self._at = {whole(layer, "a layer", DictionaryError): transcoders[layer] for layer in sorted(transcoders)}
        if not self._at:
            raise DictionaryError("the dictionary has no layers.")
        for layer, transcoder in self._at.items():
            check_tensors(layer, transcoder)

    def to(self, device: torch.device) -> "TranscoderSet":
        """The same transcoders with all their tensors on another device.

        Args:
            device: the device.

        Returns:
            A new set.
        """
        moved = TranscoderSet({layer: moved_to(t, device) for layer, t in self._at.items()}, self.name, self.made_for)
        moved.prompt_rule, moved.mlps = self.prompt_rule, self.mlps
        return moved

    def placed(self, devices: Mapping[int, torch.device]) -> "TranscoderSet":
        """The same transcoders with each layer on its device.

        Encoders and decoders that are in the machine's memory or on disk stay there, and their rows are copied to the
        device when needed.

        Args:
            devices: the device of each layer.

        Returns:
            A new set, or this one if nothing has to move.
        """
        moved = {layer: placed_on(t, devices[layer], self._wide) for layer, t in self._at.items()}
        if all(moved[layer] is self._at[layer] for layer in moved):
            return self
        made = copy(self)
        made._at = moved
        return made

    def sample(self) -> Sample:
        return tuple(entry for layer in self._at for entry in self.layer_sample(layer))

    def layer_sample(self, layer: int) -> Sample:
        """The numbers of :meth:`sample` that are of one layer.

        Args:
            layer: the layer.

        Returns:
            Pairs of what the numbers are of, and the numbers.
        """
        t, what = self._at[layer], f"layer {layer} of the dictionary"
        found = [(f"{what} ({t.input_hook} to {t.output_hook})", some_entries(t.W_enc))]
        found.append((f"{what} (its decoder)", some_entries(self._own_decoder(layer))))
        found += [(f"{what} (its {n})", getattr(t, n).detach().norm(dtype=torch.float32)) for n in ("b_enc", "b_dec")]
        return rounded(found)

    def decoder(self, layer: int) -> Float[Tensor, "feature slot d_out"] | Any | None:
        """The decoder of a cross-layer transcoder, whose slot ``j`` writes to ``layer + j``.

        Args:
            layer: the layer whose features write.

        Returns:
            A tensor ``[feature, slot, d_out]``, or the matrices of all slots by themselves (``SlotDecoders``). None for
            per-layer transcoders.
        """
        return None

    def _own_decoder(self, layer: int) -> Float[Tensor, "feature d_out"]:
        return self._at[layer].W_dec

    def __getitem__(self, layer: int) -> Transcoder:
        return self._at[layer]

    @property
    def layers(self) -> Sequence[int]:
        return tuple(self._at)

    def width(self, layer: int) -> int:
        return self._at[layer].W_enc.shape[0]

    def input_hook(self, layer: int) -> str:
        return f"blocks.{layer}.{self._at[layer].input_hook}"

    def output_hook(self, layer: int) -> str:
        return f"blocks.{layer}.{self._at[layer].output_hook}"

    def check(self, model: Any) -> None:
        """Make sure that layers, widths, hooks and the scale of what is read fit the model.

        Published transcoders that read ``mlp.hook_in`` expect the norm's output with its gain applied. If
        TransformerLens has folded the norms (``normalization_type`` ends in "Pre"), the gain is in ``W_in`` instead.

        Args:
            model: the model.

        Raises:
            DictionaryError: a layer does not exist, a tensor has another width than the model's, an autoencoder cannot
                sit at its site, or the norm's gain is missing.
            UnknownHookError: a transcoder reads or writes a hook that the model does not have, or that is not its
                MLP's.
        """
        made_for = f" (it was made for {self.made_for})" if self.made_for else ""
        d_model, found = int(model.cfg.d_model), self._at[self.layers[0]].W_enc.shape[1]
        if found != d_model and own_site(self, self.layers[0]) != "attn.hook_z":
            shape = tuple(self._at[self.layers[0]].W_enc.shape)
            raise DictionaryError(
                f"layer {self.layers[0]}: W_enc of {self.name}{made_for} has shape {shape}, expected "
                f"{(shape[0], d_model)}, since the model's d_model is {d_model}. Is it for another model?"
            )
        require_layers(self.layers, int(model.cfg.n_layers))
        for layer, transcoder in self._at.items():
            width, site = self.width(layer), own_site(self, layer)
            if site is not None:
                require_site(model, layer, site)
                for name in ("W_enc", "W_dec"):
                    d = width_of(model, layer, site)
                    require_shape(layer, f"{name} (d is the width of {site})", getattr(transcoder, name), (width, d))
                continue
            require_shape(layer, "W_enc (d_in is the model's d_model)", transcoder.W_enc, (width, d_model))
            require_shape(layer, "W_dec (d_out is the model's d_model)", transcoder.W_dec, (width, d_model))
            if read_stage(model, layer, self.input_hook(layer)) == "normed":
                self._require_gain(model, layer, made_for)
            write_stage(layer, self.output_hook(layer))
            resolve(model, self.input_hook(layer))
            resolve(model, self.output_hook(layer))

    def _require_gain(self, model: Any, layer: int, made_for: str) -> None:
        """Raise DictionaryError if the tensor read lacks the norm's gain because TransformerLens folded it away."""
        # A set of one's own on a model that was folded from the start: it was trained on what it reads.
        never_had_one = not self.made_for and str(model.cfg.normalization_type).endswith("Pre")
        before, _ = mlp_norms(model, layer)
        if never_had_one or before is None or not was_folded(model, before):
            return
        raise DictionaryError(
            f"{self.name} reads {self.input_hook(layer)} with the norm's gain applied{made_for}, but this model's "
            "norms are folded into its weights. Load the model with fold_ln=False (a bridge: without "
            "enable_compatibility_mode, or with fold_ln=False there). A set trained on the folded model reads "
            "input_hook='ln2.hook_normalized', the same tensor."
        )

    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        t = self._at[layer]
        pre = encoded(t.W_enc, t.normalised(x).reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        self._used(layer, "W_enc", pre, t.W_enc)
        return pre + t.b_enc.to(x.device).float()

    def _used(self, layer: int, name: str, result: Tensor, matrix: Tensor) -> None:
        """After using ``matrix``, which may be mapped from a file: look for NaN in it, and free the pages' memory.

        Only a result with NaN or infinity makes it worth reading the whole matrix. If that is finite, the input was
        not: a run that diverged, about which other code speaks.
        """
        forget = self._at[layer].forget_pages
        if forget is None:
            return
        if not torch.isfinite(result).all():
            for rows in matrix.split(max(1, FLOATS_AT_ONCE // matrix[0].numel())):
                require_finite(layer, f"{name} as read from disk", rows)
        forget()

    def activate(
        self, layer: int, pre: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        return self._at[layer].activate(pre)

    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        recons = weighted_sum(acts[layer], self._at[layer].W_dec)
        self._used(layer, "W_dec", recons, self._at[layer].W_dec)
        skip, t = self.skip(layer), self._at[layer]
        recons = recons + self.constant(layer).to(recons.device)
        if t.normalize != "none":
            recons = recons * t.output_factor(x)
            return recons + x.float().mean(-1, keepdim=True) if t.normalize == "layer_norm" else recons
        return recons if skip is None else recons + x.float() @ skip.to(x.device).T

    def active(self, layer: int, x: Float[Tensor, "pos d_in"]) -> LayerActive:
        parts = []
        step = max(1, min(POSITIONS_AT_ONCE, ACTIVATIONS_AT_ONCE // self.width(layer)))
        for start in range(0, x.shape[0], step):
            pre = self.pre_activations(layer, x[start : start + step])
            acts = self._at[layer].activate(pre)
            position, feature = _nonzero(acts)
            parts.append((position + start, feature, pre[position, feature], acts[position, feature]))
        active = LayerActive(*(torch.cat(column) for column in zip(*parts, strict=True)))
        scale = self.written_scale(layer, x)
        return active if scale is None else replace(active, scale=scale[active.position])

    def written_scale(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"] | None:
        t = self._at[layer]
        return None if t.normalize == "none" else t.output_factor(x)[..., 0]

    def activations_at(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, " n"]:
        t = self._at[layer]
        if t.activation == "topk":  # whether a feature is active depends on all others, so encode them all
            return super().activations_at(layer, features, x)
        vectors, bias = self.read_vectors(layer, features, x)
        pre = (x.float() * vectors).sum(-1) + bias
        return t.gate(pre, None if t.threshold is None else t.threshold[features.to(t.threshold.device)])

    def read_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        t, vectors, bias = (
            self._at[layer],
            self.encoder_directions(layer, features),
            take_rows(self._at[layer].b_enc, features),
        )
        if t.normalize == "none":
            return vectors, bias
        vectors = vectors - vectors.mean(-1, keepdim=True) if t.normalize == "layer_norm" else vectors
        return vectors * t.input_factor(x), bias

    def encoder_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        rows = take_rows(self._at[layer].W_enc, features)
        self._used(layer, "W_enc", rows, rows)
        return rows

    def decoder_vectors(self, layer: int, features: Int[Tensor, " n"], target: int) -> Float[Tensor, "n d_out"]:
        rows = take_rows(self._at[layer].W_dec, features)
        self._used(layer, "W_dec", rows, rows)
        return rows

    def constant(self, layer: int) -> Float[Tensor, " d_out"]:
        return self._at[layer].b_dec.float()

    def constant_on(self, layer: int, x: Float[Tensor, "pos d_in"]) -> Float[Tensor, "pos d_out"]:
        t, constant = self._at[layer], super().constant_on(layer, x)
        if t.normalize == "none":
            return constant
        constant = constant * t.output_factor(x)
        return constant + x.float().mean(-1, keepdim=True) if t.normalize == "layer_norm" else constant

    def skip(self, layer: int) -> Float[Tensor, "d_out d_in"] | None:
        W_skip = self._at[layer].W_skip
        return None if W_skip is None else W_skip.float()
