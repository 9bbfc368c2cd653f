"""Hold attention patterns and norm denominators at given values, in a way that works on the model at hand.

It is not enough that a hook returns the held value: some bridges show a pattern after Hugging Face has used it (GPT-J),
some norms apply a gain of their own when they are edited (Nemotron), some show no denominator at all (Gemma 4). So each
is held in one of two ways:

* through its own point: the hook returns the held value;
* replayed: the output is computed again from the input and the held value. For a pattern, heads are mixed from
  ``attn.v.hook_out`` into ``attn.o.hook_in``; for a norm, ``hook_out`` is computed from ``hook_in``.

:func:`tl_circuits.hooks.proof.prove` finds out by experiment which way works.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import EditError
from .norms import is_mlp_norm, require_norm_weights
from .sites import Model, find

HookList = list[tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]]


@dataclass(frozen=True)
class Holds:
    """How each pattern and denominator of a model is held; through its own point, if nothing else is said here.

    ``norms``: all norms that are held, in the order in which they run. ``replayed_norms``: those that are replayed.
    ``replayed_patterns``: layers whose patterns are replayed. ``loose_norms``: norms inside MLPs that cannot be held;
    that matters only in runs which compute MLPs, as a graph replaces their outputs.
    """

    norms: tuple[str, ...]
    replayed_norms: frozenset[str] = field(default_factory=frozenset)
    replayed_patterns: frozenset[int] = field(default_factory=frozenset)
    loose_norms: tuple[str, ...] = ()


def pattern_point(layer: int) -> str:
    """The hook of a layer's attention pattern."""
    return f"blocks.{layer}.attn.hook_pattern"


def scale_point(norm: str) -> str:
    """The hook of a norm's denominator. Held values have this name even if the norm has no such hook."""
    return f"{norm}.hook_scale"


def hold_hooks(
    model: Model,
    holds: Holds,
    values: Mapping[str, Tensor],
    pattern_edits: Mapping[int, Sequence[Callable[[Tensor, Any], Tensor]]] | None = None,
) -> HookList:
    """Hooks that hold all attention patterns and norm denominators fixed, whatever the model is run on.

    Args:
        model: the model.
        holds: how each can be held on this model, from ``replacement.holds(tokens)``.
        values: what they are held at, by hook name and with a batch of one in front, such as ``Recording.held``.
        pattern_edits: for each layer, functions that change its held pattern, applied in order.

    Returns:
        Pairs of a hook's name and a function, for ``run_with_hooks`` or ``model.hooks``.

    Raises:
        EditError: a norm inside an MLP cannot be held on this model.

    Examples:
        >>> tokens = tlc.hooks.to_tokens(model, prompt)
        >>> recording = tlc.hooks.record(model, tokens, position=-1)
        >>> held = tlc.hooks.hold_hooks(model, replacement.holds(tokens), recording.held)
        >>> with model.hooks(fwd_hooks=held):  # another city, with the attention of the first one
        ...     _, cache = model.run_with_cache("the capital of the state containing Oakland is")
        >>> bool((cache["blocks.1.attn.hook_pattern"][0] == recording.patterns[1].dense()).all())
        True
    """
    hooks: HookList = []
    n_pos = values[pattern_point(0)].shape[-1]
    for name in holds.norms:
        value = values[scale_point(name)]
        if is_mlp_norm(name) and value.shape[1] != n_pos:
            raise EditError(why_loose(name))
        if name in holds.replayed_norms:
            hooks += _replayed_norm(model, name, value)
        else:
            hooks.append((scale_point(name), _hold(value)))
    for layer in range(int(model.cfg.n_layers)):
        value, edits = values[pattern_point(layer)], (pattern_edits or {}).get(layer, ())
        if layer in holds.replayed_patterns:
            hooks += _replayed_pattern(model, layer, value, edits)
        else:
            hooks.append((pattern_point(layer), _hold(value)))
            hooks += [(pattern_point(layer), edit) for edit in edits]
    return hooks


def _hold(value: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    def hold(tensor: Tensor, hook: HookPoint) -> Tensor:
        # Some models flatten batch and positions into one axis (OPT), some need contiguous memory (Falcon with ALiBi).
        here = value.to(tensor.device, tensor.dtype)
        return here.expand(tensor.numel() // here.numel(), *here.shape[1:]).reshape(tensor.shape).contiguous()

    return hold


def _replayed_norm(model: Model, name: str, scale: Tensor) -> HookList:
    """Hooks that compute a norm's output again from its input, with the held denominator ``scale``."""
    inputs: list[Tensor] = []

    def keep(x: Tensor, hook: HookPoint) -> None:
        inputs[:] = [x]

    def write(y: Tensor, hook: HookPoint) -> Tensor:
        return held_output(model, name, inputs.pop(), scale).to(y.dtype)

    return [(f"{name}.hook_in", keep), (f"{name}.hook_out", write)]


def why_loose(name: str) -> str:
    """The message for a norm inside an MLP that does not run once for every position, and so cannot be held."""
    return (
        f"{name} runs inside an MLP on what experts are given, not once for every position, so freeze='attention' "
        "cannot hold its denominators; use freeze='all', which holds the MLP's output, or freeze='none'."
    )


def held_output(model: Model, name: str, x: Tensor, scale: Tensor) -> Tensor:
    """A norm's output on ``x`` with the held denominator ``scale``, which has a batch of one.

    ``x`` may have a larger batch, whose rows may be flattened into one axis with the positions.
    """
    if is_mlp_norm(name) and x.numel() % (scale.numel() * x.shape[-1]):
        raise EditError(why_loose(name))
    runs = x.reshape(-1, *scale.shape[1:-1], x.shape[-1])
    return require_norm_weights(model, name, x.shape[-1]).output(runs, scale.to(x.device)).reshape(x.shape)


def _replayed_pattern(
    model: Model, layer: int, pattern: Tensor, edits: Sequence[Callable[[Tensor, Any], Tensor]]
) -> HookList:
    """Hooks that mix a layer's values again, by the held pattern and its edits, and replace the module's own mixing."""
    values: list[Tensor] = []

    def keep(v: Tensor, hook: HookPoint) -> None:
        values[:] = [v]

    def write(z: Tensor, hook: HookPoint) -> Tensor:
        v = values.pop()
        batch, pos = v.shape[0], v.shape[1]
        held = pattern.to(v.device, v.dtype).expand(batch, -1, -1, -1)
        for edit in edits:
            held = edit(held, hook)
        n_heads = held.shape[1]
        d_head = z.numel() // (batch * pos * n_heads)
        heads = v.reshape(batch, pos, -1, d_head).transpose(1, 2)
        mixed = held @ heads.repeat_interleave(n_heads // heads.shape[1], 1)
        return mixed.transpose(1, 2).reshape(z.shape)

    normed = f"blocks.{layer}.attn.v_norm.hook_out"  # Gemma 4 norms its values
    read = normed if find(model, normed) is not None else f"blocks.{layer}.attn.v.hook_out"
    return [(read, keep), (f"blocks.{layer}.attn.o.hook_in", write)]


def can_replay_pattern(model: Model, layer: int) -> bool:
    """Whether a layer has the hooks for replaying its pattern: values before mixing, and heads after."""
    return all(find(model, f"blocks.{layer}.attn.{point}") is not None for point in ("v.hook_out", "o.hook_in"))


def can_replay_norm(model: Model, name: str) -> bool:
    """Whether a norm has the hooks for replaying it: input and output."""
    return all(find(model, f"{name}.{point}") is not None for point in ("hook_in", "hook_out"))
