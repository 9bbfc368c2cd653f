"""The places where published files are, behind one interface: here folders, in ``hub.py`` the hub."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.errors import DictionaryError


class Repository(ABC):
    """A collection of files under relative names, which may have to be downloaded first."""

    name: str

    @property
    @abstractmethod
    def paths(self) -> Sequence[str]:
        """The relative names of all files, sorted, with ``/`` between folders."""

    @abstractmethod
    def fetch(self, paths: Iterable[str]) -> None:
        """Get these files onto this machine; raises DownloadError if that fails."""

    @abstractmethod
    def local(self, path: str) -> Path:
        """The file on this machine, downloaded if it is not there yet."""

    @cached_property
    def _mapped(self) -> dict[str, MappedFile]:
        return {}

    def tensors(self, path: str) -> MappedFile:
        """The tensors of a safetensors file, mapped once however often they are asked for."""
        if path not in self._mapped:
            self._mapped[path] = MappedFile(self.local(path))
        return self._mapped[path]


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
        """The file; raises DictionaryError if it does not exist or ``path`` leads out of the folder."""
        found = self.folder / inside(path, self.name)
        if not found.is_file():
            raise DictionaryError(f"there is no file {found}.")
        return found


def inside(path: str, where: str) -> str:
    """Return ``path`` if it stays inside its folder; raise DictionaryError otherwise.

    A config may come from anywhere, so its paths are not trusted. ``where`` is the config's name, for the message.
    """
    parts = PurePosixPath(path).parts
    if not path or "\\" in path or ":" in path or path.startswith(("/", "~")) or ".." in parts:
        raise DictionaryError(
            f"{where} names the path {path!r}, which leads out of its own folder. It is not followed."
        )
    return path
