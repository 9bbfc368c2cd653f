"""Write files as a whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tl_circuits.errors import OutputError


@contextmanager
def atomic_file(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """Write a binary file that appears at ``path`` as a whole, or not at all if the block raises.

    Raises:
        OutputError: ``path`` exists already (and ``overwrite`` is False), or cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already. Choose another name, or overwrite it (--force).")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    """The permissions that new files do not get; the system only tells them while setting others."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
