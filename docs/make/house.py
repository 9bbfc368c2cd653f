"""The plan of the house: which module imports which, drawn for docs/contributing.md and checked by the tests.

python -m docs.make.house        # writes docs/images/house.svg
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = (
    ("hooks",),
    ("errors", "support", "models"),
    ("graph",),
    ("dictionaries",),
    ("attribution",),
    ("attention", "interventions"),
    ("feature_labels", "recurring"),
    ("neuronpedia", "view", "batch", "course"),
    ("tl_circuits",),  # the front door: names the public functions of all below
    ("cli",),
)
"""The rooms of each floor, from the ground up. A floor may import those below it."""

Imports = dict[str, set[str]]


def imports() -> Imports:
    """What each module imports from the package, wherever in the file it does; names as ``graph.prune``."""
    files = {_name(path): path for folder in ("hooks", "tl_circuits") for path in (ROOT / folder).rglob("*.py")}
    return {name: _imported(name, path, files) - {name} for name, path in files.items()}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "tl_circuits" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "tl_circuits"


def _imported(name: str, path: Path, files: dict[str, Path]) -> set[str]:
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            asked = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            asked = [(".".join([*above, *([node.module] if node.module else [])]), alias.name) for alias in node.names]
        else:
            continue
        for module, what in asked:
            if module.partition(".")[0] not in ("tl_circuits", "hooks"):
                continue
            within = module.removeprefix("tl_circuits").lstrip(".")
            whole = ".".join(part for part in (within, what) if part)
            found.add(whole if whole in files else within if within in files else "tl_circuits")
    return found


def circles(made: Imports) -> list[list[str]]:
    """Groups of modules of which each reaches each other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    waiting: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        waiting.append(module)
        for other in sorted(made[module]):
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in waiting:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            group = waiting[waiting.index(module) :]
            del waiting[waiting.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(made):
        if module not in number:
            visit(module)
    return found


def upward(made: Imports) -> list[tuple[str, str]]:
    """Imports from a floor above, and those between two rooms of one floor that import each other."""
    height = {room: n for n, floor in enumerate(FLOORS) for room in floor}
    pairs = [(module, other) for module in sorted(made) for other in sorted(made[module])]
    rooms = {(_room(module), _room(other)) for module, other in pairs}
    return [
        (module, other)
        for module, other in pairs
        if (here := _room(module)) != (there := _room(other))
        and (height[there] > height[here] or (height[there] == height[here] and (there, here) in rooms))
    ]


def _room(module: str) -> str:
    return module.partition(".")[0]


ROW, WIDE, ROOM = 56, 860, 150
PICTURE = ROOT / "docs" / "images" / "house.svg"


def picture(made: Imports) -> str:
    """The floors as an SVG drawing, the ground floor at the bottom; each room says how many others it imports."""
    high = ROW * len(FLOORS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high}" font-family="sans-serif" font-size="13">'
    ]
    for n, floor in enumerate(FLOORS):
        y = high - ROW * (n + 1)
        parts.append(f'<text x="8" y="{y + 32}" fill="#777">{n}</text>')
        for i, room in enumerate(floor):
            used = {_room(other) for module in made if _room(module) == room for other in made[module]} - {room}
            x = 40 + i * (ROOM + 20)
            parts.append(
                f'<rect x="{x}" y="{y + 8}" width="{ROOM}" height="{ROW - 16}" rx="6" fill="#eef3fb" stroke="#0072B2"/>'
            )
            parts.append(f'<text x="{x + 10}" y="{y + 26}">{room}</text>')
            parts.append(
                f'<text x="{x + 10}" y="{y + 41}" fill="#555" font-size="10">imports {len(used)} other rooms</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(imports()), encoding="utf-8")
