"""Transcoders saved as SAELens' autoencoders, as in ARENA's course: ``callummcdougall/arena-demos-transcoder``.

SAELens had no transcoders then, so the config says ``architecture: standard`` and names only the hook that is read. The
folder's name, such as ``gpt2-small-layer-8-mlp-transcoder-folded-b_dec_out``, says what they are: the course reads
``ln2.hook_normalized`` and predicts ``hook_mlp_out``. "Folded" means that the bias subtracted from the input is in
``b_enc``, and ``b_dec`` is that of the output.
"""

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
)
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

_FOLDER = re.compile(r".*layer-(\d+)-mlp-transcoder(-folded-b_dec_out)?")
_FIELDS = (
    *("architecture", "d_in", "d_sae", "model_name", "hook_name", "hook_layer", "hook_head_index", "activation_fn_str"),
    *(
        "activation_fn_kwargs",
        "apply_b_dec_to_input",
        "finetuning_scaling_factor",
        "normalize_activations",
        "use_b_dec_out",
    ),
)
_HARMLESS = (
    *("dtype", "device", "sae_lens_training_version", "prepend_bos", "dataset_path", "dataset_trust_remote_code"),
    *("context_size", "neuronpedia_id", "model_from_pretrained_kwargs"),
)


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each folder with such a name. Layer 8 is also there unfolded, and then left out."""
    here, found = set(repository.paths), []
    for path in repository.paths:
        folder, config = PurePosixPath(path), str(PurePosixPath(path).with_name("cfg.json"))
        match = _FOLDER.fullmatch(folder.parent.name or repository.name)
        if folder.name == "sae_weights.safetensors" and config in here and match:
            found.append((bool(match[2]), Entry(int(match[1]), (path, config))))
    folded = {entry.layer for is_folded, entry in found if is_folded}
    return [entry for is_folded, entry in found if is_folded or entry.layer not in folded]


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer: ``y = ReLU(x W_enc + b_enc) W_dec + b_dec``, with ``W_enc`` stored as ``[d_in, feature]``."""
    path, config_path = (repository.local(file) for file in entry.files)
    config, file = read_json(config_path), MappedFile(path)
    _require_plain(config_path, config, entry.layer)
    W_enc, W_dec, b_enc, b_dec = need(path, file, "W_enc", "W_dec", "b_enc", "b_dec")
    width = b_enc.numel()
    d_in = shaped(path, "W_enc", W_enc, (None, width)).shape[0]
    require_agreement(config_path, "d_sae", config.get("d_sae"), width)
    require_agreement(config_path, "d_in", config.get("d_in"), d_in)
    return LayerWeights(
        Transcoder(
            W_enc=W_enc.T,
            W_dec=decoder_rows(path, W_dec, width, b_dec.numel()),
            b_enc=b_enc,
            b_dec=b_dec,
            input_hook=hints.input_hook or "ln2.hook_normalized",
            output_hook=hints.output_hook or "hook_mlp_out",
            forget_pages=file.forget_pages,
        )
    )


def _require_plain(path: Path, config: dict[str, Any], layer: int) -> None:
    """Raise DictionaryError unless the config is that of the folded form, for which :func:`read` has the equation."""
    require_known_fields(path, config, _FIELDS, _HARMLESS)
    expected: dict[str, tuple[Any, ...]] = {
        "architecture": ("standard",),
        "hook_name": (f"blocks.{layer}.ln2.hook_normalized",),
        "activation_fn_str": ("relu",),
        "activation_fn_kwargs": (None, {}),
        "apply_b_dec_to_input": (False,),
        "finetuning_scaling_factor": (None, False),
        "normalize_activations": (None, False, "none"),
        "use_b_dec_out": (None, False),
    }
    for field, allowed in expected.items():
        if config.get(field) not in allowed:
            raise DictionaryError(
                f"{path}: {field} is {config.get(field)!r}, expected {' or '.join(repr(value) for value in allowed)} "
                "in a transcoder with folded biases (a folder whose name ends in -folded-b_dec_out)."
            )


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the layer's config."""
    name = read_json(repository.local(entry.files[1])).get("model_name")
    return name if isinstance(name, str) else None


LAYOUT = Layout(
    "ARENA's transcoders (cfg.json, sae_weights.safetensors in folders *-mlp-transcoder*)", find, read, model
)
