"""Per-layer transcoders, given as tensors."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import (
    Sample,
    is_whole,
    mlp_norms,
    read_stage,
    resolve,
    rounded,
    shown,
    spread,
    was_folded,
    whole,
    write_stage,
)

POSITIONS_AT_ONCE = 256  # with ACTIVATIONS_AT_ONCE bounds the [pos, feature] tensor while encoding
ACTIVATIONS_AT_ONCE = 2**25  # 128 MB
FLOATS_AT_ONCE = 2**24  # of an encoder or decoder on the way to the device, 64 MB


@dataclass(frozen=True, eq=False)
class Transcoder:
    """One layer: ``y = act(x W_encᵀ + b_enc) W_dec + b_dec (+ x W_skipᵀ)`` (Dunefsky et al. 2024).

    ``activation``: ``"relu"``; ``"jumprelu"`` keeps ``h`` where ``h > threshold`` (and, with
    ``clamp``, where ``h > 0``); ``"topk"`` keeps the ``k`` largest (with ``clamp``, the positive
    ones of them). ``input_hook`` and ``output_hook`` are block-relative, such as ``mlp.hook_in``.
    ``forget_pages`` is set where the two wide matrices are mapped from a file: it gives the memory
    of what was read back, and the matrices are checked when used instead of when opened.
    """

    W_enc: Float[Tensor, "feature d_in"]
    W_dec: Float[Tensor, "feature d_out"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    threshold: Float[Tensor, " feature"] | None = None
    activation: Literal["relu", "jumprelu", "topk"] = "relu"
    k: int | None = None
    clamp: bool = True
    input_hook: str = "mlp.hook_in"
    output_hook: str = "hook_mlp_out"
    forget_pages: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if is_whole(self.k):
            object.__setattr__(self, "k", whole(self.k))

    def activate(self, pre: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations from pre-activations."""
        if self.activation != "topk":
            return self.gate(pre, self.threshold)
        floor = pre.relu() if self.clamp else pre
        kept = pre.topk(self.k, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, kept, floor.gather(-1, kept))

    def gate(
        self, pre: Float[Tensor, "*batch some"], threshold: Float[Tensor, " some"] | None
    ) -> Float[Tensor, "*batch some"]:
        """Activations of features that do not compete with each other (ReLU, JumpReLU)."""
        if self.activation == "relu":
            return pre.relu()
        return (pre.relu() if self.clamp else pre) * (pre > threshold.to(pre.device))


def take_rows(matrix: Float[Tensor, "feature *rest"], features: Int[Tensor, " n"]) -> Float[Tensor, "n *rest"]:
    """Some rows of a matrix that may lie elsewhere (on disk, in host memory), where ``features`` is, float32."""
    # index_select copies whole rows, several times faster than indexing on the CPU.
    return matrix.index_select(0, features.to(matrix.device)).to(features.device).float()


