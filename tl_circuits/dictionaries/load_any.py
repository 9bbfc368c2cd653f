"""``tlc.load_dictionary``: open any dictionary: transcoders, autoencoders at any site, or several together."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tl_circuits.dictionaries.base import Dictionary
from tl_circuits.dictionaries.combined import combined, named, one_a_layer
from tl_circuits.dictionaries.load import load_transcoders
from tl_circuits.dictionaries.residency import Residency
from tl_circuits.dictionaries.saelens import is_saelens, layer_of_saelens
from tl_circuits.dictionaries.saelens_releases import open_release
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import PromptRule
from tl_circuits.support.checked import checked


@checked
def load_dictionary(
    source: Any,
    *,
    ids: str | Iterable[str] | None = None,
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
    """Open any dictionary: transcoders, SAELens autoencoders at any site, or several of them as one.

    Args:
        source: anything that :func:`load_transcoders` takes; a SAELens release of autoencoders, such as
            ``"gemma-scope-2b-pt-res-canonical"``; one SAELens object, or a list of them, each for the site that its
            hook names; or a list of dictionaries, which become one. A layer may have several of them, at different
            sites.
        ids: which autoencoders of a release, by SAELens' ids, such as ``"blocks.8.hook_resid_pre"``; several of one
            layer if they are at different sites. Without ids, ``width`` and ``l0`` choose; if a layer then has
            autoencoders at several sites, those at the release's most frequent site are taken.
        width: as for :func:`load_transcoders`.
        l0: as for :func:`load_transcoders`.
        layers: as for :func:`load_transcoders`. A release of autoencoders may have any layers; None takes all it has.
        input_hook: as for :func:`load_transcoders`.
        output_hook: as for :func:`load_transcoders`.
        device: as for :func:`load_transcoders`.
        dtype: as for :func:`load_transcoders`.
        residency: as for :func:`load_transcoders`.
        cache_dir: as for :func:`load_transcoders`. Releases of autoencoders are kept in the hub library's own folder.
        name: as for :func:`load_transcoders`.
        prompt_rule: as for :func:`load_transcoders`.
        progress: show a progress bar on stderr.

    Returns:
        The dictionary, for ``tlc.attach``. A feature's number is its row in the decoder, as in SAELens.

    Raises:
        DictionaryError: the source does not exist or cannot be read; two dictionaries are given for one site, or for
            one MLP; or an option does not apply to it.
        DownloadError: files cannot be downloaded.

    Examples:
        An autoencoder of the residual stream behind block 1, and the built-in transcoder of block 3:

        >>> import torch
        >>> random = torch.Generator().manual_seed(0)
        >>> W = torch.randn(200, 96, generator=random) / 10
        >>> site = dict(input_hook="hook_resid_post", output_hook="hook_resid_post")
        >>> mine = tlc.Transcoder(W, W, b_enc=torch.zeros(200), b_dec=torch.zeros(96), **site)
        >>> both = tlc.load_dictionary(
        ...     [tlc.load_dictionary({1: mine}, layers=[1]), tlc.load_dictionary(transcoders, layers=[3])]
        ... )
        >>> both.layers, both.output_hook(1), both.output_hook(3)
        ((1, 3), 'blocks.1.hook_resid_post', 'blocks.3.hook_mlp_out')

        The transcoders of all layers, and the same autoencoder beside one of them: two dictionaries in layer 1. Ids of
        nodes then name the site, as in ``L1.resid_post/F3@8``.

        >>> several = tlc.load_dictionary([transcoders, tlc.load_dictionary({1: mine}, layers=[1])])
        >>> several.layers, [place.site for place in several.places]
        ((0, 1, 2, 3), ['', 'mlp_out', 'resid_post', '', ''])
    """
    options: dict[str, Any] = dict(
        width=width, l0=l0, layers=layers, input_hook=input_hook, output_hook=output_hook, device=device, dtype=dtype,
        residency=residency, cache_dir=cache_dir, name=name, prompt_rule=prompt_rule, progress=progress,
    )  # fmt: skip
    if is_saelens(source):
        source = [source]
    if isinstance(source, (list, tuple)) and source:
        if all(isinstance(part, Dictionary) for part in source):
            source = combined(source)
        elif all(is_saelens(part) for part in source):
            return _of_saelens(source, options)
        elif any(isinstance(part, (Dictionary, str, Path)) for part in source):
            kinds = ", ".join(sorted({type(part).__name__ for part in source}))
            raise DictionaryError(
                f"a list must hold dictionaries alone or SAELens objects alone, got {kinds}. Open each with "
                "tlc.load_dictionary first."
            )
    elif ids is not None:
        return open_release(source, ids=ids, **options)
    if ids is not None:
        raise DictionaryError(f"ids={ids!r} chooses among the autoencoders of a SAELens release; leave ids= out here.")
    return load_transcoders(source, **options)


def _of_saelens(saes: Iterable[Any], options: dict[str, Any]) -> Dictionary:
    """SAELens objects as one dictionary, each for the layer and site that its hook names."""
    sets = one_a_layer((layer_of_saelens(sae), sae) for sae in saes)
    asked = options["layers"]
    if asked is None or len(sets) == 1:
        opened = [
            load_transcoders(found, **options | {"layers": list(found) if asked is None else asked}) for found in sets
        ]
    else:
        raise DictionaryError(
            "layers= is not for SAELens objects of which several are of one layer: give those you want."
        )
    return named(combined(opened), options["name"])
