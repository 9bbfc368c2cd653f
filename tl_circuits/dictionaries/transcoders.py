"""Per-layer transcoders: one layer as tensors (``Transcoder``), and a set of layers (``TranscoderSet``)."""

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
    own_site,
    read_stage,
    require_site,
    resolve,
    rounded,
    shown,
    spread,
    was_folded,
    whole,
    width_of,
    write_stage,
)

# A prompt is encoded in pieces of at most so many positions and activations, so that memory stays small: 128 MB.
POSITIONS_AT_ONCE = 256
ACTIVATIONS_AT_ONCE = 2**25
FEW_POSITIONS = 50  # up to here a matrix stored by columns is multiplied faster from the other side, at 10 positions tenfold
FLOATS_AT_ONCE = 2**24  # large matrices kept elsewhere are brought to the device in pieces of 64 MB


Activation = Literal["relu", "jumprelu", "topk"]


@dataclass(frozen=True, eq=False)
class Transcoder:
    """A transcoder or autoencoder of one layer, given as tensors: it predicts ``y``, such as an MLP's output, from ``x``.

    ``y = act(x W_encᵀ + b_enc) W_dec + b_dec``, plus ``x W_skipᵀ`` if there is a skip connection (Dunefsky et al. 2024,
    "Transcoders find interpretable LLM feature circuits"; skip: Paulo et al. 2025). Make a dictionary of several with
    ``tlc.load_transcoders({layer: transcoder})``. If ``input_hook`` and ``output_hook`` are the same, it is an autoencoder
    of that tensor: of the residual stream (``hook_resid_pre``, ``hook_resid_mid``, ``hook_resid_post``), of what attention
    or the MLP add to it (``hook_attn_out``, ``hook_mlp_out``), or of all heads one after the other (``attn.hook_z``).

    Args:
        W_enc: encoder ``[feature, d_in]``, a row a feature.
        W_dec: decoder ``[feature, d_out]``, a row a feature.
        b_enc: encoder bias ``[feature]``.
        b_dec: decoder bias ``[d_out]``.
        W_skip: skip connection ``[d_out, d_in]``, or None.
        threshold: ``[feature]``, for ``"jumprelu"``; optional for ``"topk"``.
        activation: ``"relu"``; ``"jumprelu"`` keeps a pre-activation where it is above ``threshold``; ``"topk"``
            keeps the ``k`` largest of a token, or with a ``threshold`` those that are farthest above theirs.
        k: how many features are active on a token at most, for ``"topk"``.
        clamp: with ``"jumprelu"`` and ``"topk"``, whether negative values are dropped as well.
        input_hook: the tensor that is read, by its hook's name within the block.
        output_hook: the tensor that is predicted, by its hook's name within the block.
        rank: ``[feature]`` of positive numbers, or None. For ``"topk"``: pre-activations are compared after they are
            multiplied by it, so it decides which features are kept but not their values.
        normalize: what is done to ``x`` first and undone on ``y``, for autoencoders: ``"layer_norm"`` subtracts the mean and
            divides by the standard deviation, ``"constant_norm_rescale"`` divides by the root mean square; or ``"none"``.
        forget_pages: set for matrices that are mapped from a file: frees the memory of what was read. Such matrices
            are checked for NaN and infinity when they are used, not when they are opened.

    Examples:
        >>> import torch
        >>> random = torch.Generator().manual_seed(0)
        >>> W_enc, W_dec = (torch.randn(200, 96, generator=random) / 10 for _ in range(2))
        >>> mine = tlc.Transcoder(W_enc, W_dec, b_enc=torch.zeros(200), b_dec=torch.zeros(96), activation="topk", k=8)
        >>> acts = mine.activate(torch.randn(9, 200, generator=random))
        >>> (acts > 0).sum(-1).tolist()  # active features at each of nine positions
        [8, 8, 8, 8, 8, 8, 8, 8, 8]
        >>> tlc.load_transcoders({2: mine}, layers=[2])
        TranscoderSet('transcoders', layers 2)
    """

    W_enc: Float[Tensor, "feature d_in"]
    W_dec: Float[Tensor, "feature d_out"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    threshold: Float[Tensor, " feature"] | None = None
    activation: Activation = "relu"
    k: int | None = None
    clamp: bool = True
    input_hook: str = "mlp.hook_in"
    output_hook: str = "hook_mlp_out"
    normalize: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    forget_pages: Callable[[], None] | None = None
    rank: Float[Tensor, " feature"] | None = None

    def __post_init__(self) -> None:
        if is_whole(self.k):
            object.__setattr__(self, "k", whole(self.k))

    def normalised(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """What the encoder's matrix reads, in float32."""
        x = x.float()
        if self.normalize == "none":
            return x
        centred = x - x.mean(-1, keepdim=True) if self.normalize == "layer_norm" else x
        return centred * self.input_factor(x)

    def input_factor(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
        """The factor by which an input is multiplied: one over its standard deviation or root mean square."""
        if self.normalize == "layer_norm":  # as SAELens has it: the unbiased estimate, and 1e-5 only on this side
            return 1.0 / (x.float().std(-1, keepdim=True) + 1e-5)
        return x.shape[-1] ** 0.5 / x.float().norm(dim=-1, keepdim=True)

    def output_factor(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
        """The factor by which a reconstruction is multiplied, to have the size of ``x`` again."""
        return x.float().std(-1, keepdim=True) if self.normalize == "layer_norm" else 1.0 / self.input_factor(x)

    def activate(self, pre: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations from pre-activations."""
        if self.activation != "topk":
            return self.gate(pre, self.threshold)
        if self.k is None:
            raise DictionaryError('activation is "topk", but k is None; give k=..., how many features are active on a token.')
        floor = pre.relu() if self.clamp else pre
        compared = pre if self.threshold is None else pre - self.threshold.to(pre.device)
        if self.threshold is not None:
            floor = floor * (compared > 0)
        if self.rank is not None:
            compared = compared * self.rank.to(pre.device)
        kept = compared.topk(self.k, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, kept, floor.gather(-1, kept))

    def gate(
        self, pre: Float[Tensor, "*batch some"], threshold: Float[Tensor, " some"] | None
    ) -> Float[Tensor, "*batch some"]:
        """Activations of some features alone, for ReLU and JumpReLU: there one does not depend on the others."""
        if self.activation == "relu":
            return pre.relu()
        if threshold is None:
            raise DictionaryError(f"activation is {self.activation!r}, but threshold is None; give threshold=..., one number a feature.")
        return (pre.relu() if self.clamp else pre) * (pre > threshold.to(pre.device))


def take_rows(matrix: Float[Tensor, "feature *rest"], features: Int[Tensor, " n"]) -> Float[Tensor, "n *rest"]:
    """Rows ``features`` of a matrix that may be on disk or another device; in float32, on ``features``' device."""
    # index_select copies whole rows, several times faster than indexing on the CPU.
    return matrix.index_select(0, features.to(matrix.device)).to(features.device).float()


def weighted_sum(
    acts: Float[Tensor, "*batch feature"], matrix: Float[Tensor, "feature d_out"]
) -> Float[Tensor, "*batch d_out"]:
    """``acts @ matrix`` in float32, reading only the rows of features that are active at some position.

    If gradients are being computed, all rows are read: inactive features have a gradient as well.
    """
    acts = acts.float()
    flat = acts.reshape(-1, acts.shape[-1])
    whole = acts.requires_grad and torch.is_grad_enabled()
    used = torch.arange(flat.shape[1], device=acts.device) if whole else flat.any(0).nonzero()[:, 0]
    total = flat.new_zeros(flat.shape[0], matrix.shape[1])
    for some in used.split(max(1, FLOATS_AT_ONCE // matrix.shape[1])):
        total = total + (flat if some.numel() == flat.shape[1] else flat[:, some]) @ take_rows(matrix, some)
    return total.reshape(*acts.shape[:-1], -1)


def encoded(W_enc: Float[Tensor, "feature d_in"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n feature"]:
    """``x W_encᵀ`` in float32, a piece of the encoder at a time, reading it in the order in which it lies in memory."""
    step = max(1, FLOATS_AT_ONCE // x.shape[1])
    by_columns = W_enc.T.is_contiguous() and not W_enc.is_contiguous()  # as SAELens stores it: [d_in, feature]
    if by_columns and len(x) < FEW_POSITIONS:
        parts = [x @ columns.to(x.device).float() for columns in W_enc.T.split(step, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    # This way round a matrix stored by rows is read row by row, a third faster on a few positions.
    parts = [rows.T.to(x.device).float().T @ x.T if by_columns else rows.to(x.device).float() @ x.T for rows in W_enc.split(step)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).T


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
        """The same transcoders with each layer on its device: a new set, or this one if nothing has to move.

        Encoders and decoders that are in the machine's memory or on disk stay there, and their rows are copied to the
        device when needed.
        """
        moved = {layer: _placed(t, devices[layer], self._wide) for layer, t in self._at.items()}
        if all(moved[layer] is self._at[layer] for layer in moved):
            return self
        made = copy(self)
        made._at = moved
        return made

    def sample(self) -> Sample:
        return tuple(entry for layer in self._at for entry in self.layer_sample(layer))

    def layer_sample(self, layer: int) -> Sample:
        """The numbers of :meth:`sample` that are of one layer."""
        t, what = self._at[layer], f"layer {layer} of the dictionary"
        found = [(f"{what} ({t.input_hook} to {t.output_hook})", some_entries(t.W_enc))]
        found.append((f"{what} (its decoder)", some_entries(self._own_decoder(layer))))
        found += [(f"{what} (its {n})", getattr(t, n).detach().norm(dtype=torch.float32)) for n in ("b_enc", "b_dec")]
        return rounded(found)

    def decoder(self, layer: int) -> Float[Tensor, "feature slot d_out"] | Any | None:
        """The decoder of a cross-layer transcoder, whose slot ``j`` writes to ``layer + j``; None if per-layer.

        A tensor, or the matrices of all slots by themselves (``SlotDecoders``).
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
        """Raise DictionaryError unless layers, widths, hooks and the scale of what is read fit the model.

        Published transcoders that read ``mlp.hook_in`` expect the norm's output with its gain applied. If
        TransformerLens has folded the norms (``normalization_type`` ends in "Pre"), the gain is in ``W_in`` instead.
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
            f"{self.name} reads {self.input_hook(layer)} with the norm's gain applied{made_for}, but this model's norms are "
            "folded into its weights. Load the model with fold_ln=False (a bridge: without enable_compatibility_mode, or with "
            "fold_ln=False there). A set trained on the folded model reads input_hook='ln2.hook_normalized', the same tensor."
        )

    def pre_activations(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        t = self._at[layer]
        pre = encoded(t.W_enc, t.normalised(x).reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        self._used(layer, "W_enc", pre, t.W_enc)
        return pre + t.b_enc.to(x.device).float()

    def _used(self, layer: int, name: str, result: Tensor, matrix: Tensor) -> None:
        """After using ``matrix``, which may be mapped from a file: look for NaN in it, and free the pages' memory.

        Only a result with NaN or infinity makes it worth reading the whole matrix. If that is finite, the input was not:
        a run that diverged, about which other code speaks.
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
        t, vectors, bias = self._at[layer], self.encoder_directions(layer, features), take_rows(self._at[layer].b_enc, features)
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


_OPTIONAL = ("W_skip", "threshold", "rank")
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", *_OPTIONAL)


def some_entries(matrix: Float[Tensor, "feature d"]) -> Float[Tensor, "3 2"]:
    """A few numbers of a large matrix, by which it is known again; nothing else of it is read from disk."""
    rows, columns = (spread(size, count).to(matrix.device) for size, count in zip(matrix.shape, (3, 2), strict=True))
    return matrix.detach()[rows[:, None], columns].float()


def to_layer(matrix: Tensor, device: torch.device) -> Tensor:
    """A large matrix moved to its layer's device, unless it is kept in the machine's memory or on disk."""
    return matrix if matrix.device.type == "cpu" else matrix.to(device)


def _placed(transcoder: Transcoder, device: torch.device, wide: Sequence[str]) -> Transcoder:
    tensors = {name: getattr(transcoder, name) for name in (*wide, *_TENSORS[2:])}
    found = {n: to_layer(t, device) if n in wide else t.to(device) for n, t in tensors.items() if t is not None}
    moved: dict[str, Any] = {name: tensor for name, tensor in found.items() if tensor is not tensors[name]}
    return replace(transcoder, **moved) if moved else transcoder


def _to(transcoder: Transcoder, device: torch.device) -> Transcoder:
    tensors = {n: getattr(transcoder, n) for n in _TENSORS}
    moved: dict[str, Any] = {n: None if t is None else t.to(device) for n, t in tensors.items()}
    return replace(transcoder, **moved, forget_pages=None)


def _check_tensors(layer: int, t: Transcoder) -> None:
    for name in _TENSORS:
        tensor = getattr(t, name)
        if not isinstance(tensor, Tensor) and not (tensor is None and name in _OPTIONAL):
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
    for name in ("threshold", "rank"):
        if getattr(t, name) is not None:
            require_shape(layer, name, getattr(t, name), (width,))
    for name in _TENSORS if t.forget_pages is None else _TENSORS[2:]:  # mapped matrices: checked when used
        if getattr(t, name) is not None:
            require_finite(layer, name, getattr(t, name))
    if t.input_hook == t.output_hook and t.W_skip is not None:
        raise DictionaryError(f"layer {layer}: an autoencoder (of {t.input_hook}) has no skip connection; leave W_skip out.")
    if t.normalize not in ("none", "layer_norm", "constant_norm_rescale"):
        raise DictionaryError(
            f"layer {layer}: normalize={t.normalize!r} is not one of none, layer_norm, constant_norm_rescale."
        )
    if t.normalize != "none" and t.input_hook != t.output_hook:
        raise DictionaryError(
            f"layer {layer}: normalize={t.normalize!r} is for autoencoders, and this reads {t.input_hook} and writes "
            f"{t.output_hook}. Fold the normalisation into the weights and set it to 'none'."
        )
    if t.activation not in ("relu", "jumprelu", "topk"):
        raise DictionaryError(
            f"layer {layer}: activation {t.activation!r} is not one of relu, jumprelu, topk."
        )
    if t.activation == "jumprelu" and t.threshold is None:
        raise DictionaryError(f"layer {layer}: a jumprelu transcoder needs a threshold tensor [feature].")
    if t.activation == "topk" and not (isinstance(t.k, int) and 1 <= t.k <= width):
        raise DictionaryError(f"layer {layer}: a topk transcoder needs 1 <= k <= {width}, got k={t.k!r}.")
    if t.rank is not None and (t.activation != "topk" or bool((t.rank <= 0).any())):
        raise DictionaryError(
            f"layer {layer}: rank must be positive and is for activation 'topk' alone, got activation {t.activation!r} and a "
            f"lowest rank of {float(t.rank.min()):.3g}."
        )
