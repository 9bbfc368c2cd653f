"""Find the files of a published set: recognise its layout, and follow a config that lists files elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tl_circuits.dictionaries.formats import LAYOUTS, Entry, Hints, Layout, circuit_tracer, gemma_scope, gemma_scope_2
from tl_circuits.dictionaries.formats.reading import positive_int, read_yaml, require_known_fields
from tl_circuits.dictionaries.formats.recognised import refuse, refuse_by_name
from tl_circuits.dictionaries.hub import HubRepository
from tl_circuits.dictionaries.references import parse_reference
from tl_circuits.dictionaries.repository import Repository, inside
from tl_circuits.errors import DictionaryError

CONFIG = "config.yaml"
# Facts that these repositories' files do not say; circuit-tracer and SAELens know them by the repository's name.
_KNOWN = {
    "mwhanna/qwen3-": Hints("mlp.hook_in", "mlp.hook_out"),
    "facebook/crv-8b-instruct-transcoders": Hints("mlp.hook_in", "mlp.hook_out", "topk", 128),
    # Sets that EleutherAI converted to clt-training's files; which tensors they read is in the options of its
    # `attribute`.
    "EleutherAI/gpt2-mntss-": Hints("hook_resid_mid", "mlp.hook_out"),
    "EleutherAI/gpt2-curt-": Hints("hook_resid_mid", "mlp.hook_out"),
    "EleutherAI/Llama-3.2-1B-mntss-": Hints("hook_resid_mid", "mlp.hook_out"),
    "EleutherAI/gemma-mntss-": Hints("hook_resid_mid", "hook_mlp_out"),
    "EleutherAI/gemmascope-transcoders-sparsify": Hints("mlp.hook_in", "hook_mlp_out"),
}
_FIELDS = (
    *("model_name", "model_kind", "feature_input_hook", "feature_output_hook", "transcoders", "activation", "k"),
    "model",  # of another layout, refused by name before
)
# Where the set and its dashboards are, which circuit-tracer's loader overwrites; and the hooks for nnsight.
_HARMLESS = (
    *("scan", "repo_id", "revision", "subfolder", "description", "license"),
    *("feature_input_location_pattern", "feature_output_location_pattern", "attention_location_pattern"),
    *("layernorm_scale_location_patterns", "pre_logit_location", "embed_location", "embed_weight", "unembed_weight"),
)
_KINDS = ("transcoder_set", "cross_layer_transcoder")


@dataclass(frozen=True)
class Candidate:
    """One layer's files, with their repository and the layout that reads them."""

    repository: Repository
    layout: Layout
    entry: Entry


@dataclass(frozen=True)
class Published:
    """All candidates of a source, and what is said about all of them. Several sets give several candidates a layer."""

    name: str
    candidates: tuple[Candidate, ...]
    hints: Hints
    made_for: str | None = None


def find_published(repository: Repository, cache_dir: Path | None = None) -> Published:
    """The set that a repository holds, or lists in circuit-tracer's ``config.yaml``.

    Raises:
        DictionaryError: the layout is unknown or not supported, or the config contradicts the files.
    """
    refuse_by_name(repository)
    if CONFIG not in repository.paths:
        return Published(repository.name, _recognise(repository), _completed(repository.name, Hints()))
    path = repository.local(CONFIG)
    config = read_yaml(path)
    if "class_path" in str(config.get("model", "")):
        refuse(repository)
    require_known_fields(path, config, _FIELDS, _HARMLESS)
    hints = _hints(path, config)
    listed = config.get("transcoders")
    if listed is None:
        candidates = _recognise(repository)
    else:
        candidates = _follow(repository, path, listed, cache_dir)
    _require_kind(path, config, candidates)
    if any(c.entry.files[0].endswith("npz") for c in candidates):
        hints = replace(hints, activation=None, k=None)  # Gemma Scope is always JumpReLU; some configs say otherwise
    return Published(repository.name, candidates, _completed(repository.name, hints), config.get("model_name"))


def _completed(name: str, hints: Hints) -> Hints:
    known = next((found for prefix, found in _KNOWN.items() if _is_called(name, prefix)), Hints())
    return Hints(
        hints.input_hook or known.input_hook,
        hints.output_hook or known.output_hook,
        hints.activation or known.activation,
        hints.k or known.k,
    )


def _is_called(name: str, prefix: str) -> bool:
    """Whether a repository's name starts so. A local copy of EleutherAI's sets is known by its folder's name alone."""
    organisation, _, repository = prefix.partition("/")
    return name.startswith(prefix) or (organisation == "EleutherAI" and PurePosixPath(name).name.startswith(repository))


