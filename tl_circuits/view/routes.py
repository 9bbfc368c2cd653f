"""The ways of a figure's arrows: they pass the rows between through gaps, and run through no box. As page/routes.js
does."""

from collections.abc import Sequence
from dataclasses import dataclass, field

Place = tuple[float, float, float, float]  # left, bottom, width, height
Points = list[tuple[float, float]]
EDGE, APART, PORT = 0.04, 0.07, 0.14  # inches: from boxes, between arrows in a gap, between arrows at an edge


@dataclass
class _Gap:
    low: float
    high: float
    users: list["_Pass"] = field(default_factory=list)


@dataclass
class _Row:
    bottom: float
    top: float
    places: list[Place]
    gaps: list[_Gap]


@dataclass
class _Pass:
    row: _Row
    x: float


def routes(ends: Sequence[tuple[Place, Place]], places: Sequence[Place], width: float) -> list[Points]:
    """Points of every arrow, given as the place it leaves and the place it enters.

    Args:
        ends: (place left, place entered) of each arrow. Every place is one of ``places``.
        places: left, bottom, width and height of everything that stands in the way. Those with one ``bottom`` are a
            row.
        width: how far rows reach.

    Returns:
        For each arrow: its start, both ends of every gap it passes, and its end. An arrow within a row goes from side
            to
        side if nothing stands between; else from top to top, and is to be drawn as an arc above the row.
    """
    rows = _rows(places, width)
    started = [_port(ends, i, 0) for i in range(len(ends))]
    ended = [_port(ends, i, 1) for i in range(len(ends))]
    passes = [_passes(source, target, a, b, rows) for (source, target), a, b in zip(ends, started, ended, strict=True)]
    for gap in (gap for row in rows for gap in row.gaps):
        gap.users.sort(key=lambda one: one.x)
        for one, x in zip(gap.users, apart([one.x for one in gap.users], gap.low, gap.high, APART), strict=True):
            one.x = x
    return [
        _points(source, target, a, b, through, rows)
        for (source, target), a, b, through in zip(ends, started, ended, passes, strict=True)
    ]


def apart(ordered: Sequence[float], low: float, high: float, least: float) -> list[float]:
    """Ordered numbers moved so that neighbours are ``least`` apart, or evenly over low..high if they do not fit."""
    step = min(least, (high - low) / max(1, len(ordered) - 1))
    found = [min(max(x, low), high) for x in ordered]
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + step)
    limit = high
    for i in reversed(range(len(found))):
        found[i] = min(found[i], limit)
        limit = found[i] - step
    return found


def _rows(places: Sequence[Place], width: float) -> list[_Row]:
    rows = []
    for bottom in sorted({place[1] for place in places}):
        here = sorted(place for place in places if place[1] == bottom)
        lefts = [0.0, *(left + wide for left, _, wide, _ in here)]
        rights = [*(left for left, *_ in here), width]
        gaps = [_Gap(a + EDGE, b - EDGE) for a, b in zip(lefts, rights, strict=True) if b - a >= 2 * EDGE]
        rows.append(_Row(bottom, bottom + max(place[3] for place in here), here, gaps or [_Gap(width, width)]))
    return rows


def _centre(place: Place) -> float:
    return place[0] + place[2] / 2


def _at_top(source: Place, target: Place, end: int) -> bool:
    """Whether an arrow's end stands on the upper edge.

    It leaves upwards unless it goes down, and enters from where it comes.
    """
    return source[1] <= target[1] if end == 0 else source[1] >= target[1]


def _port(ends: Sequence[tuple[Place, Place]], i: int, end: int) -> float:
    """Where one end stands on the edge of its place: beside the other ends, in the order of where they come from."""
    mine = ends[i]
    beside = sorted(
        (_centre(other[1 - side]), j, side)
        for j, other in enumerate(ends)
        for side in (0, 1)
        if other[side] == mine[end] and _at_top(*other, side) == _at_top(*mine, end)
    )
    half = min(0.35 * mine[end][2], PORT * (len(beside) - 1) / 2)
    at = beside.index((_centre(mine[1 - end]), i, end))
    return _centre(mine[end]) + (2 * half * at / (len(beside) - 1) - half if len(beside) > 1 else 0.0)


def _passes(source: Place, target: Place, start: float, end: float, rows: Sequence[_Row]) -> list[_Pass]:
    low, high = sorted((source[1], target[1]))
    between = [row for row in rows if low < row.bottom < high]
    found, x = [], start
    for n, row in enumerate(between if source[1] < target[1] else reversed(between)):
        # Straight on where that is free, else towards the end of the arrow.
        free = any(gap.low <= x <= gap.high for gap in row.gaps)
        wished = x if free else x + (end - x) / (len(between) - n + 1)
        gap = min(row.gaps, key=lambda gap: abs(min(max(wished, gap.low), gap.high) - wished))
        x = min(max(wished, gap.low), gap.high)
        found.append(_Pass(row, x))
        gap.users.append(found[-1])
    return found


def _points(
    source: Place, target: Place, start: float, end: float, passes: Sequence[_Pass], rows: Sequence[_Row]
) -> Points:
    here = next(row.places for row in rows if row.bottom == source[1])
    if source[1] == target[1] and not any(
        min(source[0], target[0]) < place[0] < max(source[0], target[0]) for place in here
    ):
        right, y = target[0] > source[0], source[1] + source[3] / 2
        return [(source[0] + source[2] * right, y), (target[0] + target[2] * (not right), y)]
    up = source[1] < target[1]
    through = [
        (one.x, y) for one in passes for y in ((one.row.bottom, one.row.top) if up else (one.row.top, one.row.bottom))
    ]
    leaves = source[1] + source[3] * _at_top(source, target, 0)
    return [(start, leaves), *through, (end, target[1] + target[3] * _at_top(source, target, 1))]
