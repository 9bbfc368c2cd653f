"""Read configs and check tensors of files that may be damaged or hostile; errors name file and field."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_circuits.errors import DictionaryError, NotFiniteError
from tl_circuits.support.reading import LARGEST_CONFIG, boundary, require_plain


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; DictionaryError if it holds anything else."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DictionaryError(f"{path} is not JSON: {error}.") from error
    return _mapping(path, content)


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file, plain data only; DictionaryError if it holds anything else."""
    import yaml

    try:
        content = yaml.safe_load(_text(path))
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # a date of month 13, a list as a key
        raise DictionaryError(f"{path} is not plain YAML: {' '.join(str(error).split())}.") from error
    return _mapping(path, content)


def _text(path: Path) -> str:
    if not path.is_file():
        raise DictionaryError(f"there is no file {path}.")
    if path.stat().st_size > LARGEST_CONFIG:
        raise DictionaryError(f"{path} has {path.stat().st_size:,} bytes; a config has at most {LARGEST_CONFIG:,}.")
    with boundary(DictionaryError, path):
        data = path.read_bytes()
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DictionaryError(f"{path} is not text: {error}.") from error


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DictionaryError(f"{path} holds a {type(content).__name__}, expected fields with values.")
    require_plain(content, path, DictionaryError)
    return content


def require_known_fields(
    path: Path, config: Mapping[str, Any], known: Collection[str], harmless: Collection[str]
) -> None:
    """Raise DictionaryError if a config has a field that is neither read here nor known to change nothing.

    Such a field may change what the weights mean, as ``transcode`` and ``normalize_io`` did when they were added.
    """
    unknown = sorted(str(name) for name in config if name not in known and name not in harmless)
    if unknown:
        raise DictionaryError(
            f"{path}: {', '.join(map(repr, unknown))} {'is a field' if len(unknown) == 1 else 'are fields'} that "
            "this version does not know in this layout, and a field can change what the weights mean. If it changes "
            "nothing, remove it from a copy of the file; else give the layers as tensors: "
            "tlc.load_transcoders({layer: tlc.Transcoder(...)})."
        )


def require_known_tensors(path: Path, tensors: Collection[str], known: re.Pattern[str]) -> None:
    """Raise DictionaryError if a file holds a tensor, which would not be used, whose name ``known`` does not match."""
    unknown = sorted(name for name in tensors if not known.fullmatch(name))
    if unknown:
        raise DictionaryError(
            f"{path} holds the tensor {unknown[0]!r}, which this version does not know in this layout: without it "
            "the set may compute something else."
        )


def need(path: Path, tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """The tensors called ``names``.

    Raises:
        DictionaryError: one is missing.
        NotFiniteError: a vector holds NaN or infinity. Layouts compute biases from each other, so this is the last
            place that can say which of the file's own it was. Matrices are checked when they are used.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DictionaryError(
            f"{path}: the tensor {missing[0]!r} is missing; the file holds {', '.join(sorted(tensors))}."
        )
    found = [tensors[name] for name in names]
    for name, tensor in zip(names, found, strict=True):
        if tensor.ndim < 2 and not torch.isfinite(tensor).all():
            raise NotFiniteError(f"{path}: {name} holds NaN or infinity.")
    return found


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
