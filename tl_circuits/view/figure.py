"""The story as a figure for papers and slides, and an intervention before and after. Matplotlib; no browser."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.visible import visible
from tl_circuits.support.figures import Picture, figure_class, save_figure
from tl_circuits.view.routes import Points, apart, routes
from tl_circuits.view.story import Story, Unit, story_of, summary_line

if TYPE_CHECKING:
    from tl_circuits.interventions.intervene import InterventionResult

PLUS, MINUS = "#0072B2", "#D55E00"
WIDE, LANE, BOX, HIGH = 10.0, 1.0, 2.1, 0.58  # inches
MARGIN = 0.15  # beside the outermost boxes of a lane
BETWEEN = 0.2  # between boxes of a lane, for arrows to pass
HEAD, HALF, ARC = 0.08, 0.06, 0.3  # an arrow's head, half its width, and how high an arc over a row goes
CLOSE_ROWS = 0.22
LEAST_NAMED = 0.05  # a word's share is written if it is at least this
FOOT, TALLEST = 0.5, 0.3  # below the tokens is room for the bars of what each word does
LEGEND = (
    "Bars: what each word does to the answer. Blue solid arrows raise what they point to, orange dashed ones lower "
    "it, in the replacement model."
)
TURNED_DOWN = " Boxes with ↓ are turned down, by blue arrows."  # in graphs that compare with other prompts


def plot_story(graph: AttributionGraph, path: Path | None, max_boxes: int, overwrite: bool) -> Path | Picture:
    """Draw the story of ``graph``; see :meth:`AttributionGraph.plot`."""
    story = story_of(graph, max_boxes)
    places, high = _places(story)
    figure = figure_class()(figsize=(WIDE, high + 1.0))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, WIDE), ylim=(0, high + 1.0))
    axis.axis("off")
    weakest = sorted(story.arrows, key=lambda a: abs(a.share))
    for arrow, points in zip(
        weakest, routes([(places[a.source], places[a.target]) for a in weakest], places, WIDE), strict=True
    ):
        _arrow(axis, points, arrow.share)
    for unit, place in zip(story.units, places, strict=True):
        _unit(axis, unit, place)
    _words(
        axis,
        graph,
        {unit.members[0]: place for unit, place in zip(story.units, places, strict=True) if unit.kind == "token"},
    )
    axis.text(0.15, high + 0.62, story.headline, fontsize=17, fontweight="bold", va="center", **_plain())
    read = _cut(graph.info.reads, 180)
    legend = LEGEND + (TURNED_DOWN if any(unit.lower for unit in story.units) else "")
    for line, y in ((read, 0.34), (summary_line(story, graph), 0.16), (legend, -0.02)):
        axis.text(0.15, high + y, line, fontsize=small_print(line), color="0.35", va="center", **_plain())
    return save_figure(figure, path, overwrite)


def plural(count: int, thing: str) -> str:
    """A number of things, such as ``2 features``."""
    return f"{count} {thing}{'s' * (count != 1)}"


def small_print(line: str) -> float:
    """The size in points at which a line below the headline fits the figure's width."""
    return 7.5 * min(1.0, 180 / max(1, len(line)))


def plot_intervention(result: "InterventionResult", path: Path | None, overwrite: bool) -> Path | Picture:
    """Bars of the likeliest next tokens before and after an intervention; see :meth:`InterventionResult.plot`."""
    figure = figure_class()(figsize=(5.2, 3.2), layout="constrained")
    axis = figure.subplots()
    top = result.top(5)
    rows = range(len(top))
    axis.barh([r - 0.2 for r in rows], top.before, height=0.38, color="0.7", label="before")
    axis.barh([r + 0.2 for r in rows], top.after, height=0.38, color=PLUS, label="after")
    axis.set_yticks(list(rows), [f"“{_cut(visible(t), 24)}”" for t in top.token], parse_math=False)
    axis.invert_yaxis()
    axis.set(xlabel="probability of the next token", xlim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        f"{plural(len(result.edits), 'feature')} edited, KL {result.kl():.2f} nats ({result.freeze} held)", fontsize=10
    )
    axis.legend(frameon=False, loc="lower right")
    return save_figure(figure, path, overwrite)


def _places(story: Story) -> tuple[list[tuple[float, float, float, float]], float]:
    """Left, bottom, width and height of every unit, and the height of the whole: boxes in lanes, as in the page."""
    tokens = [u for u in story.units if u.kind == "token"]
    lanes: list[list[Unit]] = []
    for box in sorted((u for u in story.units if u.kind == "box"), key=lambda u: (u.row, u.column)):
        if not lanes or len(lanes[-1]) == 4 or box.row - lanes[-1][0].row > CLOSE_ROWS:
            lanes.append([])
        lanes[-1].append(box)
    found: dict[int, tuple[float, float, float, float]] = {}
    centres = _row(found, tokens, FOOT, 0.34)
    for n, lane in enumerate(lanes):
        wished = sorted(lane, key=lambda u: (_at(centres, u.column), u.row))
        left = apart([_at(centres, u.column) - BOX / 2 for u in wished], MARGIN, WIDE - BOX - MARGIN, BOX + BETWEEN)
        for unit, x in zip(wished, left, strict=True):
            found[id(unit)] = (x, FOOT + LANE * (n + 0.95), BOX, HIGH)
    top = FOOT + LANE * (len(lanes) + 0.95)
    _row(found, [u for u in story.units if u.kind == "target"], top, 0.34)
    return [found[id(unit)] for unit in story.units], top + 0.5


