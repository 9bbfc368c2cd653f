"""What ``config.json`` says about a folder of transcoders with four bits a number, and which files belong to it."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tl_circuits.dictionaries.formats.reading import positive_int, read_json, require_known_fields
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.errors import DictionaryError
from tl_circuits.support.reading import MOST_LAYERS, quoted

FORMAT, VERSION = "tl_circuits four bits", 1
CONFIG = "config.json"
PATH = re.compile(r"layer_(\d{1,4})\.four_bit\.safetensors")


@dataclass(frozen=True)
class Settings:
    """What the config says about all layers. ``d_in``, ``d_out`` and ``features`` are sizes."""

    model: str | None
    input_hook: str
    output_hook: str
    activation: str
    k: int | None
    clamp: bool
    skip: bool
    d_in: int
    d_out: int
    features: int
    layers: tuple[int, ...]
    licence: str | None = None
    training_tokens: int | None = None
    description: str | None = None


def layer_files(repository: Repository) -> list[tuple[int, str]]:
    """Layer and name of each layer's file in the repository's top folder, by layer."""
    matches = ((path, PATH.fullmatch(path)) for path in repository.paths)
    return sorted((int(m[1]), path) for path, m in matches if m)


def settings_of(repository: Repository, config: str) -> Settings:
    """Read and check the config.

    Raises:
        DictionaryError: it is missing, of another format or version, has a field that is not known or of the wrong
            type, or names other layers than there are files.
    """
    path = repository.local(config)
    said = read_json(path)
    if said.get("format") != FORMAT:
        raise DictionaryError(
            f"{path}: format is {_shown(said, 'format')}, expected {FORMAT!r}, which the files beside it have."
        )
    if said.get("version") != VERSION or isinstance(said["version"], bool):
        raise DictionaryError(
            f"{path}: version is {_shown(said, 'version')}, and this tl_circuits reads version {VERSION}. Update "
            "tl_circuits."
        )
    require_known_fields(path, said, ("format", "version", *(field.name for field in fields(Settings))), ())
    for name, (kind, called, may_be_none) in _KINDS.items():
        if not (isinstance(said.get(name), kind) or (said.get(name) is None and may_be_none)):
            raise DictionaryError(
                f"{path}: {name} is {_shown(said, name)}, expected {called}{' or null' if may_be_none else ''}."
            )
    for name in ("d_in", "d_out", "features", "k", "training_tokens"):
        if said.get(name) is not None or name not in ("k", "training_tokens"):
            positive_int(path, name, said.get(name))
    if said["activation"] not in ("relu", "jumprelu", "topk"):
        raise DictionaryError(f"{path}: activation is {_shown(said, 'activation')}, expected relu, jumprelu or topk.")
    if said["activation"] == "topk" and not (said.get("k") and said["k"] <= said["features"]):
        raise DictionaryError(
            f"{path}: k is {_shown(said, 'k')}, expected a whole number from 1 to features, {said['features']}."
        )
    for name in ("input_hook", "output_hook"):
        if not said[name] or said[name].startswith("blocks."):
            raise DictionaryError(
                f"{path}: {name} is {_shown(said, name)}, expected a hook's name within a block, such as 'mlp.hook_in'."
            )
    _require_files(path, said["layers"], [layer for layer, _ in layer_files(repository)])
    given: dict[str, Any] = {field.name: said.get(field.name) for field in fields(Settings)}
    return Settings(**given | {"layers": tuple(sorted(said["layers"]))})


_TEXT, _FLAG = (str, "text"), (bool, "true or false")
_KINDS = {
    **dict.fromkeys(("input_hook", "output_hook", "activation"), (*_TEXT, False)),
    **dict.fromkeys(("model", "licence", "description"), (*_TEXT, True)),
    **dict.fromkeys(("clamp", "skip"), (*_FLAG, False)),
    "layers": (list, "a list of layers", False),
}


def _require_files(path: Path, layers: list[Any], there: list[int]) -> None:
    odd = next((n for n in layers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < MOST_LAYERS), None)
    if odd is not None or None in layers:
        raise DictionaryError(
            f"{path}: layers holds {quoted(odd)}, expected whole numbers from 0 to {MOST_LAYERS - 1}."
        )
    if sorted(layers) != there:
        differing = sorted(set(layers) ^ set(there))
        about = (
            f"only one of them has the layers {quoted(str(differing))}"
            if differing
            else "one of them has a layer twice"
        )
        raise DictionaryError(
            f"{path}: layers and the files beside it differ: {about}. Was a file lost, or are two sets mixed?"
        )


def _shown(said: dict[str, Any], name: str) -> str:
    return quoted(repr(said[name])) if name in said else "missing"
