"""One set out of a repository that publishes several widths and sparsities."""

from collections.abc import Iterable, Sequence

from tl_circuits.dictionaries.published import Candidate
from tl_circuits.errors import DictionaryError


def select(
    name: str,
    candidates: Sequence[Candidate],
    width: int | str | None,
    l0: int | float | str | None,
    layers: Iterable[int] | None,
) -> dict[int, Candidate]:
    """One candidate for each layer, ascending.

    ``width``: as published (``"16k"``) or a number (16384). ``l0``: as published (``"small"``,
    ``"76"``); a number takes each layer's nearest. Raises DictionaryError, listing what there is,
    when a choice is left, when nothing fits, and when asked layers are missing.
    """
    fitting = [c for c in candidates if width is None or c.entry.width == _width_name(width)]
    if not fitting:
        raise DictionaryError(f"{name} has no width {width!r}. There is: {_listed(candidates)}.")
    by_layer: dict[int, list[Candidate]] = {}
    for candidate in fitting:
        by_layer.setdefault(candidate.entry.layer, []).append(candidate)
    chosen = {layer: _one(name, layer, here, l0, candidates) for layer, here in sorted(by_layer.items())}
    if layers is not None:
        asked = sorted(set(layers))
        missing = [layer for layer in asked if layer not in chosen]
        if missing or not asked:
            raise DictionaryError(f"{name} has no layers {missing}; it has {_ranges(list(chosen))}.")
        return {layer: chosen[layer] for layer in asked}
    if list(chosen) != list(range(min(chosen), max(chosen) + 1)):
        missing = sorted(set(range(min(chosen), max(chosen))) - set(chosen))
        raise DictionaryError(
            f"{name} is missing the layers {_ranges(missing)}; it has {_ranges(list(chosen))}. A set is a gapless range: "
            "complete it, or take part of it with layers=."
        )
    return chosen


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
    raise DictionaryError(
        f"{name} publishes several sets; choose one with width= and l0= (on the command line --width and --l0). There is: "
        f"{_listed(everything)}."
    )


def _is_number(text: str | int | float | None) -> bool:
    try:
        float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def _width_name(width: int | str) -> str:
    """``16384`` as it is published: ``16k``."""
    text = str(width)
    if not text.isdigit():
        return text
    n = int(text)
    return f"{n // 1_000_000}m" if n >= 1_000_000 else f"{n // 1000}k" if n >= 1000 else text


def _listed(candidates: Sequence[Candidate]) -> str:
    """Every width with its sparsities, and how many layers have them."""
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


def _ranges(layers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}" if len(p) == 1 else f"{p[0]}..{p[-1]}" for p in parts)
