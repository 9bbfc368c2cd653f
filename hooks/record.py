"""Record one forward pass of the model: everything that attribution needs to know about a prompt."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .collect import stopping_at
from .errors import ArchitectureError, HookFiringError, NotFiniteError
from .norms import is_inner_norm, is_norm, norm_names, norm_weights, require_norm_weights
from .owned import put_hook
from .patterns import Pattern
from .repeatable import require_repeatable
from .sites import (
    Model,
    find,
    is_parallel,
    layer_device,
    model_device,
    resolve,
    scores_scale,
    scores_softcap,
    unembed_weights,
    with_its_layer,
)
from .tolerances import rounding_within
from .turn import in_turn, turn

LONG = 1024  # on prompts with more positions, patterns are not kept but computed again from queries and keys


@dataclass(frozen=True)
class Recording:
    """What one forward pass showed; :func:`record` makes one.

    Tensors are in the model's own dtype (``final`` is float32), without the batch dimension, and those of a layer are
    on its device.

    Attributes:
        tokens: the prompt's token ids ``[pos]``.
        patterns: by layer, attention after softmax; ``patterns[L].dense()`` is ``[n_heads, query, key]``.
        scales: by name of the norm, such as ``blocks.3.ln1``, its denominators ``[pos, 1]``, for norms on the residual
            stream.
        resid_pre: by layer, the block's input ``[pos, d_model]``.
        attn_out: by layer, what attention adds to the stream ``[pos, d_model]``.
        mlp_out: by layer, what the MLP adds to the stream ``[pos, d_model]``.
        resid_final: the stream that the final norm reads ``[pos, d_model]``. If only the layers below one were
            recorded, that layer's input.
        sites: by hook name, the tensors of further hooks ``[pos, d]``; several axes behind ``pos`` are laid flat.
        position: where ``logits`` and ``final`` were kept.
        logits: the model's logits at ``position``, ``[d_vocab]``. None if only the layers below one were recorded.
        final: the final norm's output at ``position``, from which the logits are made, ``[d_model]``; None as
            ``logits``.
        inner_scales: as ``scales``, for norms inside attention and MLPs, with a batch of one in front.

    Examples:
        >>> recording = tlc.hooks.record(model, tlc.hooks.to_tokens(model, prompt), position=-1)
        >>> recording.patterns[0].dense().shape  # [n_heads, query, key]
        torch.Size([4, 9, 9])
        >>> last = recording.resid_pre[3] + recording.attn_out[3] + recording.mlp_out[3]
        >>> bool((last - recording.resid_final).abs().max() < 1e-4)  # a block adds two tensors to the stream
        True
    """

    tokens: Int[Tensor, " pos"]
    patterns: tuple[Pattern, ...]
    scales: dict[str, Float[Tensor, "pos 1"]]
    resid_pre: tuple[Float[Tensor, "pos d_model"], ...]
    attn_out: tuple[Float[Tensor, "pos d_model"], ...]
    mlp_out: tuple[Float[Tensor, "pos d_model"], ...]
    resid_final: Float[Tensor, "pos d_model"]
    sites: dict[str, Float[Tensor, "pos _"]]
    position: int
    logits: Float[Tensor, " d_vocab"] | None
    final: Float[Tensor, " d_model"] | None = None
    inner_scales: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.resid_final.dtype

    @property
    def whole_logits(self) -> Float[Tensor, " d_vocab"]:
        """``logits``, where the whole model must have been recorded.

        Raises:
            ValueError: only the layers below one were recorded.
        """
        if self.logits is None:
            raise ValueError("only the first layers were recorded, so there are no logits; record without below=.")
        return self.logits

    @property
    def held(self) -> dict[str, Tensor]:
        """All patterns and denominators by hook name, with a batch of one in front: what a held run is held at."""
        values = {f"blocks.{layer}.attn.hook_pattern": p.dense()[None] for layer, p in enumerate(self.patterns)}
        scales = {name: scale[None] for name, scale in self.scales.items()} | self.inner_scales
        return values | {f"{name}.hook_scale": scale for name, scale in scales.items()}

    @property
    def streams(self) -> tuple[Float[Tensor, "pos d_model"], ...]:
        """The residual stream before each recorded layer, and after the last one."""
        return (*self.resid_pre, self.resid_final)


class Listener:
    """Collect the tensors of named hooks during one forward pass, and count how often each fires.

    ``seen`` holds the tensors by hook name. For hooks in ``reduced``, ``reduced[name](tensor, seen)`` is stored instead
    of the tensor. Hooks in ``optional`` may not fire; all others must fire exactly once (see :meth:`check`).
    """

    def __init__(
        self,
        model: Model,
        names: Iterable[str],
        reduced: Mapping[str, Callable[[Tensor, dict[str, Any]], Any]] | None = None,
        optional: Iterable[str] = (),
    ):
        self.seen: dict[str, Any] = {}
        self._reduced = reduced or {}
        self._optional = set(optional)
        self._counts = dict.fromkeys([*names, *self._reduced, *self._optional], 0)
        self._model = model

    def __enter__(self) -> "Listener":
        require_repeatable(self._model)
        with ExitStack() as stack:
            stack.enter_context(turn(self._model))
            for name in self._counts:
                stack.callback(put_hook(resolve(self._model, name), self._keep(name)))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _keep(self, name: str) -> Callable[..., None]:
        # HookedTransformer calls ln1 once each for queries, keys and values, on the same tensor.
        may_repeat = name.endswith(".ln1.hook_scale")

        def keep(output: Tensor, hook: Any) -> None:
            if may_repeat and name in self.seen and torch.equal(self.seen[name], output):
                return
            self._counts[name] += 1
            self.seen[name] = self._reduced[name](output, self.seen) if name in self._reduced else output

        return keep

    def check(self) -> None:
        """Raise HookFiringError unless every hook fired exactly once."""
        wrong = {name: n for name, n in self._counts.items() if n != 1 and name not in self._optional}
        if wrong:
            name, n = next(iter(wrong.items()))
            raise HookFiringError(
                f"{len(wrong)} of {len(self._counts)} hooks did not fire exactly once in a forward pass, "
                f"first {name!r} with {n} firings. {_why_silent(self._model, name) if n == 0 else _WHY_TWICE}"
            )


_WHY_TWICE = (
    "A module that runs twice in one pass has no single tensor to explain, so this architecture is not covered."
)
FIRING_OPTIONS = ("use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_attn_result")


def _why_silent(model: Model, name: str) -> str:
    on = [option for option in FIRING_OPTIONS if getattr(model.cfg, option, False)]
    if on:
        return f"The option {on[0]} is on, which changes what fires: switch it off with model.set_{on[0]}(False)."
    silent = "The model has this hook point but does not run it."
    if hasattr(model, "original_model") and any(base.__module__.startswith("sae_lens") for base in type(model).__mro__):
        return (
            f"{silent} If SAELens' reset_saes() or saes() was used on this bridge, they left a new point there that "
            "the block does not call. Open the model again, and attach with tlc.attach alone."
        )
    return silent


@contextmanager
def unembedding_only(model: Model, position: int | None) -> Iterator[None]:
    """Make the model compute logits at one position only, or (None) at none.

    On a long prompt with a large vocabulary, the logits of all positions are most of a forward pass's memory.
    """

    def keep_one(output: Tensor, hook: Any) -> Tensor:
        start = 0 if position is None else position % output.shape[1]
        return output[:, start : start + (position is not None)]

    undo = put_hook(resolve(model, final_hook(model)), keep_one)
    try:
        yield
    finally:
        undo()


def final_hook(model: Model) -> str:
    """The last hook before the unembedding."""
    last = f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"
    return next(
        (name for name in ("unembed.hook_in", "ln_final.hook_normalized") if find(model, name) is not None), last
    )


def final_stream(model: Model, seen: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The tensor that the unembedding reads, in float32, computed from the one at :func:`final_hook`."""
    if final_hook(model) != "ln_final.hook_normalized":
        return seen.float()
    norm = norm_weights(model, "ln_final")
    return seen.float() if norm is None else seen.float() * norm.weight.to(seen.device) + norm.bias.to(seen.device)


