"""Nobody cheats: what a notebook does to its own process earns no points and harms nothing outside."""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import torch

from tests import course_attacks as attacks
from tl_circuits.course import notebook_process
from tl_circuits.course.answering import GRACE, answer_apart
from tl_circuits.course.assignments import open_submission
from tl_circuits.course.channel import Inbox, receive, send_within
from tl_circuits.course.grading import grade
from tl_circuits.course.questions import Part, Question, open_lab, tensor
from tl_circuits.course.report import check
from tl_circuits.course.wire import DEEPEST, LARGEST_MESSAGE, Stranger, pack, unpack
from tl_circuits.errors import CourseError
from tl_circuits.hooks import Ablate, Set

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs limits that only Linux has")


@pytest.fixture(scope="module")
def lab():
    return open_lab()


def write(folder, text):
    folder.mkdir()
    (folder / "hooks_and_features.ipynb").write_text(text)
    return folder


def test_no_change_of_its_own_process_earns_a_notebook_points(tmp_path):
    cells = [*attacks.CHEATS.values(), attacks.JUNK, attacks.FORGED]
    report = check(write(tmp_path / "a", attacks.notebook(*cells)))
    assert report.earned == 0 and [mark["points"] for mark in report.marks] == [4] * 5
    assert not any("raised" in remark for mark in report.marks[:4] for remark in mark["remarks"]), report.marks


