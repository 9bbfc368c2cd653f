"""English text from Debian packages, for transcoders of a general language model: what it is, its licence, and how it
is read.

Packages are fetched with ``apt-get download`` and unpacked into a folder; nothing is installed.
"""

import gzip
import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tl_circuits.models import sha256


@dataclass(frozen=True)
class Source:
    """Text of one Debian package.

    ``pattern``: its files, below ``usr/share`` of the package. ``read``: a file's bytes to documents. ``most``: tokens
    that are taken at most, so that no one kind of text is more than an eighth of all.
    """

    package: str
    pattern: str
    read: Callable[[bytes], list[str]]
    licence: str
    most: int


class _Words(HTMLParser):
    """The text of a page, without its scripts, styles and navigation."""

    _DROPPED = ("script", "style", "nav", "head", "footer")
    _BLOCKS = ("p", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "br", "table")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.dropped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.dropped += tag in self._DROPPED
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.dropped = max(0, self.dropped - (tag in self._DROPPED))
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.dropped:
            self.parts.append(data)


def html(data: bytes) -> list[str]:
    """A page as one document."""
    words = _Words()
    words.feed(data.decode("utf-8", "replace"))
    lines = (re.sub(r"[ \t\xa0]+", " ", line).strip() for line in "".join(words.parts).split("\n"))
    return [re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()]


def plain(data: bytes) -> list[str]:
    """A file as one document."""
    return [data.decode("utf-8", "replace").strip()]


def fortune(data: bytes) -> list[str]:
    """A file of sayings, forty to a document."""
    return _joined(re.split(r"\n%\n", data.decode("utf-8", "replace")), 40)


def dictionary(data: bytes) -> list[str]:
    """A dictionary of the dict protocol, forty entries to a document, without its marks of sources."""
    text = re.sub(r"\n *\[[^\]\n]{0,40}\]\n", "\n", data.decode("utf-8", "replace"))
    return _joined(re.split(r"\n\n(?=\S)|\n(?=\S[^\n]{0,60}\n {2,})", text), 40)


def glosses(data: bytes) -> list[str]:
    """WordNet's words with their meanings and examples, sixty to a document."""
    found = []
    for line in data.decode("utf-8", "replace").splitlines():
        fields, mark, meaning = line.partition(" | ")
        if mark and line[:1].isdigit():
            words = [w.replace("_", " ") for w in fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]]
            found.append(f"{', '.join(words)}: {meaning.strip()}")
    return _joined(found, 60)


def _joined(entries: list[str], n: int) -> list[str]:
    return ["\n\n".join(e.strip() for e in entries[i : i + n]) for i in range(0, len(entries), n)]


SOURCES = (
    Source(
        "anarchism", "doc/anarchism/markdown/sec*.md.gz", plain, "GFDL-1.1+ or GPL-2+ (an essay in 140 parts)", 400_000
    ),
    Source("dict-gcide", "dictd/gcide.dict.dz", dictionary, "GPL-3+ (Webster 1913 with additions)", 350_000),
    Source("wordnet-base", "wordnet/data.*", glosses, "WordNet licence", 250_000),
    Source("dict-foldoc", "dictd/foldoc.dict.dz", dictionary, "GFDL-1.1+", 150_000),
    Source("dict-jargon", "dictd/jargon.dict.dz", dictionary, "public domain", 150_000),
    Source("dict-devil", "dictd/devil.dict.dz", dictionary, "public domain", 150_000),
    Source("fortunes", "games/fortunes/*", fortune, "BSD, as a collection of quotations", 250_000),
    Source("debian-handbook", "doc/debian-handbook/html/en-US/*.html", html, "GPL-2+ or CC-BY-SA-3.0", 250_000),
    Source("debian-history", "doc/debian-history/docs/*en*.html", html, "GPL-2+", 50_000),
    Source("debian-policy", "doc/debian-policy/policy.html/*.html", html, "GPL-2+", 100_000),
    Source("debian-reference-en", "debian-reference/*.en.html", html, "GPL-2+", 100_000),
    Source("installation-guide-amd64", "doc/installation-guide-amd64/en/*.html", html, "GPL-2+", 80_000),
    Source("git-doc", "doc/git/html/*.txt", plain, "GPL-2", 150_000),
    Source("linux-doc-6.1", "doc/linux-doc-6.1/html/_sources/**/*.txt", plain, "GPL-2", 250_000),
    Source("perl-doc", "perl/5.36.0/pod/*.pod", plain, "GPL-1+ or Artistic", 150_000),
    Source("postgresql-doc-15", "doc/postgresql-doc-15/html/*.html", html, "PostgreSQL", 200_000),
    Source("python3.11-doc", "doc/python3.11/html/_sources/**/*.txt", plain, "PSF-2", 350_000),
    Source("rust-doc", "doc/rust-doc/html/book/*.html", html, "MIT or Apache-2.0", 150_000),
)


def fetched(folder: Path) -> dict[str, tuple[Path, str]]:
    """Fetch and unpack the packages that are not there yet: package to its files' folder and the package's SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in sorted({source.package for source in SOURCES}):
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob(f"{package}_*.deb")
        unpacked = folder / package
        if not unpacked.is_dir():
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
        found[package] = (unpacked, sha256(archive))
    return found


def documents(source: Source, unpacked: Path) -> Iterator[str]:
    """The documents of a source in a fixed order that mixes its parts; those under 200 characters are left out."""
    made = []
    for path in sorted((unpacked / "usr/share").glob(source.pattern)):
        if path.is_file() and path.suffix not in (".dat", ".u8", ".index"):
            data = path.read_bytes()
            made += source.read(gzip.decompress(data) if path.suffix in (".gz", ".dz") else data)
    yield from sorted((text for text in made if len(text) > 200), key=digest)


def digest(text: str) -> str:
    """A document's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()
