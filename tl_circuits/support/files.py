"""Write files as a whole or not at all."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tl_circuits.errors import OutputError, TLCircuitsError

OLD = 3600.0  # seconds after which a part of a file has no writer any more
_LONGEST = 40  # characters of a file's name in the name of its part; names may have 255 bytes in all


@contextmanager
def atomic_file(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """Write a binary file that appears at ``path`` as a whole, or not at all if the block raises.

    It is on the disk before it appears. A file that is overwritten keeps its permissions. Where ``path`` is a link, the
    file that it points to is written. Parts that killed runs left of this file are removed.

    Raises:
        OutputError: ``path`` exists already (and ``overwrite`` is False), is no plain file, or cannot be written.
    """
    try:
        if not overwrite and path.exists():
            raise OutputError(
                f"{path} exists already. Choose another name, or overwrite it: overwrite=True in Python, --force in "
                "a command."
            )
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            what = "a folder" if target.is_dir() else "a device or a pipe"
            raise OutputError(f"cannot write {path}: it is {what}. Give the name of a file.")
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        start = (
            f".{target.name[:_LONGEST]}.{hashlib.sha256(target.name.encode(errors='surrogateescape')).hexdigest()[:8]}."
        )
        _collect(target, start)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=start, suffix=".part")
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path}: {_reason(error)}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
        flush_to_disk(target.parent)
    except OSError as error:
        if isinstance(error, TLCircuitsError):  # the block's own
            raise
        raise OutputError(f"cannot write {path}: {_reason(error)}.") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. Does nothing where a system cannot."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some file systems cannot
        pass
    finally:
        os.close(handle)


def remove_if_old(part: Path) -> None:
    """Remove a part of a file that nobody has written to for an hour: its writer was killed."""
    try:
        if time.time() - part.lstat().st_mtime > OLD:
            part.unlink()
    except OSError:  # another process was faster, or may and we may not
        pass


def _collect(target: Path, start: str) -> None:
    """Remove what killed runs left of a file; until version 0.1 the names of parts held no hash."""
    try:
        names = os.listdir(target.parent)
    except OSError:  # a folder that may be written to and not read
        return
    for name in names:
        if name.endswith(".part") and (name.startswith(start) or _is_earlier_part(name, target.name)):
            remove_if_old(target.parent / name)


def _is_earlier_part(name: str, of: str) -> bool:
    return name.startswith(f".{of}.") and "." not in name[len(of) + 2 : -len(".part")]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _umask() -> int:
    """The permissions that new files do not get; the system only tells them while setting others."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