@in_turn
def record(
    model: Model, tokens: Int[Tensor, " pos"], position: int, sites: Iterable[str] = (), below: int | None = None
) -> Recording:
    """Run the model once and keep what attribution needs: patterns, norm denominators, streams and outputs.

    Args:
        model: the model.
        tokens: ``[pos]``.
        position: where logits are kept; they are computed nowhere else.
        sites: names of further hooks whose tensors are kept.
        below: record only the layers below this one; the pass ends with its attention scores.

    Returns:
        What the pass showed.

    Raises:
        UnknownHookError: the model does not have one of ``sites``.
        HookFiringError: a hook does not fire, or fires twice.
        NotFiniteError: a tensor holds NaN or infinity.
        ArchitectureError: attention is not causal, or the logits do not follow from the final norm's output.

    Examples:
        >>> tokens = tlc.hooks.to_tokens(model, prompt)
        >>> recording = tlc.hooks.record(model, tokens, position=-1, sites=["blocks.2.mlp.hook_in"])
        >>> recording.logits.shape, recording.sites["blocks.2.mlp.hook_in"].shape
        (torch.Size([670]), torch.Size([9, 96]))
        >>> recording.scales["blocks.0.ln1"].shape  # the norm's denominator at each position
        torch.Size([9, 1])
    """
    tokens = tokens.to(model_device(model))
    layers = range(int(model.cfg.n_layers) if below is None else below)
    blocks = [f"blocks.{layer}" for layer in layers]
    norms, last = norm_names(model, below), _last(model, below)
    names = [f"{b}.{kind}" for b in blocks for kind in _ADDED]
    ends = [last] if below is not None else [last, final_hook(model)]
    names = list(dict.fromkeys([*names, *stream_points(model, norms), *ends, *sites]))
    patterns = [f"{b}.attn.hook_pattern" for b in blocks]
    # Each pattern is reduced as soon as it is seen: all whole patterns of a long prompt would not fit into memory.
    cut = {name: partial(_pattern, model, layer) for layer, name in enumerate(patterns)}
    optional = [*_queries_keys(model, tokens, layers), *inner_points(model, norms)]
    with torch.no_grad(), Listener(model, names, cut, optional) as listener:
        logits = _run(model, tokens, position, below)
    listener.check()
    of_norms = [*stream_points(model, norms), *inner_points(model, norms)]
    shown = {
        name: with_its_layer(model, name, listener.seen[name].detach()) for name in of_norms if name in listener.seen
    }
    scales = denominators(model, norms, shown)
    for name, scale in scales.items():
        require_finite_tensor(f"{name}.hook_scale", scale)
    seen = {
        name: with_its_layer(model, name, _squeeze(name, listener.seen[name]))
        for name in names
        if not name.endswith(".hook_scale")
    }
    if logits is not None and not torch.isfinite(logits).all():
        raise NotFiniteError("the model's logits hold NaN or infinity on this prompt.")
    final = None
    if logits is not None:
        final = final_stream(model, seen[final_hook(model)][position])
        require_logits(model, final, logits)
    for name in patterns:
        for block in listener.seen[name].blocks:
            if isinstance(block.held, Tensor):  # recomputed ones were compared with the model's own already
                require_finite_tensor(name, block.held)
    return Recording(
        tokens=tokens,
        patterns=tuple(listener.seen[name] for name in patterns),
        scales={name: scale[0] for name, scale in scales.items() if not is_inner_norm(name)},
        inner_scales={name: scale for name, scale in scales.items() if is_inner_norm(name)},
        resid_pre=tuple(seen[f"{b}.hook_resid_pre"] for b in blocks),
        attn_out=tuple(seen[f"{b}.hook_attn_out"] for b in blocks),
        mlp_out=tuple(seen[f"{b}.hook_mlp_out"] for b in blocks),
        resid_final=seen[last].to(layer_device(model, int(model.cfg.n_layers) - 1))
        if "ln_final" in norms
        else seen[last],
        sites={name: seen[name].flatten(1) for name in sites},
        position=position,
        logits=logits,
        final=final,
    )


