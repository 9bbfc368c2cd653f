"""The interface of layouts: which layers of a repository have this layout, and how one of them is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.slot_decoders import SlotDecoders
from tl_circuits.dictionaries.transcoder import Transcoder


@dataclass(frozen=True)
class Entry:
    """One layer of one published set. ``width`` and ``l0`` are as the repository writes them.

    ``files``: the weights first, then other files that are needed to read them. ``site``: of an autoencoder, the hook
    within its block at which it sits.
    """

    layer: int
    files: tuple[str, ...]
    width: str | None = None
    l0: str | None = None
    site: str | None = None


@dataclass(frozen=True)
class Hints:
    """What a config for all layers, or the caller, says about every layer; None where they say nothing."""

    input_hook: str | None = None
    output_hook: str | None = None
    activation: str | None = None
    k: int | None = None


class LayerWeights(NamedTuple):
    """The weights of one layer; ``decoder`` is set if features write to later layers as well.

    ``make``: set if large matrices must be computed, or their file be read whole. It returns those (``W_enc``,
    ``W_dec``, and ``b_enc`` if it takes a large matrix to compute it) by name; in ``transcoder`` they only have their
    shapes (on torch's ``meta`` device). It is not called where a converted copy of them is in the cache.
    """

    transcoder: Transcoder
    decoder: Float[Tensor, "feature slot d_out"] | SlotDecoders | None = None
    make: Callable[[], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Layout:
    """One way in which weights are published.

    ``find`` lists a repository's layers in this layout (none if it has another), ``read`` reads one, and ``model``
    gives the name of the model it was trained on, if the files say it. ``grows``: how many bytes of memory a byte of
    its files takes.
    """

    name: str
    find: Callable[[Repository], Sequence[Entry]]
    read: Callable[[Repository, Entry, Hints], LayerWeights]
    model: Callable[[Repository, Entry], str | None] = lambda repository, entry: None
    grows: int = 1
