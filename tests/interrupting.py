"""Ctrl-C at every line of this package that an operation executes, and what is left on the model afterwards."""

import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tl_circuits as tlc
from tl_circuits import hooks

FOLDERS = tuple(str(Path(package.__file__).parent) for package in (tlc, hooks))
Line = tuple[str, int]


def modules_of(model: Any) -> dict[int, Any]:
    """All modules of a model; a TransformerBridge keeps the network that it wraps outside of its own."""
    network = getattr(model, "original_model", None)
    return {id(m): m for root in (model, network) if isinstance(root, torch.nn.Module) for m in root.modules()}


def whole_state(model: Any) -> dict[Any, Any]:
    """Everything that could differ: every attribute, hook, child and parameter of every module, and of this thread."""
    state: dict[Any, Any] = {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "warnings": list(map(repr, warnings.filters)),
        "signal": signal.getsignal(signal.SIGINT),
        "cfg": {key: repr(value) for key, value in vars(model.cfg).items()},
        "lock": any(lock.mine() for lock in sys.modules["tl_circuits.hooks.turn"]._LOCKS.values()),
    }
    for key, module in modules_of(model).items():
        state[key] = {name: _seen(value) for name, value in vars(module).items() if name not in _CACHES}
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                state[key, name] = (
                    id(tensor),
                    tensor._version,
                    tensor.requires_grad,
                    tensor.grad is None,
                    tensor.data_ptr(),
                )
    return state


# A bridge makes the first two anew when it is asked for its hooks; in the third SAELens keeps what its last run read.
_CACHES = ("_hook_cache", "_block_alias_cache", "_captured_input")


def _seen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value), tuple(map(id, value.values()))
    if isinstance(value, (list, tuple)):
        return tuple(map(id, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def differences(before: dict[Any, Any], after: dict[Any, Any]) -> list[str]:
    """The names of what differs."""
    found: set[str] = set()
    for key in {**before, **after}:
        first, second = before.get(key, {}), after.get(key, {})
        if isinstance(first, dict) and isinstance(second, dict):
            found |= {name for name in {**first, **second} if first.get(name, "absent") != second.get(name, "absent")}
        elif first != second:
            found.add(str(key))
    return sorted(found)


@dataclass(frozen=True)
class Trial:
    """One interrupt: where it came, what it left on the model, and whether ``tlc.detach(model)`` mended that.

    ``whole``: what it left is the whole dictionary, attached and working, because detaching had not begun.
    """

    line: Line
    left: tuple[str, ...]
    whole: bool = False
    mended: bool = True


@dataclass(frozen=True)
class Operation:
    """What is interrupted: ``run``, called with the model or, if there is a ``dictionary``, with it attached to the
    model."""

    name: str
    model: Any
    run: Callable[[Any], Any]
    dictionary: Any = None

    def begin(self) -> Any:
        """Attach the dictionary, if there is one; returns what ``run`` gets."""
        return self.model if self.dictionary is None else tlc.attach(self.model, self.dictionary)

    def logits(self) -> torch.Tensor:
        """The model's logits on some tokens."""
        with torch.no_grad():
            return self.model(torch.arange(1, 10)[None])

    def lines(self) -> list[Line]:
        """The lines of this package that it executes, in order, once everything that is remembered is remembered."""
        found: list[Line] = []
        subject = self.begin()
        self.run(subject)
        with _traced(found.append):
            self.run(subject)
        tlc.detach(self.model)
        return found


def chosen(lines: list[Line], per_line: int, share: float = 1.0, seed: int = 0) -> list[int]:
    """Which executed lines to interrupt: of a share of the lines the first and last time, and others at random."""
    times: dict[Line, list[int]] = {}
    for number, line in enumerate(lines):
        times.setdefault(line, []).append(number)
    rng = random.Random(seed)
    picked: set[int] = set()
    for at in times.values():
        if rng.random() < share:
            picked.update([at[0], at[-1]][:per_line])
            picked.update(rng.sample(at, min(len(at), max(0, per_line - 2))))
    return sorted(picked)


@contextmanager
def _traced(at_line: Callable[[Line], None]) -> Iterator[None]:
    ours: dict[Any, bool] = {}

    def local(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in ours:
            ours[code] = code.co_filename.startswith(FOLDERS)
        return local if ours[code] else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupt(run: Callable[[], Any], number: int, by_signal: bool) -> Line | None:
    """Interrupt ``run`` at its line ``number``; returns that line, or None if ``run`` ended before or went on.

    ``by_signal`` sends SIGINT, as Ctrl-C does, which our code may let wait; else KeyboardInterrupt is raised there and
    then, which nothing can put off.
    """
    count, where = 0, []

    def at_line(line: Line) -> None:
        nonlocal count
        count += 1
        if count == number + 1:
            where.append(line)
            if not by_signal:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    try:
        with _traced(at_line):
            run()
    except KeyboardInterrupt:
        return where[0]
    return None


def try_all(operation: Operation, numbers: list[int], by_signal: bool) -> list[Trial]:
    """Interrupt an operation at each of these lines, and compare the model with what it was before."""
    expected, bare = operation.logits(), whole_state(operation.model)
    subject = operation.begin()
    before = whole_state(operation.model)
    trials = []
    for number in numbers:
        line = interrupt(partial(operation.run, subject), number, by_signal)
        if line is None:
            continue
        left = differences(before, whole_state(operation.model))
        if not torch.equal(operation.logits(), expected):
            left.append("logits")
        if not left:
            trials.append(Trial(line, ()))
            continue
        taken_over = bool(getattr(operation.model, "_acts_to_saes", None))  # SAELens' own attachment gives other logits
        whole = (
            operation.dictionary is None and _wholly_attached(operation.model) and (taken_over or "logits" not in left)
        )
        tlc.detach(operation.model)
        wrong = differences(bare, whole_state(operation.model))
        trials.append(Trial(line, tuple(left), whole, not wrong and torch.equal(operation.logits(), expected)))
        subject = operation.begin()
        before = whole_state(operation.model)
    tlc.detach(operation.model)
    return trials


def _wholly_attached(model: Any) -> bool:
    """Whether an ordinary attached dictionary is all that there is, so that features can be read and nothing else
    differs."""
    own = [
        hook for m in modules_of(model).values() for hook in m._forward_hooks.values() if getattr(hook, "owner", None)
    ]
    points = sum(name.endswith("hook_sae_acts_post") for name in model.hook_dict)
    return points == int(model.cfg.n_layers) and all(hook.lasting for hook in own)
