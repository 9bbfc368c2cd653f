"""Read configs and tensors from files that may be damaged or hostile; errors name file and field."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_circuits.errors import DictionaryError

SMALL = 1 << 20  # bytes; a larger file is no config and is not read
ROUGHLY_SQUEEZED = 20  # weights hardly compress, so an archive that unpacks to more than this factor is a zip bomb


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; DictionaryError if it holds anything else."""
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise DictionaryError(f"{path} is not JSON: {error}.") from error
    return _mapping(path, content)


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file, plain data only; DictionaryError if it holds anything else."""
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
    """The arrays ``names`` of a NumPy archive, as tensors.

    Raises:
        DictionaryError: the archive is cut off, holds pickled objects or members outside of it, or claims more data
            than its size can hold.
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
    """The tensors called ``names``; DictionaryError if one is missing."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DictionaryError(
            f"{path}: the tensor {missing[0]!r} is missing; the file holds {', '.join(sorted(tensors))}."
        )
    return [tensors[name] for name in names]


def shaped(path: Path, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """Return ``tensor`` if it has ``shape`` (None: any size); raise DictionaryError otherwise."""
    fits = tensor.ndim == len(shape) and all(s in (None, n) for n, s in zip(tensor.shape, shape, strict=True))
    if not fits:
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise DictionaryError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected ({expected}).")
    return tensor


def decoder_rows(path: Path, W_dec: Tensor, width: int, d_out: int) -> Tensor:
    """``W_dec`` as ``[feature, d_out]``, transposed if it was stored as ``[d_out, feature]``.

    Published sets in the same layout do either, so the shape decides.
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
    """Return ``threshold`` if it has one number a feature, none of them negative; raise DictionaryError otherwise."""
    shaped(path, field, threshold, (width,))
    negative = int((threshold < 0).sum())
    if negative:
        raise DictionaryError(
            f"{path}: {field} has {negative} negative values, the lowest {float(threshold.min()):.3g}. A JumpReLU "
            "threshold is at least 0; is this its logarithm?"
        )
    return threshold


def require_agreement(path: Path, field: str, said: Any, found: int | str | bool) -> None:
    """Raise DictionaryError if a config's field contradicts the tensors."""
    if said is not None and said != found:
        raise DictionaryError(f"{path}: {field} is {said!r}, but the tensors say {found!r}.")


def positive_int(path: Path, field: str, value: Any) -> int:
    """Return ``value`` if it is a whole number from 1; raise DictionaryError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DictionaryError(f"{path}: {field} is {value!r}, expected a whole number from 1.")
    return value
