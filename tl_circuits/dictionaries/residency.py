"""Decide where a dictionary's weights are kept (on disk, in the machine's memory, on the device), and put them there.

The residency is that of the large matrices, encoder and decoder; the small tensors always go to the device. A matrix
used from disk must be stored row by row in a safetensors file. If it is not, a converted copy is written once, into
the cache folder.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_circuits.dictionaries.formats import LayerWeights
from tl_circuits.dictionaries.hub import require_space
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.errors import DictionaryError
from tl_circuits.support.cache import cache_dir
from tl_circuits.support.memory import free_memory

Residency = Literal["auto", "disk", "cpu", "device"]
SMALL_SET = 2**29  # on a CPU, "auto" loads sets of up to 512 MB into memory and leaves larger ones on disk
_SMALL = ("b_enc", "b_dec", "W_skip", "threshold")


def choose_residency(asked: str, device: torch.device, size: int) -> str:
    """The residency asked for; for ``"auto"``, "device" if a set of ``size`` bytes fits easily, else "disk"."""
    if asked not in ("auto", "disk", "cpu", "device"):
        raise DictionaryError(f'residency is {asked!r}, expected "disk", "cpu", "device" or "auto".')
    if asked != "auto":
        return asked
    room = SMALL_SET if device.type == "cpu" else free_memory(device) // 3
    return "device" if size <= room else "disk"


def place(
    weights: LayerWeights, files: Sequence[Path], residency: str, device: torch.device, dtype: torch.dtype | None
) -> LayerWeights:
    """Put ``weights``, read from ``files``, where they are to be kept. ``dtype``: None for the stored one."""
    t, decoder = weights
    small = {n: _own(getattr(t, n), device, dtype) for n in _SMALL if getattr(t, n) is not None}
    if residency == "disk":
        wide = {"W_enc": t.W_enc, "W_dec": t.W_dec} if decoder is None else {"W_enc": t.W_enc, "decoder": decoder}
        forget_pages = t.forget_pages
        if forget_pages is None or any(not m.is_contiguous() or m.dtype != (dtype or m.dtype) for m in wide.values()):
            file = _converted(files, wide, dtype)
            wide, forget_pages = dict(file), file.forget_pages
        forget_pages()
    else:
        where = device if residency == "device" else torch.device("cpu")
        wide = {"W_enc": _own(t.W_enc, where, dtype)}
        wide |= {"W_dec": _own(t.W_dec, where, dtype)} if decoder is None else {"decoder": _own(decoder, where, dtype)}
        forget_pages = None
    decoder = wide.pop("decoder", None)
    if decoder is not None:
        wide.setdefault("W_dec", decoder[:, 0])
    tensors: dict[str, Any] = {**small, **wide}
    return LayerWeights(replace(t, **tensors, forget_pages=forget_pages), decoder)


def _own(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A copy in its own memory, stored row by row, that does not depend on a file."""
    return torch.empty_like(tensor, device=device, dtype=dtype, memory_format=torch.contiguous_format).copy_(tensor)


def _converted(files: Sequence[Path], wide: dict[str, Tensor], dtype: torch.dtype | None) -> MappedFile:
    """A safetensors file with the large matrices, row by row and in ``dtype``; written if it is missing."""
    path = cache_dir() / "transcoders" / f"{_fingerprint(files, dtype)}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(t.numel() * (dtype or t.dtype).itemsize for t in wide.values())
        require_space(path.parent, size, f"convert {files[0]}")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".converting.")
        os.close(handle)
        try:
            save_file({name: t.to(dtype or t.dtype).contiguous() for name, t in wide.items()}, temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return MappedFile(path)


def _fingerprint(files: Sequence[Path], dtype: torch.dtype | None) -> str:
    """The name of a conversion: a hash of its source files (place, size, time of change) and the dtype."""
    facts = [str(dtype)]
    for file in files:
        real = file.resolve()
        stat = real.stat()
        facts.append(f"{real}|{stat.st_size}|{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