@linux
def test_bombs_cost_only_the_question_they_are_in_and_nothing_stays(tmp_path):
    mark = f"left-by-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        harm = f"MARK = {mark!r}\nFOLDER = {str(tmp_path / 'a')!r}\nPORT = {server.getsockname()[1]}\n" + attacks.HARM
        cells = [harm, attacks.FILL, attacks.OUTSIDE, attacks.NETWORK, attacks.MEMORY, attacks.FORKS]
        folder = write(tmp_path / "a", attacks.notebook(*cells, functions=attacks.solved()))
        report = check(folder)
    earned = {given["function"]: given["earned"] for given in report.marks}
    assert earned == {
        "activations_at": 4, "pre_activations": 4, "feature_activations": 4, "reconstruction_error": 4, "ablate": 0,
    }, report  # fmt: skip
    *crashes, last = report.remarks
    assert "started more than 64 processes and was stopped in `ablate`" in last
    assert "OSError" in crashes[0] and "big" not in os.listdir(folder)
    if not report.not_kept_out:  # with namespaces
        assert "Read-only file system" in crashes[1] and "AssertionError" in crashes[2] and len(crashes) == 3
        assert os.listdir(folder) == ["hooks_and_features.ipynb"]
    until = time.monotonic() + 10
    while (left := _processes(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def _processes(mark):
    return [p.pid for p in psutil.process_iter(["cmdline", "status"]) if mark in (p.info["cmdline"] or ())]


WITHOUT_NAMESPACES = """
import sys, runpy
sys.path[:] = [p for p in sys.path if p]
def refuse():
    raise OSError(1, "Operation not permitted")
main = runpy.run_path(sys.argv[1])["main"]
main.__globals__["_enter_namespaces"] = refuse
main(*sys.argv[2:])
"""


@linux
@pytest.mark.parametrize("namespaces", [True, False])
def test_a_notebook_that_loops_for_ever_is_stopped_with_its_children(namespaces, tmp_path, monkeypatch):
    if not namespaces:
        monkeypatch.setattr(notebook_process, "CODE", WITHOUT_NAMESPACES)
    mark = f"child-of-{os.getpid()}"
    loop = (
        f"MARK = {mark!r}"
        + attacks.HARM
        + "while True:\n    try:\n        sum(range(1000))\n    except BaseException:\n        pass"
    )
    notebook = json.loads(attacks.notebook())
    notebook["cells"].insert(0, {"cell_type": "code", "source": loop})
    report = check(write(tmp_path / "a", json.dumps(notebook)), time_limit=3.0)
    assert report.earned == 0 and report.points == 20
    assert namespaces or "allows no namespaces" in report.not_kept_out[0]
    assert "took longer than 3 s and was stopped in code cell 1" in report.remarks[0]
    assert not _processes(mark)


def loop_for_ever(begun):
    begun()
    while True:
        with suppress(BaseException):
            sum(range(1000))


def leave_a_child_with_the_pipe(begun):
    begun()
    if os.fork() == 0:
        os.setsid()
        time.sleep(5)
        os._exit(0)
    os._exit(3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs copies of processes")
@pytest.mark.parametrize(
    ("run", "answer"),
    [
        (lambda begun: begun() or pack({"returned": 7, "hooks": 0}), {"returned": 7, "hooks": 0}),
        (loop_for_ever, {"raised": "StillRunning: ended after 0.3 s", "unwritten": False, "looped": True}),
        (leave_a_child_with_the_pipe, {"raised": "", "ended": 3, "unwritten": False, "looped": True}),
        (
            lambda begun: begun() or os.kill(os.getpid(), 9),
            {"raised": "", "ended": -9, "unwritten": False, "looped": True},
        ),
    ],
)
def test_whatever_a_function_does_to_its_process_the_next_is_asked_as_ever(run, answer):
    began = time.monotonic()
    assert unpack(answer_apart(0.3, run)) == answer
    assert time.monotonic() - began < 4.0 + GRACE  # the child that holds the pipe is not waited for


def test_a_process_that_does_not_read_is_not_waited_for_and_messages_may_come_in_pieces():
    reader, writer = (open(end, mode, buffering=0) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with pytest.raises(TimeoutError):
        send_within(writer, bytes(1 << 20), time.monotonic() + 0.3, lambda: None)
    assert receive(reader) == bytes(1 << 20)  # a pipe takes 64 kB at once
    threading.Timer(0.2, lambda: writer.write(b"\0" * 7)).start()
    threading.Timer(0.4, lambda: writer.write(b"\3abc" + (1 << 62).to_bytes(8, "big"))).start()
    inbox = Inbox(reader)
    assert inbox.next(time.monotonic() + 5, lambda: None) == b"abc"
    assert inbox.next(time.monotonic() + 5, lambda: None) is None  # one of 2**62 bytes is announced
    reader.close()
    with pytest.raises(OSError):
        send_within(writer, b"x", time.monotonic() + 1, lambda: None)
    writer.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_in_place_of_the_notebook_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "hooks_and_features.ipynb")
    with pytest.raises(CourseError, match="is not a file"):
        open_submission(tmp_path / "hooks_and_features.ipynb")
    with pytest.raises(CourseError, match="holds no notebook"):
        open_submission(tmp_path)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\xff" * 100,
        pack(3),
        pack({"returned": None}),
        pack({"raised": "x"}).replace(b"raised", b"\x00aised"),
        pack([1]).replace(b"list", b"Recorded"),
        pack([1]).replace(b"list", b"LIST"),
        pack({"returned": Ablate(0, 1, 2), "hooks": 0}).replace(b"layer", b"LAYER"),
    ],
)
def test_a_forged_answer_earns_nothing_and_stops_nothing(sent, lab):
    def check_it(student, lab):
        yield Part(1, bool(tensor(student(3), (3,), "pos").sum() == 3), "a hint")

    (given,) = grade([Question("f", "a task", 1, check_it)], {"f": "function"}, lambda *_: sent, lab=lab)
    assert given.earned == 0 and given.remarks


class Odd(dict):
    def __float__(self):
        raise ValueError("no number")


def test_values_come_back_as_they_were_and_objects_of_other_types_as_their_names():
    values = [
        None,
        True,
        3,
        -2.5,
        "a\udc80",
        [1, (2, 3)],
        {"a": {1, 2}},
        {(0, -2, 5): 1.5},
        slice(1, None),
        frozenset({"x"}),
    ]
    assert unpack(pack(values)) == values
    edits = [Ablate(0, -2, (1, 2)), Set(1, slice(0, 2), 3, value=0.5)]
    assert unpack(pack(edits)) == edits
    one = torch.arange(6.0).view(2, 3)
    got = unpack(pack([one.T, one.to_sparse(), torch.nn.Parameter(one), one.expand(2, 2, 3), one.bfloat16()]))
    assert [tuple(t.shape) for t in got] == [(3, 2), (2, 3), (2, 3), (2, 2, 3), (2, 3)]
    assert torch.equal(got[0], one.T) and type(got[2]) is torch.Tensor and got[4].dtype == torch.bfloat16
    assert unpack(pack(object())) == Stranger("object") and unpack(pack(Odd())) == {}
    assert unpack(pack(torch.empty(2, device="meta"))).name == "Tensor"
    assert unpack(pack(torch.zeros(1).expand(LARGEST_MESSAGE))).name == "Tensor"
    assert unpack(pack(10**4000)) == Stranger("int")
    deep: list = []
    for _ in range(DEEPEST * 3):
        deep = [deep]
    assert "Stranger" in repr(unpack(pack(deep)))


def test_a_copied_folder_is_bounded_in_bytes_and_files_and_has_no_links(tmp_path, monkeypatch):
    from tl_circuits.course import confine

    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for number in range(4):
        (folder / "sub" / f"{number}").write_bytes(b"x" * 40)
    (folder / "link").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(confine, "COPIED", 100)  # bytes: two of the four files
    confine.copy_folder(folder, tmp_path / "bytes")
    assert [len(p.read_bytes()) for p in (tmp_path / "bytes").rglob("*") if p.is_file()] == [40, 40]
    monkeypatch.setattr(confine, "COPIED", 1000)
    monkeypatch.setattr(confine, "COPIED_FILES", 3)
    confine.copy_folder(folder, tmp_path / "files")
    assert sum(p.is_file() for p in (tmp_path / "files").rglob("*")) == 3
    assert not any((tmp_path / name / odd).exists() for name in ("bytes", "files") for odd in ("link", "pipe"))
