"""Autoencoders in SAELens' own layout: folders with ``cfg.json`` and ``sae_weights.safetensors``.

SAELens has changed its configs several times, so its own loader reads them; the object is then converted. That loader
drops what it does not know, so what a config says is compared first with what SAELens' own classes take.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import read_json, require_known_fields
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.saelens import AUTOENCODERS, from_saelens
from tl_circuits.errors import DictionaryError

_WEIGHTS = "sae_weights.safetensors"
_BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
# What SAELens wrote beside the fields of its classes until version 6, and where it came from.
_EARLIER = (
    *(
        "architecture",
        "hook_point",
        "hook_point_layer",
        "hook_point_head_index",
        "hook_name",
        "hook_name_out",
        "hook_layer",
    ),
    *(
        "hook_layer_out",
        "hook_head_index",
        "activation_fn",
        "activation_fn_str",
        "activation_fn_kwargs",
        "finetuning_scaling_factor",
    ),
    *(
        "metadata",
        "model_name",
        "model_class_name",
        "model_from_pretrained_kwargs",
        "prepend_bos",
        "context_size",
        "seqpos_slice",
    ),
    *(
        "ignore_tokens",
        "dataset_path",
        "dataset_trust_remote_code",
        "sae_lens_version",
        "sae_lens_training_version",
        "neuronpedia_id",
    ),
    *("from_pretrained_path", "hf_hook_name", "exclude_special_tokens"),
)
# What version 5 wrote of a training: it changes how weights were found, not what they mean.
_TRAINING = (
    *(
        "l1_coefficient",
        "lp_norm",
        "use_ghost_grads",
        "normalize_sae_decoder",
        "noise_scale",
        "decoder_orthogonal_init",
    ),
    *("mse_loss_normalization", "jumprelu_init_threshold", "jumprelu_bandwidth", "decoder_heuristic_init"),
    *("decoder_heuristic_init_norm", "init_encoder_as_decoder_transpose", "scale_sparsity_penalty_by_decoder_norm"),
)


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each folder, if all of them hold autoencoders; the layer is in the config's hook name."""
    here, entries = set(repository.paths), []
    for path in repository.paths:
        config = str(PurePosixPath(path).with_name("cfg.json"))
        if PurePosixPath(path).name != _WEIGHTS or config not in here:
            continue
        found = read_json(repository.local(config))
        match = re.match(r"blocks\.(\d+)\.", str(_hook(found)))
        if not _is_autoencoder(found) or match is None:
            return []
        entries.append(Entry(int(match[1]), (path, config), site=_hook(found)[match.end() :]))
    return entries


def _hook(config: dict[str, Any], name: str = "hook_name") -> Any:
    metadata = config.get("metadata")
    found = metadata if isinstance(metadata, dict) and name in metadata else config
    return found.get(name, config.get("hook_point") if name == "hook_name" else None)


def _is_autoencoder(config: dict[str, Any]) -> bool:
    """Whether a config is of an autoencoder. The oldest say no architecture; then it is the standard one."""
    return config.get("architecture", "standard") in AUTOENCODERS and _hook(config, "hook_name_out") in (
        None,
        _hook(config),
    )


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer, by SAELens' loader."""
    path, config = (repository.local(file) for file in entry.files)
    try:
        from sae_lens.saes.sae import SAE
    except ImportError as error:
        raise DictionaryError(
            f"{path} is a SAELens autoencoder, and reading it needs sae_lens: pip install sae_lens"
        ) from error
    _require_understood(config, read_json(config))
    try:
        sae = SAE.load_from_disk(path.parent)
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:400]
        raise DictionaryError(f"{path.parent}: SAELens cannot open this autoencoder: {said}") from error
    return LayerWeights(from_saelens(entry.layer, sae, hints.input_hook, hints.output_hook))


def _require_understood(path: Path, config: dict[str, Any]) -> None:
    """Refuse what SAELens' loader would drop, take for a default, or does not know.

    Configs without an architecture are the oldest. They hold all of a training's options, so of these only the
    activation function is compared.
    """
    from sae_lens.registry import get_sae_class, get_sae_training_class

    architecture = config.get("architecture", "standard")
    if architecture in _BATCH_TOPK:
        raise DictionaryError(
            f"{path}: a {architecture!r} saved in training, of which k counts over a batch. Save it with "
            "save_inference_model(), or open it with SAELens and give the object."
        )
    if "architecture" in config:
        classes = get_sae_class(architecture)[1], get_sae_training_class(architecture)[1]
        own = {field.name for one in classes for field in fields(one)}
        require_known_fields(path, config, own | {*_EARLIER}, _TRAINING)
    kind = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    more = config.get("activation_fn_kwargs")
    has_k = "k" in config or (isinstance(more, dict) and "k" in more)
    if kind != "relu" and not (kind == "topk" and has_k):
        raise DictionaryError(f"{path}: the activation function is {kind!r}, expected 'relu', or 'topk' with its k.")
    if architecture == "topk" and not has_k:
        raise DictionaryError(f"{path}: k is missing, how many features are active at once.")
    if config.get("finetuning_scaling_factor"):
        raise DictionaryError(
            f"{path}: finetuning_scaling_factor is set: the activations are multiplied by numbers that SAELens no "
            "longer reads. Multiply the decoder's rows by them and save again without it."
        )


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the layer's config."""
    name = _hook(read_json(repository.local(entry.files[1])), "model_name")
    return name if isinstance(name, str) else None


LAYOUT = Layout("SAELens autoencoders (cfg.json, sae_weights.safetensors)", find, read, model)
