"""Decide where a dictionary's weights are kept (on disk, in the machine's memory, on the device), and put them there.

The residency is that of the large matrices, encoder and decoder; the small tensors always go to the device. A matrix
used from disk must be stored row by row in a safetensors file. If it is not, a converted copy is written once, into
the cache folder.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_circuits.dictionaries.formats import LayerWeights
from tl_circuits.dictionaries.hub import require_space
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.slot_decoders import SlotDecoders, slot_matrix
from tl_circuits.errors import DictionaryError
from tl_circuits.support.cache import cache_dir
from tl_circuits.support.memory import free_memory

Residency = Literal["auto", "disk", "cpu", "device"]
SMALL_SET = 2**29  # on a CPU, "auto" loads sets of up to 512 MB into memory and leaves larger ones on disk
_SMALL = ("b_enc", "b_dec", "W_skip", "threshold", "rank")


def choose_residency(asked: str, device: torch.device, size: int) -> str:
    """The residency asked for; for ``"auto"``, "device" if a set of ``size`` bytes fits easily, else "disk"."""
    if asked not in ("auto", "disk", "cpu", "device"):
        raise DictionaryError(f'residency is {asked!r}, expected "disk", "cpu", "device" or "auto".')
    if asked != "auto":
        return asked
    room = SMALL_SET if device.type == "cpu" else free_memory(device) // 3
    return "device" if size <= room else "disk"


def place(
    weights: LayerWeights,
    files: Sequence[Path],
    residency: str,
    device: torch.device,
    dtype: torch.dtype | None,
    shared: dict[Tensor, Tensor] | None = None,
) -> LayerWeights:
    """Put ``weights``, read from ``files``, where they are to be kept.

    ``dtype``: None for the stored one. ``shared``: what other layers have put into memory already, so that a matrix
    that several layers use is there once; it is added to.
    """
    t, shared = weights.transcoder, {} if shared is None else shared
    stored = {name: getattr(t, name) for name in _SMALL}
    small = {
        n: _own(tensor, device, dtype) for n, tensor in stored.items() if tensor is not None and not tensor.is_meta
    }
    if residency == "disk":
        wide, forget_pages = _on_disk(weights, files, dtype)
        forget_pages()
    else:
        where = device if residency == "device" else torch.device("cpu")
        found = _wide(weights) | ({} if weights.make is None else weights.make())
        slots = isinstance(weights.decoder, SlotDecoders)
        wide = {n: _once(m, where, dtype, shared if slots and n != "W_enc" else {}) for n, m in found.items()}
        forget_pages = None
    if "b_enc" in wide:
        small["b_enc"] = _own(wide.pop("b_enc"), device, dtype)
    decoder = weights.decoder
    if isinstance(decoder, SlotDecoders):
        scales = tuple(None if scale is None else _own(scale, device, None) for scale in decoder.scales)
        decoder = SlotDecoders(tuple(wide.pop(_slot(j)) for j in range(len(scales))), scales)
    elif decoder is not None:
        decoder = wide.pop("decoder")
    if decoder is not None:
        wide["W_dec"] = slot_matrix(decoder, 0)
    tensors: dict[str, Any] = {**small, **wide}
    return LayerWeights(replace(t, **tensors, forget_pages=forget_pages), decoder)


def _slot(j: int) -> str:
    return f"decoder.{j}"


def _wide(weights: LayerWeights) -> dict[str, Tensor]:
    """The large matrices by name: the encoder, and the decoder of a layer or of all that its features write to.

    A bias that takes the encoder to compute it is among them, so that its converted copy saves reading the encoder.
    """
    t, decoder = weights.transcoder, weights.decoder
    wide = {"W_enc": t.W_enc} | ({"b_enc": t.b_enc} if t.b_enc.is_meta else {})
    if isinstance(decoder, SlotDecoders):
        return wide | {_slot(j): matrix for j, matrix in enumerate(decoder.matrices)}
    return wide | ({"W_dec": t.W_dec} if decoder is None else {"decoder": decoder})


def _on_disk(
    weights: LayerWeights, files: Sequence[Path], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The large matrices, each mapped from its own file or from a converted copy, and what frees their memory."""
    wide, forget = _wide(weights), weights.transcoder.forget_pages

    def fits(matrix: Tensor) -> bool:
        return (
            forget is not None
            and not matrix.is_meta
            and matrix.is_contiguous()
            and matrix.dtype == (dtype or matrix.dtype)
        )

    rest = [name for name, matrix in wide.items() if not fits(matrix)]
    if forget is not None and not rest:
        return wide, forget
    path = cache_dir() / "transcoders" / f"{_fingerprint(files, dtype)}.safetensors"
    if not path.is_file() or not set(rest) <= set(MappedFile(path)):
        made = {} if weights.make is None else weights.make()
        _convert(path, files[0], {name: made.get(name, wide[name]) for name in rest}, dtype)
    copy = MappedFile(path)

    def forget_both() -> None:
        copy.forget_pages()
        if forget is not None:
            forget()

    return wide | {name: copy[name] for name in rest}, forget_both


def _own(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A copy in its own memory, stored row by row, that does not depend on a file."""
    return torch.empty_like(tensor, device=device, dtype=dtype, memory_format=torch.contiguous_format).copy_(tensor)


def _once(tensor: Tensor, device: torch.device, dtype: torch.dtype | None, shared: dict[Tensor, Tensor]) -> Tensor:
    """:func:`_own`, or what it returned for the same tensor object before."""
    if tensor not in shared:
        shared[tensor] = _own(tensor, device, dtype)
    return shared[tensor]


def _convert(path: Path, source: Path, wide: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write the large matrices to ``path``, row by row and in ``dtype``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(t.numel() * (dtype or t.dtype).itemsize for t in wide.values())
    require_space(path.parent, size, f"convert {source}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".converting.")
    os.close(handle)
    try:
        save_file({name: t.to(dtype or t.dtype).contiguous() for name, t in wide.items()}, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _fingerprint(files: Sequence[Path], dtype: torch.dtype | None) -> str:
    """The name of a conversion: a hash of its source files (place, size, time of change) and the dtype."""
    facts = [str(dtype)]
    for file in files:
        real = file.resolve()
        stat = real.stat()
        facts.append(f"{real}|{stat.st_size}|{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
