"""Gemma Scope 2: ``…/layer_{l}_width_{w}_l0_{x}[_affine]/{config.json,params.safetensors}``.

Cross-layer ones are ``…/width_{w}_l0_{x}[_affine]/params_layer_{l}.safetensors``.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

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
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

_PER_LAYER = re.compile(r"(?:.*/)?layer_(\d+)_width_([^_/]+)_l0_([^/]+)/params\.safetensors")
_CROSS = re.compile(r"(?:(?:.*/)?width_([^_/]+)_l0_([^/]+)/)?params_layer_(\d+)\.safetensors")
_BARE = re.compile(r"(?:.*/)?params\.safetensors")
_FIELDS = ("affine_connection", "architecture", "hf_hook_point_in", "hf_hook_point_out", "model_name", "type", "width")
_HARMLESS = ("l0",)
_HOOKS = {
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each layer and variant."""
    entries = []
    for path in repository.paths:
        if m := _PER_LAYER.fullmatch(path):
            entries.append(Entry(int(m[1]), _with_config(repository, path), m[2], m[3]))
        elif m := _CROSS.fullmatch(path):
            entries.append(Entry(int(m[3]), (path,), m[1], m[2]))
    kinds = {_CROSS.fullmatch(entry.files[0]) is not None for entry in entries}
    if len(kinds) > 1 or len({PurePosixPath(e.files[0]).parts[:-2] for e in entries}) > 1:
        folders = sorted({"/".join(PurePosixPath(e.files[0]).parts[:-2]) for e in entries})
        raise DictionaryError(
            f"{repository.name} holds several sets; name one with its folder: "
            + ", ".join(f"{repository.name}/{folder}" for folder in folders)
        )
    return entries


def _with_config(repository: Repository, path: str) -> tuple[str, ...]:
    config = str(PurePosixPath(path).with_name("config.json"))
    return (path, config) if config in repository.paths else (path,)


def is_file_of(path: str) -> bool:
    """Whether a file that another repository's config names has this layout."""
    return bool(_BARE.fullmatch(path) or _CROSS.fullmatch(path))


def entry_for(layer: int, path: str) -> Entry:
    """The entry for a file that another repository's config names."""
    cross = _CROSS.fullmatch(path)
    return Entry(int(cross[3]) if cross else layer, (path,))


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer. It reads the MLP's norm with the gain applied, and writes what is added to the residual stream."""
    path = repository.local(entry.files[0])
    file = MappedFile(path)
    w_enc, w_dec, b_enc, b_dec, threshold = need(path, file, "w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    width, d_out = b_enc.numel(), b_dec.numel()
    d_in = shaped(path, "w_enc", w_enc, (None, width)).shape[0]
    affine = file.get("affine_skip_connection")
    if affine is not None:
        shaped(path, "affine_skip_connection", affine, (d_in, d_out))
    config = read_json(repository.local(entry.files[1])) if len(entry.files) > 1 else {}
    if config:
        where = repository.local(entry.files[1])
        require_known_fields(where, config, _FIELDS, _HARMLESS)
        require_agreement(where, "width", config.get("width"), width)
        require_agreement(where, "affine_connection", config.get("affine_connection"), affine is not None)
        require_agreement(where, "architecture", config.get("architecture"), "jump_relu")
        if config.get("type") not in (None, "transcoder", "clt", "crosscoder_transcoder"):
            raise DictionaryError(
                f"{where}: type is {config['type']!r}, not a transcoder. Autoencoders of Gemma Scope 2 are opened by "
                "their release in SAELens (tlc.load_dictionary('gemma-scope-2-...')); transcoders are in the "
                "repository's folder transcoder_all."
            )
    cross = w_dec.ndim == 3
    # The decoder's second axis is the layer written to, from 0; a feature writes to its own and later ones.
    decoder = shaped(path, "w_dec", w_dec, (width, None, d_out))[:, entry.layer :] if cross else None
    transcoder = Transcoder(
        W_enc=w_enc.T,
        W_dec=decoder[:, 0] if decoder is not None else decoder_rows(path, w_dec, width, d_out),
        b_enc=b_enc,
        b_dec=b_dec,
        W_skip=None if affine is None else affine.T,
        threshold=valid_threshold(path, "threshold", threshold, width),
        activation="jumprelu",
        input_hook=hints.input_hook or _hook(config, "hf_hook_point_in", entry.layer, "mlp.hook_in"),
        output_hook=hints.output_hook or _hook(config, "hf_hook_point_out", entry.layer, "hook_mlp_out"),
        forget_pages=file.forget_pages,
    )
    return LayerWeights(transcoder, decoder)


def _hook(config: dict, field: str, layer: int, default: str) -> str:
    said = config.get(field)
    if said is None:
        return default
    prefix = f"model.layers.{layer}."
    known = _HOOKS.get(str(said).removeprefix(prefix))
    if known is None or not str(said).startswith(prefix):
        raise DictionaryError(
            f"layer {layer}: config.json's {field} is {said!r}, expected {prefix} and one of {', '.join(_HOOKS)}."
        )
    return known


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the layer's config."""
    if len(entry.files) < 2:
        return None
    name = read_json(repository.local(entry.files[1])).get("model_name")
    return name if isinstance(name, str) else None


LAYOUT = Layout("Gemma Scope 2 (safetensors)", find, read, model)
