"""One layer's transcoder or autoencoder, given as tensors, and what is checked of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.base import require_finite, require_shape
from tl_circuits.dictionaries.matrices import to_layer
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import is_whole, shown, whole

OPTIONAL = ("W_skip", "threshold", "rank")
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", *OPTIONAL)

Activation = Literal["relu", "jumprelu", "topk"]


@dataclass(frozen=True, eq=False)
class Transcoder:
    """A transcoder or autoencoder of one layer, given as tensors.

    It predicts ``y``, such as an MLP's output, from ``x``, such as the MLP's input:
    ``y = act(x W_encᵀ + b_enc) W_dec + b_dec``, plus ``x W_skipᵀ`` if there is a skip connection (Dunefsky et al. 2024,
    "Transcoders find interpretable LLM feature circuits"; skip: Paulo et al. 2025). Make a dictionary of several with
    ``tlc.load_transcoders({layer: transcoder})``. If ``input_hook`` and ``output_hook`` are the same, it is an
    autoencoder of that tensor: of the residual stream (``hook_resid_pre``, ``hook_resid_mid``, ``hook_resid_post``), of
    what attention or the MLP add to it (``hook_attn_out``, ``hook_mlp_out``), or of all heads one after the other
    (``attn.hook_z``).

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
        normalize: what is done to ``x`` first and undone on ``y``, for autoencoders: ``"layer_norm"`` subtracts the
            mean and divides by the standard deviation, ``"constant_norm_rescale"`` divides by the root mean square; or
            ``"none"``.
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
        """What the encoder's matrix reads: the input after what ``normalize`` asks for.

        Args:
            x: inputs ``[..., d_in]``.

        Returns:
            A float32 tensor of the same shape; the input itself if ``normalize`` is ``"none"``.
        """
        x = x.float()
        if self.normalize == "none":
            return x
        centred = x - x.mean(-1, keepdim=True) if self.normalize == "layer_norm" else x
        return centred * self.input_factor(x)

    def input_factor(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
        """The factor by which an input is multiplied: one over its standard deviation or root mean square.

        Args:
            x: inputs ``[..., d_in]`` of an autoencoder whose ``normalize`` is not ``"none"``.

        Returns:
            A float32 tensor ``[..., 1]``.
        """
        if self.normalize == "layer_norm":  # as SAELens has it: the unbiased estimate, and 1e-5 only on this side
            return 1.0 / (x.float().std(-1, keepdim=True) + 1e-5)
        return x.shape[-1] ** 0.5 / x.float().norm(dim=-1, keepdim=True)

    def output_factor(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
        """The factor by which a reconstruction is multiplied, to have the size of ``x`` again.

        Args:
            x: inputs ``[..., d_in]`` of an autoencoder whose ``normalize`` is not ``"none"``.

        Returns:
            A float32 tensor ``[..., 1]``.
        """
        return x.float().std(-1, keepdim=True) if self.normalize == "layer_norm" else 1.0 / self.input_factor(x)

    def activate(self, pre: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations from pre-activations.

        Args:
            pre: pre-activations ``[..., feature]``, the encoder's bias included.

        Returns:
            A tensor of the same shape; 0 where a feature is not active.

        Raises:
            DictionaryError: if ``activation`` is ``"topk"`` and ``k`` is None, or ``"jumprelu"`` and ``threshold`` is
                None.
        """
        if self.activation != "topk":
            return self.gate(pre, self.threshold)
        if self.k is None:
            raise DictionaryError(
                'activation is "topk", but k is None; give k=..., how many features are active on a token.'
            )
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
        """Activations of some features alone, for ReLU and JumpReLU: there one does not depend on the others.

        Args:
            pre: their pre-activations ``[..., some]``.
            threshold: their thresholds ``[some]``; None for ReLU, which has none.

        Returns:
            A tensor of the shape of ``pre``.

        Raises:
            DictionaryError: if ``threshold`` is None and ``activation`` is not ``"relu"``.
        """
        if self.activation == "relu":
            return pre.relu()
        if threshold is None:
            raise DictionaryError(
                f"activation is {self.activation!r}, but threshold is None; give threshold=..., one number a feature."
            )
        return (pre.relu() if self.clamp else pre) * (pre > threshold.to(pre.device))


def placed_on(transcoder: Transcoder, device: torch.device, wide: Sequence[str]) -> Transcoder:
    """The same transcoder on a device; ``wide`` matrices in the machine's memory or on disk stay where they are."""
    tensors = {name: getattr(transcoder, name) for name in (*wide, *TENSORS[2:])}
    found = {n: to_layer(t, device) if n in wide else t.to(device) for n, t in tensors.items() if t is not None}
    moved: dict[str, Any] = {name: tensor for name, tensor in found.items() if tensor is not tensors[name]}
    return replace(transcoder, **moved) if moved else transcoder


def moved_to(transcoder: Transcoder, device: torch.device) -> Transcoder:
    """The same transcoder with all its tensors on a device."""
    tensors = {n: getattr(transcoder, n) for n in TENSORS}
    moved: dict[str, Any] = {n: None if t is None else t.to(device) for n, t in tensors.items()}
    return replace(transcoder, **moved, forget_pages=None)


def check_tensors(layer: int, t: Transcoder) -> None:
    """Raise DictionaryError or NotFiniteError where the tensors of a layer do not fit each other or their settings."""
    for name in TENSORS:
        tensor = getattr(t, name)
        if not isinstance(tensor, Tensor) and not (tensor is None and name in OPTIONAL):
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
    for name in TENSORS if t.forget_pages is None else TENSORS[2:]:  # mapped matrices: checked when used
        if getattr(t, name) is not None:
            require_finite(layer, name, getattr(t, name))
    if t.input_hook == t.output_hook and t.W_skip is not None:
        raise DictionaryError(
            f"layer {layer}: an autoencoder (of {t.input_hook}) has no skip connection; leave W_skip out."
        )
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
        raise DictionaryError(f"layer {layer}: activation {t.activation!r} is not one of relu, jumprelu, topk.")
    if t.activation == "jumprelu" and t.threshold is None:
        raise DictionaryError(f"layer {layer}: a jumprelu transcoder needs a threshold tensor [feature].")
    if t.activation == "topk" and not (isinstance(t.k, int) and 1 <= t.k <= width):
        raise DictionaryError(f"layer {layer}: a topk transcoder needs 1 <= k <= {width}, got k={t.k!r}.")
    if t.rank is not None and (t.activation != "topk" or bool((t.rank <= 0).any())):
        raise DictionaryError(
            f"layer {layer}: rank must be positive and is for activation 'topk' alone, got activation "
            f"{t.activation!r} and a lowest rank of {float(t.rank.min()):.3g}."
        )
