"""The page as one HTML file that contains everything and fetches nothing."""

import base64
import hashlib
import html
from pathlib import Path
from typing import Any

from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.support.files import atomic_file
from tl_circuits.view.bundle import page_file, script
from tl_circuits.view.page_data import packed_json, page_data


def write_page(graph: AttributionGraph, path: Path, overwrite: bool, ablations: list[dict[str, Any]] | None) -> Path:
    """Write the page of ``graph`` to ``path``, whole or not at all.

    Raises:
        OutputError: if the file exists or cannot be written.
    """
    content = page_html(graph, ablations).encode("utf-8", "replace")
    with atomic_file(path, overwrite) as file:
        file.write(content)
    return path


def page_html(graph: AttributionGraph, ablations: list[dict[str, Any]] | None = None) -> str:
    """The page as text. Its content security policy allows its own script and style, and no request at all."""
    code, style = script("file.js"), page_file("page.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    data = page_data(graph, ablations)
    return page_file("template.html").format(
        policy=html.escape(policy),
        title=html.escape(graph.info.prompt[:80]),
        headline=html.escape(data["story"]["headline"]),
        prompt=html.escape(graph.info.prompt),
        style=style,
        script=code,
        data=packed_json(data),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
