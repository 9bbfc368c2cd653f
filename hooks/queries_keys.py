"""Queries and keys of one layer as affine functions of the residual stream, with frozen norms.

An attention score before softmax is ``q·k``. If the denominators of the norm before attention (and of the norms of
queries and keys, if there are any) are held at their recorded values, then ``q`` is affine in the stream at the query's
position and ``k`` in the stream at the key's position, rotation included. QK attribution is built on this.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .collect import stopping_at
from .errors import ArchitectureError
from .maps import FrozenNorm, frozen_norm
from .norms import attention_norms, require_norm_weights
from .record import Listener, Recording, record, scores_name
from .sites import Model, find, scores_scale, scores_softcap
from .softcap import without_soft_cap
from .turn import in_turn


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys, ``x / scale · weight``, with its recorded ``scale``."""

    weight: Float[Tensor, " d"]
    scale: Float[Tensor, "n_heads pos"]


@dataclass(frozen=True)
class Rotation:
    """A layer's rotary embedding on this prompt: its tables, and how it pairs dimensions (``flip``)."""

    cos: Float[Tensor, "pos rotary"]
    sin: Float[Tensor, "pos rotary"]
    flip: Callable[[Tensor], Tensor]

    def apply(self, x: Float[Tensor, "n d_head"], position: int) -> Float[Tensor, "n d_head"]:
        """Rotate vectors as a query or key at ``position``; dimensions beyond the tables are not rotated."""
        width = self.cos.shape[-1]
        turned = x[..., :width] * self.cos[position] + self.flip(x[..., :width]) * self.sin[position]
        return torch.cat([turned, x[..., width:]], dim=-1)


