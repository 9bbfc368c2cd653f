"""Places: where dictionaries stand, one after the other in the order of the forward pass.

A layer has one place for each of its dictionaries, and one if it has none. So where no layer has several dictionaries,
the number of a place is that of its layer. Graphs are computed over places: what is written at one acts on what is read
at later ones only.
"""

from typing import Any, NamedTuple

from .errors import DictionaryError
from .numbers import shown


class BlockPlace(NamedTuple):
    """Where one dictionary stands, or a layer without any.

    Attributes:
        layer: the layer.
        site: the short name of the site, such as ``"attn_out"``, if the layer has several dictionaries; else empty.
    """

    layer: int
    site: str


def short_site(site: str) -> str:
    """The name of a site as ids and tables say it, such as ``"resid_post"`` for ``"hook_resid_post"``."""
    return site.replace("hook_", "")


def by_place(dictionary: Any) -> Any:
    """The dictionary that answers to numbers of places where ``dictionary`` answers to layers.

    That is ``dictionary`` itself unless some layer has several.
    """
    view = getattr(dictionary, "by_place", None)
    return dictionary if view is None else view()


def places(dictionary: Any, n_layers: int) -> tuple[BlockPlace, ...]:
    """All places of the first ``n_layers`` layers; a place's number is its index."""
    known = getattr(by_place(dictionary), "places", ())
    there = [place for place in known if place.layer < n_layers]
    return (*there, *(BlockPlace(layer, "") for layer in range(len({place.layer for place in there}), n_layers)))


def sites_of(dictionary: Any, layer: int) -> tuple[str, ...]:
    """The short names of the sites at which a layer has dictionaries, in the order of the forward pass."""
    placed = by_place(dictionary)
    if not hasattr(placed, "places"):
        return (_output(placed, layer),) if layer in placed.layers else ()
    return tuple(
        _output(placed, n) for n, place in enumerate(placed.places) if place.layer == layer and n in placed.layers
    )


def place_number(dictionary: Any, layer: int, site: str | None = None, error: type[Exception] = DictionaryError) -> int:
    """The number of the place of one of a layer's dictionaries, or of a layer without any.

    Args:
        dictionary: the attached dictionary.
        layer: the layer.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``,
            ``"hook_resid_post"`` or ``"blocks.4.hook_resid_post"``.
        error: the type of the error.

    Raises:
        DictionaryError: (or ``error``) the layer has several dictionaries and ``site`` is missing, or the layer has
            none at ``site``. The message lists the sites.
    """
    here = sites_of(dictionary, layer)
    if site is not None and not isinstance(site, str):
        raise error(f"site= is the name of a site such as {here[0] if here else 'resid_post'!r}, got {shown(site)}.")
    name = short_site(site.removeprefix(f"blocks.{layer}.")) if site else None
    if name and name not in here:
        raise error(f"layer {layer} has no dictionary at site={site!r}; it has {', '.join(map(repr, here)) or 'none'}.")
    if not name and len(here) > 1:
        raise error(
            f"layer {layer} has several dictionaries; say which one with site=, one of {', '.join(map(repr, here))}."
        )
    first = next(n for n, place in enumerate(places(dictionary, layer + 1)) if place.layer == layer)
    return first + (here.index(name) if name else 0)


def _output(placed: Any, number: int) -> str:
    return short_site(placed.output_hook(number).split(".", 2)[2])
