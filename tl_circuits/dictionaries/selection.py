"""Choose one set from a repository that publishes several widths and sparsities."""

from collections.abc import Iterable, Sequence

from tl_circuits.dictionaries.base import gaps, ranges
from tl_circuits.dictionaries.published import Candidate
from tl_circuits.errors import DictionaryError


def select(
    name: str,
    candidates: Sequence[Candidate],
    width: int | str | None,
    l0: int | float | str | None,
    layers: Iterable[int] | None,
) -> dict[int, Candidate]:
    """Choose one candidate for each layer.

    Args:
        name: the source's name, for messages.
        candidates: everything that is published.
        width: as published (``"16k"``) or as a number (16384).
        l0: as published (``"small"``, ``"76"``); for a number, each layer takes the nearest.
        layers: only these; None for all.

    Raises:
        DictionaryError: several fit, none fits, or layers are missing; the message lists what there is.
    """
    fitting = [c for c in candidates if width is None or c.entry.width == _width_name(width)]
    if not fitting:
        raise DictionaryError(f"{name} has no width {width!r}. There is: {_listed(candidates)}.")
    by_layer: dict[int, list[Candidate]] = {}
    for candidate in fitting:
        by_layer.setdefault(candidate.entry.layer, []).append(candidate)
    chosen = {layer: _one(name, layer, here, l0, candidates) for layer, here in sorted(by_layer.items())}
    anywhere = all(c.entry.site is not None for c in candidates)
    return {layer: chosen[layer] for layer in wanted_layers(name, list(chosen), layers, anywhere)}


def wanted_layers(name: str, there: Sequence[int], asked: Iterable[int] | None, anywhere: bool) -> Sequence[int]:
    """The layers to open, ascending: those ``asked`` for, or all that are ``there``.

    A set of transcoders with a gap is probably an unfinished download or training, so it is opened only if its layers
    are asked for one by one. Autoencoders may sit ``anywhere``.

    Raises:
        DictionaryError: there is a gap and no layers were asked for, or a layer asked for is not there.
    """
    if asked is not None:
        layers = sorted(set(asked))
        missing = [layer for layer in layers if layer not in there]
        if missing or not layers:
            what = f"no layers {ranges(missing)}" if missing else "no such layers: layers= is empty"
            raise DictionaryError(f"{name} has {what}; it has {ranges(there)}.")
        return layers
    missing = gaps(there) if there else []
    if missing and not anywhere:
        raise DictionaryError(
            f"{name} is missing the layers {ranges(missing)}; it has {ranges(there)}. Complete it, or say that these "
            f"are meant in load_transcoders(..., layers={list(there)}): the MLPs of all other layers are error nodes "
            "then."
        )
    return there


def _one(
    name: str, layer: int, here: Sequence[Candidate], l0: int | float | str | None, everything: Sequence[Candidate]
) -> Candidate:
    if l0 is None:
        fitting = list(here)
    elif isinstance(l0, str) and not _is_number(l0):
        fitting = [c for c in here if c.entry.l0 == l0]
    else:
        numbered = [c for c in here if _is_number(c.entry.l0)]
        nearest = min((abs(float(c.entry.l0 or 0) - float(l0)) for c in numbered), default=None)
        fitting = [c for c in numbered if abs(float(c.entry.l0 or 0) - float(l0)) == nearest][:1]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise DictionaryError(f"{name}, layer {layer}, has no l0 {l0!r}. There is: {_listed(here)}.")
    if all(c.entry.width is None and c.entry.l0 is None for c in everything):
        files = ", ".join(c.entry.files[0] for c in fitting[:4])
        raise DictionaryError(
            f"{name} holds {len(fitting)} dictionaries for layer {layer}: {files}. Give the folder of one of them."
        )
    raise DictionaryError(
        f"{name} publishes several sets; choose one with width= and l0= (on the command line --width and --l0). "
        f"There is: {_listed(everything)}."
    )


def _is_number(text: str | int | float | None) -> bool:
    try:
        float(text)  # type: ignore[arg-type]  # None raises TypeError, which is caught
    except (TypeError, ValueError):
        return False
    return True


def _width_name(width: int | str) -> str:
    """A width as publishers write it: 16384 is ``16k``."""
    text = str(width)
    if not text.isdigit():
        return text
    n = int(text)
    return f"{n // 1_000_000}m" if n >= 1_000_000 else f"{n // 1000}k" if n >= 1000 else text


def _listed(candidates: Sequence[Candidate]) -> str:
    """All widths with their sparsities, and how many layers have each, for a message."""
    sets: dict[tuple[str, str], set[int]] = {}
    for c in candidates:
        sets.setdefault((c.entry.width or "?", c.entry.l0 or "?"), set()).add(c.entry.layer)
    lines = []
    for width in sorted({w for w, _ in sets}):
        l0s = {l0: len(layers) for (w, l0), layers in sets.items() if w == width}
        order = sorted(l0s, key=lambda l0: (not _is_number(l0), float(l0) if _is_number(l0) else 0.0, l0))
        if len(order) > 8 and all(map(_is_number, order)):
            lines.append(f"width={width!r} l0={order[0]} to {order[-1]} ({max(l0s.values())} layers at most each)")
        else:
            some = ", ".join(f"{l0!r} ({l0s[l0]} layers)" for l0 in order)
            lines.append(f"width={width!r} with l0={some}")
    return "; ".join(lines)
