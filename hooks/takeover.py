"""Take off the wrappers that SAELens' ``add_sae`` put on a model, and put the same ones back later."""

from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from .errors import AttachError
from .owned import point_tables
from .sites import Model, walk

_LIFTED = "_tl_circuits_lifted"
"""The attribute of the model that lists what was taken off, while there is anything."""


def carried_saes(model: Model) -> dict[str, Any]:
    """The dictionaries that SAELens attached to ``model``, by the hook that each reads."""
    wrappers = getattr(model, "_acts_to_saes", None)
    return {} if not isinstance(wrappers, dict) else {name: wrapper.sae for name, wrapper in wrappers.items()}


@dataclass(frozen=True, eq=False)
class _Lifted:
    """What is needed to put one wrapper back: where it was, its entries in the model's tables, and its stand-in.

    ``entries``: each table, the wrapper's own entries in it, and the order of all its names.
    """

    parent: torch.nn.Module
    attribute: str
    wrapper: Any
    name: str
    entries: tuple[tuple[dict[str, Any], dict[str, Any], list[str]], ...]
    plain: HookPoint
    plain_name: str | None

    def take_off(self) -> None:
        setattr(self.parent, self.attribute, self.plain)
        self.plain.name = self.name
        for table, own, _ in self.entries:
            for key in own:
                del table[key]
            table[self.name] = self.plain

    def put_back(self) -> None:
        setattr(self.parent, self.attribute, self.wrapper)
        self.plain.name = self.plain_name
        for table, own, order in self.entries:
            table.pop(self.name, None)
            table.update(own)
            for key in [*(key for key in order if key in table), *(table.keys() - set(order))]:
                table[key] = table.pop(key)


def lift(model: Model) -> None:
    """Replace SAELens' wrappers by plain HookPoints, until :func:`give_back`.

    Raises:
        AttachError: SAELens lists a wrapper that is not on the model.
    """
    outputs = getattr(model, "_transcoder_output_hooks", {})
    for read, sae in carried_saes(model).items():
        alias = walk(model, sae.cfg.metadata.hook_name_out or read)
        lifted = _lifted(model, outputs.get(read, _own_name(model, read)), alias)
        model.__dict__.setdefault(_LIFTED, []).append(lifted)  # written down before it is done
        lifted.take_off()


def give_back(model: Model) -> None:
    """Put back what :func:`lift` took off, from any state that an exception left behind."""
    lifted = model.__dict__.get(_LIFTED, [])
    while lifted:
        lifted[-1].put_back()
        lifted.pop()
    model.__dict__.pop(_LIFTED, None)


def _own_name(model: Model, name: str) -> str:
    """The hook that ``name`` stands for: SAELens puts a bridge's autoencoders where the alias points to."""
    resolve_alias = getattr(model, "_resolve_hook_name", None)
    return name if resolve_alias is None else resolve_alias(name)


def _lifted(model: Model, name: str, alias: Any) -> _Lifted:
    parent_name, attribute = name.rsplit(".", 1)
    parent = walk(model, parent_name)
    wrapper = getattr(parent, attribute, None)
    if wrapper is None:
        raise AttachError(f"SAELens attached a dictionary at {name!r}, but nothing is there. Call model.reset_saes().")
    entries = tuple(
        (table, {key: value for key, value in table.items() if key == name or key.startswith(f"{name}.")}, list(table))
        for table in point_tables(model)
    )
    # On a bridge, the alias `hook_mlp_out` still refers to the point that was there before add_sae.
    plain = alias if isinstance(alias, HookPoint) else HookPoint()
    return _Lifted(parent, attribute, wrapper, name, entries, plain, plain.name)
