"""Llamascopium (lm-saes): folders with ``config.json`` (``sae_type``) and ``sae_weights.safetensors``."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import (
    decoder_rows,
    need,
    positive_int,
    read_json,
    require_agreement,
    require_known_fields,
    shaped,
)
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.saelens import relative_hook
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

_WEIGHTS = "sae_weights.safetensors"
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_FIELDS = (
    *("sae_type", "d_model", "expansion_factor", "use_decoder_bias", "act_fn", "top_k", "norm_activation"),
    *("sparsity_include_decoder_norm", "hook_point_in", "hook_point_out", "use_glu_encoder"),
    *("apply_decoder_bias_to_pre_encoder", "jump_relu_threshold"),  # of older versions, where they may be off
)
_HARMLESS = (
    *("dtype", "device", "force_unit_decoder_norm", "jumprelu_threshold_window", "use_triton_kernel"),
    *("sparsity_threshold_for_triton_spmm_kernel", "sae_pretrained_name_or_path", "strict_loading"),
)
_VARIANT = re.compile(r"(\d+x)/(?:k?)(\w+)/[^/]+$")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each folder; its config's hook point says the layer."""
    here, entries = set(repository.paths), []
    for path in repository.paths:
        folder = PurePosixPath(path)
        config_path = str(folder.with_name("config.json"))
        if folder.name != _WEIGHTS or config_path not in here or str(folder.with_name("cfg.json")) in here:
            continue
        config = read_json(repository.local(config_path))
        if "sae_type" not in config:
            continue
        _require_known(repository.local(config_path), config)
        match = re.match(r"blocks\.(\d+)\.", str(config.get("hook_point_in")))
        if match is None:
            raise DictionaryError(
                f"{repository.local(config_path)}: hook_point_in is {config.get('hook_point_in')!r}, expected "
                "blocks.<layer>.<hook>."
            )
        variant = _VARIANT.search(str(folder.parent))
        width, l0 = (variant[1], f"k{variant[2]}") if variant else (None, None)
        entries.append(Entry(int(match[1]), (path, config_path), width, l0))
    return entries


def _require_known(path: Path, config: dict[str, Any]) -> None:
    kind = config["sae_type"]
    if kind != "sae" or config.get("hook_point_in") == config.get("hook_point_out"):
        what = {"clt": "cross-layer transcoder", "lorsa": "Lorsa attention replacement"}.get(kind, "autoencoder")
        raise DictionaryError(
            f"{path}: a llamascopium {what} (sae_type {kind!r}) is recognised but not supported; only its transcoders "
            "are."
        )
    require_known_fields(path, config, _FIELDS, _HARMLESS)
    refused = {
        "apply_decoder_bias_to_pre_encoder": bool(config.get("apply_decoder_bias_to_pre_encoder")),
        "jump_relu_threshold": bool(config.get("jump_relu_threshold")),
        "use_glu_encoder": bool(config.get("use_glu_encoder")),
        "norm_activation": config.get("norm_activation") not in (None, "dataset-wise", "inference"),
        "act_fn": config.get("act_fn") not in ("relu", "jumprelu", "topk"),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise DictionaryError(
                f"{path}: a llamascopium transcoder with {field} {config.get(field)!r} is recognised but not supported."
            )


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer, with its norm factors folded into the weights, so that it works on the model's own tensors.

    These transcoders were trained on scaled tensors: with ``s = √d_model / average norm`` of what is read (``s_in``)
    and of what is written (``s_out``), ``h = s_in x W_E + b_E`` and ``y = (act(h) W_D + b_D) / s_out``. Divided by
    ``s_in``, the activations are those of the encoder ``W_E`` with bias ``b_E / s_in`` and threshold ``θ / s_in``, and
    the decoder is ``W_D s_in / s_out``. With ``sparsity_include_decoder_norm``, ``act(h)`` is ``act(h n) / n``, where
    ``n`` is the norm of each feature's row of ``W_D``: it divides a threshold, and TopK compares ``h n``.
    """
    path, config_path = (repository.local(file) for file in entry.files)
    config, file = read_json(config_path), MappedFile(path)
    W_E, b_E, W_D = need(path, file, "W_E", "b_E", "W_D")
    width = b_E.numel()
    d_model = shaped(path, "W_E", W_E, (None, width)).shape[0]
    require_agreement(config_path, "d_model", config.get("d_model"), d_model)
    if config.get("expansion_factor") is not None:
        said = int(d_model * float(config["expansion_factor"]))
        require_agreement(config_path, "d_model x expansion_factor", said, width)
    biased = config.get("use_decoder_bias", True)
    b_D = need(path, file, "b_D")[0] if biased else torch.zeros(d_model, dtype=b_E.dtype)
    s_in, s_out = (_scale(path, file, config, side, d_model) for side in ("hook_point_in", "hook_point_out"))
    rows = decoder_rows(path, W_D, width, d_model)
    activation, threshold, rank = config["act_fn"], None, None
    norms = (
        rows.float().norm(dim=1) if activation != "relu" and config.get("sparsity_include_decoder_norm", True) else None
    )
    if activation == "jumprelu":
        (log_threshold,) = need(path, file, _LOG_THRESHOLD)
        threshold = shaped(path, _LOG_THRESHOLD, log_threshold, (width,)).float().exp() / s_in
        threshold = threshold if norms is None else threshold / norms
    elif activation == "topk" and norms is not None:
        rank = norms.clamp_min(torch.finfo(torch.float32).tiny)  # a feature that writes nothing is chosen last
    scaled = s_in != 1.0 or s_out != 1.0
    return LayerWeights(
        Transcoder(
            W_enc=W_E.T,
            W_dec=torch.empty(rows.shape, dtype=rows.dtype, device="meta") if scaled else rows,
            b_enc=b_E / s_in if scaled else b_E,
            b_dec=b_D / s_out if scaled else b_D,
            threshold=threshold,
            activation=activation,
            k=positive_int(config_path, "top_k", config.get("top_k")) if activation == "topk" else None,
            input_hook=hints.input_hook or relative_hook(entry.layer, "hook_point_in", config["hook_point_in"]),
            output_hook=hints.output_hook or relative_hook(entry.layer, "hook_point_out", config.get("hook_point_out")),
            rank=rank,
            forget_pages=file.forget_pages,
        ),
        make=(lambda: {"W_dec": rows * (s_in / s_out)}) if scaled else None,
    )


def _scale(path: Path, file: MappedFile, config: dict[str, Any], side: str, d_model: int) -> float:
    """The factor ``√d_model / average norm`` of what is read or written; 1 if it is in the weights already."""
    if config.get("norm_activation") != "dataset-wise":
        return 1.0
    name = f"dataset_average_activation_norm.{config[side]}"
    (norm,) = need(path, file, name)
    value = float(norm)
    if not 0 < value < float("inf"):
        raise DictionaryError(f"{path}: {name} is {value}, expected a positive number.")
    return d_model**0.5 / value


LAYOUT = Layout("llamascopium (config.json with sae_type)", find, read)
