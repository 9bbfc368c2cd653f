"""Reading configs and tensors with errors that name file and field."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_circuits.errors import DictionaryError

SMALL = 1 << 20  # a config larger than this is not a config
ROUGHLY_SQUEEZED = 20  # random weights do not compress; more than this is a zip bomb


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DictionaryError naming the file otherwise."""
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise DictionaryError(f"{path} is not JSON: {error}.") from error
    return _mapping(path, content)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, plain data only; DictionaryError naming the file otherwise."""
    import yaml

    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise DictionaryError(f"{path} is not plain YAML: {' '.join(str(error).split())}.") from error
    return _mapping(path, content)


def _text(path: Path) -> str:
    if not path.is_file():
        raise DictionaryError(f"there is no file {path}.")
    if path.stat().st_size > SMALL:
        raise DictionaryError(f"{path} has {path.stat().st_size:,} bytes; a config has at most {SMALL:,}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DictionaryError(f"{path} is not text: {error}.") from error


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DictionaryError(f"{path} holds a {type(content).__name__}, expected fields with values.")
    return content


def read_npz(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Arrays of a NumPy archive as tensors.

    Raises DictionaryError for what is not an archive of plain arrays: cut off, pickled objects,
    members that lead out of the archive, or more data than its size can hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_strange_members(path, archive)
            return {name: torch.from_numpy(_array(path, archive, name)) for name in names}
    except (zipfile.BadZipFile, EOFError, zipfile.LargeZipFile, NotImplementedError) as error:
        raise DictionaryError(f"{path} is not a whole npz archive ({error}). Was it cut off?") from error


def _refuse_strange_members(path: Path, archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        if "/" in member.filename or "\\" in member.filename or not member.filename.endswith(".npy"):
            raise DictionaryError(f"{path}: the archive's member {member.filename!r} is not a plain NumPy array.")
        if member.file_size > ROUGHLY_SQUEEZED * member.compress_size + SMALL:
            raise DictionaryError(
                f"{path}: {member.filename} unpacks from {member.compress_size:,} to {member.file_size:,} bytes, "
                "which weights never do. It is not unpacked."
            )


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise DictionaryError(f"{path}: there is no {name!r}; it holds {', '.join(archive.namelist())}.")
    size = archive.getinfo(member).file_size
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except ValueError as error:
            raise DictionaryError(f"{path}: {name} is not a NumPy array: {error}.") from error
        if dtype.hasobject or dtype.kind not in "fiu":
            raise DictionaryError(f"{path}: {name} has dtype {dtype}: pickled objects are never loaded.")
        expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if expected > size:
            raise DictionaryError(f"{path}: {name} claims shape {shape}, more than the {size:,} bytes there are.")
        data = bytearray(file.read(expected))
    if len(data) < expected:
        raise DictionaryError(f"{path}: {name} ends after {len(data):,} of {expected:,} bytes. Was it cut off?")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def need(path: Path, tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """The tensors called ``names``; DictionaryError naming file and field for a missing one."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DictionaryError(
            f"{path}: the tensor {missing[0]!r} is missing; the file holds {', '.join(sorted(tensors))}."
        )
    return [tensors[name] for name in names]


def shaped(path: Path, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """``tensor`` if it has ``shape`` (None: any size); DictionaryError naming file and both shapes otherwise."""
    fits = tensor.ndim == len(shape) and all(s in (None, n) for n, s in zip(tensor.shape, shape, strict=True))
    if not fits:
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise DictionaryError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected ({expected}).")
    return tensor


def decoder_rows(path: Path, W_dec: Tensor, width: int, d_out: int) -> Tensor:
    """``W_dec`` as ``[feature, d_out]``, whichever way round it was stored.

    Published sets of one and the same layout differ in this, so the shape decides.
    """
    if tuple(W_dec.shape) == (width, d_out):
        return W_dec
    if tuple(W_dec.shape) == (d_out, width):
        return W_dec.T
    raise DictionaryError(
        f"{path}: W_dec has shape {tuple(W_dec.shape)}, expected {(width, d_out)} or {(d_out, width)} "
        "(from b_enc and b_dec)."
    )


def valid_threshold(path: Path, field: str, threshold: Tensor, width: int) -> Tensor:
    """``threshold`` if there is one a feature and none is negative (a logarithm); DictionaryError otherwise."""
    shaped(path, field, threshold, (width,))
    negative = int((threshold < 0).sum())
    if negative:
        raise DictionaryError(
            f"{path}: {field} has {negative} negative values, the lowest {float(threshold.min()):.3g}. A JumpReLU "
            "threshold is at least 0; is this its logarithm?"
        )
    return threshold


def require_agreement(path: Path, field: str, said: Any, found: int | str | bool) -> None:
    """Raise DictionaryError where a config's field contradicts what its tensors show."""
    if said is not None and said != found:
        raise DictionaryError(f"{path}: {field} is {said!r}, but the tensors say {found!r}.")


def positive_int(path: Path, field: str, value: Any) -> int:
    """``value`` as a whole number from 1; DictionaryError naming file and field otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DictionaryError(f"{path}: {field} is {value!r}, expected a whole number from 1.")
    return value
