"""Open autoencoders by SAELens' release names and ids. SAELens' own loaders read the files, as each release has its own
layout; what they give is converted (:mod:`~tl_circuits.dictionaries.saelens`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from tl_circuits.dictionaries.base import Dictionary, ranges
from tl_circuits.dictionaries.combined import combined, one_a_layer
from tl_circuits.dictionaries.in_memory import Options, from_layers
from tl_circuits.dictionaries.prompt_rules import published_rule
from tl_circuits.dictionaries.releases import release_directory
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import DictionaryError, DownloadError
from tl_circuits.hooks import PromptRule, wholes

_LAYER = (r"blocks\.(\d+)\.", r"layer_?(\d+)", r"^l(\d+)[ram]", r"^(\d+)-")
_SITE = r"resid_pre|resid_mid|resid_post|attn_out|mlp_out|hook_z"
_LISTED = 8  # ids in a message


def is_release(name: str) -> bool:
    """Whether SAELens has a release of autoencoders called ``name``."""
    return "transcoder" not in name and "clt" not in name and name in release_directory()


def open_release(
    release: str,
    *,
    ids: str | Iterable[str] | None,
    width: int | str | None,
    l0: int | float | str | None,
    layers: Iterable[int] | None,
    input_hook: str | None,
    output_hook: str | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    residency: str,
    cache_dir: str | Path | None,
    name: str | None,
    prompt_rule: PromptRule | None,
    progress: bool,
) -> Dictionary:
    """The autoencoders of a release, chosen by ids, or by width, l0 and layers; see :func:`load_dictionary`.

    Raises:
        DictionaryError: there is no such release or id, several autoencoders fit, or one cannot be converted.
        DownloadError: files cannot be downloaded.
    """
    if not isinstance(release, str) or not is_release(release):
        raise DictionaryError(f"ids= is for a SAELens release of autoencoders, and {release!r} is none.")
    if cache_dir is not None:
        raise DictionaryError(
            f"SAELens keeps {release} in the hub library's own folder: set HF_HOME instead of cache_dir=."
        )
    entry = release_directory()[release]
    asked = None if layers is None else wholes(layers, "layers", DictionaryError)
    chosen = _by_ids(release, entry, ids) if ids is not None else _by_properties(release, entry, width, l0)
    if asked is not None:
        missing = sorted(set(asked) - set(chosen))
        if missing or not asked:
            raise DictionaryError(
                f"{release} has no layers {ranges(missing) or '(layers= is empty)'}; it has {ranges(list(chosen))}."
            )
        chosen = {layer: chosen[layer] for layer in sorted(asked)}
    opened = []
    listed = [(layer, one) for layer, ids_of_layer in chosen.items() for one in ids_of_layer]
    for layer, one in tqdm(listed, desc="opening autoencoders", unit="layer", disable=not progress):
        opened.append((layer, _open(release, one)))
        _require_layer(release, one, *opened[-1])
    title = name or _title(release, entry.saes_map, [one for _, one in listed])
    rule = prompt_rule or _rule(opened[0][1], entry.model)
    sets = []
    for found in one_a_layer(opened):
        made = from_layers(found, Options(list(found), input_hook, output_hook, device, dtype, residency, title, rule))
        assert isinstance(made, TranscoderSet)
        made.made_for = entry.model
        sets.append(made)
    return combined(sets)


def _open(release: str, sae_id: str) -> Any:
    from sae_lens.saes.sae import SAE

    try:
        return SAE.from_pretrained(release, sae_id)
    except OSError as error:  # the hub library's errors, offline ones included, are OSErrors
        raise DownloadError(f"{release}, {sae_id}: {str(error).splitlines()[0]}") from error
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise DictionaryError(f"SAELens cannot open {release}, {sae_id}: {str(error).splitlines()[0]}") from error


def _require_layer(release: str, sae_id: str, layer: int, sae: Any) -> None:
    hook = str(sae.cfg.metadata.hook_name)
    if not hook.startswith(f"blocks.{layer}."):
        raise DictionaryError(
            f"{release}, {sae_id}: its config names the hook {hook!r}, which is not one of layer {layer}."
        )


def _rule(sae: Any, made_for: str) -> PromptRule:
    """The rule of published sets; without a token in front if the release says that it was trained so."""
    rule = published_rule(made_for)
    return PromptRule(False, rule.skip_first, rule.skip_prefixes) if sae.cfg.metadata.prepend_bos is False else rule


def _title(release: str, known: Mapping[str, str], chosen: Sequence[str]) -> str:
    """The release's name; with what its chosen ids have in common, if they are not all of the release."""
    if len(chosen) == len(known):
        return release
    patterns = sorted({_pattern(sae_id) for sae_id in chosen})
    return f"{release}//{patterns[0]}" if len(patterns) == 1 else f"{release}//{', '.join(chosen)}"