@dataclass(frozen=True)
class FrozenScores:
    """One layer's attention scores before softmax, as products of affine queries and keys.

    ``scores``: the model's own scores, after its soft cap if it has one; minus infinity where the mask hides a key.
    Some bridges (OPT, XGLM) show what softmax made of them instead. Then ``scores`` is its logarithm, which differs
    from them by a constant for each query, and ``stream`` is what enters the layer; else that is None.
    """

    layer: int
    W_Q: Float[Tensor, "n_heads d_model d_head"]
    b_Q: Float[Tensor, "n_heads d_head"]
    W_K: Float[Tensor, "n_kv d_model d_head"]
    b_K: Float[Tensor, "n_kv d_head"]
    before: FrozenNorm | None
    query_norm: HeadNorm | None
    key_norm: HeadNorm | None
    rotation: Rotation | None
    scale: float
    softcap: float | None
    scores: Float[Tensor, "n_heads query key"]
    stream: Float[Tensor, "pos d_model"] | None

    def query(self, head: int, position: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """Matrix and bias that give a head's query at ``position`` from the stream, rotated and scaled."""
        matrix, bias = self._read(self.W_Q, self.b_Q, self.query_norm, head, position)
        return matrix * self.scale, bias * self.scale

    def key(self, head: int, position: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """Matrix and bias that give the rotated key at ``position`` from the stream, as query head ``head`` sees it."""
        shared = head * self.W_K.shape[0] // self.W_Q.shape[0]
        return self._read(self.W_K, self.b_K, self.key_norm, shared, position)

    def masked(self, head: int, query: int, key: int) -> bool:
        """Whether the model's mask (causal, sliding window) hides ``key`` from ``query``."""
        return bool(torch.isinf(self.scores[head, query, key]))

    def uncapped(self, head: int, query: int, key: int) -> float:
        """The model's own score before its soft cap, which is inverted in double precision.

        Where it is known up to a constant for each query, the constant is the mean difference from query times key.
        """
        row = without_soft_cap(self.scores[head, query].double(), self.softcap)
        if self.stream is None:
            return float(row[key])
        seen = row.isfinite().nonzero()[:, 0]
        return float(row[key] + (self._products(head, query, seen.tolist(), self.stream.double()) - row[seen]).mean())

    def _products(
        self, head: int, query: int, keys: list[int], stream: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, " key"]:
        """Query times key for some keys of one query."""
        matrix, bias = self.query(head, query)
        q = stream[query] @ matrix.double() + bias.double()
        each = [(position, *self.key(head, position)) for position in keys]
        return torch.stack([q @ (stream[position] @ W.double() + b.double()) for position, W, b in each])

    def _read(self, W: Tensor, b: Tensor, norm: HeadNorm | None, head: int, position: int) -> tuple[Tensor, Tensor]:
        matrix, bias = W[head], b[head]
        if self.before is not None:
            bias = bias + self.before.weights.bias @ matrix
            matrix = self.before.fold(matrix) / self.before.scale[position]
        rows = torch.cat([matrix, bias[None]])
        if norm is not None:
            weight = norm.weight.reshape(-1, rows.shape[-1])
            rows = rows * weight[head % len(weight)] / norm.scale[head % len(norm.scale), position]
        if self.rotation is not None:
            rows = self.rotation.apply(rows, position)
        return rows[:-1], rows[-1]


@in_turn
def frozen_scores(model: Model, recording: Recording, layer: int) -> FrozenScores:
    """Queries and keys of ``layer`` on a recorded prompt, from its weights and a forward pass that stops at its scores.

    Raises:
        ArchitectureError: the layer has no plain query and key weights, or shows no scores.
    """
    with torch.no_grad(), _listener(model, layer) as listener, stopping_at(model, scores_name(layer)):
        model(recording.tokens[None])
    return _frozen(model, recording, layer, listener)


@in_turn
def record_below(
    model: Model, tokens: Int[Tensor, " pos"], layer: int, sites: Iterable[str] = ()
) -> tuple[Recording, FrozenScores]:
    """:func:`record` for the layers below ``layer`` and :func:`frozen_scores` for ``layer``, in one forward pass."""
    with _listener(model, layer) as listener:
        recording = record(model, tokens, tokens.numel() - 1, sites, below=layer)
    return recording, _frozen(model, recording, layer, listener)


def _frozen(model: Model, recording: Recording, layer: int, listener: Listener) -> FrozenScores:
    attn = model.blocks[layer].attn
    W_Q, b_Q = _projection(attn, layer, "Q")
    W_K, b_K = _projection(attn, layer, "K")
    seen = {name.split(".attn.")[1]: tensor.detach() for name, tensor in listener.seen.items()}
    if _SCORES not in seen:
        raise ArchitectureError(
            f"blocks.{layer}.attn shows no scores ({_SCORES} stays silent), so they cannot be explained."
        )
    shown = seen[_SCORES][0]
    floor = torch.finfo(shown.dtype).min / 2  # masks write minus infinity, or write or add the lowest number
    scores = torch.where(shown < floor, -torch.inf, shown.float())
    after = bool((scores >= 0).all() and ((scores.sum(-1) - 1).abs() < _SUMS_TO_ONE).all())  # what softmax made of them
    streams = [*recording.resid_pre, recording.resid_final]
    return FrozenScores(
        layer=layer,
        W_Q=W_Q,
        b_Q=b_Q,
        W_K=W_K,
        b_K=b_K,
        before=frozen_norm(model, recording, attention_norms(model, layer)[0]),
        query_norm=_head_norm(model, f"blocks.{layer}.attn.q_norm", seen, W_Q.shape[0]),
        key_norm=_head_norm(model, f"blocks.{layer}.attn.k_norm", seen, W_K.shape[0]),
        rotation=_rotation(model, attn, seen, recording.tokens),
        scale=scores_scale(model, layer, W_Q.shape[-1]),
        softcap=scores_softcap(model),
        scores=scores.log() if after else scores,
        stream=streams[layer].float().to(scores.device) if after else None,
    )


_SCORES = "hook_attn_scores"
_SUMS_TO_ONE = 1e-2  # of a row of a pattern in half precision
_HOOKS = (_SCORES, "hook_cos", "hook_sin", "q_norm.hook_scale", "k_norm.hook_scale")


def _listener(model: Model, layer: int) -> Listener:
    """A listener on those of :data:`_HOOKS` that the layer's attention has.

    Raises:
        ArchitectureError: it has no hook for scores.
    """
    if find(model, scores_name(layer)) is None:
        raise ArchitectureError(f"blocks.{layer}.attn has no {_SCORES}, so its scores cannot be explained.")
    prefix = f"blocks.{layer}.attn."
    return Listener(model, [prefix + hook for hook in _HOOKS if find(model, prefix + hook) is not None])


def _projection(attn: Any, layer: int, kind: str) -> tuple[Tensor, Tensor]:
    grouped = getattr(attn, f"_W_{kind}", None)  # HookedTransformer's W_K repeats grouped heads
    try:
        W = grouped if isinstance(grouped, Tensor) else getattr(attn, f"W_{kind}", None)
    except NotImplementedError:  # latent attention: the bridge says so itself
        W = None
    if not isinstance(W, Tensor) or W.ndim != 3:
        raise ArchitectureError(
            f"blocks.{layer}.attn has no plain W_{kind} [heads, d_model, d_head] (latent or linear attention?), "
            "so its scores cannot be explained."
        )
    b = getattr(attn, f"_b_{kind}" if W is grouped else f"b_{kind}", None)
    W = W.detach().float()
    bias = b.detach().float() if isinstance(b, Tensor) else W.new_zeros(W.shape[0], W.shape[2])
    return W, bias.reshape(W.shape[0], W.shape[2])


def _head_norm(model: Model, name: str, seen: dict[str, Tensor], heads: int) -> HeadNorm | None:
    scale = seen.get(f"{name.rsplit('.', 1)[1]}.hook_scale")
    if scale is None:
        return None
    weights = require_norm_weights(model, name)
    n_pos = seen["hook_attn_scores"].shape[-1]
    scale = scale.float()
    if scale.ndim == 2:  # HookedTransformer: all heads of all positions in one column
        scale = scale.reshape(n_pos, -1).T
    else:  # [1, heads, pos, 1], or [1, pos, 1] for a norm over all heads together
        scale = scale.reshape(-1, n_pos)
    if scale.shape[0] not in (1, heads):
        raise ArchitectureError(f"{name}: expected denominators for {heads} heads, got {scale.shape[0]}.")
    return HeadNorm(weights.weight, scale)


def _rotation(model: Model, attn: Any, seen: dict[str, Tensor], tokens: Tensor) -> Rotation | None:
    if "hook_cos" in seen:  # TransformerBridge shows the tables that this layer was given (scaled; local or global)
        adjacent = bool(getattr(model.cfg, "rotary_adjacent_pairs", False))
        cos, sin = (seen[name].float().reshape(-1, seen[name].shape[-1]) for name in ("hook_cos", "hook_sin"))
        if adjacent:
            half = cos.shape[-1] // 2
            cos, sin = (table[:, :half].repeat_interleave(2, dim=-1) for table in (cos, sin))
        return Rotation(cos, sin, _flip_adjacent if adjacent else _flip_halves)
    if isinstance(getattr(attn, "rotary_cos", None), Tensor):  # HookedTransformer
        n_pos = tokens.numel()
        return Rotation(attn.rotary_cos[:n_pos].float(), attn.rotary_sin[:n_pos].float(), attn.rotate_every_two)
    return None


def _flip_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _flip_adjacent(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


@in_turn
def held_head_norms(
    model: Model, tokens: Int[Tensor, " pos"], layer: int
) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    """Hooks that hold the denominators of a layer's query and key norms at their values on the prompt ``tokens``."""
    names = [f"blocks.{layer}.attn.{norm}.hook_scale" for norm in ("q_norm", "k_norm")]
    names = [name for name in names if find(model, name) is not None]
    with torch.no_grad(), Listener(model, dict.fromkeys(names)) as listener:
        model(tokens[None])
    return [(name, _hold(listener.seen[name].detach())) for name in names if name in listener.seen]


def _hold(value: Tensor) -> Callable[[Tensor, Any], Tensor]:
    def hold(scale: Tensor, hook: Any) -> Tensor:
        # HookedTransformer lays batch, positions and heads out in one column.
        return value.repeat(len(scale) // len(value), 1) if value.ndim == 2 else value.expand_as(scale)

    return hold
