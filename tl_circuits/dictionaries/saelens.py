"""Convert SAELens transcoders and autoencoders to this package's.

sae_lens is not imported here, only by whoever made the object."""

import re
from typing import Any, Literal

import torch
from torch import Tensor

from tl_circuits.dictionaries.base import require_finite
from tl_circuits.dictionaries.transcoder import Activation, Transcoder
from tl_circuits.errors import DictionaryError

ARCHITECTURES: dict[str, Activation] = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""SAELens' transcoders, with their activation functions."""

AUTOENCODERS = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
"""SAELens' autoencoders that can be converted."""

_NORMALISED: dict[str, Literal["none", "layer_norm", "constant_norm_rescale"]] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
}


def is_saelens(value: Any) -> bool:
    """Whether ``value`` is an object of the sae_lens package (or a subclass of one)."""
    return any(c.__module__.split(".")[0] == "sae_lens" for c in type(value).__mro__)


def from_saelens(layer: int, sae: Any, input_hook: str | None = None, output_hook: str | None = None) -> Transcoder:
    """A SAELens transcoder or autoencoder as a :class:`Transcoder`, with the same activations and reconstruction.

    Args:
        layer: its layer, for messages and hook names.
        sae: the SAELens object.
        input_hook: used instead of the hook that its metadata names.
        output_hook: the same for what is written.

    Raises:
        DictionaryError: its architecture, activation function or normalisation is not known, or it is for one head
            only.
    """
    architecture = sae.cfg.architecture()
    if architecture in ARCHITECTURES:
        return _transcoder(layer, sae, input_hook, output_hook)
    if architecture not in AUTOENCODERS:
        raise DictionaryError(
            f"layer {layer}: a SAELens {architecture!r} cannot be opened; these can: "
            f"{', '.join((*ARCHITECTURES, *AUTOENCODERS))}."
        )
    if input_hook and output_hook and input_hook != output_hook:
        raise DictionaryError(
            f"layer {layer}: an autoencoder writes where it reads, but input_hook is {input_hook!r} and output_hook "
            f"{output_hook!r}."
        )
    return _autoencoder(layer, sae, architecture, input_hook or output_hook)


def _transcoder(layer: int, sae: Any, input_hook: str | None, output_hook: str | None) -> Transcoder:
    cfg = sae.cfg
    normalise = str(getattr(cfg, "normalize_activations", "none") or "none")
    if normalise != "none":
        raise DictionaryError(
            f"layer {layer}: normalize_activations={normalise!r} depends on the input at run time. Fold it into "
            "the weights first (sae.fold_activation_norm_scaling_factor) and set it to 'none'."
        )
    activation, k = ARCHITECTURES[cfg.architecture()], None
    kind = type(sae.activation_fn).__name__
    if kind == "TopK":
        activation, k = "topk", int(sae.activation_fn.k)
    elif kind != "ReLU":
        raise DictionaryError(f"layer {layer}: activation function {kind} is not ReLU or TopK.")
    return Transcoder(
        W_enc=_tensor(sae.W_enc).T,
        W_dec=_tensor(sae.W_dec),
        b_enc=_tensor(sae.b_enc),
        b_dec=_tensor(sae.b_dec),
        W_skip=_tensor(sae.W_skip) if hasattr(sae, "W_skip") else None,
        threshold=_tensor(sae.threshold) if activation == "jumprelu" else None,
        activation=activation,
        k=k,
        input_hook=input_hook or _input_hook(layer, cfg.metadata),
        output_hook=output_hook
        or relative_hook(layer, "hook_name_out", cfg.metadata.hook_name_out or cfg.metadata.hook_name),
    )


def _autoencoder(layer: int, sae: Any, architecture: str, hook: str | None) -> Transcoder:
    cfg, metadata = sae.cfg, sae.cfg.metadata
    hook = hook or relative_hook(layer, "hook_name", metadata.hook_name)
    if metadata.hook_head_index is not None:
        raise DictionaryError(
            f"layer {layer}: this autoencoder is of head {metadata.hook_head_index} alone; those of a whole tensor "
            "can be opened."
        )
    normalize = str(getattr(cfg, "normalize_activations", "none") or "none")
    if normalize not in _NORMALISED:
        raise DictionaryError(
            f"layer {layer}: normalize_activations={normalize!r} was done with numbers of the training set that the "
            "object does not hold. Fold them into the weights first (sae.fold_activation_norm_scaling_factor or "
            "fold_activation_whitening)."
        )
    W_enc, W_dec, b_dec = (_tensor(part) for part in (sae.W_enc, sae.W_dec, sae.b_dec))
    found = _activation(layer, sae, architecture, W_enc.T)
    if cfg.apply_b_dec_to_input:
        require_finite(layer, "b_dec", b_dec)  # before it makes the encoder's bias NaN, which is not at fault
        # The encoder reads x - b_dec; both are linear, so this is a part of its bias.
        found["b_enc"] = found["b_enc"].float() - found["W_enc"].float() @ b_dec.float()
    return Transcoder(
        **{"W_dec": W_dec, **found}, b_dec=b_dec, input_hook=hook, output_hook=hook, normalize=_NORMALISED[normalize]
    )


