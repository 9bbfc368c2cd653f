"""Text for training, as pieces of token ids on disk: read once, so that epochs and a resumed run see the same."""

import gzip
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tl_circuits.errors import PromptError
from tl_circuits.hooks import plain_ids, without_first
from tl_circuits.support.extras import how_to_install

SUFFIXES = (".txt", ".md", ".rst", ".gz", ".npy")
"""Files that are read from a folder; of those ending in .gz, what is in them."""
_PART = 1_000_000  # characters that are made to tokens at once

Pieces = Int[np.ndarray, "piece context"]


def files_of(texts: Sequence[str | Path]) -> list[Path]:
    """The files of a list of files and folders, folders searched to the bottom, in the order of their names.

    Raises:
        PromptError: there is no such file, or a folder has none with a suffix that is read.
    """
    found: list[Path] = []
    for path in map(Path, texts):
        if not path.exists():
            raise PromptError(f"there is no text file {path}.")
        inside = (
            [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        )
        if not inside:
            raise PromptError(f"the folder {path} has no files ending in {', '.join(SUFFIXES)}.")
        found += inside
    return found


def dataset_texts(name: str) -> Iterator[str]:
    """The texts of the split ``train`` of a dataset, by its hub name or folder, one after the other as they arrive.

    Raises:
        ImportError: the library ``datasets`` is not installed.
        PromptError: the dataset cannot be opened, or its rows have no ``text``.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"a dataset is read with the library datasets. Run: {how_to_install('train')}") from error
    try:
        rows = iter(load_dataset(name, split="train", streaming=True))
        first: dict[str, Any] = next(rows, {})
    except (OSError, ValueError) as error:
        raise PromptError(f"cannot open the dataset {name!r}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(first.get("text"), str):
        raise PromptError(
            f"the rows of the dataset {name!r} have no text under 'text', only {', '.join(first) or 'nothing'}."
        )
    for row in chain([first], rows):
        yield row["text"]


def write_pieces(
    path: Path,
    tokenizer: Any,
    files: Sequence[Path],
    more: Iterable[str],
    context: int,
    first: int | None,
    d_vocab: int,
) -> None:
    """Write all texts as an ``.npy`` of int32 ``[piece, context]``.

    Texts are joined, an end-of-text token behind each, and cut; what is left over at the end is dropped. Each piece
    begins with ``first``. Files ending in ``.npy`` hold pieces already, and follow as they are. One part of a text is
    in memory at a time.

    Args:
        path: the file to write, whole or not at all.
        tokenizer: makes ids of text.
        files: UTF-8 text, also compressed (.gz), or pieces.
        more: texts beside the files.
        context: tokens in a piece.
        first: the special token before a piece, or None.
        d_vocab: ids of pieces are below it.

    Raises:
        PromptError: a file is not UTF-8 text, or pieces are of another length or vocabulary.
    """
    start = [] if first is None else [first]
    step = context - len(start)
    raw, half = path.with_name(f".{path.name}.ids"), path.with_name(f".{path.name}.making")
    rest: list[int] = []
    n = 0
    with raw.open("wb") as file:
        texts = (chain(_parts(f)) for f in files if f.suffix != ".npy")
        for text in chain(texts, ([t] for t in more)):
            for part, ids in enumerate(plain_ids(tokenizer, words) for words in text):
                rest += ids if part else without_first(ids, start)
                n += _cut(rest, start, step, file)
            if tokenizer.eos_token_id is not None:
                rest.append(tokenizer.eos_token_id)
        n += _cut(rest, start, step, file)
        for f in files:
            if f.suffix == ".npy":
                given = read_pieces(f, context, d_vocab)
                n += len(given)
                for i in range(0, len(given), 4096):
                    file.write(np.ascontiguousarray(given[i : i + 4096], dtype=np.int32).tobytes())
    made = np.lib.format.open_memmap(half, mode="w+", dtype=np.int32, shape=(n, context))
    if n:
        made[:] = np.memmap(raw, dtype=np.int32, mode="r", shape=(n, context))
        made.flush()
    raw.unlink()
    os.replace(half, path)


def read_pieces(path: Path, context: int, d_vocab: int) -> Pieces:
    """Pieces of token ids, mapped from disk.

    Raises:
        PromptError: they are of another length than ``context``, no whole numbers, or beyond the vocabulary.
    """
    try:
        pieces = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise PromptError(f"{path} does not hold numbers: {error}.") from error
    if pieces.ndim != 2 or pieces.shape[1] != context or not np.issubdtype(pieces.dtype, np.integer):
        raise PromptError(
            f"{path} holds {pieces.dtype} {pieces.shape}, expected whole numbers [piece, {context}] (context)."
        )
    if len(pieces) and not 0 <= pieces.min() <= pieces.max() < d_vocab:
        raise PromptError(
            f"{path} holds ids from {pieces.min()} to {pieces.max()}, but the model has ids 0 to {d_vocab - 1}."
        )
    return pieces


def _parts(path: Path) -> Iterator[str]:
    """A text in parts that end at the end of a line, so that no word is cut."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            part: list[str] = []
            size = 0
            for line in file:
                part.append(line)
                size += len(line)
                if size >= _PART:
                    yield "".join(part)
                    part, size = [], 0
            yield "".join(part)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise PromptError(f"{path} is not UTF-8 text: {error}.") from error


def _cut(ids: list[int], start: list[int], step: int, file: Any) -> int:
    """Write whole pieces of ``ids`` and take them away."""
    n = len(ids) // step
    if n:
        pieces = np.array(ids[: n * step], dtype=np.int32).reshape(n, step)
        file.write(np.hstack([np.tile(np.array(start, dtype=np.int32), (n, 1)), pieces]).astype(np.int32).tobytes())
        del ids[: n * step]
    return n