def _words(axis: Any, graph: AttributionGraph, tokens: dict[int, tuple[float, float, float, float]]) -> None:
    """A bar under each token: its share of what the words do to the answer."""
    words = graph.words
    most = max(words.share.abs().max(), 1e-30) if len(words) else 1.0
    for row in words.itertuples():
        place = tokens.get(graph.node_numbers[f"token@{row.position}"])
        if place is None:
            continue
        x, y, wide, _ = place
        high = TALLEST * abs(row.share) / most
        axis.fill(
            [x, x + wide, x + wide, x],
            [y - 0.03, y - 0.03, y - 0.03 - high, y - 0.03 - high],
            color=PLUS if row.share >= 0 else MINUS,
            linewidth=0,
        )
        if abs(row.share) >= LEAST_NAMED:
            axis.text(
                x + wide / 2,
                y - 0.08 - high,
                f"{row.share:+.0%}",
                fontsize=6,
                color="0.35",
                ha="center",
                va="top",
                **_plain(),
            )


def _row(found: dict[int, Any], units: list[Unit], y: float, height: float) -> list[float]:
    """Place units in a row over the middle; returns their centres by column."""
    widths = [0.25 + 0.085 * min(16, len(u.name)) for u in units]
    squeeze = min(1.0, (WIDE - 0.3) / max(1e-9, sum(widths) + 0.1 * len(widths)))
    x = (WIDE - squeeze * (sum(widths) + 0.1 * max(0, len(widths) - 1))) / 2
    centres = []
    for unit, wide in zip(units, widths, strict=True):
        found[id(unit)] = (x, y, wide * squeeze, height)
        centres.append(x + wide * squeeze / 2)
        x += (wide + 0.1) * squeeze
    return centres


def _at(centres: Sequence[float], column: float) -> float:
    if not centres:
        return WIDE / 2
    low = min(int(column), len(centres) - 1)
    high = min(low + 1, len(centres) - 1)
    return centres[low] + (centres[high] - centres[low]) * (column - int(column))


def _arrow(axis: Any, points: Points, share: float) -> None:
    """Draw one arrow along ``points``: curves from row to row, straight lines through gaps, and a head."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    wide, colour, style = (
        min(5.0, 0.6 + 5 * abs(share) ** 0.5),
        PLUS if share >= 0 else MINUS,
        "-" if share >= 0 else (0, (4, 2.5)),
    )
    (x1, y1), (x2, y2) = points[0], points[-1]
    beside, level = len(points) == 2 and y1 == y2 and abs(x2 - x1) < 2 * BETWEEN, y1 == y2
    if beside:
        sign = 1 if x2 > x1 else -1
        vertices, codes, head = [(x1, y1), (x2 - sign * HEAD, y1)], [1, 2], (sign, 0)
    elif level:
        over = y1 + ARC
        vertices, codes, head = [(x1, y1), (x1, over), (x2, over + HEAD), (x2, y2 + HEAD)], [1, 4, 4, 4], (0, -1)
    else:
        sign = 1 if y2 > y1 else -1
        ends = [*points[:-1], (x2, y2 - sign * HEAD)]
        vertices, codes, head = [ends[0]], [1], (0, sign)
        for n in range(0, len(ends), 2):
            (xa, ya), (xb, yb) = ends[n : n + 2]
            vertices += [(xa, (ya + yb) / 2), (xb, (ya + yb) / 2), (xb, yb), *ends[n + 2 : n + 3]]
            codes += [4, 4, 4, *([2] if n + 2 < len(ends) else [])]
    axis.add_patch(
        PathPatch(
            Curve(vertices, codes),
            fill=False,
            linewidth=wide,
            edgecolor=colour,
            linestyle=style,
            alpha=0.75,
            capstyle="butt",
        )
    )
    (tx, ty), (dx, dy) = vertices[-1], head
    axis.fill(
        [tx - HALF * dy, tx + HALF * dy, tx + HEAD * dx],
        [ty - HALF * dx, ty + HALF * dx, ty + HEAD * dy],
        color=colour,
        linewidth=0,
    )


def _unit(axis: Any, unit: Unit, place: tuple[float, float, float, float]) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y, wide, high = place
    face, edge, ink = {
        "token": ("#f6f7f9", "#d5dae0", "black"),
        "box": ("#eef2f7", "#8695a6", "black"),
        "target": ("#1b1f24", "#1b1f24", "white"),
    }[unit.kind]
    axis.add_patch(
        FancyBboxPatch(
            (x, y),
            wide,
            high,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=face,
            edgecolor=edge,
            linewidth=1,
            zorder=3,
        )
    )
    if unit.kind == "box":
        count = len(unit.members)
        axis.text(
            x + 0.1,
            y + high - 0.19,
            _cut(unit.name, 27),
            fontsize=8.2,
            fontweight="bold",
            va="center",
            zorder=4,
            **_plain(),
        )
        axis.text(
            x + 0.1,
            y + 0.15,
            _cut(f"{'↓ ' * unit.lower}{plural(count, 'feature')} · {unit.place}", 42),
            fontsize=6.2,
            color="0.35",
            va="center",
            zorder=4,
            **_plain(),
        )
    else:
        bold = "bold" if unit.kind == "target" else "normal"
        axis.text(
            x + wide / 2,
            y + high / 2,
            _cut(unit.name, max(3, int(wide / 0.082))),
            fontsize=8.5,
            color=ink,
            fontweight=bold,
            ha="center",
            va="center",
            zorder=4,
            **_plain(),
        )


def _plain() -> dict[str, Any]:
    """Draw text as it is, without mathematics between dollar signs, in fonts that also have other scripts."""
    return {"parse_math": False, "family": ["DejaVu Sans", "sans-serif"]}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
