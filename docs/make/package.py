"""Shows mkdocstrings the package as it is installed: with the top-level folder ``hooks`` as ``tl_circuits.hooks``."""

import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[2]
_FOLDER = tempfile.TemporaryDirectory(prefix="tl_circuits-docs-")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config, **_):
    package = Path(_FOLDER.name, "tl_circuits")
    package.mkdir(exist_ok=True)
    for source in (*(ROOT / "tl_circuits").iterdir(), ROOT / "hooks"):
        if not (package / source.name).exists():
            (package / source.name).symlink_to(source)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_FOLDER.name]
    return config
