"""Layouts that are recognised but not read, so that the error can name them instead of guessing their equations."""

import re

from tl_circuits.dictionaries.repository import Repository
from tl_circuits.errors import DictionaryError

# A layout's name, and a file by which it is recognised.
_BY_FILE = (
    ("Llama Scope 1 transcoders (LXTC)", re.compile(r"(?:.*/)?L(?:lama)?[^/]*TC-\d+x/hyperparams\.json")),
    ("Llama Scope 1 (hyperparams.json)", re.compile(r"(?:.*/)?hyperparams\.json")),
    (
        "crosslayer-coding (norm_stats.json)",
        re.compile(r"(?:.*/)?(?:norm_stats\.json|clt_checkpoint_\d+\.safetensors)"),
    ),
    ("CLT-Forge / CircuitLab (clt_cfg.json)", re.compile(r"(?:.*/)?clt_cfg\.json")),
    ("crosslayer-transcoder (checkpoint.safetensors)", re.compile(r"(?:.*/)?checkpoint\.safetensors")),
    ("mntss sparsecoder sweep (encoder_layer_*)", re.compile(r"(?:.*/)?encoder_layer_\d+(?:\.safetensors)?")),
)
_PICKLES = re.compile(r".*\.(?:pt|pth|bin|pkl|pickle|ckpt|dcp)")


def refuse_by_name(repository: Repository) -> None:
    """Raise DictionaryError for sets whose files look like a layout that is read, but stand for other equations."""
    if "W_dec_norm.safetensors" in repository.paths or "Cross-Layer-TopK-CLT" in repository.name:
        raise DictionaryError(
            f"{repository.name} keeps the k highest-scoring features of all layers together (Cross-Layer-TopK-CLT), "
            "so whether a feature is active depends on later layers as well. That is recognised but not supported."
        )


def refuse(repository: Repository) -> None:
    """Raise DictionaryError that says what the repository holds: a recognised layout, pickles, or nothing known."""
    for name, pattern in _BY_FILE:
        found = next((path for path in repository.paths if pattern.fullmatch(path)), None)
        if found:
            raise DictionaryError(
                f"{repository.name}: {found} shows the layout {name}, which is recognised but not supported. Give the "
                "layers as tensors instead: tlc.load_transcoders({layer: tlc.Transcoder(...)})."
            )
    pickles = [path for path in repository.paths if _PICKLES.fullmatch(path)]
    if pickles:
        raise DictionaryError(
            f"{repository.name}: {pickles[0]} is a pickle, which could run any code and is never loaded. Convert it to "
            "safetensors, or give the layers as tensors: tlc.load_transcoders({layer: tlc.Transcoder(...)})."
        )
    seen = ", ".join(repository.paths[:5]) or "nothing"
    raise DictionaryError(f"{repository.name} holds no transcoders in a layout we know; it holds {seen}.")
