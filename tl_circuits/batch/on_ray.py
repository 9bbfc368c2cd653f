"""Trace many prompts on Ray, with one worker a device, each of which loads model and dictionary once."""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from tl_circuits.batch.jobs import Job
from tl_circuits.batch.one import trace_one
from tl_circuits.batch.store import Store
from tl_circuits.errors import ArgumentError
from tl_circuits.hooks import Replacement
from tl_circuits.support.extras import how_to_install

OLDEST = (2, 60)  # older ones take work from anybody who reaches them, or do not start with authentication
AUTH_MODE = "RAY_AUTH_MODE"  # Ray's own switch; its value "token" stands for authentication
SECONDS_TO_ANSWER = 10  # how long to wait for a cluster
LIVES = 2  # a prompt during which so many workers died counts as failed


def trace_on_ray(
    opener: Callable[[], Replacement],
    jobs: list[Job],
    out: str,
    options: dict[str, Any],
    workers: int | None,
    address: str | None,
) -> Iterator[dict[str, Any]]:
    """Trace prompts on Ray; yields the record of each as it finishes.

    A worker that dies is replaced, and its prompt is traced again.

    Raises:
        ImportError: Ray is not installed (the extra ``ray``), or too old.
        ConnectionError: no cluster answers at ``address``.
        ArgumentError: Ray's authentication is off. Anybody who reaches such a cluster can run code on it.
        ValueError: there are more workers than devices.
        RuntimeError: a worker cannot open the model.
    """
    ray = _ray()
    ours = _connect(ray, address)
    try:
        device, count = _devices(ray)
        if workers is not None and workers > count:
            raise ValueError(
                f"{workers} workers, but the cluster has {count} {device} to give one to each. Ask for fewer."
            )
        n = min(workers or count, len(jobs))
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // n)
        needs = {"num_gpus": 1} if device == "GPUs" else {"num_cpus": cpus}
        make = ray.remote(**needs)(_Worker)
        yield from _drive(ray, lambda: make.remote(opener, out, options, cpus), n, jobs, options)
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"workers run on Ray, which is not installed: {how_to_install('ray')}.") from error
    if _version(ray.__version__) < OLDEST:
        raise ImportError(
            f"Ray {ray.__version__} lets anybody who reaches it over the network run code; at least "
            f"{'.'.join(map(str, OLDEST))} is needed: {how_to_install('ray')}."
        )
    return ray


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 60) for "2.60.0rc1"."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:2])


def _require_authentication(connected: bool) -> None:
    """Raise ArgumentError if Ray's authentication is off. Ray says so in the environment.

    Args:
        connected: whether Ray has started. Before, a mode that is not set is right: Ray then chooses.
    """
    mode = os.environ.get(AUTH_MODE, "")
    if mode.lower() == "token" or (not mode and not connected):
        return
    raise ArgumentError(
        f"Ray runs without authentication ({AUTH_MODE}={mode or 'not set'}), so anybody who reaches it over the "
        f"network could run code. Set {AUTH_MODE}=token for this program and for the cluster; `ray get-auth-token "
        "--generate` makes a token."
    )


def _connect(ray: Any, address: str | None) -> bool:
    """Connect to Ray; returns whether that was necessary, since then it must be closed here as well."""
    if ray.is_initialized():
        _require_authentication(connected=True)
        return False
    _require_authentication(connected=False)
    try:
        if address:
            _require_open(address)
        dashboard = None if address else False
        ray.init(address=address or "local", include_dashboard=dashboard, log_to_driver=False, logging_level="error")
    except (
        ConnectionError,
        OSError,
        RuntimeError,
        ValueError,
        TimeoutError,
        ray.exceptions.AuthenticationError,
    ) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address or 'this machine'}: {error}. Check the address, or leave it out to "
            "start one here."
        ) from error
    try:
        _require_authentication(connected=True)
    except ArgumentError:
        ray.shutdown()
        raise
    return True


def _require_open(address: str) -> None:
    """Raise OSError at once if nothing listens there: Ray would try for minutes and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


def _devices(ray: Any) -> tuple[str, int]:
    resources = ray.cluster_resources()
    return ("GPUs", int(resources["GPU"])) if resources.get("GPU", 0) >= 1 else ("CPU cores", int(resources["CPU"]))


class _Worker:
    """One worker: it runs in its own process, opens model and dictionary once, and traces one prompt at a time."""

    def __init__(self, opener: Callable[[], Replacement], out: str, options: dict[str, Any], threads: int):
        import torch

        torch.set_num_threads(threads)
        self._replacement, self._store, self._options = opener(), Store(out), options

    def trace(self, job: Job) -> dict[str, Any]:
        return trace_one(self._replacement, job, self._store, self._options)


def _drive(
    ray: Any, start: Callable[[], Any], n: int, jobs: list[Job], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    waiting = deque((job, 1) for job in jobs)
    running: dict[Any, tuple[Any, Job, int]] = {}

    def give(worker: Any) -> None:
        if waiting:
            job, life = waiting.popleft()
            running[worker.trace.remote(job)] = worker, job, life

    for _ in range(n):
        give(start())
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        worker, job, life = running.pop(ready)
        try:
            record = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            # Ray reports a worker that failed while starting in the same way as one that died at work.
            if "__init__" in str(error) or "creation task" in str(error):
                raise RuntimeError(f"a worker could not open the model: {error}") from error
            if life < LIVES:
                waiting.appendleft((job, life + 1))
                give(start())
                continue
            record = {
                "id": job.id,
                "key": job.key(options),
                "prompt": str(job.prompt),
                "status": "failed",
                "error": f"its worker died {LIVES} times, perhaps for want of memory",
            }
            worker = start() if waiting else worker
        yield record
        give(worker)