def _activation(layer: int, sae: Any, architecture: str, W_enc: Tensor) -> dict[str, Any]:
    """Encoder, its bias, threshold and k of an autoencoder; its decoder as well where that is not the object's own."""
    if architecture == "gated":
        return _gated(sae, W_enc)
    found: dict[str, Any] = {"W_enc": W_enc, "b_enc": _tensor(sae.b_enc)}
    if architecture == "standard":
        kind = type(sae.activation_fn).__name__
        if kind != "ReLU":
            raise DictionaryError(f"layer {layer}: activation function {kind} of a 'standard' autoencoder is not ReLU.")
        return found
    if architecture == "jumprelu":
        return found | {"activation": "jumprelu", "threshold": _tensor(sae.threshold)}
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        # In training k counts over a batch. SAELens saves such a model as JumpReLU with the threshold that it learned.
        threshold = float(sae.topk_threshold)
        if not threshold > 0:
            raise DictionaryError(
                f"layer {layer}: this {architecture!r} has learned no threshold yet (topk_threshold is "
                f"{threshold:g}), so which features are active on a single prompt is not defined. Train it further, "
                "or save it for inference."
            )
        found |= {"activation": "jumprelu", "threshold": torch.full_like(found["b_enc"], threshold)}
    else:
        found |= {"activation": "topk", "k": int(sae.cfg.k)}
    return _rescaled(sae, found) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else found


def _rescaled(sae: Any, found: dict[str, Any]) -> dict[str, Any]:
    """With the decoder's norms folded into the encoder, as if every decoder vector had length one."""
    W_dec = _tensor(sae.W_dec).float()
    norm = W_dec.norm(dim=-1)
    W_enc, b_enc = found["W_enc"].float() * norm[:, None], found["b_enc"].float() * norm
    return found | {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec / norm.clamp_min(1e-30)[:, None]}


def _gated(sae: Any, W_enc: Tensor) -> dict[str, Any]:
    """A gated autoencoder as JumpReLU (Rajamanoharan et al. 2024, "Jumping ahead", appendix).

    Gate ``π = x·w + b_gate`` and magnitude ``m = x·w·exp(r) + b_mag`` depend on the same ``x·w``. So ``π > 0`` is the
    same as ``m > b_mag - b_gate·exp(r)``, and the activation is ``max(m, 0)`` there.
    """
    scale = _tensor(sae.r_mag).float().exp()
    b_mag, b_gate = _tensor(sae.b_mag).float(), _tensor(sae.b_gate).float()
    return {
        "W_enc": W_enc.float() * scale[:, None],
        "b_enc": b_mag,
        "activation": "jumprelu",
        "threshold": b_mag - b_gate * scale,
    }


def _input_hook(layer: int, metadata: Any) -> str:
    """The hook that is read.

    SAELens names ``hook_mlp_in`` for Gemma Scope 2, which is the stream before the norm; but the Hugging Face name in
    the same metadata says the norm's output, and that is right.
    """
    short = relative_hook(layer, "hook_name", metadata.hook_name)
    after_norm = str(metadata.hf_hook_name).endswith("pre_feedforward_layernorm.output")
    return "mlp.hook_in" if short == "hook_mlp_in" and after_norm else short


def _tensor(parameter: Tensor) -> Tensor:
    return parameter.detach()


def relative_hook(layer: int, field: str, hook: Any) -> str:
    """A hook's name within its block; DictionaryError if metadata's ``field`` names a hook of another layer."""
    prefix = f"blocks.{layer}."
    if not isinstance(hook, str) or not hook.startswith(prefix):
        raise DictionaryError(
            f"layer {layer}: metadata.{field} is {hook!r}, expected a hook of this layer, starting with {prefix!r}."
        )
    return hook[len(prefix) :]


def layer_of_saelens(sae: Any) -> int:
    """The layer of a SAELens object, by the hook that its metadata names.

    Raises:
        DictionaryError: the hook is of no block.
    """
    hook = sae.cfg.metadata.hook_name
    match = re.match(r"blocks\.(\d+)\.", str(hook))
    if match is None:
        raise DictionaryError(
            f"the SAELens object's metadata.hook_name is {hook!r}, expected a hook of a block, such as "
            "blocks.8.hook_resid_pre."
        )
    return int(match[1])
