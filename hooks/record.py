"""One forward pass of the untouched model, with what attribution needs written down."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .collect import stopping_at
from .errors import HookFiringError, NotFiniteError
from .patterns import Pattern
from .sites import (
    Model,
    find,
    is_parallel,
    norm_module,
    resolve,
    scores_scale,
    scores_softcap,
    with_its_layer,
)

LONG = 1024  # positions, beyond which patterns are made again from queries and keys instead of kept


@dataclass(frozen=True)
class Recording:
    """What one forward pass showed, batch dimension removed, in the model's own dtype.

    Everything of layer L lies where layer L does. ``patterns[L]``: attention patterns after softmax, without
    the zeros of the mask. ``scales[name]``: the denominator of the norm called ``name``. ``resid_pre[L]``, ``attn_out[L]``, ``mlp_out[L]``: the block's input and
    the two tensors added to it. ``resid_final``: what ``ln_final`` reads. ``sites[name]``: the
    tensors of the hooks asked for. ``logits``: the model's, at ``position``; None where the pass ended below
    a layer, whose input stands as ``resid_final``.
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

    @property
    def dtype(self) -> torch.dtype:
        """The model's own."""
        return self.resid_final.dtype

    @property
    def streams(self) -> tuple[Float[Tensor, "pos d_model"], ...]:
        """The residual stream before each recorded layer and after the last."""
        return (*self.resid_pre, self.resid_final)


class Listener:
    """Collects the tensors of named hooks during one forward pass and counts the firings.

    What ``reduced`` makes of a tensor, and of what was seen before it, is kept in place of those it
    names; those in ``optional`` may stay silent.
    """

    def __init__(
        self,
        model: Model,
        names: Iterable[str],
        reduced: dict[str, Callable[[Tensor, dict[str, Any]], Any]] | None = None,
        optional: Iterable[str] = (),
    ):
        self.seen: dict[str, Any] = {}
        self._reduced = reduced or {}
        self._optional = set(optional)
        self._counts = dict.fromkeys([*names, *self._reduced, *self._optional], 0)
        self._model = model

    def __enter__(self) -> "Listener":
        with ExitStack() as stack:
            for name in self._counts:
                handle = resolve(self._model, name).register_forward_hook(self._keep(name))
                stack.callback(handle.remove)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _keep(self, name: str) -> Callable[..., None]:
        # HookedTransformer calls ln1 once each for queries, keys and values, on the same tensor.
        may_repeat = name.endswith(".ln1.hook_scale")

        def keep(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
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
                f"first {name!r} with {n} firings. Is a setting such as use_split_qkv_input on?"
            )


def norm_names(model: Model, below: int | None = None) -> list[str]:
    """The hook prefixes of all norms on the residual stream's path, blocks first; those up to layer ``below``'s attention."""
    names = [
        f"blocks.{layer}.{norm}"
        for layer in range(int(model.cfg.n_layers) if below is None else below)
        for norm in ("ln1", "ln1_post", "ln2", "ln2_post")
    ]
    last = "ln_final" if below is None else f"blocks.{below}.ln1"
    return [name for name in (*names, last) if norm_module(model, name) is not None]


