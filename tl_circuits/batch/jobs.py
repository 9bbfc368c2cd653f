"""Read the prompts of a batch, from Python objects or from a file of JSON lines."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuits.errors import ArgumentError, PromptError
from tl_circuits.hooks import is_whole, whole, wholes

_FIELDS = ("id", "prompt", "targets", "position")


@dataclass(frozen=True)
class Job:
    """One prompt to trace, with a name (``id``); ``targets`` and ``position`` as in :func:`tl_circuits.attribute`."""

    id: str
    prompt: str | tuple[int, ...]
    targets: tuple[str | int, ...] | None = None
    position: int = -1

    def key(self, options: dict[str, Any]) -> str:
        """A hash of everything that the result depends on; under it the result is stored and found again."""
        content = json.dumps([self.prompt, self.targets, self.position, options], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BadLine:
    """A prompt that could not be read, and why."""

    id: str
    error: str


def read_jobs(prompts: str | Path | Iterable[Any]) -> list[Job | BadLine]:
    """The prompts of a batch, in order.

    Args:
        prompts: a ``.jsonl`` file; or texts, token ids, graphs, or mappings with ``prompt`` and, if wanted, ``id``,
            ``targets`` and ``position``.

    Returns:
        A :class:`Job` for each prompt, or a :class:`BadLine` where it cannot be read.

    Raises:
        PromptError: the file cannot be read, or there are no prompts.
    """
    if isinstance(prompts, (str, Path)):
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"cannot read prompts from {prompts}: {error}. Give a file with one JSON object a line.") from error
        given = [(f"line {n}", _parsed(line)) for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        given = [(f"prompt {n}", item) for n, item in enumerate(prompts, start=1)]
    if not given:
        raise PromptError("there are no prompts to trace.")
    jobs: list[Job | BadLine] = []
    taken: dict[str, str] = {}
    for where, item in given:
        try:
            job = item if isinstance(item, Job) else _job(where, item)
            if job.id in taken:
                raise ValueError(f"the id {job.id!r} is already that of {taken[job.id]}")
        except ValueError as error:
            jobs.append(BadLine(where, f"{where}: {error}"))
            continue
        taken[job.id] = where
        jobs.append(job)
    return jobs


def _ids(prompt: Any) -> tuple[int, ...]:
    try:
        return wholes(prompt, "token ids")
    except ArgumentError as error:
        raise ValueError(f"'prompt' must be text or token ids, got {prompt!r} (no token ids: {error})") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return error


def _job(where: str, item: Any) -> Job:
    if isinstance(item, json.JSONDecodeError):
        raise ValueError(f"not JSON ({item})")
    fields = item if isinstance(item, dict) else {"prompt": item}
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    prompt: Any = fields.get("prompt")
    if hasattr(prompt, "prompt_tokens"):
        prompt = tuple(prompt.prompt_tokens())
    elif not isinstance(prompt, str):
        prompt = _ids(prompt)
    if not prompt:
        raise ValueError("'prompt' must be text or token ids, and is empty")
    targets, position = fields.get("targets"), fields.get("position", -1)
    if targets is not None:
        given = [targets] if isinstance(targets, str) or is_whole(targets) else _each(targets)
        if given is None or not all(isinstance(t, str) or is_whole(t) for t in given):
            raise ValueError(f"'targets' must be tokens or token ids, got {targets!r}")
        targets = tuple(t if isinstance(t, str) else whole(t) for t in given)
    if not is_whole(position):
        raise ValueError(f"'position' must be a whole number, got {position!r}")
    return Job(str(fields.get("id", where)), prompt, targets, whole(position))


def _each(values: Any) -> list[Any] | None:
    """The entries of a list, an array, a column or a tensor; None for anything else."""
    if not isinstance(values, (list, tuple)) and not (hasattr(values, "tolist") and getattr(values, "ndim", 0) == 1):
        return None
    return list(values)