def _points_of(model: Model, name: str) -> list[str]:
    """The hooks that show a norm's denominator: a hook of its own, or else the norm's input and output."""
    own = f"{name}.hook_scale"
    return [own] if find(model, own) is not None else [f"{name}.hook_in", f"{name}.hook_out"]


def stream_points(model: Model, norms: Iterable[str]) -> list[str]:
    """The hooks that show the denominators of norms on the residual stream, which must fire."""
    return [point for name in norms if not is_inner_norm(name) for point in _points_of(model, name)]


def inner_points(model: Model, norms: Iterable[str]) -> list[str]:
    """The hooks that show the denominators of norms inside attention and MLPs.

    They may stay silent, as in a layer without values of its own.
    """
    return [point for name in norms if is_inner_norm(name) for point in _points_of(model, name)]


def denominators(model: Model, norms: Iterable[str], seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The denominator of every norm that ran, from its hooks' tensors, with the batch of one still in front."""
    found = {}
    for name in norms:
        points = _points_of(model, name)
        if any(point not in seen for point in points):
            continue
        if len(points) == 1:
            scale = seen[points[0]]
        else:
            x, y = (seen[point] for point in points)
            scale = require_norm_weights(model, name, x.shape[-1]).denominator(x, y)
        found[name] = scale[None] if scale.ndim == 2 else scale  # OPT and routers lay the rows of a batch flat
    return found


LOGITS_COMPARED = 4096  # tokens whose logits are checked, evenly spread over the vocabulary


def require_logits(model: Model, final: Float[Tensor, " d_model"], logits: Float[Tensor, " d_vocab"]) -> None:
    """Raise ArchitectureError unless the unembedding of ``final`` gives the model's own logits."""
    step = max(1, logits.numel() // LOGITS_COMPARED)
    ours = unembed_weights(model).some(slice(None, None, step)).logits(final)
    models = logits[::step].float().to(ours.device)
    gap = float((ours - models).abs().max() / models.abs().max().clamp_min(1e-30))
    # of the unembedding and of the final norm, relative to the largest logit
    if not gap <= rounding_within(logits.dtype):
        raise ArchitectureError(
            f"logits: W_U and b_U make other logits than the model's own (off by {gap:.1%}), so something between the "
            "final norm and the logits (a head, a scale) is not known, and what leads to a logit cannot be explained."
        )


_ADDED = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")


def scores_name(layer: int) -> str:
    """The hook that shows a layer's attention scores, just before softmax."""
    return f"blocks.{layer}.attn.hook_attn_scores"


def _last(model: Model, below: int | None) -> str:
    """The hook that shows the stream after the recorded layers."""
    if below is not None:
        return f"blocks.{below}.hook_resid_pre"
    if find(model, "ln_final.hook_in") is not None:
        return "ln_final.hook_in"
    after = f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"
    return after if is_norm(model, "ln_final") else final_hook(model)


def _run(
    model: Model, tokens: Int[Tensor, " pos"], position: int, below: int | None
) -> Float[Tensor, " d_vocab"] | None:
    """Run the model; returns the logits at ``position``, or None if the pass ends with layer ``below``'s scores."""
    if below is None:
        with unembedding_only(model, position):
            return model(tokens[None])[0, 0].detach()
    with stopping_at(model, scores_name(below)):
        model(tokens[None])
    return None


def _queries_keys(model: Model, tokens: Int[Tensor, " pos"], layers: range) -> list[str]:
    """The hooks of rotated queries and keys, if the prompt is too long to keep patterns and the model has them."""
    if tokens.numel() <= LONG:
        return []
    names = [f"blocks.{layer}.attn.hook_rot_{kind}" for layer in layers for kind in "qk"]
    return [name for name in names if find(model, name) is not None]


def _pattern(model: Model, layer: int, pattern: Tensor, seen: dict[str, Any]) -> Pattern:
    prefix = f"blocks.{layer}.attn"
    whole = _one(f"{prefix}.hook_pattern", pattern)
    require_causal(whole, layer)
    names = [f"{prefix}.hook_rot_q", f"{prefix}.hook_rot_k"]
    if all(name in seen for name in names):
        # HookedTransformer puts positions before heads.
        q, k = (x.transpose(0, 1) if x.shape[0] == whole.shape[1] else x for x in (_one(n, seen[n]) for n in names))
        made = Pattern.recomputed(whole, q, k, scores_scale(model, layer, q.shape[-1]), scores_softcap(model))
        if made is not None:
            return made
    return Pattern.cut(whole)


def require_causal(pattern: Float[Tensor, "n_heads query key"], layer: int) -> None:
    """Raise ArchitectureError if a position attends to a later one; this package is for causal models only."""
    if pattern.ndim != 3 or pattern.shape[1] != pattern.shape[2]:
        raise ArchitectureError(
            f"layer {layer}: the attention pattern has shape {tuple(pattern.shape)}, expected [n_heads, query, key] "
            "with as many keys as queries, so this attention is not covered."
        )
    if pattern.triu(1).any():
        raise ArchitectureError(
            f"layer {layer} attends to later positions (bidirectional attention). Only causal models can be explained."
        )


def _squeeze(name: str, tensor: Tensor) -> Tensor:
    tensor = _one(name, tensor)
    require_finite_tensor(name, tensor)
    return tensor


def _one(name: str, tensor: Tensor) -> Tensor:
    if tensor.shape[0] != 1:
        raise HookFiringError(f"{name!r} gave shape {tuple(tensor.shape)}; expected a batch of one first.")
    return tensor.detach()[0]


def require_finite_tensor(name: str, tensor: Tensor) -> None:
    """Raise NotFiniteError if the tensor of hook ``name`` holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NotFiniteError(f"{name!r} holds NaN or infinity on this prompt.")


def resid_mid(recording: Recording, model: Model, layer: int) -> Float[Tensor, "pos d_model"]:
    """What the MLP's norm reads: the block's input, plus the attention's output unless the two are parallel."""
    resid = recording.resid_pre[layer].float()
    return resid if is_parallel(model) else resid + recording.attn_out[layer].float()