@contextmanager
def unembedding_only(model: Model, position: int) -> Iterator[None]:
    """Make the model unembed one position: the logits of all others are never made.

    They are most of a forward pass's memory on a long prompt with a large vocabulary.
    """
    name = "unembed.hook_in" if find(model, "unembed.hook_in") is not None else "ln_final.hook_normalized"

    def keep_one(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[:, position : position + 1]

    handle = resolve(model, name).register_forward_hook(keep_one)
    try:
        yield
    finally:
        handle.remove()


def record(
    model: Model, tokens: Int[Tensor, " pos"], position: int, sites: Iterable[str] = (), below: int | None = None
) -> Recording:
    """Run the model once on ``tokens`` and keep what attribution reads, logits at ``position`` only.

    ``sites`` are further hook names to keep. With ``below``, only the layers below that one are recorded, and
    the pass ends with its attention scores. Raises HookFiringError if a hook stays silent or
    fires twice, NotFiniteError naming the first tensor that holds NaN or infinity.
    """
    layers = range(int(model.cfg.n_layers) if below is None else below)
    blocks = [f"blocks.{layer}" for layer in layers]
    norms, last = norm_names(model, below), _last(model, below)
    names = [f"{b}.{kind}" for b in blocks for kind in _ADDED]
    names = list(dict.fromkeys([*names, *(f"{name}.hook_scale" for name in norms), last, *sites]))
    patterns = [f"{b}.attn.hook_pattern" for b in blocks]
    # Cut at once, so that the whole patterns of a long prompt never stand side by side.
    cut = {name: partial(_pattern, model, layer) for layer, name in enumerate(patterns)}
    with torch.no_grad(), Listener(model, names, cut, _queries_keys(model, tokens, layers)) as listener:
        logits = _run(model, tokens, position, below)
    listener.check()
    seen = {name: with_its_layer(model, name, _squeeze(name, listener.seen[name])) for name in names}
    if logits is not None and not torch.isfinite(logits).all():
        raise NotFiniteError("the model's logits hold NaN or infinity on this prompt.")
    for name in patterns:
        for block in listener.seen[name].blocks:
            if isinstance(block.held, Tensor):  # those made again were compared with the model's own
                _require_finite(name, block.held)
    return Recording(
        tokens=tokens,
        patterns=tuple(listener.seen[name] for name in patterns),
        scales={name: seen[f"{name}.hook_scale"] for name in norms},
        resid_pre=tuple(seen[f"{b}.hook_resid_pre"] for b in blocks),
        attn_out=tuple(seen[f"{b}.hook_attn_out"] for b in blocks),
        mlp_out=tuple(seen[f"{b}.hook_mlp_out"] for b in blocks),
        resid_final=seen[last].to(seen["ln_final.hook_scale"].device) if "ln_final" in norms else seen[last],
        sites={name: seen[name] for name in sites},
        position=position,
        logits=logits,
    )


_ADDED = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")


def scores_name(layer: int) -> str:
    """The hook of a layer's scores before softmax, the last to fire before its pattern."""
    return f"blocks.{layer}.attn.hook_attn_scores"


def _last(model: Model, below: int | None) -> str:
    """The hook that shows the stream behind the recorded layers."""
    if below is not None:
        return f"blocks.{below}.hook_resid_pre"
    own = "ln_final.hook_in"
    return own if find(model, own) is not None else f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"


def _run(model: Model, tokens: Int[Tensor, " pos"], position: int, below: int | None) -> Float[Tensor, " d_vocab"] | None:
    """The logits at ``position``; None where the pass ends with layer ``below``'s scores."""
    if below is None:
        with unembedding_only(model, position):
            return model(tokens[None])[0, 0].detach()
    with stopping_at(model, scores_name(below)):
        model(tokens[None])
    return None


def _queries_keys(model: Model, tokens: Int[Tensor, " pos"], layers: range) -> list[str]:
    """Hooks of rotated queries and keys, on a prompt too long to keep the patterns; not every model shows them."""
    if tokens.numel() <= LONG:
        return []
    names = [f"blocks.{layer}.attn.hook_rot_{kind}" for layer in layers for kind in "qk"]
    return [name for name in names if find(model, name) is not None]


def _pattern(model: Model, layer: int, pattern: Tensor, seen: dict[str, Any]) -> Pattern:
    prefix = f"blocks.{layer}.attn"
    whole = _one(f"{prefix}.hook_pattern", pattern)
    names = [f"{prefix}.hook_rot_q", f"{prefix}.hook_rot_k"]
    if all(name in seen for name in names):
        # HookedTransformer puts positions before heads.
        q, k = (x.transpose(0, 1) if x.shape[0] == whole.shape[1] else x for x in (_one(n, seen[n]) for n in names))
        made = Pattern.recomputed(whole, q, k, scores_scale(model, layer, q.shape[-1]), scores_softcap(model))
        if made is not None:
            return made
    return Pattern.cut(whole)


def _squeeze(name: str, tensor: Tensor) -> Tensor:
    tensor = _one(name, tensor)
    _require_finite(name, tensor)
    return tensor


def _one(name: str, tensor: Tensor) -> Tensor:
    if tensor.shape[0] != 1:
        raise HookFiringError(f"{name!r} gave shape {tuple(tensor.shape)}; expected a batch of one first.")
    return tensor.detach()[0]


def _require_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise NotFiniteError(f"{name!r} holds NaN or infinity on this prompt.")


def resid_mid(recording: Recording, model: Model, layer: int) -> Float[Tensor, "pos d_model"]:
    """What the MLP's norm reads: the block's input, plus the attention's output unless parallel."""
    resid = recording.resid_pre[layer].float()
    return resid if is_parallel(model) else resid + recording.attn_out[layer].float()
