"""What every layout's module gives: which layers it finds in a repository, and how one is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoders import Transcoder


@dataclass(frozen=True)
class Entry:
    """One layer of one published set. ``width`` and ``l0`` are as the repository names them.

    ``files`` are the weights, then what else must be there to read them.
    """

    layer: int
    files: tuple[str, ...]
    width: str | None = None
    l0: str | None = None


@dataclass(frozen=True)
class Hints:
    """What is said elsewhere (a config over all layers, or the caller) about every layer."""

    input_hook: str | None = None
    output_hook: str | None = None
    activation: str | None = None
    k: int | None = None


class LayerWeights(NamedTuple):
    """One layer as read; ``decoder`` only where features write to later layers too."""

    transcoder: Transcoder
    decoder: Float[Tensor, "feature slot d_out"] | None = None


@dataclass(frozen=True)
class Layout:
    """A way of laying out weights. ``find`` is empty where the repository is laid out otherwise.

    ``model`` reads what the files say about the model they are for, if they do.
    """

    name: str
    find: Callable[[Repository], Sequence[Entry]]
    read: Callable[[Repository, Entry, Hints], LayerWeights]
    model: Callable[[Repository, Entry], str | None] = lambda repository, entry: None
