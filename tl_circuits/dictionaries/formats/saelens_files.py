"""SAELens' own layout: folders with ``cfg.json`` and ``sae_weights.safetensors``."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import (
    decoder_rows,
    need,
    read_json,
    require_agreement,
    require_known_fields,
    shaped,
    valid_threshold,
)
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.saelens import ARCHITECTURES, AUTOENCODERS, relative_hook
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

_WEIGHTS = "sae_weights.safetensors"
_FIELDS = (
    *("architecture", "d_in", "d_out", "d_sae", "apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    *("hook_name", "hook_name_out", "model_name", "metadata"),
)
_HARMLESS = ("dtype", "device", "sae_lens_version", "sae_lens_training_version", "neuronpedia_id", "prepend_bos")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each folder; the layer is in its config's hook name."""
    here, entries = set(repository.paths), []
    for path in repository.paths:
        folder = PurePosixPath(path)
        config = str(folder.with_name("cfg.json"))
        if folder.name == _WEIGHTS and config in here:
            where = repository.local(config)
            entries.append(Entry(_layer(where, read_json(where)), (path, config)))
    return entries


def _layer(path: Path, config: dict[str, Any]) -> int:
    _require_transcoder(path, config)
    hook = _field(config, "hook_name")
    match = re.match(r"blocks\.(\d+)\.", str(hook))
    if match is None:
        raise DictionaryError(f"{path}: metadata.hook_name is {hook!r}, expected blocks.<layer>.<hook>.")
    return int(match[1])


def _field(config: dict[str, Any], name: str) -> Any:
    metadata = config.get("metadata")
    return metadata.get(name) if isinstance(metadata, dict) and name in metadata else config.get(name)


def _require_transcoder(path: Path, config: dict[str, Any]) -> None:
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise DictionaryError(f"{path}: {_why_neither(config, architecture)}")
    require_known_fields(path, config, _FIELDS, _HARMLESS)
    if config.get("reshape_activations") not in (None, "none"):
        raise DictionaryError(
            f"{path}: reshape_activations is {config['reshape_activations']!r}; transcoders are read with 'none'."
        )
    if config.get("apply_b_dec_to_input"):
        raise DictionaryError(f"{path}: apply_b_dec_to_input is true, which no transcoder of SAELens can have.")
    normalise = config.get("normalize_activations") or "none"
    if normalise != "none":
        raise DictionaryError(
            f"{path}: normalize_activations is {normalise!r}, which depends on the input at run time. Fold it into the "
            "weights first (sae.fold_activation_norm_scaling_factor) and save again."
        )


def _why_neither(config: dict[str, Any], architecture: Any) -> str:
    """Why a config without a transcoder's architecture was not taken for an autoencoder's either."""
    if architecture is not None and architecture not in AUTOENCODERS:
        return (
            f"architecture {architecture!r} cannot be opened; these can: {', '.join((*ARCHITECTURES, *AUTOENCODERS))}."
        )
    hook = _field(config, "hook_name") or config.get("hook_point")
    out = _field(config, "hook_name_out")
    if out not in (None, hook):
        return f"an autoencoder writes where it reads, but hook_name is {hook!r} and hook_name_out {out!r}."
    if re.match(r"blocks\.\d+\.", str(hook)) is None:
        return f"hook_name is {hook!r}, expected a hook of TransformerLens, blocks.<layer>.<hook>."
    return (
        "this is an autoencoder, and other folders beside it are not. Open each by its own folder, and give a list "
        "of both."
    )


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer. ``W_enc`` is stored as ``[d_in, feature]``, a skip connection as ``[d_out, d_in]``."""
    path, config_path = (repository.local(file) for file in entry.files)
    config, file = read_json(config_path), MappedFile(path)
    W_enc, W_dec, b_enc, b_dec = need(path, file, "W_enc", "W_dec", "b_enc", "b_dec")
    width, d_out = b_enc.numel(), b_dec.numel()
    d_in = shaped(path, "W_enc", W_enc, (None, width)).shape[0]
    architecture = config["architecture"]
    activation = ARCHITECTURES[architecture]
    require_agreement(config_path, "d_sae", config.get("d_sae"), width)
    require_agreement(config_path, "d_in", config.get("d_in"), d_in)
    require_agreement(config_path, "d_out", config.get("d_out"), d_out)
    threshold = None
    if activation == "jumprelu":
        threshold = valid_threshold(path, "threshold", need(path, file, "threshold")[0], width)
    if "skip" in architecture:
        shaped(path, "W_skip", need(path, file, "W_skip")[0], (d_out, d_in))
    read_hook = _field(config, "hook_name")
    return LayerWeights(
        Transcoder(
            W_enc=W_enc.T,
            W_dec=decoder_rows(path, W_dec, width, d_out),
            b_enc=b_enc,
            b_dec=b_dec,
            W_skip=file["W_skip"] if "skip" in architecture else None,
            threshold=threshold,
            activation=activation,
            input_hook=hints.input_hook or relative_hook(entry.layer, "hook_name", read_hook),
            output_hook=hints.output_hook
            or relative_hook(entry.layer, "hook_name_out", _field(config, "hook_name_out") or read_hook),
            forget_pages=file.forget_pages,
        )
    )


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the layer's config."""
    name = _field(read_json(repository.local(entry.files[1])), "model_name")
    return name if isinstance(name, str) else None


LAYOUT = Layout("SAELens (cfg.json, sae_weights.safetensors)", find, read, model)
