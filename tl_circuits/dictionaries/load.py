"""``tlc.load_transcoders``: open a dictionary from a published set, a folder, SAELens objects or tensors."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.dictionaries.base import Dictionary
from tl_circuits.dictionaries.combined import combined
from tl_circuits.dictionaries.cross_layer import CrossLayerTranscoders
from tl_circuits.dictionaries.formats import Hints, LayerWeights
from tl_circuits.dictionaries.hub import HubRepository
from tl_circuits.dictionaries.in_memory import Options, from_layers, refuse_publishing_options, with_options
from tl_circuits.dictionaries.prompt_rules import published_rule
from tl_circuits.dictionaries.published import Candidate, Published, find_published
from tl_circuits.dictionaries.references import SHORT_NAMES, parse_reference
from tl_circuits.dictionaries.releases import find_release, release_names
from tl_circuits.dictionaries.repository import LocalFolder, Repository
from tl_circuits.dictionaries.residency import Residency, choose_residency, place
from tl_circuits.dictionaries.saelens_releases import is_release, open_release
from tl_circuits.dictionaries.selection import select, wanted_layers
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import PromptRule, wholes
from tl_circuits.models import BUILTIN
from tl_circuits.support.checked import checked
from tl_circuits.support.reading import boundary


@checked
def load_transcoders(
    source: Any,
    *,
    width: int | str | None = None,
    l0: int | float | str | None = None,
    layers: Iterable[int] | None = None,
    input_hook: str | None = None,
    output_hook: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    residency: Residency = "auto",
    cache_dir: str | Path | None = None,
    name: str | None = None,
    prompt_rule: PromptRule | None = None,
    progress: bool = False,
) -> Dictionary:
    """Open transcoders: a published set by name, a folder, SAELens objects, or tensors of your own.

    Pickles are never loaded, as they could run any code.

    Args:
        source: one of: ``"tiny-facts"`` (built in); a short name such as ``"gemma"`` (``tl-circuits models`` lists
            them); a SAELens release, of autoencoders too (:func:`load_dictionary` has more options for them); a hub
            repository ``org/repo[/folder][@revision]``; a folder in one of the layouts of docs/transcoders.md;
            ``{layer: SAELens object}`` or ``{layer: Transcoder}``; a list of either, one a layer from 0; or a
            dictionary, which is returned with the options below applied (the same object if none is given).
        width: which set, if the repository has several: ``"16k"`` or 16384. If there is a choice and none is made, an
            error lists what there is.
        l0: which set by its number of active features a token: ``"small"``, or a number, for which each layer takes
            the nearest one.
        layers: only these layers; the other MLPs become error nodes. None for all, without a gap.
        input_hook: name within a block, such as ``mlp.hook_in``, of the tensor that is read, if the files do not say
            it or say it wrongly.
        output_hook: the same for the tensor that is written.
        device: where small tensors and results are; None for a GPU if there is one. :func:`attach` moves each
            layer to the device of the model's layer.
        dtype: dtype of the weights; None keeps the stored one. Computations are in float32 in any case.
        residency: where encoders and decoders, the large matrices, are kept: ``"device"``, ``"cpu"``, or ``"disk"``
            (memory-mapped; rows are read when needed). ``"auto"`` takes the device if they fit, else disk.
        cache_dir: where downloads are kept; None for the hub library's own folder (``HF_HOME``).
        name: what graphs call the dictionary; None for the source's name.
        prompt_rule: which special token is put before a text, and which first positions get no features. None keeps
            the set's own rule. For a set opened by name, from the hub or from a folder: a special token before every
            text, and position 0 left out, as in circuit-tracer (for instruction-tuned Gemma-3 the opening of a
            person's turn, too). For objects and tensors: what the model does itself, and a beginning-of-sequence
            token at position 0 left out.
        progress: show a progress bar on stderr.

    Returns:
        A ``TranscoderSet``, or for cross-layer transcoders a ``CrossLayerTranscoders``.

    Raises:
        DictionaryError: the source does not exist, holds no transcoders, or is damaged (the message names file and
            field); or an option cannot be applied to it.
        DownloadError: files cannot be downloaded.

    Examples:
        >>> transcoders = tlc.load_transcoders("tiny-facts")
        >>> transcoders
        TranscoderSet('tiny-facts', layers 0..3)
        >>> transcoders[0].W_enc.shape  # [feature, d_in]
        torch.Size([768, 96])
        >>> tlc.load_transcoders([transcoders[0], transcoders[1]], name="my transcoders")
        TranscoderSet('my transcoders', layers 0..1)
    """
    for option, hook in (("input_hook", input_hook), ("output_hook", output_hook)):
        if hook is not None and (not hook or hook.startswith("blocks.")):
            raise DictionaryError(f"{option}={hook!r} must be a hook's name within a block, such as 'mlp.hook_in'.")
    if dtype is not None and not dtype.is_floating_point:
        raise DictionaryError(f"dtype={dtype} is not one of floating-point numbers, such as torch.bfloat16.")
    layers = None if layers is None else wholes(layers, "layers", DictionaryError)
    options = Options(layers, input_hook, output_hook, device, dtype, residency, name, prompt_rule)
    given = None
    if isinstance(source, Dictionary):
        given = source
    elif isinstance(source, str) and source == BUILTIN:
        from tl_circuits.dictionaries.builtin.files import open_transcoders

        given = open_transcoders()
    elif isinstance(source, (list, tuple, Mapping)):
        refuse_publishing_options("what was given", width=width, l0=l0, cache_dir=cache_dir)
        return from_layers(source if isinstance(source, Mapping) else dict(enumerate(source)), options)
    if given is not None:
        refuse_publishing_options(repr(given.name), width=width, l0=l0, cache_dir=cache_dir)
        return with_options(given, options)
    # SAELens takes seconds to import, so its registry is asked last.
    plain = isinstance(source, str) and "/" not in source and source not in SHORT_NAMES and not Path(source).is_dir()
    if plain and is_release(source):
        return open_release(
            source,
            ids=None,
            width=width,
            l0=l0,
            layers=layers,
            input_hook=input_hook,
            output_hook=output_hook,
            device=device,
            dtype=dtype,
            residency=residency,
            cache_dir=cache_dir,
            name=name,
            prompt_rule=prompt_rule,
            progress=progress,
        )
    if not isinstance(source, (str, Path)):
        raise DictionaryError(
            f"cannot load transcoders from {source!r}: give a name, a folder, {{layer: SAELens transcoder}} or "
            "{layer: tlc.Transcoder}."
        )
    hub_cache = None if cache_dir is None else Path(cache_dir)
    with boundary(DictionaryError, source):
        published = _find(source, hub_cache)
    sets = [select(published.name, here, width, l0, asked) for here, asked in _by_site(published, layers)]
    _fetch(candidate for one in sets for candidate in one.values())
    hints = Hints(
        input_hook or published.hints.input_hook,
        output_hook or published.hints.output_hook,
        published.hints.activation,
        published.hints.k,
    )
    where = _device(device)
    everything = {
        c.repository.local(file): c.layout.grows for one in sets for c in one.values() for file in c.entry.files
    }
    stay = choose_residency(residency, where, sum(path.stat().st_size * grows for path, grows in everything.items()))
    made_for = _made_for(published, next(iter(sets[0].values())))
    shared: dict[Tensor, Tensor] = {}

    def opened(layer: int, candidate: Candidate) -> LayerWeights:
        with boundary(DictionaryError, f"layer {layer} of {source} ({', '.join(candidate.entry.files)})"):
            read = candidate.layout.read(candidate.repository, candidate.entry, hints)
        if read.decoder is not None and len(sets[0]) < len({c.entry.layer for c in published.candidates}):
            raise DictionaryError(
                f"{published.name} is a cross-layer transcoder, which is loaded whole: leave layers= out."
            )
        files = [candidate.repository.local(file) for file in candidate.entry.files]
        bar.update()
        return place(read, files, stay, where, dtype, shared)

    with tqdm(total=sum(map(len, sets)), desc="opening transcoders", unit="layer", disable=not progress) as bar:
        parts = [
            _assemble(name or published.name, {layer: opened(layer, c) for layer, c in one.items()}, made_for)
            for one in sets
        ]
    made = parts[0] if len(parts) == 1 else combined(parts)
    return made.with_prompt_rule(prompt_rule or published_rule(made_for))


def _by_site(
    published: Published, layers: Iterable[int] | None
) -> list[tuple[Sequence[Candidate], Iterable[int] | None]]:
    """The candidates with the layers asked for, apart by site where a layer has autoencoders at several sites."""
    candidates = published.candidates
    there = {c.entry.layer for c in candidates}
    if len({(c.entry.layer, c.entry.site) for c in candidates}) == len(there):
        return [(candidates, layers)]
    layers = None if layers is None else wanted_layers(published.name, sorted(there), layers, anywhere=True)
    apart: list[tuple[Sequence[Candidate], Iterable[int] | None]] = []
    for site in dict.fromkeys(c.entry.site for c in candidates):
        here = [c for c in candidates if c.entry.site == site]
        asked = None if layers is None else sorted({c.entry.layer for c in here} & set(layers))
        if asked is None or asked:
            apart.append((here, asked))
    return apart


def _find(source: str | Path, cache_dir: Path | None) -> Published:
    text = str(source)
    if isinstance(source, str) and source in SHORT_NAMES:
        short = SHORT_NAMES[source]
        found = find_published(HubRepository(parse_reference(short.reference), cache_dir), cache_dir)
        return replace(found, made_for=found.made_for or short.model)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return find_published(LocalFolder(folder), cache_dir)
    if folder.is_file():
        raise DictionaryError(f"{folder} is a file; give the folder that holds all layers.")
    if isinstance(source, Path) or text.startswith((".", "/", "~")):
        raise DictionaryError(f"there is no folder {folder}.")
    release = find_release(text, cache_dir)
    if release is not None:
        return release
    if "/" in text:
        repository: Repository = HubRepository(parse_reference(text), cache_dir)
        return find_published(repository, cache_dir)
    near = difflib.get_close_matches(text, [*SHORT_NAMES, *release_names()], n=3, cutoff=0.3)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise DictionaryError(
        f"{text!r} is not a short name, a folder, a SAELens release or a hub repository (org/name).{hint} "
        "`tl-circuits models` lists the short names."
    )


def _fetch(candidates: Iterable[Candidate]) -> None:
    """Download all files of the chosen layers, each repository's together."""
    wanted: dict[int, tuple[Repository, list[str]]] = {}
    for candidate in candidates:
        _, files = wanted.setdefault(id(candidate.repository), (candidate.repository, []))
        files.extend(candidate.entry.files)
    for repository, files in wanted.values():
        repository.fetch(files)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _made_for(published: Published, first: Candidate) -> str | None:
    return published.made_for or first.layout.model(first.repository, first.entry)


def _assemble(name: str, loaded: dict[int, LayerWeights], made_for: str | None) -> Dictionary:
    widths = {layer: weights.transcoder.W_enc.shape[0] for layer, weights in loaded.items()}
    first = next(iter(widths))
    other = next((layer for layer, width in widths.items() if width != widths[first]), None)
    if other is not None:
        raise DictionaryError(
            f"{name}: layer {first} has {widths[first]} features and layer {other} has {widths[other]}; "
            "the layers of one set have one width. Are two sets mixed?"
        )
    encoders = {layer: weights.transcoder for layer, weights in loaded.items()}
    if all(weights.decoder is None for weights in loaded.values()):
        return TranscoderSet(encoders, name, made_for)
    decoders = {layer: weights.decoder for layer, weights in loaded.items() if weights.decoder is not None}
    return CrossLayerTranscoders(encoders, decoders, name, made_for)
