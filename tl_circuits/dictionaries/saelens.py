"""Convert SAELens transcoders to this package's. sae_lens is not imported here, only by whoever made the object."""

from typing import Any

from torch import Tensor

from tl_circuits.dictionaries.transcoders import Activation, Transcoder
from tl_circuits.errors import DictionaryError

ARCHITECTURES: dict[str, Activation] = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


def is_saelens(value: Any) -> bool:
    """Whether ``value`` is an object of the sae_lens package (or a subclass of one)."""
    return any(c.__module__.split(".")[0] == "sae_lens" for c in type(value).__mro__)


def transcoder_from_saelens(
    layer: int, sae: Any, input_hook: str | None = None, output_hook: str | None = None
) -> Transcoder:
    """A SAELens ``Transcoder``, ``SkipTranscoder``, or JumpReLU version of either, as a :class:`Transcoder`.

    Args:
        layer: its layer, for messages and hook names.
        sae: the SAELens object.
        input_hook: used instead of the hook that its metadata names.
        output_hook: the same for what is written.

    Raises:
        DictionaryError: it is no transcoder, or has an unknown activation function or a normalisation at run time.
    """
    cfg = sae.cfg
    architecture = cfg.architecture()
    if architecture not in ARCHITECTURES:
        raise DictionaryError(
            f"layer {layer}: a SAELens {architecture!r} is not a transcoder. It rebuilds the tensor it reads, so "
            "it leaves no linear path through the MLP; use a transcoder, or tlc.mlp_neurons(model)."
        )
    normalise = str(getattr(cfg, "normalize_activations", "none") or "none")
    if normalise != "none":
        raise DictionaryError(
            f"layer {layer}: normalize_activations={normalise!r} depends on the input at run time. Fold it into "
            "the weights first (sae.fold_activation_norm_scaling_factor) and set it to 'none'."
        )
    activation, k = ARCHITECTURES[architecture], None
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
