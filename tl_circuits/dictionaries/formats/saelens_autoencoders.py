"""Autoencoders in SAELens' own layout: folders with ``cfg.json`` and ``sae_weights.safetensors``.

SAELens has changed its configs several times, so its own loader reads them; the object is then converted.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from safetensors import SafetensorError

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import read_json
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.saelens import AUTOENCODERS, from_saelens
from tl_circuits.errors import DictionaryError

_WEIGHTS = "sae_weights.safetensors"


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
        entries.append(Entry(int(match[1]), (path, config)))
    return entries


def _hook(config: dict[str, Any], name: str = "hook_name") -> Any:
    metadata = config.get("metadata")
    found = metadata if isinstance(metadata, dict) and name in metadata else config
    return found.get(name, config.get("hook_point") if name == "hook_name" else None)


def _is_autoencoder(config: dict[str, Any]) -> bool:
    """Whether a config is of an autoencoder. The oldest say no architecture; then it is the standard one."""
    return config.get("architecture", "standard") in AUTOENCODERS and _hook(config, "hook_name_out") in (None, _hook(config))


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer, by SAELens' loader."""
    path = repository.local(entry.files[0])
    try:
        from sae_lens.saes.sae import SAE
    except ImportError as error:
        raise DictionaryError(f"{path} is a SAELens autoencoder, and reading it needs sae_lens: pip install sae_lens") from error
    try:
        sae = SAE.load_from_disk(path.parent)
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise DictionaryError(f"{path.parent}: SAELens cannot open this autoencoder: {str(error).splitlines()[0]}") from error
    return LayerWeights(from_saelens(entry.layer, sae, hints.input_hook, hints.output_hook))


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the layer's config."""
    name = _hook(read_json(repository.local(entry.files[1])), "model_name")
    return name if isinstance(name, str) else None


LAYOUT = Layout("SAELens autoencoders (cfg.json, sae_weights.safetensors)", find, read, model)
