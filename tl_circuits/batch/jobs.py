"""Read the prompts of a batch, from Python objects or from a file of JSON lines."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuits.errors import ArgumentError, PromptError
from tl_circuits.hooks import is_whole, whole, wholes
from tl_circuits.support.reading import quoted

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
            # Lines end with a line feed alone: JSON may hold the other ends of lines that Python knows, such as U+2028.
            lines = Path(prompts).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            raise PromptError(
                f"cannot read prompts from {prompts}: {error}. Give a file with one JSON object a line."
            ) from error
        given = [(f"line {n}", _parsed(line)) for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        given = [(f"prompt {n}", item) for n, item in enumerate(prompts, start=1)]
    if not given:
        raise PromptError("there are no prompts to trace.")
    jobs: list[Job | BadLine] = []
    reserved = {_own_id(item) for _, item in given}
    taken: dict[str, str] = {}
    for where, item in given:
        name = _free(where, reserved)
        try:
            job = item if isinstance(item, Job) else _job(name, item)
            _require_text(job)
            if job.id in taken:
                raise ValueError(f"the id {quoted(job.id)!r} is already that of {taken[job.id]}")
        except ValueError as error:
            jobs.append(BadLine(name, f"{where}: {error}"))
            continue
        taken[job.id] = where
        jobs.append(job)
    return jobs


def _own_id(item: Any) -> str | None:
    """The id that an entry gives itself."""
    given = item.id if isinstance(item, Job) else item.get("id") if isinstance(item, dict) else None
    return given if isinstance(given, str) else None if given is None else quoted(given)


def _free(where: str, taken: set[str | None]) -> str:
    """A name for an entry without an id: where it stands, with a number behind it if another entry is called so."""
    names = (where, *(f"{where} ({n})" for n in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def _require_text(job: Job) -> None:
    """Raise ValueError where a text holds half of a surrogate pair, which no file can be written with."""
    texts = [job.id, job.prompt, *(job.targets or ())]
    for name, text in zip(("'id'", "'prompt'", *["'targets'"] * len(texts)), texts, strict=False):
        if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{name} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text: {ascii(text)[:80]}"
            )


def _ids(prompt: Any) -> tuple[int, ...]:
    try:
        return wholes(prompt, "token ids")
    except ArgumentError as error:
        raise ValueError(f"'prompt' must be text or token ids, got {quoted(prompt)} (no token ids: {error})") from error


@dataclass(frozen=True)
class _NotJson:
    """A line that is not JSON, and why."""

    error: str


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        return _NotJson("nested too deeply")
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        return _NotJson(quoted(str(error)))


def _job(where: str, item: Any) -> Job:
    if isinstance(item, _NotJson):
        raise ValueError(f"not JSON ({item.error})")
    fields = item if isinstance(item, dict) else {"prompt": item}
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise ValueError(f"unknown field {quoted(unknown[0])!r}; known are {', '.join(_FIELDS)}")
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
            raise ValueError(f"'targets' must be tokens or token ids, got {quoted(targets)}")
        targets = tuple(t if isinstance(t, str) else whole(t) for t in given)
    if not is_whole(position):
        raise ValueError(f"'position' must be a whole number, got {quoted(position)}")
    name = fields.get("id", where)
    if not isinstance(name, str) and not is_whole(name):
        raise ValueError(f"'id' must be text or a whole number, got {quoted(name)}")
    return Job(str(name), prompt, targets, whole(position))


def _each(values: Any) -> list[Any] | None:
    """The entries of a list, an array, a column or a tensor; None for anything else."""
    if not isinstance(values, (list, tuple)) and not (hasattr(values, "tolist") and getattr(values, "ndim", 0) == 1):
        return None
    return list(values)
