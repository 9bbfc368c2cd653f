"""Files appear as a whole or not at all, where and how the user keeps them."""

import os
import signal
import stat

import pytest

from tl_circuits.errors import OutputError
from tl_circuits.support.files import atomic_file

posix = pytest.mark.skipif(os.name != "posix", reason="needs permissions, links and devices")


def write(path, content=b"new", overwrite=True):
    with atomic_file(path, overwrite) as file:
        file.write(content)
    return path


@posix
def test_an_overwritten_file_keeps_its_permissions_and_a_new_one_gets_the_usual(tmp_path):
    old = tmp_path / "old"
    old.touch(0o600)
    os.chmod(old, 0o640)
    assert stat.S_IMODE(write(old).stat().st_mode) == 0o640
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(write(tmp_path / "new").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@posix
def test_a_link_stays_and_the_file_it_points_to_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")  # its file does not exist yet
    for content in (b"one", b"two"):
        write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").read_bytes() == content
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


@posix
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "link to a device"])
def test_what_is_no_plain_file_is_refused_and_stays(kind, tmp_path):
    place = tmp_path / "place"
    if kind == "device":
        place = type(place)(os.devnull)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(os.devnull)
    before = os.stat(place).st_mode
    with pytest.raises(OutputError, match="Give the name of a file"):
        write(place)
    assert os.stat(place).st_mode == before


def test_the_longest_names_that_a_system_takes_can_be_written(tmp_path):
    for name in ("a" * 255, "é" * 127):
        assert write(tmp_path / name).read_bytes() == b"new"
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / ("a" * 256))
    with pytest.raises(OutputError, match="null"):
        write(tmp_path / "a\0b")
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / ("a" * 255) / "b")


def killed_while_writing(path):
    child = os.fork()
    if child == 0:
        with atomic_file(path, True) as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@posix
def test_what_a_killed_run_left_is_removed_once_it_is_old(tmp_path):
    killed_while_writing(tmp_path / "file")
    (part,) = os.listdir(tmp_path)
    earlier, other = ".file.abcd1234.part", ".file.json.abcd1234.part"  # of version 0.1, of this file and another
    for name in (earlier, other):
        (tmp_path / name).touch()
    write(tmp_path / "file")
    assert {*os.listdir(tmp_path)} == {"file", part, earlier, other}, "they might still be written"
    for name in (part, earlier, other):
        os.utime(tmp_path / name, (0, 0))
    write(tmp_path / "file")
    assert {*os.listdir(tmp_path)} == {"file", other}


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    did = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: did.append("sync") or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: did.append("rename") or rename(*names))
    write(tmp_path / "file")
    assert did[:2] == ["sync", "rename"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_full_disk_is_said_in_words_and_the_old_file_stays(step, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OutputError, match="file: No space left on device"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_errors_of_what_is_written_are_its_own(tmp_path):
    with pytest.raises(KeyError), atomic_file(tmp_path / "file", True):
        raise KeyError("x")
    with pytest.raises(OutputError, match="^its own words$"), atomic_file(tmp_path / "file", True):
        raise OutputError("its own words")
    assert not os.listdir(tmp_path)
