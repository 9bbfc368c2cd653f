"""Two warnings of the bridge that say nothing here: denominators are edited, or followed backwards, on purpose."""

import re
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

_FILTER = ("ignore", re.compile("A forward hook edited hook_scale|Backward hooks on hook_scale"), UserWarning, None, 0)
# Python has one list of filters for all threads. `warnings.catch_warnings` puts another list in its place and the first
# one back, so of two threads that leave in the other order than they came, one leaves its filters behind for good. Here
# the one filter stays as long as any pass needs it.
_LOCK = threading.RLock()  # an exception may come just before it is let go; its own thread must not wait for it then
_PASSES: set[object] = set()


class _Pass:
    """One pass; it lives as long as the call that it belongs to."""


@contextmanager
def edits_expected() -> Iterator[None]:
    """Silence the bridge's warnings about edited denominators; all other warnings are shown as ever."""
    lives, mine = _Pass(), object()
    # An exception may come between any two lines, also before the one that ends this. Then it ends with the call
    # itself.
    last = weakref.finalize(lives, _end, mine)
    try:
        _begin(mine)
        yield
    finally:
        _end(mine)
        last.detach()


def _begin(mine: object) -> None:
    with _LOCK:
        _PASSES.add(mine)
        if not any(item is _FILTER for item in warnings.filters):
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]  # typeshed calls the list a Sequence


def _end(mine: object) -> None:
    with _LOCK:
        _PASSES.discard(mine)
        if not _PASSES:
            warnings.filters[:] = [item for item in warnings.filters if item is not _FILTER]  # type: ignore[index]  # as above
