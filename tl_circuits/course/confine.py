"""Start a notebook's process within limits, and end it with everything that it started.

This file runs as a program of its own, ``confine.py FOLDER SCRATCH MODEL``, and needs nothing but Python's standard
library. What it can do depends on the system:

* Linux with namespaces: the process sees only processes of its own, has no network, cannot write outside ``SCRATCH``
  (of bounded size, and gone afterwards), and works in a copy of ``FOLDER``. If the first process of the namespace ends,
  the system ends all others.
* Linux without: this program adopts what the notebook leaves behind, also from other sessions, and ends it.
* Elsewhere: limits of the system for each process, and a process group that is ended as a whole.

See namespaces(7), user_namespaces(7), prctl(2), mount_setattr(2), setrlimit(2).
"""

import ctypes
import os
import shutil
import signal
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

MEMORY = 6 * 1024**3  # bytes of one process that no file backs
FILE = 256 * 1024**2  # bytes of one file
FILES = 256  # open at once
SCRATCH = 512 * 1024**2  # bytes that all files written may have together
SCRATCH_FILES = 20_000
COPIED = 256 * 1024**2  # bytes of the notebook's folder
COPIED_FILES = 2_000

# Numbers of the Linux kernel's interface, the same on all machines.
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PRIVATE, _RECURSIVE = 1 << 18, 1 << 14
_NO_SUID, _NO_DEVICES = 2, 4
_SET_PARENT_DEATH, _DROP_BOUND, _SUBREAPER, _NO_NEW_RIGHTS = 1, 24, 36, 38
_CAPSET_HEADER = struct.pack("II", 0x20080522, 0)
_MOUNT_SETATTR = 442
_READ_ONLY, _NO_SUID_ATTRIBUTE = 1, 2

ALL = ("namespaces", "files", "processes")


class Refused(OSError):
    """The system does not allow a step."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    function = getattr(_libc(), name, None)
    if function is None or function(*arguments) < 0:
        raise Refused(ctypes.get_errno(), name)


def _enter_namespaces() -> None:
    """Give this process namespaces of its own for users, mounts, processes, network and shared memory."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NETWORK | _NEW_IPC)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _shut_files(scratch: Path) -> None:
    """Make every file read-only, but for a new and bounded ``scratch``. Needs the rights of a namespace."""
    _call("mount", b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
    options = f"size={SCRATCH},nr_inodes={SCRATCH_FILES},mode=700".encode()
    _call("mount", b"tmpfs", os.fsencode(scratch), b"tmpfs", _NO_SUID | _NO_DEVICES, options)
    read_only = struct.pack("QQQQ", _READ_ONLY | _NO_SUID_ATTRIBUTE, 0, 0, 0)
    _call("syscall", _MOUNT_SETATTR, -100, b"/", 0x8000, read_only, len(read_only))
    writable = struct.pack("QQQQ", 0, _READ_ONLY, 0, 0)
    _call("syscall", _MOUNT_SETATTR, -100, os.fsencode(scratch), 0, writable, len(writable))


def _own_processes_only() -> None:
    """Show the processes of the namespace in /proc, and no others."""
    _call("mount", b"proc", b"/proc", b"proc", _NO_SUID | _NO_DEVICES, None)


def _drop_rights() -> None:
    """Give up, for good, all rights that the namespace gave."""
    for right in range(64):
        if _libc().prctl(_DROP_BOUND, right, 0, 0, 0) < 0:
            break
    _call("prctl", _NO_NEW_RIGHTS, 1, 0, 0, 0)
    _call("capset", _CAPSET_HEADER, struct.pack("IIIIII", *[0] * 6))


def set_limits() -> None:
    """Limit this process and its children: memory, size of files, open files; no core files."""
    try:
        import resource
    except ImportError:  # Windows
        return
    wanted = {"RLIMIT_DATA": MEMORY, "RLIMIT_FSIZE": FILE, "RLIMIT_NOFILE": FILES, "RLIMIT_CORE": 0}
    for name, most in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows too large is an error, not the process's end


def copy_folder(folder: Path, made: Path) -> None:
    """Copy the plain files of a folder, up to the bounds. Links, pipes and devices are left out."""
    left, count = COPIED, 0
    made.mkdir()
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            source, target = Path(where) / name, made / Path(where).relative_to(folder) / name
            try:
                facts = source.lstat()
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > left or count >= COPIED_FILES:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
            except OSError:  # not readable: a notebook does not see it
                continue
            left, count = left - facts.st_size, count + 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _call("prctl", _SET_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)


def _wait(child: int) -> int:
    """Wait for a child, and for whatever else ends meanwhile. Returns its exit code, 128 + n for signal n."""
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _end_children() -> None:
    """End all children, and theirs, which this process adopts when their parents end."""
    while True:
        try:
            children = _children(os.getpid())
            for child in children:
                os.kill(child, signal.SIGKILL)
            if os.waitpid(-1, 0 if children else os.WNOHANG)[0] == 0:
                return
        except (ChildProcessError, ProcessLookupError):
            if not _children(os.getpid()):
                return


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc/self/stat").exists() else ():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def _forked(run: Callable[[], int]) -> int:
    """The process number of a child that runs a function and ends with its exit code."""
    child = os.fork()
    if child:
        return child
    code = None
    try:
        code = run()
    finally:
        if code is None:
            sys.excepthook(*sys.exc_info())
        os._exit(70 if code is None else code)


def run_confined(folder: Path, scratch: Path, notebook: Callable[[list[str]], None]) -> int:
    """Run ``notebook`` in a process within limits, wait for it, and end everything that it started.

    Args:
        folder: the folder that the notebook reads files from.
        scratch: an empty folder, for what it writes.
        notebook: is given what this system could not do, of :data:`ALL`.

    Returns:
        Its exit code, 128 + n where signal n ended it.
    """
    missing: list[str] = []
    if not hasattr(os, "fork"):
        set_limits()
        copy_folder(folder, scratch / "work")
        os.chdir(scratch / "work")
        notebook(list(ALL))
        return 0
    try:
        _enter_namespaces()
    except (Refused, OSError):
        missing = list(ALL)
        if sys.platform == "linux":
            _call("prctl", _SUBREAPER, 1, 0, 0, 0)

    def student() -> int:
        if missing:
            _die_with_parent()
        set_limits()
        copied = scratch / "work"
        if not copied.exists():
            copy_folder(folder, copied)
        os.chdir(copied)
        notebook(missing)
        return 0

    def first_process() -> int:
        _die_with_parent()
        for name, step in (("files", lambda: _shut_files(scratch)), ("processes", _own_processes_only)):
            try:
                step()
            except Refused:
                missing.append(name)
        copy_folder(folder, scratch / "work")
        _drop_rights()
        return _wait(_forked(student))

    child = _forked(student if missing else first_process)

    def end(*_: int | FrameType | None) -> None:
        os.kill(child, signal.SIGKILL)
        _end_children()
        os._exit(128 + signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    code = _wait(child)
    _end_children()
    return code


def main(folder: str, scratch: str, model: str) -> None:
    """Run the notebook's process; see :mod:`tl_circuits.course.student_process`."""
    if hasattr(signal, "SIGKILL"):
        _die_with_parent()

    def notebook(missing: list[str]) -> None:
        from tl_circuits.course.student_process import main

        main(missing, model)

    sys.exit(run_confined(Path(folder), Path(scratch), notebook))
