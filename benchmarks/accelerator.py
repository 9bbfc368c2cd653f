"""The benchmark of an accelerator: a Gemma-2-2b-shaped random model on a GPU, tl_circuits against circuit-tracer.

    python -m benchmarks.accelerator --peer .venv-peer/bin/python --out accelerator.jsonl --profile
    python -m benchmarks.accelerator --table accelerator.jsonl      # the tables again, from what was written

The random weights are made on the device from fixed seeds, in each program's own process. Every measurement prints its
line at once, and is appended to ``--out``. A measurement of more than ``--seconds-each`` is stopped after its current
batch, and the time of the remaining nodes is estimated from those done (marked "about"). What fails is recorded with
its error.
"""

import argparse
import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START = 240  # seconds that a process may take to import everything and to make the model
SLACK = 60  # seconds by which a measurement may exceed its time, for preparing and for its current batch
KEPT = 130  # seconds left to the agreement and the profile when circuit-tracer's further batch sizes end
WITHIN = 1e-3  # float32: edges may differ by this share of the largest edge into the same target
FIRST_BATCH, FURTHER_BATCHES = 256, (512, 128, 64)
PEER_ORDER = (64, 256, 10, 1024)
AGREED_NODES, AGREED_BATCH, AGREED_OURS = 256, 32, 4096


