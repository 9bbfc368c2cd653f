"""Hooks and HookPoints that are ours, each with the owner's mark, so that all are found from the model alone.

A mark is set before what it marks is put on the model. So whatever ends a change half-way, :func:`take_off` finds all
that there is: it looks at every module, and also finds a hook that TransformerLens had registered but not yet listed.

Hooks are of two kinds: *lasting* ones stay from attaching to detaching; the others are there for one run of the model,
by the thread that put them there.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import BusyError
from .sites import Model, registry

OWNER = "tl_circuits"
"""The attribute ``owner`` of our hooks and of our HookPoints. A text, so that a reloaded package finds them."""

_ASIDE = "tl_circuits_hooks_aside"  # where a point keeps its hooks while they are set aside

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class OwnHook:
    """A hook of ours: calls ``function``, and refuses calls from another thread unless it is lasting."""

    owner = OWNER

    def __init__(self, function: Callable[..., Any], lasting: bool = False):
        self.lasting = lasting
        self._function = function
        self._thread = get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.lasting and get_ident() != self._thread:
            raise BusyError(
                "the model was run while another thread traces or edits it, so this run would compute with that "
                "thread's changes. Run the model inside `with tl_circuits.hooks.turn(model):`, which waits for the "
                "other thread, or give each thread a model of its own."
            )
        return self._function(*args, **kwargs)


def is_ours(point: Any) -> bool:
    """Whether a HookPoint was made by this package."""
    return getattr(point, "owner", None) == OWNER


def register_point(model: Model, name: str, owner: torch.nn.Module, attribute: str) -> HookPoint:
    """Add a HookPoint as ``owner.attribute``, known to the model as ``name``, until :func:`take_off`."""
    point = HookPoint()
    point.name = name
    point.owner = OWNER  # type: ignore[assignment]  # a Module's attributes are typed as modules and tensors
    owner.add_module(attribute, point)
    for table in point_tables(model):
        table[name] = point
    return point


def point_tables(model: Model) -> list[dict[str, Any]]:
    """The model's own tables of hook points by name."""
    tables = [registry(model)]
    if isinstance(model.__dict__.get("mod_dict"), dict):
        tables.append(model.mod_dict)  # HookedTransformer.add_hook looks names up here
    return tables


def put_hook(point: HookPoint, function: Callable[..., Any]) -> Callable[[], None]:
    """Add a TransformerLens hook to a point; returns a function that removes exactly this hook.

    PyTorch's ``register_forward_hook`` would not do: some points (Granite's) fire only if TransformerLens knows of a
    hook on them.
    """
    before = list(point.fwd_hooks)
    point.add_hook(OwnHook(function))
    added = next(handle for handle in point.fwd_hooks if handle not in before)

    def undo() -> None:
        added.hook.remove()
        if added in point.fwd_hooks:
            point.fwd_hooks.remove(added)

    return undo


