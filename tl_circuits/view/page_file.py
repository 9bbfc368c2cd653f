"""One HTML file, everything inside, nothing fetched."""

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.storage import atomic_file
from tl_circuits.view.page_data import page_data


def write_page(graph: AttributionGraph, path: Path, overwrite: bool) -> Path:
    """Write ``graph``'s page to ``path``, atomically; raises OutputError as ``graph.save`` does."""
    content = page_html(graph).encode()
    with atomic_file(path, overwrite) as file:
        file.write(content)
    return path


def page_html(graph: AttributionGraph) -> str:
    """The page as text. Its security policy allows its own script and style and no request at all."""
    page = files("tl_circuits.view") / "page"
    script, style = ((page / name).read_text(encoding="utf-8") for name in ("graph.js", "graph.css"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    # Inside a script element only "<" could end it early; JSON may write it as an escape.
    data = json.dumps(page_data(graph), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (page / "template.html").read_text(encoding="utf-8").format(
        policy=html.escape(policy),
        title=html.escape(graph.info.prompt[:80]),
        style=style,
        script=script,
        data=data,
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
