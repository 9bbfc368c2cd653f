"""Text that the model itself writes, for training where no other text comes with a machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.errors import OutputError

_NOT_YET = -1  # stands in rows that are not written yet


def write_samples(
    network: Any, first: int, count: int, context: int, path: Path, *, batch_size: int, seed: int
) -> Iterator[int]:
    """Write ``count`` pieces of ``context`` tokens, sampled from the model at temperature 1, to an ``.npy`` file.

    A batch of pieces is sampled at once, with the model's cache. Batch ``i`` has a random generator of its own, seeded
    by ``seed`` and ``i``. So after an interruption, a second call writes only what is missing, and the file is the
    same. Text goes on after an end-of-text token, as it does in the model's training.

    Args:
        network: a Hugging Face model with a language-modelling head.
        first: the token that every piece begins with.
        count: how many pieces.
        context: tokens in a piece.
        path: the file, int32 ``[count, context]``; a row of -1 is not written yet.
        batch_size: pieces that are sampled at once.
        seed: of all random numbers.

    Yields:
        The number of pieces in the file, after each batch.

    Raises:
        OutputError: the file exists with another shape.
    """
    file = _opened(path, count, context)
    for number, start in enumerate(range(0, count, batch_size)):
        end = min(start + batch_size, count)
        if (file[start:end] == _NOT_YET).any():
            random = torch.Generator(next(network.parameters()).device).manual_seed(seed * 1_000_003 + number)
            file[start:end] = sampled(network, first, end - start, context, random).cpu().numpy()
            file.flush()
        yield end


def written(path: Path) -> Int[np.ndarray, "piece context"]:
    """The pieces of a file of samples that are there already, mapped from disk."""
    file = np.load(path, mmap_mode="r")
    missing = np.flatnonzero(file[:, 0] == _NOT_YET)
    return file[: missing[0]] if len(missing) else file


@torch.inference_mode()
def sampled(network: Any, first: int, n: int, context: int, random: torch.Generator) -> Int[Tensor, "piece context"]:
    """``n`` pieces of the model's own text at temperature 1, each beginning with the token ``first``.

    ``random`` is of the device that the model is on. A token is drawn as the largest of ``p / E`` with ``E`` from the
    exponential distribution, which has probability ``p``.
    """
    ids = torch.full((n, context), first, dtype=torch.int32, device=random.device)
    cache = None
    for position in range(1, context):
        out = network(input_ids=ids[:, position - 1, None].long(), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids[:, position] = _drawn(out.logits[:, -1].float(), random)
    return ids


def _drawn(logits: Float[Tensor, "piece d_vocab"], random: torch.Generator) -> Int[Tensor, " piece"]:
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_(generator=random)).argmax(-1).int()


def _opened(path: Path, count: int, context: int) -> np.memmap:
    if not path.exists():
        half = path.with_name(f".{path.name}.making")
        made = np.lib.format.open_memmap(half, mode="w+", dtype=np.int32, shape=(count, context))
        made[:] = _NOT_YET
        made.flush()
        os.replace(half, path)
    file = np.load(path, mmap_mode="r+")
    if file.shape != (count, context):
        raise OutputError(
            f"{path} holds {file.shape[0]} pieces of {file.shape[1]} tokens, expected {count} of {context}. "
            "Go on with the same numbers, or remove the file."
        )
    return file
