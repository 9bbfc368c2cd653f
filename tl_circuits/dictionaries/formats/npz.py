"""Read arrays from NumPy archives (``.npz``) that may be damaged or hostile; errors name file and array."""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tl_circuits.errors import DictionaryError
from tl_circuits.support.reading import LARGEST_CONFIG

ROUGHLY_SQUEEZED = 20  # weights hardly compress, so an archive that unpacks to more than this factor is a zip bomb


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


class NpzFile:
    """The arrays ``names`` of a NumPy archive. Their shapes are read at once, an array itself when it is asked for.

    Raises:
        DictionaryError: the archive is cut off, holds pickled objects or members outside of it, claims more data than
            its size can hold, or lacks an array.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        self.path = path
        with self._opened() as archive:
            _refuse_strange_members(path, archive)
            self._headers = {name: self._header(archive, name) for name in names}

    def empty(self, name: str) -> Tensor:
        """A tensor with the shape and dtype of an array, but without its numbers (on torch's ``meta`` device)."""
        header = self._headers[name]
        dtype = torch.from_numpy(np.empty(0, header.dtype)).dtype
        return torch.empty(header.shape, dtype=dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        """One array, read now and compared with its check sum."""
        shape, fortran, dtype = self._headers[name]
        expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._opened() as archive, archive.open(f"{name}.npy") as file:
            _read_header(file)
            data = bytearray(file.read(expected))
        if len(data) < expected:
            raise DictionaryError(
                f"{self.path}: {name} ends after {len(data):,} of {expected:,} bytes. Was it cut off?"
            )
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C"))

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, EOFError, zipfile.LargeZipFile, NotImplementedError) as error:
            raise DictionaryError(f"{self.path} is not a whole npz archive ({error}). Was it cut off?") from error

    def _header(self, archive: zipfile.ZipFile, name: str) -> _Header:
        member = f"{name}.npy"
        if member not in archive.namelist():
            raise DictionaryError(f"{self.path}: there is no {name!r}; it holds {', '.join(archive.namelist())}.")
        with archive.open(member) as file:
            try:
                header = _read_header(file)
            except ValueError as error:
                raise DictionaryError(f"{self.path}: {name} is not a NumPy array: {error}.") from error
        if header.dtype.hasobject or header.dtype.kind not in "fiu":
            raise DictionaryError(f"{self.path}: {name} has dtype {header.dtype}: pickled objects are never loaded.")
        size = archive.getinfo(member).file_size
        if int(np.prod(header.shape, dtype=np.int64)) * header.dtype.itemsize > size:
            raise DictionaryError(
                f"{self.path}: {name} claims shape {header.shape}, more than the {size:,} bytes there are."
            )
        return header


def _refuse_strange_members(path: Path, archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        if "/" in member.filename or "\\" in member.filename or not member.filename.endswith(".npy"):
            raise DictionaryError(f"{path}: the archive's member {member.filename!r} is not a plain NumPy array.")
        if member.file_size > ROUGHLY_SQUEEZED * member.compress_size + LARGEST_CONFIG:
            raise DictionaryError(
                f"{path}: {member.filename} unpacks from {member.compress_size:,} to {member.file_size:,} bytes, "
                "which weights never do. It is not unpacked."
            )


def _read_header(file: Any) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return _Header(*read(file))
