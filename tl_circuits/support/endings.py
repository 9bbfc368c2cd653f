"""How files of graphs end, and what they are called without their ending."""

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
