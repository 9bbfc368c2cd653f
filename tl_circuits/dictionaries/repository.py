"""Where published files lie: a folder. (``hub.py`` has the other place, with the same surface.)"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from tl_circuits.errors import DictionaryError


class Repository(ABC):
    """Files under relative names, some of which may have to be downloaded first."""

    name: str

    @property
    @abstractmethod
    def paths(self) -> Sequence[str]:
        """The relative names of all files, sorted, with ``/`` between folders."""

    @abstractmethod
    def fetch(self, paths: Iterable[str]) -> None:
        """Have these files here; raises DownloadError where that cannot be."""

    @abstractmethod
    def local(self, path: str) -> Path:
        """The file on this machine, downloaded if it is not there yet."""


class LocalFolder(Repository):
    """A folder on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = str(folder)

    @cached_property
    def paths(self) -> Sequence[str]:
        found = (
            Path(root, file).relative_to(self.folder).as_posix()
            for root, _, files in os.walk(self.folder)
            for file in files
        )
        return tuple(sorted(found))

    def fetch(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.local(path)

    def local(self, path: str) -> Path:
        """The file; raises DictionaryError where it is not there or ``path`` leads out of the folder."""
        found = self.folder / inside(path, self.name)
        if not found.is_file():
            raise DictionaryError(f"there is no file {found}.")
        return found


def inside(path: str, where: str) -> str:
    """``path`` if it is relative and does not climb out of its folder; DictionaryError otherwise.

    ``where`` says for the message which config or archive names it.
    """
    parts = PurePosixPath(path).parts
    if not path or "\\" in path or ":" in path or path.startswith(("/", "~")) or ".." in parts:
        raise DictionaryError(f"{where} names the path {path!r}, which leads out of its own folder. It is not followed.")
    return path
