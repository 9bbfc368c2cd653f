"""Find published sets by SAELens' release names. SAELens' registry is part of its package, so no network is needed."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from posixpath import commonpath
from typing import Any

from tl_circuits.dictionaries.hub import HubRepository
from tl_circuits.dictionaries.published import Published, find_published
from tl_circuits.dictionaries.references import Reference
from tl_circuits.errors import DictionaryError

_DECODERS_SUMMED = "mntss_clt_layer_transcoder"


def find_release(name: str, cache_dir: Path | None = None) -> Published | None:
    """The release of transcoders called ``name``; None if SAELens is not installed or has no such release.

    Raises:
        DictionaryError: its decoders cannot rebuild an MLP's output.
    """
    directory = release_directory()
    if name not in directory:
        return None
    release = directory[name]
    if release.conversion_func == _DECODERS_SUMMED:
        raise DictionaryError(
            f"{name} sums each feature's decoders over layers, so it cannot rebuild an MLP's output. "
            f"Load the cross-layer transcoder itself: tlc.load_transcoders({release.repo_id!r})."
        )
    paths = list(release.saes_map.values())
    folder = commonpath(paths)  # such as transcoder_all; the repository may hold other sets beside it
    published = find_published(HubRepository(Reference(release.repo_id, path=folder), cache_dir), cache_dir)
    wanted = {path.removeprefix(f"{folder}/") for path in paths}
    kept = [c for c in published.candidates if wanted & {c.entry.files[0], c.entry.files[0].rpartition("/")[0]}]
    return replace(published, name=name, candidates=tuple(kept), made_for=published.made_for or release.model)


def release_names() -> list[str]:
    """The releases that SAELens knows; empty if it is not installed."""
    return sorted(release_directory())


def release_directory() -> Mapping[str, Any]:
    """SAELens' registry of releases by name; empty if SAELens is not installed."""
    if importlib.util.find_spec("sae_lens") is None:
        return {}
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()
