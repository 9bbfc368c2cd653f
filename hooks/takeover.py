"""Take off the wrappers that SAELens' ``add_sae`` put on a model, and put the same ones back later."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformer_lens.hook_points import HookPoint

from .errors import AttachError
from .sites import Model, registry, walk


def carried_saes(model: Model) -> dict[str, Any]:
    """The dictionaries that SAELens attached to ``model``, by the hook that each reads."""
    wrappers = getattr(model, "_acts_to_saes", None)
    return {} if not isinstance(wrappers, dict) else {name: wrapper.sae for name, wrapper in wrappers.items()}


@contextmanager
def lifted(model: Model) -> Iterator[None]:
    """Replace SAELens' wrappers by plain HookPoints while the context is open."""
    with ExitStack() as stack:
        outputs = getattr(model, "_transcoder_output_hooks", {})
        for read, sae in carried_saes(model).items():
            alias = walk(model, sae.cfg.metadata.hook_name_out or read)
            _lift(model, outputs.get(read, _own_name(model, read)), alias, stack)
        yield


def _own_name(model: Model, name: str) -> str:
    """The hook that ``name`` stands for: SAELens puts a bridge's autoencoders where the alias points to."""
    resolve_alias = getattr(model, "_resolve_hook_name", None)
    return name if resolve_alias is None else resolve_alias(name)


def _lift(model: Model, name: str, alias: Any, stack: ExitStack) -> None:
    parent_name, attribute = name.rsplit(".", 1)
    parent = walk(model, parent_name)
    wrapper = getattr(parent, attribute, None)
    if wrapper is None:
        raise AttachError(f"SAELens attached a dictionary at {name!r}, but nothing is there. Call model.reset_saes().")
    tables = [registry(model)]
    if isinstance(model.__dict__.get("mod_dict"), dict):
        tables.append(model.mod_dict)
    # On a bridge, the alias `hook_mlp_out` still refers to the point that was there before add_sae.
    plain = alias if isinstance(alias, HookPoint) else HookPoint()
    plain.name = name
    setattr(parent, attribute, plain)
    stack.callback(setattr, parent, attribute, wrapper)
    for table in tables:
        own = {key: value for key, value in table.items() if key == name or key.startswith(f"{name}.")}
        for key in own:
            del table[key]
        table[name] = plain
        stack.callback(_restore, table, name, own)


def _restore(table: dict[str, Any], name: str, own: dict[str, Any]) -> None:
    table.pop(name, None)
    table.update(own)