def _recognise(repository: Repository) -> tuple[Candidate, ...]:
    for layout in LAYOUTS:
        entries = layout.find(repository)
        if entries:
            return tuple(Candidate(repository, layout, entry) for entry in entries)
    refuse(repository)
    raise AssertionError("unreachable")


def _hints(path: Path, config: dict[str, Any]) -> Hints:
    for field in ("feature_input_hook", "feature_output_hook", "activation", "model_name"):
        if config.get(field) is not None and not isinstance(config[field], str):
            raise DictionaryError(f"{path}: {field} is {config[field]!r}, expected text.")
    k = config.get("k")
    return Hints(
        input_hook=_within_block(path, "feature_input_hook", config.get("feature_input_hook")),
        output_hook=_within_block(path, "feature_output_hook", config.get("feature_output_hook")),
        activation=config.get("activation"),
        k=None if k is None else positive_int(path, "k", k),
    )


def _within_block(path: Path, field: str, hook: str | None) -> str | None:
    """A hook's name within its block; some configs write it for all blocks, as ``blocks.{layer}.hook_resid_mid``."""
    short = None if hook is None else hook.removeprefix("blocks.{layer}.")
    if short is not None and (short.startswith("blocks.") or "{" in short or not short):
        raise DictionaryError(
            f"{path}: {field} is {hook!r}, expected a hook's name within a block, such as 'mlp.hook_in', or after "
            "'blocks.{layer}.'."
        )
    return short


def _require_kind(path: Path, config: dict[str, Any], candidates: Sequence[Candidate]) -> None:
    kind = config.get("model_kind")
    if kind is None:
        return
    if kind not in _KINDS:
        raise DictionaryError(f"{path}: model_kind is {kind!r}, expected {' or '.join(_KINDS)}.")
    crosses = any(PurePosixPath(c.entry.files[0]).name.startswith(("W_enc_", "params_layer_")) for c in candidates)
    if crosses != (kind == "cross_layer_transcoder"):
        raise DictionaryError(
            f"{path}: model_kind is {kind!r}, but {candidates[0].entry.files[0]} is laid out as "
            f"{'a cross-layer transcoder' if crosses else 'per-layer transcoders'}."
        )


def _follow(repository: Repository, path: Path, listed: Any, cache_dir: Path | None) -> tuple[Candidate, ...]:
    """The candidates of a config that lists one file a layer, here or on the hub."""
    if not isinstance(listed, list) or not listed:
        raise DictionaryError(f"{path}: transcoders is {type(listed).__name__}, expected a list with one file a layer.")
    hubs: dict[Any, HubRepository] = {}
    candidates: dict[tuple[int, str], Candidate] = {}
    for index, item in enumerate(listed):
        layer, target = _layer_and_target(path, index, item)
        if target.startswith("hf://"):
            reference = parse_reference(target)
            root = replace(reference, path="")
            where: Repository = hubs.setdefault(root, HubRepository(root, cache_dir))
            file = reference.path
        else:
            where, file = repository, inside(target, str(path))
        layout, entry = _by_file_name(path, layer, file)
        # A cross-layer list may name its last file twice (an entry more than there are layers).
        candidates.setdefault((entry.layer, file), Candidate(where, layout, entry))
    return tuple(candidates.values())


def _layer_and_target(path: Path, index: int, item: Any) -> tuple[int, str]:
    """Layer and file of a list's entry: a reference, whose place is the layer, or ``{layer, filepath}`` (2025)."""
    if isinstance(item, str):
        return index, item
    if isinstance(item, dict) and isinstance(item.get("filepath"), str) and isinstance(item.get("layer"), int):
        return item["layer"], item["filepath"]
    raise DictionaryError(f"{path}: transcoders[{index}] is {item!r}, expected hf://org/repo/path or a relative path.")


def _by_file_name(path: Path, layer: int, file: str) -> tuple[Layout, Entry]:
    named = gemma_scope.PATH.fullmatch(file) or circuit_tracer.PATH.fullmatch(PurePosixPath(file).name)
    if named and int(named[1]) != layer:
        raise DictionaryError(f"{path}: transcoders[{layer}] is {file}, the file of layer {named[1]}.")
    if file.endswith(".npz"):
        return gemma_scope.LAYOUT, Entry(layer, (file,))
    if gemma_scope_2.is_file_of(file):
        return gemma_scope_2.LAYOUT, gemma_scope_2.entry_for(layer, file)
    if file.endswith(".safetensors"):
        return circuit_tracer.LAYOUT, Entry(layer, (file,))
    raise DictionaryError(f"{path}: transcoders[{layer}] is {file}, expected an .npz or .safetensors file.")
