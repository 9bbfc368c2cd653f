"""One thread at a time: whoever edits a model, or runs it with hooks, has its turn on it.

Hooks are part of the model, so two threads that put hooks on one model would run each other's. Everything of this
package that runs a model therefore takes its turn first, and waits for the thread that has it. The same thread may take
it again inside. When the outermost turn ends with an exception, every hook that was put on for a single run is gone,
also if the exception (Ctrl-C) came in the middle of putting hooks on or off.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from .interrupts import interrupts_wait
from .owned import put_hook, take_off
from .sites import Model, resolve

_F = TypeVar("_F", bound=Callable[..., Any])


class _Lock:
    """A lock that knows whether the calling thread has it. Giving it back twice does no harm."""

    def __init__(self) -> None:
        self._lock = RLock()

    def mine(self) -> bool:
        """Whether this thread holds the lock."""
        return self._lock._is_owned()  # type: ignore[attr-defined]  # private, but threading.Condition uses it

    def take(self) -> None:
        self._lock.acquire()

    def give_back(self) -> None:
        if self.mine():
            self._lock.release()


_LOCKS: "WeakKeyDictionary[Any, _Lock]" = WeakKeyDictionary()
"""The lock of each model that lives; not on the model, as locks cannot be copied or pickled with it."""


@contextmanager
def turn(model: Model) -> Iterator[None]:
    """Have the model to oneself: wait until no other thread traces or edits it, and keep others waiting.

    All functions of this package that run a model do this themselves. Use it around passes and hooks of your own when
    several threads share a model.

    Args:
        model: the model.

    Examples:
        >>> with tlc.hooks.turn(model):
        ...     logits = model(prompt)
        >>> logits.shape
        torch.Size([1, 9, 670])
    """
    lock = _LOCKS.setdefault(model, _Lock())
    if lock.mine():
        yield
        return
    gradients = torch.is_grad_enabled()
    try:
        try:
            lock.take()
            yield
        except BaseException:  # Ctrl-C included: no hook is left behind
            if lock.mine():  # not so if Ctrl-C ended the waiting
                with interrupts_wait():
                    take_off(model, lasting=False)
                    torch.set_grad_enabled(gradients)
            raise
        finally:
            lock.give_back()
    finally:  # once more: an exception may be raised between any two lines above
        lock.give_back()


def in_turn(function: _F) -> _F:
    """Make a function take its turn on its first argument: a model, or a Replacement, whose model it is then."""
    first = next(iter(inspect.signature(function).parameters))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get(first)
        model = getattr(given, "model", given)
        if not isinstance(model, torch.nn.Module):
            return function(*args, **kwargs)  # which says what is wrong
        with turn(model):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]  # the same signature, which mypy cannot see


@contextmanager
def added_hooks(model: Model, hooks: list[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Put TransformerLens hooks on a model while the context is open, and then remove exactly these."""
    with turn(model), ExitStack() as stack:
        for name, function in hooks:
            stack.callback(put_hook(resolve(model, name), function))
        yield
