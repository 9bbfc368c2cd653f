"""Safetensors files as memory-mapped tensors, for dictionaries larger than memory.

A tensor here is a view of the file: nothing is read until it is used. :meth:`MappedFile.forget_pages` frees the memory
of what was read; the operating system reads it again when it is needed again.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_circuits.errors import DictionaryError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FOREIGN = {b"PK\x03\x04": "a zip archive (a PyTorch pickle?)", b"\x80": "a Python pickle"}


class MappedFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, by name.

    Raises:
        DictionaryError: the file is missing, cut off or not safetensors.
    """

    def __init__(self, path: Path):
        self.path = path
        _require_safetensors(path)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            # A private mapping: torch wants a writable buffer, and nothing written would reach the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        header.pop("__metadata__", None)
        self._tensors = {name: self._view(name, entry, 8 + length) for name, entry in header.items()}

    def _view(self, name: str, entry: dict, data_at: int) -> Tensor:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise DictionaryError(f"{self.path}: {name} has dtype {entry['dtype']}, not one of {', '.join(_DTYPES)}.")
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=data_at + begin)
        return flat.reshape(entry["shape"])

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def forget_pages(self) -> None:
        """Free the memory of everything read so far. Tensors stay valid; they are read again when used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _require_safetensors(path: Path) -> None:
    if not path.is_file():
        raise DictionaryError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt"):  # it checks header, offsets and length
            return
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(4)
        foreign = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)
        if foreign:
            raise DictionaryError(f"{path} is {foreign}, not safetensors. Pickles are never loaded.") from error
        raise DictionaryError(f"{path} is not a whole safetensors file ({error}). Was it cut off?") from error
