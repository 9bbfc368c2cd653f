"""Many prompts: written as they finish, resumed, on Ray."""

import hashlib
import json
import os
import signal
from functools import partial
from importlib.util import find_spec

import pandas as pd
import pytest

import tl_circuits as tlc
from tests.conftest import need
from tests.tiny import tiny_bridge, transcoders
from tl_circuits.batch import one as tracing
from tl_circuits.batch import store as stores
from tl_circuits.batch.jobs import Job, read_jobs
from tl_circuits.errors import ArgumentError, GraphFileError, OutputError, PromptError

PROMPTS = ["w1 w2 w3 w4", "w5 w6 w7", "w8 w9 w10 w11 w12"]


def opened():
    model = tiny_bridge("llama")
    return tlc.attach(model, transcoders(model))


@pytest.fixture
def replacement():
    with opened() as attached:
        yield attached


def lines(path, *objects):
    path.write_text("\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects) + "\n")
    return path


def test_every_prompt_gets_the_graph_it_gets_alone(replacement, tmp_path):
    summary = tlc.trace_many(replacement, PROMPTS, tmp_path, max_nodes=30, progress=False)
    assert list(summary.status) == ["done"] * 3
    for prompt, file in zip(PROMPTS, summary.file, strict=True):
        alone = tlc.attribute(replacement, prompt, max_nodes=30, progress=False)
        assert alone.edges.equals(tlc.load_graph(tmp_path / file).edges)
    assert pd.read_parquet(tmp_path / "summary.parquet").key.tolist() == summary.key.tolist()


def test_finished_prompts_are_not_traced_again_and_broken_off_ones_are(replacement, tmp_path, monkeypatch):
    first = tlc.trace_many(replacement, PROMPTS, tmp_path, max_nodes=30, progress=False)
    (tmp_path / f"{first.key[1]}.json").write_text('{"status": "do')  # broken off while writing
    traced = []
    monkeypatch.setattr(
        tracing, "attribute", lambda r, prompt, *a, **k: traced.append(prompt) or tlc.attribute(r, prompt, *a, **k)
    )
    again = tlc.trace_many(replacement, PROMPTS, tmp_path, max_nodes=30, progress=False)
    assert traced == [PROMPTS[1]]
    assert again.edges.tolist() == first.edges.tolist()
    tlc.trace_many(replacement, PROMPTS[:1], tmp_path, max_nodes=20, progress=False)
    assert traced[1:] == [PROMPTS[0]], "other settings are another result"


def test_ctrl_c_leaves_whole_files_only(replacement, tmp_path, monkeypatch):
    def interrupted(r, prompt, *rest, **options):
        if prompt == PROMPTS[2]:
            raise KeyboardInterrupt
        return tlc.attribute(r, prompt, *rest, **options)

    monkeypatch.setattr(tracing, "attribute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tlc.trace_many(replacement, PROMPTS, tmp_path, max_nodes=30, progress=False)
    names = sorted(path.suffix for path in tmp_path.iterdir())
    assert names == [".json", ".json", ".safetensors", ".safetensors"]


def test_bad_lines_and_failing_prompts_are_reported_and_the_rest_done(replacement, tmp_path):
    file = lines(
        tmp_path / "prompts.jsonl",
        {"id": "a", "prompt": "w1 w2 w3"},
        "{not json",
        {"id": "a", "prompt": "w2"},
        {"prompt": ""},
        {"prompt": "w3 w4", "colour": "red"},
        {"id": "long", "prompt": " ".join(["w1"] * 40)},
        {"id": "target", "prompt": "w1 w2", "targets": ["w1 w2 w3"]},
        {"id": "ids", "prompt": [1, 5, 6], "targets": ["w7"], "position": 1},
    )
    summary = tlc.trace_many(replacement, file, tmp_path / "out", max_nodes=20, progress=False).set_index("id")
    assert summary.status[["a", "ids"]].tolist() == ["done", "done"]
    failed = summary[summary.status == "failed"].error
    assert "not JSON" in failed["line 2"] and "already that of line 1" in failed["line 3"]
    assert "'prompt' must be text" in failed["line 4"] and "'colour'" in failed["line 5"]
    assert "context is 32" in failed["long"] and "TargetError" in failed["target"]


def test_any_fsspec_address_will_do(replacement):
    summary = tlc.trace_many(replacement, PROMPTS[:1], "memory://graphs", max_nodes=20, progress=False)
    again = tlc.trace_many(replacement, PROMPTS[:1], "memory://graphs", max_nodes=20, progress=False)
    assert summary.status.tolist() == ["done"] and again.seconds.tolist() == summary.seconds.tolist()


def test_writing_is_tried_again_and_then_recorded(replacement, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.0)
    from fsspec.implementations.local import LocalFileSystem

    failures, write = iter([True, True, False, *[False] * 9]), LocalFileSystem.pipe_file

    def flaky(self, path, value, **kwargs):
        if next(failures):
            raise OSError("connection reset")
        return write(self, path, value, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", flaky)
    assert tlc.trace_many(replacement, PROMPTS[:1], tmp_path / "a", max_nodes=5, progress=False).status[0] == "done"
    failures = iter([True] * 3 + [False] * 9)
    failed = tlc.trace_many(replacement, PROMPTS[:1], tmp_path / "b", max_nodes=5, progress=False)
    assert "connection reset" in failed.error[0]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["summary.parquet"]


def test_settings_that_do_not_fit_say_so(replacement, tmp_path):
    with pytest.raises(PromptError, match="no prompts"):
        tlc.trace_many(replacement, [], tmp_path, progress=False)
    with pytest.raises(PromptError, match="cannot read"):
        tlc.trace_many(replacement, tmp_path / "none.jsonl", tmp_path, progress=False)
    with pytest.raises(ValueError, match="function that returns"):
        tlc.trace_many(replacement, PROMPTS, tmp_path, workers=1, progress=False)
    with pytest.raises(ValueError, match="name="):
        tlc.trace_many(opened, PROMPTS, tmp_path, progress=False)
    with pytest.raises(OutputError, match="cannot write"):
        tlc.trace_many(replacement, PROMPTS, "/dev/null/out", progress=False)


def test_a_cluster_that_does_not_answer_says_so(tmp_path):
    need(find_spec("ray") is not None, "ray")
    with pytest.raises(ConnectionError, match="no Ray cluster answers at 127.0.0.1:1"):
        tlc.trace_many(opened, PROMPTS, tmp_path, name="tiny", ray_address="127.0.0.1:1", progress=False)


@pytest.fixture(scope="module")
def cluster():
    need(find_spec("ray") is not None, "ray")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def _killed_once(marker, length):
    """A worker whose model takes its process down at the first prompt of ``length`` tokens."""
    replacement = opened()
    told = marker / "died"

    def hook(model, args):
        if not told.exists() and args[0].shape[-1] == length:
            told.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    replacement.model.register_forward_pre_hook(hook)
    return replacement


def test_ray_workers_give_the_same_graphs_and_one_that_dies_loses_nothing(cluster, tmp_path):
    alone = tlc.trace_many(opened, PROMPTS, tmp_path / "here", name="tiny", max_nodes=30, progress=False)
    opener = partial(_killed_once, tmp_path, 6)  # w8 ... w12 and the beginning-of-sequence token
    there = tlc.trace_many(opener, PROMPTS, tmp_path / "there", name="tiny", workers=2, max_nodes=30, progress=False)
    assert (tmp_path / "died").exists()
    assert there.status.tolist() == ["done"] * 3
    for file in alone.file:
        one, other = (tlc.load_graph(tmp_path / where / file) for where in ("here", "there"))
        assert one.node_ids == other.node_ids
        assert abs(one.edges.weight - other.edges.weight).max() < 1e-5  # another number of threads


def test_ray_says_what_is_wrong(cluster, tmp_path):
    with pytest.raises(ValueError, match="3 workers, but the cluster has 2 CPU cores"):
        tlc.trace_many(opened, PROMPTS, tmp_path, name="tiny", workers=3, progress=False)

    def broken():
        raise FileNotFoundError("no such checkpoint")

    with pytest.raises(RuntimeError, match="could not open the model"):
        tlc.trace_many(broken, PROMPTS, tmp_path, name="tiny", workers=1, progress=False)


def test_targets_in_a_file_are_written_as_on_the_command_line_and_numbers_may_be_numpys(replacement, tmp_path):
    import numpy as np

    jobs = [
        {"id": "difference", "prompt": "w1 w2", "targets": "w5 - w9"},
        {"id": "unknown", "prompt": "w1 w2", "targets": ["Parisian"]},
        {"id": "numpy", "prompt": np.array([1, 5, 6]), "targets": np.array([20]), "position": np.int64(1)},
        {"id": "plain", "prompt": [1, 5, 6], "targets": [20], "position": 1},
        {"id": "boolean", "prompt": "w1 w2", "targets": [True]},
    ]
    summary = tlc.trace_many(replacement, jobs, tmp_path, max_nodes=20, progress=False).set_index("id")
    assert summary.status.to_dict() == {
        "difference": "done",
        "unknown": "failed",
        "numpy": "done",
        "plain": "done",
        "prompt 5": "failed",
    }
    assert tlc.load_graph(tmp_path / summary.file["difference"]).info.target_names == ("w5 − w9",)
    assert "unknown token '<unk>'" in summary.error["unknown"] and "tokens or token ids" in summary.error["prompt 5"]
    assert summary.key["numpy"] == summary.key["plain"]


def test_lines_of_any_kind_are_errors_of_their_own_and_ids_never_collide(tmp_path):
    text = [
        json.dumps({"id": "line 2", "prompt": "w1 w2"}).encode(),
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"prompt": "w1", "targets": 5.5}',
        b'{"prompt": "w1 \\ud800"}',
        b'{"prompt": "w1", "id": "\\udfff"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "w1", "id": [1]}',
        json.dumps({"prompt": "w1\u2028w2"}, ensure_ascii=False).encode() + b"\r",
        json.dumps({"id": "line 10 (2)", "prompt": "w5"}).encode(),
        b'{"prompt": "w7"}',
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(text))
    jobs = read_jobs(tmp_path / "p.jsonl")
    assert len(jobs) == len(text) == len({job.id for job in jobs})
    good = [job for job in jobs if isinstance(job, Job)]
    assert [job.id for job in good] == ["line 2", "line 9", "line 10 (2)", "line 11"]
    assert good[1].prompt == "w1\u2028w2"
    told = {job.id: job.error for job in jobs if not isinstance(job, Job)}
    assert "nested too deeply" in told["line 2 (2)"] and told["line 2 (2)"].startswith("line 2: ")
    assert "not JSON" in told["line 3"] and "'targets' must be" in told["line 4"]
    assert "'prompt' holds half of a surrogate pair" in told["line 5"] and "'id' holds half" in told["line 6"]
    assert "not JSON" in told["line 7"] and "'id' must be text" in told["line 8"]
    assert all(len(error) < 400 for error in told.values())


def test_a_bad_line_is_not_done_because_another_line_is_called_like_it(replacement, tmp_path):
    file = lines(tmp_path / "p.jsonl", {"id": "line 2", "prompt": "w1 w2"}, "{not json", {"prompt": "w1 \ud800"})
    summary = tlc.trace_many(replacement, file, tmp_path / "out", max_nodes=5, progress=False)
    assert summary.status.tolist() == ["done", "failed", "failed"]
    assert summary.id.tolist() == ["line 2", "line 2 (2)", "line 3"]


def test_a_graph_that_was_cut_off_or_changed_and_a_broken_record_are_noticed(replacement, tmp_path):
    first = tlc.trace_many(replacement, PROMPTS, tmp_path, max_nodes=5, progress=False)
    whole = [(tmp_path / file).read_bytes() for file in first.file]
    (tmp_path / first.file[0]).write_bytes(whole[0][:-1])
    record = json.loads((tmp_path / f"{first.key[1]}.json").read_text())
    broken = [
        [],
        {},
        {"status": "done"},
        record | {"file": "../x"},
        record | {"nodes": "many"},
        record | {"prompt": None},
    ]
    for text in (*map(json.dumps, broken), "[" * 100_000, "\xff"):
        (tmp_path / f"{first.key[1]}.json").write_text(text)
        assert stores.Store(str(tmp_path)).record(first.key[1]) is None
    again = tlc.trace_many(replacement, PROMPTS, tmp_path, max_nodes=5, progress=False)
    assert again.status.tolist() == ["done"] * 3
    assert [(tmp_path / file).read_bytes() for file in again.file] == whole
    record = json.loads((tmp_path / f"{first.key[2]}.json").read_text())
    assert record["bytes"] == len(whole[2]) and record["sha256"] == hashlib.sha256(whole[2]).hexdigest()
    (tmp_path / first.file[2]).write_bytes(whole[1] + bytes(max(0, len(whole[2]) - len(whole[1]))))
    with pytest.raises(GraphFileError, match="its hash differs"):
        stores.Store(str(tmp_path)).graph(record)


def test_records_of_earlier_versions_count_where_their_graph_is_whole(replacement, tmp_path):
    first = tlc.trace_many(replacement, PROMPTS[:2], tmp_path, max_nodes=5, progress=False)
    for key in first.key:
        record = json.loads((tmp_path / f"{key}.json").read_text())
        del record["bytes"], record["sha256"]
        (tmp_path / f"{key}.json").write_text(json.dumps(record))
    (tmp_path / first.file[1]).write_bytes((tmp_path / first.file[1]).read_bytes()[:-9])
    store = stores.Store(str(tmp_path))
    assert store.record(first.key[0]) is not None and store.record(first.key[1]) is None


def test_what_killed_runs_left_is_removed_and_what_others_write_is_not(replacement, tmp_path):
    done = tlc.trace_many(replacement, PROMPTS[:1], tmp_path, max_nodes=5, progress=False)
    old, young = (tmp_path / f".{done.file[0]}.{name}.part" for name in ("0" * 32, "1" * 32))
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    (tmp_path / done.file[0]).unlink()
    tlc.trace_many(replacement, PROMPTS[:1], tmp_path, max_nodes=5, progress=False)
    assert young.exists() and not old.exists()


def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_traced(replacement, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "touch", full)
    monkeypatch.setattr(tracing, "attribute", None)
    with pytest.raises(OutputError, match="No space left"):
        tlc.trace_many(replacement, PROMPTS, tmp_path, progress=False)


def test_ray_without_authentication_or_too_old_is_refused(tmp_path, monkeypatch):
    need(find_spec("ray") is not None, "ray")
    import ray

    monkeypatch.setattr(ray, "init", None)  # nothing may start
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for mode in ("disabled", "k8s", "DISABLED"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(ArgumentError, match="without authentication"):
            tlc.trace_many(opened, PROMPTS, tmp_path, name="tiny", workers=1, progress=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ArgumentError, match="not set"):
        tlc.trace_many(opened, PROMPTS, tmp_path, name="tiny", workers=1, progress=False)
    monkeypatch.setattr(ray, "__version__", "2.59.1")
    with pytest.raises(ImportError, match=r"2\.59\.1 lets anybody"):
        tlc.trace_many(opened, PROMPTS, tmp_path, name="tiny", workers=1, progress=False)
