"""How files of graphs end, and what they are called without their ending."""

import re
from pathlib import Path

OURS = ".graph.safetensors"
_OTHERS = (".safetensors", ".json.gz", ".json", ".pt")


def stem_of(path: Path) -> str:
    """A graph file's name without its ending: ``demo`` for ``demo.graph.safetensors``, ``a.b`` for ``a.b.json``.

    Examples:
        >>> from pathlib import Path
        >>> from tl_circuits.support.endings import stem_of
        >>> stem_of(Path("demo.graph.safetensors")), stem_of(Path("a.b.json"))
        ('demo', 'a.b')
    """
    ending = next((e for e in (OURS, *_OTHERS) if path.name.endswith(e) and path.name != e), path.suffix)
    return path.name.removesuffix(ending)


def stem_for(prompt: str) -> str:
    """What files of a prompt's graph are called, without an ending, if nobody chose a name.

    Examples:
        >>> from tl_circuits.support.endings import stem_for
        >>> stem_for("The capital of France is"), stem_for("日本")
        ('the-capital-of-france-is', 'trace')
    """
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "trace"