def _pattern(sae_id: str) -> str:
    """An id with stars for its layer and its number of active features."""
    match = next(filter(None, (re.search(pattern, sae_id) for pattern in _LAYER)), None)
    starred = sae_id if match is None else sae_id[: match.start(1)] + "*" + sae_id[match.end(1) :]
    return re.sub(r"l0_\d+", "l0_*", starred)


def _layer_of(entry: Any, sae_id: str) -> int | None:
    """The layer of an id; None for autoencoders of no block, such as those of embeddings."""
    # Neuronpedia's name comes second: what is behind the last block counts as a further layer there.
    source = str((entry.neuronpedia_id or {}).get(sae_id) or "")
    found = next(filter(None, (re.search(p, sae_id) for p in _LAYER)), None) or re.search(r"/(\d+)-", source)
    return int(found[1]) if found and "embedding" not in sae_id else None


def _by_ids(release: str, entry: Any, ids: str | Iterable[str]) -> dict[int, list[str]]:
    """The ids by layer; several of one layer are of different sites, or refused when they are opened."""
    asked = [ids] if isinstance(ids, str) else list(ids)
    unknown = next((one for one in asked if one not in entry.saes_map), None)
    if unknown is not None or not asked:
        raise DictionaryError(f"{release} has no id {unknown!r}. There is: {_listed(entry.saes_map)}.")
    found: dict[int, list[str]] = {}
    for one in dict.fromkeys(asked):
        layer = _layer_of(entry, one)
        if layer is None:
            raise DictionaryError(f"{release}, {one}, is of no block, so it cannot be attached. Leave it out.")
        found.setdefault(layer, []).append(one)
    return dict(sorted(found.items()))


def _by_properties(
    release: str, entry: Any, width: int | str | None, l0: int | float | str | None
) -> dict[int, list[str]]:
    """One id for each layer, of those with this width and number of active features."""
    ids = [one for one in entry.saes_map if _layer_of(entry, one) is not None]
    sites = Counter(match[0] for one in ids if (match := re.search(_SITE, one)))
    if len(sites) > 1:  # gpt2-small-res-jb has eleven before a block and one behind the last
        most = sites.most_common(1)[0][0]
        ids = [one for one in ids if most in one]
    if width is not None:
        wanted = _width_name(width)
        ids = [one for one in ids if re.search(rf"(?:width_|_){wanted}(?:$|[/_])", one)]
    by_layer: dict[int, list[str]] = {}
    for one in ids:
        by_layer.setdefault(_layer_of(entry, one) or 0, []).append(one)
    chosen = {layer: _nearest(here, l0) for layer, here in sorted(by_layer.items())}
    several = next((here for here in chosen.values() if len(here) != 1), None)
    if several is not None or not chosen:
        raise DictionaryError(
            f"{release} has {'several autoencoders' if several else 'nothing'} for a layer with width={width!r} and "
            f"l0={l0!r}. Choose with width=, l0= or ids=. There is: {_listed(several or entry.saes_map)}."
        )
    return chosen


def _width_name(width: int | str) -> str:
    text = str(width)
    n = int(text) if text.isdigit() else 0
    return f"{n // 1_000_000}m" if n >= 1_000_000 else f"{n // 1000}k" if n >= 1000 else text


def _nearest(ids: Sequence[str], l0: int | float | str | None) -> list[str]:
    """The ids with this number of active features: as published, or the nearest number."""
    if l0 is None:
        return list(ids)
    named = [one for one in ids if re.search(rf"l0_{re.escape(str(l0))}(?:$|[/_])", one)]
    numbers = {one: int(match[1]) for one in ids if (match := re.search(r"l0_(\d+)", one))}
    if named or not numbers or isinstance(l0, str):
        return named
    best = min(abs(n - l0) for n in numbers.values())
    return [one for one, n in numbers.items() if abs(n - l0) == best][:1]


def _listed(ids: Iterable[str]) -> str:
    every = list(ids)
    return ", ".join(every[:_LISTED]) + (f" and {len(every) - _LISTED} more" if len(every) > _LISTED else "")
