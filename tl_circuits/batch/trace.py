"""Trace many prompts, one after the other in this process or on the workers of a Ray cluster."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from tl_circuits.attribution.expand import MAX_NODES
from tl_circuits.batch.jobs import BadLine, Job, read_jobs
from tl_circuits.batch.on_ray import trace_on_ray
from tl_circuits.batch.one import Record, trace_one
from tl_circuits.batch.store import Store
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.errors import ArgumentError, BelongingError, OutputError
from tl_circuits.hooks import Replacement
from tl_circuits.support.checked import checked


@checked
def trace_many(
    replacement: Replacement | Callable[[], Replacement],
    prompts: str | Path | Iterable[Any],
    out: str | Path,
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    name: str | None = None,
    max_nodes: int = MAX_NODES,
    progress: bool = True,
) -> pd.DataFrame:
    """Trace many prompts and save each attribution graph as soon as it is finished.

    Calling it again goes on where it stopped: a prompt that is finished already, with the same ``name`` and
    ``max_nodes``, is not traced again. A prompt that fails is recorded as failed and does not stop the others.

    Args:
        replacement: the model with its dictionary, as :func:`tl_circuits.attach` returns it; or a function that
            returns one, which Ray's workers call once each.
        prompts: a ``.jsonl`` file with one JSON object a line; or texts, token ids or mappings. An object or
            mapping has ``prompt`` and, if wanted, ``id``, ``targets`` (tokens, token ids, or ``"A - B"`` for a
            difference of logits) and ``position``.
        out: a folder, or any address that fsspec can write to, such as ``s3://bucket/folder``.
        workers: number of Ray workers, each with its own model and dictionary. None traces in this process, or if
            ``ray_address`` is given, on one worker for each device of the cluster.
        ray_address: a running Ray cluster; None starts one on this machine if ``workers`` is given.
        name: a name for model and dictionary, by which finished results are found again. Needed if ``replacement``
            is a function.
        max_nodes: as in :func:`tl_circuits.attribute`.
        progress: show a progress bar on stderr.

    Returns:
        A frame ``id key prompt status error seconds nodes edges replacement_score completeness_score coverage file``
        with a row a prompt, in their order. It is also written as ``summary.parquet``.

    Raises:
        PromptError: the file of prompts cannot be read, or there are no prompts.
        OutputError: ``out`` cannot be written to.
        BelongingError: ``out`` holds results of the same name that were made with other weights.
        ValueError: settings that do not go together.
        ImportError: Ray is not installed, or older than 2.60.
        ArgumentError: Ray's authentication is off.
        ConnectionError: no cluster answers at ``ray_address``.

    Examples:
        >>> question = "the capital of the state containing {} is"
        >>> prompts = [{"id": city, "prompt": question.format(city)} for city in ("Dallas", "Miami")]
        >>> table = tlc.trace_many(replacement, prompts, folder / "graphs", max_nodes=20)
        >>> print(table[["id", "status", "nodes"]].to_string(index=False))
            id status  nodes
        Dallas   done     66
         Miami   done     66
        >>> tlc.load_graph(folder / "graphs" / table.file[1]).info.target_names
        ('Tallahassee',)
    """
    if hasattr(replacement, "hook_dict"):
        raise ArgumentError(
            "trace_many(replacement=...) must be a Replacement (tlc.attach(model, dictionary) makes one), got a bare "
            "model."
        )
    on_ray = workers is not None or ray_address is not None
    opened = replacement if isinstance(replacement, Replacement) else None
    if on_ray and opened is not None:
        raise ValueError(
            "Ray's workers open their own model: give a function that returns the replacement, not one already "
            "attached."
        )
    if name is not None:
        label = name
    elif opened is not None:
        label = f"{getattr(opened.model.cfg, 'model_name', '')} {opened.dictionary.name}"
    else:
        raise ValueError("give name=..., what model and dictionary are called, so that results can be known again.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    options = {"max_nodes": max_nodes, "name": label}
    store, jobs = Store(str(out)), read_jobs(prompts)
    store.require_writable()
    records: dict[str, Record] = {}
    waiting: list[Job] = []
    for job in jobs:
        if isinstance(job, BadLine):
            records[job.id] = {"id": job.id, "status": "failed", "error": job.error}
        elif (done := store.record(job.key(options))) is not None:
            records[job.id] = done | {"id": job.id}
        else:
            waiting.append(job)
    if opened is not None:
        _require_own(opened, store, records.values(), label)
    if not waiting:
        finished: Iterator[Record] = iter(())
    elif isinstance(replacement, Replacement) or not on_ray:
        finished = _trace_here(replacement, waiting, store, options)
    else:
        finished = trace_on_ray(replacement, waiting, str(out), options, workers, ray_address)
    with tqdm(total=len(jobs), initial=len(records), desc="prompts", unit="prompt", disable=not progress) as bar:
        for record in finished:
            records[record["id"]] = record
            bar.update()
    frame = pd.DataFrame([records[job.id] for job in jobs]).reindex(columns=_COLUMNS)
    try:
        store.write_table(frame)
    except OSError as error:
        raise OutputError(
            f"the graphs are written, but not {store.out}/summary.parquet: {error}. Run it again; nothing is traced "
            "twice."
        ) from error
    return frame


_COLUMNS = [
    "id", "key", "prompt", "status", "error", "seconds", "nodes", "edges", "replacement_score", "completeness_score",
    "coverage", "file",
]  # fmt: skip


def _require_own(replacement: Replacement, store: Store, records: Iterable[Record], label: str) -> None:
    """Raise BelongingError if results of the same name were made with other weights; one finished graph tells."""
    done = next((record for record in records if record.get("status") == "done"), None)
    if done is None:
        return
    try:
        require_belonging(replacement, store.graph(done).info)
    except BelongingError as error:
        raise BelongingError(
            f"{store.out} holds results called {label!r} of other weights: give another folder, or name=... ({error})"
        ) from error


def _trace_here(
    replacement: Replacement | Callable[[], Replacement], jobs: list[Job], store: Store, options: dict[str, Any]
) -> Iterator[Record]:
    # A replacement that this call opened is detached at the end; one that was passed in stays attached.
    with nullcontext(replacement) if isinstance(replacement, Replacement) else replacement() as ready:
        for job in jobs:
            yield trace_one(ready, job, store, options)
