"""Trace one prompt of a batch, in this process or on a worker."""

import time
from typing import Any

from tl_circuits.attribution import attribute
from tl_circuits.attribution.targets import parse_target
from tl_circuits.batch.jobs import Job
from tl_circuits.batch.store import Store, graph_file
from tl_circuits.hooks import Replacement

Record = dict[str, Any]


def trace_one(replacement: Replacement, job: Job, store: Store, options: dict[str, Any]) -> Record:
    """Trace one prompt and write its graph. If it fails, the record that is returned says why; nothing is raised."""
    key, began = job.key(options), time.perf_counter()
    record: Record = {
        "id": job.id,
        "key": key,
        "prompt": job.prompt if isinstance(job.prompt, str) else str(job.prompt),
    }
    try:
        prompt = job.prompt if isinstance(job.prompt, str) else list(job.prompt)
        targets = None if job.targets is None else [parse_target(t) if isinstance(t, str) else t for t in job.targets]
        graph = attribute(
            replacement, prompt, targets, position=job.position, max_nodes=options["max_nodes"], progress=False
        )
        scores = graph.scores()
        record |= {
            "status": "done",
            "error": None,
            "seconds": time.perf_counter() - began,
            "nodes": len(graph),
            "edges": len(graph.edges),
            "replacement_score": scores.replacement,
            "completeness_score": scores.completeness,
            "coverage": graph.coverage,
            "file": graph_file(key),
        }
        store.write(key, record, graph)
    except Exception as error:  # whatever one prompt's failure is, the others go on
        record = {n: record[n] for n in ("id", "key", "prompt")} | {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
        }
    return record