class Log:
    """Prints each measurement at once, and appends it to a file."""

    def __init__(self, path: Path | None):
        self._path = path
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        self.records.append(record)
        print(told(record), flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record


class Worker:
    """A process that answers jobs. It is started for the first one, and again after one that it did not survive."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], until: float, log: Log):
        self._name, self._command, self._environment = name, command, environment
        self._until, self._log = until, log
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)
        self._failed_starts = 0
        self.ready: dict[str, Any] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()
        self._errors.close()

    def ask(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        """What the process answers to a job, or ``{"error": …}``. ``limit``: seconds."""
        left = self._until - time.perf_counter()
        if left <= 0:
            return {"error": "skipped: the time for all measurements is over"}
        if self._process is None and (error := self._start(left)):
            return {"error": error}
        assert self._process is not None and self._process.stdin is not None  # _start has made it
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._lost("the process ended")
        return self._answer(min(limit, max(1.0, self._until - time.perf_counter())))

    def _start(self, left: float) -> str | None:
        """Start the process and wait until the model is made; returns the error if that fails."""
        if self._failed_starts > 1:
            return "skipped: the process failed to start twice"
        self._lines = queue.Queue()
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
        )
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        began = time.perf_counter()
        found = self._answer(min(START, left))
        if "error" in found:
            self._failed_starts += 1
            return f"start failed: {found['error']}"
        self.ready = found
        seconds = time.perf_counter() - began
        self._log.add({"part": "start", "program": self._name, "start_seconds": seconds, **found})
        return None

    def _answer(self, limit: float) -> dict[str, Any]:
        deadline = time.perf_counter() + limit
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.perf_counter()))
            except queue.Empty:
                return self._lost(f"no answer within {limit:.0f} s")
            if line is None:
                return self._lost("the process ended")
            if line.startswith("{"):
                return json.loads(line)

    def _lost(self, why: str) -> dict[str, Any]:
        """Stop the process; its last words are part of the error."""
        self._stop()
        self._errors.seek(0)
        words = self._errors.read()[-1500:]
        said = "out of memory" if "out of memory" in words.lower() and why == "the process ended" else f"{why}: {words}"
        return {"error": said}

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None  # it was asked for
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


class Benchmark:
    """All parts, in the order in which their numbers matter."""

    def __init__(self, arguments: argparse.Namespace, log: Log):
        self.arguments, self.log = arguments, log
        self.until = time.perf_counter() + 60 * arguments.minutes
        self.sums: dict[str, int] = {}  # check sums of the weights, by dtype and state
        self._in_float32 = self._worker("ours", "float32")  # waits for the last part while others run

    def run(self) -> None:
        arguments = self.arguments
        parts: list[Callable[[], None]] = [self.ours]
        if not arguments.skip_peer:
            parts += [self.peer, self.agreement]
        parts += [self.profiles, self.float32]
        with self._in_float32:
            for part in parts:
                try:
                    part()
                except Exception as error:  # noqa: BLE001  (one part that fails shall not stop the others)
                    self.log.add({"part": part.__name__, "error": f"{type(error).__name__}: {error}"})

    def _worker(self, program: str, dtype: str, *more: str, until: float | None = None) -> Worker:
        arguments = self.arguments
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if program == "ours":
            command = [sys.executable, "-m", "benchmarks.accelerator_ours"]
        else:
            command = [*shlex.split(arguments.peer), str(Path(__file__).parent / "accelerator_peer.py")]
            environment.pop("PYTHONPATH", None)
            if arguments.peer_path is not None:
                environment["PYTHONPATH"] = arguments.peer_path
        command += [arguments.shape, dtype, arguments.device, *more]
        return Worker(f"{program} {dtype}", command, environment, self.until if until is None else until, self.log)

    def _same_weights(self, state: str, total: int | None) -> None:
        """Record whether both programs made the same weights."""
        if total is None:
            return
        if state not in self.sums:
            self.sums[state] = total
            return
        first = self.sums[state]
        if first == total:
            self.log.add({"part": "weights", "state": state, "same": True})
        else:
            self.log.add(
                {"part": "weights", "error": f"{state}: check sums differ ({first} and {total}): other random numbers"}
            )

    def _speed(self, worker: Worker, part: str, dtype: str, length: int, **more: Any) -> None:
        limit, nodes = self.arguments.seconds_each, self.arguments.nodes
        if self._active_a_position:  # at position 0 there are no features
            nodes = max(1, min(nodes, int(0.9 * self._active_a_position * (length - 1))))
        job = {"do": "speed", "length": length, "nodes": nodes, "limit": limit, **more}
        found = worker.ask(job, limit + SLACK)
        self.log.add({"part": part, "dtype": dtype, "length": length, "nodes": nodes, **more, **found})

    _active_a_position = 0.0  # summed over layers, as measured

    def ours(self) -> None:
        """Ours at all lengths."""
        arguments = self.arguments
        with self._worker("ours", arguments.dtype) as worker:
            found = self.log.add(
                {"part": "check", "program": "ours", **worker.ask({"do": "check", "length": 64}, SLACK)}
            )
            self._active_a_position = sum(found.get("active_a_position", []))
            self._same_weights(arguments.dtype, (worker.ready or {}).get("checksum"))
            self.log.add({"part": "rates", **worker.ask({"do": "rates"}, SLACK)})
            for length in arguments.lengths:
                self._speed(worker, "ours", arguments.dtype, length)

    def peer(self) -> None:
        """circuit-tracer: the first batch size at each length, then the others, as long as there is time."""
        arguments = self.arguments
        order = [length for length in PEER_ORDER if length in arguments.lengths]
        jobs = [(length, arguments.batches[0]) for length in order]
        # At other lengths the smallest alone: on 6,000 tokens larger ones cannot fit where that does not.
        jobs += [(length, min(arguments.batches)) for length in arguments.lengths if length not in order]
        jobs += [(length, batch) for batch in arguments.batches[1:] for length in order]
        with self._worker("peer", arguments.dtype, until=self.until - min(KEPT, 60 * arguments.minutes / 3)) as worker:
            self.log.add({"part": "check", "program": "peer", **worker.ask({"do": "check", "length": 64}, SLACK)})
            self._same_weights(arguments.dtype, (worker.ready or {}).get("checksum"))
            failed: dict[int, int] = {}  # the smallest batch that did not fit, by length
            for length, batch in jobs:
                if batch >= failed.get(length, batch + 1):
                    self.log.add(
                        {
                            "part": "peer",
                            "dtype": arguments.dtype,
                            "length": length,
                            "batch": batch,
                            "error": f"not tried: batch {failed[length]} was out of memory",
                        }
                    )
                    continue
                self._speed(worker, "peer", arguments.dtype, length, batch=batch)
                if self.log.records[-1].get("error") == "out of memory":
                    failed[length] = min(batch, failed.get(length, batch))

    def agreement(self) -> None:
        """Edges of both programs in float32, at the shortest length."""
        length = min(self.arguments.lengths)
        with tempfile.TemporaryDirectory() as folder:
            job = {"length": length, "folder": folder}
            worker = self._in_float32
            near = self.log.add({"part": "near the threshold", **worker.ask(job | {"do": "near"}, SLACK)})
            self._same_weights("float32, rows near the threshold at zero", near.get("checksum"))
            ours = worker.ask(job | {"do": "graph", "nodes": AGREED_OURS}, 2 * SLACK)
            if "error" in near or "error" in ours:
                self.log.add({"part": "agreement", "error": near.get("error", ours.get("error"))})
                return
            with self._worker("peer", "float32", str(Path(folder, "near.json"))) as peer:
                theirs = peer.ask(job | {"do": "graph", "nodes": AGREED_NODES, "batch": AGREED_BATCH}, 2 * SLACK)
                self._same_weights("float32, rows near the threshold at zero", (peer.ready or {}).get("checksum"))
            if "error" in theirs:
                self.log.add({"part": "agreement", "error": theirs["error"]})
                return
            found = compared(Path(folder)) | {"active": ours["active"], "active_peer": theirs["active"]}
            self.log.add({"part": "agreement", "length": length, "dtype": "float32", **found})

    def profiles(self) -> None:
        """Where our time goes (few nodes on long prompts, whose kernels are many), then ours with products in TF32."""
        arguments = self.arguments
        if not arguments.profile and not arguments.tf32:
            return
        with self._worker("ours", arguments.dtype) as worker:
            for length in arguments.profile_lengths if arguments.profile else []:
                job = {"do": "profile", "length": length, "nodes": 512 if length <= 256 else 32}
                self.log.add({"part": "profile", "dtype": arguments.dtype, **job, **worker.ask(job, 2 * SLACK)})
            for length in self._some_lengths if arguments.tf32 else []:
                self._speed(worker, "ours, TF32", arguments.dtype, length, precision="high")

    def float32(self) -> None:
        """Ours in float32 at some lengths; the encoder rows that the agreement set to zero are few."""
        if self.arguments.dtype != "float32" and self._some_lengths:
            self._in_float32.ask({"do": "check", "length": 64}, SLACK)
            for length in self._some_lengths:
                self._speed(self._in_float32, "ours", "float32", length)

    @property
    def _some_lengths(self) -> list[int]:
        return [length for length in self.arguments.float32_lengths if length in self.arguments.lengths]


def compared(folder: Path) -> dict[str, Any]:
    """Every edge among circuit-tracer's nodes that are ours too, theirs against ours.

    Both programs chose their nodes by themselves; ours are many more, so nearly all of theirs are among them.
    """
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(folder / "ours.safetensors"), load_file(folder / "peer.safetensors")
    kind = ours["kind"]
    rows = zip(*(ours[name].tolist() for name in ("layer", "position", "feature")), strict=True)
    place = {row: i for i, row in enumerate(rows) if int(kind[i]) == 0}
    features = [tuple(row) for row in theirs["features"].tolist()]
    shared = torch.tensor([feature in place for feature in features], dtype=torch.bool)
    rest = torch.arange(int((kind == 0).sum()), len(kind))
    if len(theirs["adjacency"]) != len(features) + len(rest):
        return {
            "error": "other errors, tokens and logits: "
            f"{len(theirs['adjacency']) - len(features)} and {len(rest)} nodes"
        }
    columns = torch.cat([torch.tensor([place.get(feature, 0) for feature in features], dtype=torch.long), rest])
    kept = torch.cat([shared, torch.ones(len(rest), dtype=torch.bool)])
    mine, reference = ours["adjacency"][columns][:, columns][kept][:, kept], theirs["adjacency"].float()[kept][:, kept]
    targets = reference.abs().amax(1) > 0
    gap = (mine - reference).abs().amax(1)[targets] / reference.abs().amax(1)[targets]
    return {
        "nodes": int(kept.sum()),
        "features": int(shared.sum()),
        "features_peer": len(features),
        "same_targets": ours["feature"][kind == 3].tolist() == theirs["logits"].tolist(),
        "edges": int((reference != 0).sum()),
        "largest_gap": float(gap.max()),
        "median_gap": float(gap.median()),
        "rows_without_edges_differ": float((mine - reference).abs()[~targets].max()) if (~targets).any() else 0.0,
        "within": WITHIN,
        "agree": bool(gap.max() <= WITHIN),
    }


def told(record: dict[str, Any]) -> str:
    """One measurement as a line of text (a profile as several)."""
    part, error = record["part"], record.get("error")
    where = " ".join(
        f"{record[k]}{unit}" for k, unit in (("dtype", ""), ("length", " tokens"), ("nodes", " nodes")) if k in record
    )
    where += f" batch {record['batch']}" if "batch" in record else ""
    head = f"[{part}] {where or record.get('program', '')}".strip()
    if error is not None:
        said = error.strip().splitlines()
        return f"{head}: {said[0]}" + (f" … {said[-1]}" if len(said) > 1 else "")  # the whole of it is in the file
    if "nodes_per_s" in record:
        about = "" if record["finished"] else f"about (stopped after {record['done']} nodes) "
        memory = (
            f"; peak {record['allocated_gb']:.1f} GB allocated, {record['reserved_gb']:.1f} reserved"
            if "allocated_gb" in record
            else ""
        )
        sweeps = f"; {record['sweep_seconds']:.2f} s in {record['sweeps']} sweeps" if "sweeps" in record else ""
        return f"{head}: {about}{record['nodes_per_s']:.4g} nodes/s, {record['seconds']:.2f} s{sweeps}{memory}"
    if part == "profile":
        from benchmarks.accelerator_profile import profile_lines

        return "\n".join([f"{head}:", *profile_lines(record)])
    rest = {k: v for k, v in record.items() if k not in ("part", "dtype", "length", "nodes", "program", "shape")}
    return f"{head}: {json.dumps(rest)}"


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """The comparison as a table: circuit-tracer's best batch size at each length."""
    rates = next((r for r in records if r["part"] == "rates" and "float32" in r), {})
    device = next((r["device"] for r in records if r["part"] == "start" and "device" in r), "unknown")
    if rates:
        yield (
            f"{device}: products of large matrices at "
            + ", ".join(f"{rates[name] / 1e3:.1f} TFLOP/s in {name}" for name in ("float32", "tf32", "bfloat16"))
            + ". tl_circuits multiplies in float32 whatever the model's dtype."
        )
        yield ""
    yield (
        "| dtype | prompt tokens / nodes | tl_circuits nodes/s | of the float32 rate | in its sweeps | peak GB "
        "allocated / reserved | circuit-tracer's best nodes/s (batch) | peak GB allocated / reserved | ratio |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for ours in records:
        if not ours["part"].startswith("ours") or "length" not in ours:
            continue
        theirs = [
            r
            for r in records
            if r["part"] == "peer" and (r.get("dtype"), r.get("length")) == (ours["dtype"], ours["length"])
        ]
        done = [r for r in theirs if "nodes_per_s" in r]
        best = max(done, key=lambda r: r["nodes_per_s"], default=None)
        yield "| " + " | ".join(_cells(ours, best, theirs, rates)) + " |"


def _cells(
    ours: dict[str, Any], best: dict[str, Any] | None, theirs: list[dict[str, Any]], rates: dict[str, Any]
) -> list[str]:
    name = ours["dtype"] + (", products in TF32" if ours["part"] == "ours, TF32" else "")
    cells = [name, f"{ours['length']} / {ours['nodes']}"]
    if "error" in ours:
        cells += [ours["error"].splitlines()[0][:60], "", "", ""]
    else:
        rate = rates.get("tf32" if ours["part"] == "ours, TF32" else "float32")
        shares = [f"{ours[key] / rate:.1%}" if rate else "" for key in ("gflops", "gflops_in_sweeps")]
        cells += [_about(ours), *shares, _memory(ours)]
    if best is None:
        why = {
            r["error"].splitlines()[0][:60] for r in theirs if "error" in r and not r["error"].startswith("not tried")
        }
        return [*cells, "; ".join(sorted(why)) or "not tried", "", ""]
    ratio = f"{ours['nodes_per_s'] / best['nodes_per_s']:.2f}" if "nodes_per_s" in ours else ""
    return [*cells, f"{_about(best)} ({best['batch']})", _memory(best), ratio]


def _about(record: dict[str, Any]) -> str:
    return f"{'' if record['finished'] else 'about '}{record['nodes_per_s']:.3g}"


def _memory(record: dict[str, Any]) -> str:
    return f"{record['allocated_gb']:.1f} / {record['reserved_gb']:.1f}" if "allocated_gb" in record else ""


def numbers(text: str) -> list[int]:
    """Whole numbers, separated by commas."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", default="python3", help="command that runs the Python of an environment with circuit-tracer 0.5.0"
    )
    parser.add_argument("--peer-path", help="the PYTHONPATH of circuit-tracer's process: folders with its packages")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--shape", choices=("gemma-2-2b", "tiny"), default="gemma-2-2b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lengths", type=numbers, default=[10, 64, 256, 1024, 6000])
    parser.add_argument(
        "--float32-lengths",
        type=numbers,
        default=[64, 1024],
        help="where ours is also measured in float32, and with --tf32",
    )
    parser.add_argument(
        "--batches",
        type=numbers,
        default=[FIRST_BATCH, *FURTHER_BATCHES],
        help="circuit-tracer's batch sizes, in this order",
    )
    parser.add_argument("--nodes", type=int, default=2048)
    parser.add_argument("--seconds-each", type=float, default=40)
    parser.add_argument("--minutes", type=float, default=7.5, help="after these, the remaining parts are skipped")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--profile-lengths", type=numbers, default=[64, 1024])
    parser.add_argument("--tf32", action="store_true", help="also ours with float32 products in TF32")
    parser.add_argument("--out", type=Path, help="file to which each measurement is appended as a line of JSON")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing; print the table of a file written by --out"
    )
    arguments = parser.parse_args()
    if arguments.table is not None:
        records = [json.loads(line) for line in arguments.table.read_text().splitlines()]
        print(*table(records), sep="\n")
        return
    log = Log(arguments.out)
    began = time.perf_counter()
    Benchmark(arguments, log).run()
    print("", *table(log.records), "", f"{time.perf_counter() - began:.0f} s in all.", sep="\n", flush=True)


if __name__ == "__main__":
    main()