def weighted_sum(
    acts: Float[Tensor, "*batch feature"], matrix: Float[Tensor, "feature d_out"]
) -> Float[Tensor, "*batch d_out"]:
    """``acts @ matrix`` in float32, reading only the rows that are active anywhere.

    Where a gradient is wanted inactive features have one too, so then all rows are read.
    """
    acts = acts.float()
    flat = acts.reshape(-1, acts.shape[-1])
    whole = acts.requires_grad and torch.is_grad_enabled()
    used = torch.arange(flat.shape[1], device=acts.device) if whole else flat.any(0).nonzero()[:, 0]
    total = flat.new_zeros(flat.shape[0], matrix.shape[1])
    for some in used.split(max(1, FLOATS_AT_ONCE // matrix.shape[1])):
        total = total + (flat if some.numel() == flat.shape[1] else flat[:, some]) @ take_rows(matrix, some)
    return total.reshape(*acts.shape[:-1], -1)


class TranscoderSet(Dictionary):
    """One :class:`Transcoder` for each of some layers."""

    _wide = ("W_enc", "W_dec")  # what :meth:`placed` brings along as a whole

    def __init__(
        self, transcoders: Mapping[int, Transcoder], name: str = "transcoders", made_for: str | None = None
    ):
        if not isinstance(transcoders, Mapping) or not all(isinstance(t, Transcoder) for t in transcoders.values()):
            raise DictionaryError(f"a {type(self).__name__} is made of {{layer: tlc.Transcoder}}, got {shown(transcoders)}.")
        self.name = name
        self.made_for = made_for
        self._at = {whole(layer, "a layer", DictionaryError): transcoders[layer] for layer in sorted(transcoders)}
        if not self._at:
            raise DictionaryError("the dictionary has no layers.")
        for layer, transcoder in self._at.items():
            _check_tensors(layer, transcoder)

    def to(self, device: torch.device) -> "TranscoderSet":
        """The same transcoders on another device."""
        moved = TranscoderSet({layer: _to(t, device) for layer, t in self._at.items()}, self.name, self.made_for)
        moved.prompt_rule = self.prompt_rule
        return moved

    def placed(self, devices: Mapping[int, torch.device]) -> "TranscoderSet":
        """The same transcoders, each on its layer's device; itself if all are there already.

        Encoders and decoders in the machine's memory or on disk stay there: the rows that are wanted go
        to the device. What is copied is a new set's; this one keeps its own.
        """
        moved = {layer: _placed(t, devices[layer], self._wide) for layer, t in self._at.items()}
        if all(moved[layer] is self._at[layer] for layer in moved):
            return self
        made = copy(self)
        made._at = moved
        return made

    def sample(self) -> Sample:
        found = []
        for layer, t in self._at.items():
            what = f"layer {layer} of the dictionary"
            found.append((f"{what} ({t.input_hook} to {t.output_hook})", some_entries(t.W_enc)))
            found.append((f"{what} (its decoder)", some_entries(self._own_decoder(layer))))
            found += [(f"{what} (its {n})", getattr(t, n).detach().norm(dtype=torch.float32)) for n in ("b_enc", "b_dec")]
        return rounded(found)

    def decoder(self, layer: int) -> Float[Tensor, "feature slot d_out"] | None:
        """What a layer's features write to it and the layers after; None where they write to their own only."""
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
        """Raise where layers, widths or hooks do not fit, or the hook is after another normalisation.

        Published transcoders that read ``mlp.hook_in`` want the norm's gain applied; a model whose
        norms are folded (``normalization_type`` ends in Pre) has it in W_in instead.
        """
        made_for = f" (it was made for {self.made_for})" if self.made_for else ""
        d_model, found = int(model.cfg.d_model), self._at[self.layers[0]].W_enc.shape[1]
        if found != d_model:
            shape = tuple(self._at[self.layers[0]].W_enc.shape)
            raise DictionaryError(
                f"layer {self.layers[0]}: W_enc of {self.name}{made_for} has shape {shape}, expected "
                f"{(shape[0], d_model)}, since the model's d_model is {d_model}. Is it for another model?"
            )
        require_layers(self.layers, int(model.cfg.n_layers))
        for layer, transcoder in self._at.items():
            width = self.width(layer)
            require_shape(layer, "W_enc (d_in is the model's d_model)", transcoder.W_enc, (width, d_model))
            require_shape(layer, "W_dec (d_out is the model's d_model)", transcoder.W_dec, (width, d_model))
            if read_stage(model, layer, self.input_hook(layer)) == "normed":
                self._require_gain(model, layer, made_for)
            write_stage(layer, self.output_hook(layer))
            resolve(model, self.input_hook(layer))
            resolve(model, self.output_hook(layer))

    def _require_gain(self, model: Any, layer: int, made_for: str) -> None:
        """Raise where the tensor read lacks the norm's gain, because TransformerLens folded it into weights."""
        never_had_one = not self.made_for and str(model.cfg.normalization_type).endswith("Pre")  # such a model, such a set
        before, _ = mlp_norms(model, layer)
        if never_had_one or before is None or not was_folded(model, before):
            return
        raise DictionaryError(
            f"{self.name} reads {self.input_hook(layer)} with the norm's gain applied{made_for}, but this model's norms are folded "
            "into its weights. Load the model with fold_ln=False (a bridge: without enable_compatibility_mode, or with "
            "fold_ln=False there). A set trained on the folded model reads input_hook='ln2.hook_normalized', the same tensor."
        )

    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        t = self._at[layer]
        flat = x.float().reshape(-1, x.shape[-1])
        # This way round the wide matrix is read row by row, a third faster on a few positions.
        parts = [
            rows.to(x.device).float() @ flat.T for rows in t.W_enc.split(max(1, FLOATS_AT_ONCE // x.shape[-1]))
        ]
        pre = (parts[0] if len(parts) == 1 else torch.cat(parts)).T.reshape(*x.shape[:-1], -1)
        self._used(layer, "W_enc", pre)
        return pre + t.b_enc.to(x.device).float()

    def _used(self, layer: int, name: str, result: Tensor) -> None:
        """What mapped files need after use: a check of what came out, and their memory given back."""
        forget = self._at[layer].forget_pages
        if forget is not None:
            require_finite(layer, f"{name} as read from disk", result)
            forget()

    def activate(
        self, layer: int, pre: Float[Tensor, "*batch feature"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch feature"]:
        return self._at[layer].activate(pre)

    def decode(
        self, layer: int, acts: dict[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        recons = weighted_sum(acts[layer], self._at[layer].W_dec)
        self._used(layer, "W_dec", recons)
        skip = self.skip(layer)
        recons = recons + self.constant(layer).to(recons.device)
        return recons if skip is None else recons + x.float() @ skip.to(x.device).T

    def active(self, layer: int, x: Float[Tensor, "pos d_in"]) -> LayerActive:
        parts = []
        step = max(1, min(POSITIONS_AT_ONCE, ACTIVATIONS_AT_ONCE // self.width(layer)))
        for start in range(0, x.shape[0], step):
            pre = self.pre_activations(layer, x[start : start + step])
            acts = self._at[layer].activate(pre)
            feature, position = acts.T.nonzero(as_tuple=True)  # as they lie in memory, then by position
            order = position.argsort(stable=True)
            position, feature = position[order], feature[order]
            parts.append((position + start, feature, pre[position, feature], acts[position, feature]))
        return LayerActive(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def activations_at(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, " n"]:
        t = self._at[layer]
        if t.activation == "topk":  # whether one is kept depends on all others
            return super().activations_at(layer, features, x)
        vectors, bias = self.read_vectors(layer, features, x)
        pre = (x.float() * vectors).sum(-1) + bias
        return t.gate(pre, None if t.threshold is None else t.threshold[features.to(t.threshold.device)])

    def read_vectors(
        self, layer: int, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        return self.encoder_directions(layer, features), take_rows(self._at[layer].b_enc, features)

    def encoder_directions(self, layer: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        rows = take_rows(self._at[layer].W_enc, features)
        self._used(layer, "W_enc", rows)
        return rows

    def decoder_vectors(self, layer: int, features: Int[Tensor, " n"], target: int) -> Float[Tensor, "n d_out"]:
        rows = take_rows(self._at[layer].W_dec, features)
        self._used(layer, "W_dec", rows)
        return rows

    def constant(self, layer: int) -> Float[Tensor, " d_out"]:
        return self._at[layer].b_dec.float()

    def skip(self, layer: int) -> Float[Tensor, "d_out d_in"] | None:
        W_skip = self._at[layer].W_skip
        return None if W_skip is None else W_skip.float()


_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "threshold")


def some_entries(matrix: Float[Tensor, "feature d"]) -> Float[Tensor, "3 2"]:
    """A few numbers of a wide matrix that may lie on disk, of which no more is read."""
    rows, columns = (spread(size, count).to(matrix.device) for size, count in zip(matrix.shape, (3, 2), strict=True))
    return matrix.detach()[rows[:, None], columns].float()


def to_layer(matrix: Tensor, device: torch.device) -> Tensor:
    """A wide matrix on its layer's device, unless it lies in the machine's memory or on disk."""
    return matrix if matrix.device.type == "cpu" else matrix.to(device)


def _placed(transcoder: Transcoder, device: torch.device, wide: Sequence[str]) -> Transcoder:
    tensors = {name: getattr(transcoder, name) for name in (*wide, *_TENSORS[2:])}
    found = {n: to_layer(t, device) if n in wide else t.to(device) for n, t in tensors.items() if t is not None}
    moved = {name: tensor for name, tensor in found.items() if tensor is not tensors[name]}
    return replace(transcoder, **moved) if moved else transcoder


def _to(transcoder: Transcoder, device: torch.device) -> Transcoder:
    tensors = {n: getattr(transcoder, n) for n in _TENSORS}
    moved = {n: None if t is None else t.to(device) for n, t in tensors.items()}
    return replace(transcoder, **moved, forget_pages=None)


def _check_tensors(layer: int, t: Transcoder) -> None:
    for name in _TENSORS:
        tensor = getattr(t, name)
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("W_skip", "threshold")):
            raise DictionaryError(f"layer {layer}: {name} must be a tensor, got {shown(tensor)}.")
    if t.W_enc.ndim != 2 or t.W_dec.ndim != 2:
        raise DictionaryError(
            f"layer {layer}: W_enc and W_dec must be matrices [feature, d], got {tuple(t.W_enc.shape)} "
            f"and {tuple(t.W_dec.shape)}."
        )
    width, d_in = t.W_enc.shape
    d_out = t.W_dec.shape[1]
    require_shape(layer, "W_dec", t.W_dec, (width, d_out))
    require_shape(layer, "b_enc", t.b_enc, (width,))
    require_shape(layer, "b_dec", t.b_dec, (d_out,))
    if t.W_skip is not None:
        require_shape(layer, "W_skip", t.W_skip, (d_out, d_in))
    if t.threshold is not None:
        require_shape(layer, "threshold", t.threshold, (width,))
    for name in _TENSORS if t.forget_pages is None else _TENSORS[2:]:  # mapped matrices: checked when used
        if getattr(t, name) is not None:
            require_finite(layer, name, getattr(t, name))
    if t.activation not in ("relu", "jumprelu", "topk"):
        raise DictionaryError(
            f"layer {layer}: activation {t.activation!r} is not one of relu, jumprelu, topk."
        )
    if t.activation == "jumprelu" and t.threshold is None:
        raise DictionaryError(f"layer {layer}: a jumprelu transcoder needs a threshold tensor [feature].")
    if t.activation == "topk" and not (isinstance(t.k, int) and 1 <= t.k <= width):
        raise DictionaryError(f"layer {layer}: a topk transcoder needs 1 <= k <= {width}, got k={t.k!r}.")
