"""Writes the project's address, ``url`` in setup.cfg, into the notebooks: ``python -m docs.make.address``
(``make address``).

It is nowhere else. With an address, a badge opens its notebook on Colab and the first cell installs from the
repository. Without one there is no badge, because it could only lead to Colab's front page: a line says how to get the
notebook there, and the first cell takes the package from the index.
"""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLAB = "https://colab.research.google.com/"
BADGE = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]"
BY_HAND = "To run this notebook on Colab, open it there with *File > Upload notebook*."
_EITHER = re.compile(rf"{re.escape(BADGE)}\([^)]*\)|{re.escape(BY_HAND)}")
_INSTALL = re.compile(r"(%pip install -q \\?\"?tl_circuits(?:\[[a-z,]+\])?)(?: @ git\+[^\"\\\s]+)?")


def address(settings: Path = ROOT / "setup.cfg") -> str:
    """The project's address, such as ``https://github.com/me/tl_circuits``; empty if none is set.

    Raises ValueError for one that is not of GitHub: Colab opens no others.
    """
    parser = configparser.ConfigParser()
    parser.read(settings, encoding="utf-8")
    url = parser.get("metadata", "url", fallback="").strip().rstrip("/")
    if url and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"url in {settings.name} must be https://github.com/OWNER/NAME, got {url!r}.")
    return url


def notebooks(root: Path = ROOT) -> list[Path]:
    """Those of the documentation and of the course."""
    return sorted([*root.glob("docs/notebooks/*.ipynb"), *root.glob("tl_circuits/course/notebooks/*.ipynb")])


def with_address(text: str, place: str, url: str) -> str:
    """The text of a notebook's file, ``place`` being its path in the repository, with badge and first cell for
    ``url``."""
    opens = f"{COLAB}github/{url.removeprefix('https://github.com/')}/blob/main/{place}"
    text = _EITHER.sub(lambda _: f"{BADGE}({opens})" if url else BY_HAND, text)
    return _INSTALL.sub(lambda found: f"{found[1]} @ git+{url}" if url else found[1], text)


def on_config(config, **_):
    """For mkdocs: the link to the repository in the site's header."""
    config.repo_url = address() or None
    return config


if __name__ == "__main__":
    for path in notebooks():
        text = path.read_text(encoding="utf-8")
        path.write_text(with_address(text, path.relative_to(ROOT).as_posix(), address()), encoding="utf-8")