def put_lasting_hook(point: HookPoint, function: Callable[..., Any], first: bool = False) -> None:
    """Add a hook that even ``reset_hooks(including_permanent=True)`` does not remove; only :func:`take_off` does.

    It is a PyTorch hook. An empty TransformerLens hook is added beside it, because some points fire only for those.
    """

    def call(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        conversion = point.hook_conversion  # as TransformerLens shows the tensor to its own hooks
        seen = output if conversion is None else conversion.convert(output)
        result = function(seen, point)
        return result if result is None or conversion is None else conversion.revert(result)

    point.register_forward_hook(OwnHook(call, lasting=True), prepend=first)
    point.add_hook(OwnHook(_only_listens, lasting=True), is_permanent=True)


def put_module_hook(
    module: torch.nn.Module,
    function: Callable[..., Any],
    *,
    before: bool = False,
    with_kwargs: bool = False,
    lasting: bool = False,
) -> Callable[[], None]:
    """Add a PyTorch hook to any module, after its forward pass or ``before`` it; returns a function that removes it."""
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    return register(OwnHook(function, lasting), with_kwargs=with_kwargs).remove


def _only_listens(tensor: Tensor, hook: HookPoint) -> None:
    """A hook that changes nothing (see :func:`put_lasting_hook`)."""


def has_others_hooks(point: HookPoint) -> bool:
    """Whether a point carries hooks that may change what it passes on: all but the lasting ones of this package."""
    return any(not getattr(getattr(handle, "user_hook", None), "lasting", False) for handle in point.fwd_hooks)


def others_hooks(model: Model) -> dict[str, tuple[int, ...]]:
    """The points that carry hooks of others, by name, with PyTorch's number of each, which no later hook gets again."""
    found = {}
    for name, point in registry(model).items():
        numbers = [h.hook.id for h in point.fwd_hooks if getattr(h.user_hook, "owner", None) != OWNER]
        if numbers:
            found[name] = tuple(numbers)
    return found


@contextmanager
def hooks_set_aside(module: torch.nn.Module) -> Iterator[None]:
    """Let no hook act on the points within a module, whoever put it there, until the block ends.

    A point keeps its hooks beside the empty table, so :func:`take_off` gives them back from the point alone.
    """
    points = [point for point in module.modules() if isinstance(point, HookPoint)]
    try:
        for point in points:
            setattr(point, _ASIDE, point._forward_hooks)
            point._forward_hooks = OrderedDict()
        yield
    finally:
        for point in points:
            _give_hooks_back(point)


def _give_hooks_back(point: torch.nn.Module) -> None:
    kept = point.__dict__.get(_ASIDE)
    if kept is not None:
        point._forward_hooks = kept
        del point.__dict__[_ASIDE]


def take_off(model: Model, lasting: bool) -> None:
    """Remove from a model our hooks for single runs and, if ``lasting``, the lasting ones and our HookPoints as well.

    Hooks that were set aside are given back.
    Doing it again does nothing, and it may begin from any state that an exception left behind.
    """
    for module in list(_modules(model)):
        _give_hooks_back(module)
        _take_off_hooks(module, lasting)
        if lasting:
            _take_off_points(module._modules)
    if lasting:
        for table in point_tables(model):
            _take_off_points(table)


def _modules(model: Model) -> Iterator[torch.nn.Module]:
    """All modules, each once. A TransformerBridge keeps the network that it wraps outside of its own modules."""
    network = getattr(model, "original_model", None)
    seen: set[int] = set()
    for module in chain(model.modules(), network.modules() if isinstance(network, torch.nn.Module) else ()):
        if id(module) not in seen:
            seen.add(id(module))
            yield module


def _take_off_hooks(module: torch.nn.Module, lasting: bool) -> None:
    found = {
        key
        for table in _HOOK_TABLES[:2]
        for key, function in list(getattr(module, table).items())
        if (own := _own(function)) is not None and (lasting or not own.lasting)
    }
    handles = getattr(module, "fwd_hooks", None)
    if isinstance(handles, list) and handles:
        left = [handle for handle in handles if handle.hook.id not in found and not _is_left(handle, module, lasting)]
        if len(left) < len(handles):
            handles[:] = left
    for table in _HOOK_TABLES:
        for key in found:
            getattr(module, table).pop(key, None)


def _is_left(handle: Any, module: torch.nn.Module, lasting: bool) -> bool:
    """Whether TransformerLens still lists a hook of ours whose PyTorch hook is gone."""
    own = _own(getattr(handle, "user_hook", None))
    return own is not None and (lasting or not own.lasting) and handle.hook.id not in module._forward_hooks


def _own(function: Any) -> Any:
    """``function`` if it is a hook of ours, or the hook of ours that TransformerLens wrapped into it; else None."""
    if getattr(function, "owner", None) == OWNER:
        return function
    for cell in getattr(function, "__closure__", None) or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue
        if getattr(inside, "owner", None) == OWNER and isinstance(getattr(inside, "lasting", None), bool):
            return inside
    return None


def _take_off_points(table: dict[str, Any]) -> None:
    """Delete our points from a table. Names are not asked: ``enable_compatibility_mode`` may have given others."""
    for name in [name for name, point in table.items() if isinstance(point, HookPoint) and is_ours(point)]:
        del table[name]
