"""Hold attention patterns and norm denominators, in a way that was seen to work on this model.

A hook that returns another pattern or denominator does not always change what the model computes:
some bridges show a pattern after Hugging Face has used it (GPT-J), some norms add a gain of their own
when they are edited (Nemotron), some show no denominator at all (Gemma 4). With everything held, each
block must be an affine function of the residual stream that enters it, and equal to what was recorded
at the recorded stream. :func:`prove` checks exactly that, on three streams in one pass, and finds for
each pattern and each norm a way that passes:

* through its own point: the hook returns the held value;
* replayed: heads are mixed anew from ``attn.v.hook_out`` into ``attn.o.hook_in``; a norm's output is
  computed anew from its input.

What passes neither is refused by name.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .collect import stopping_at
from .errors import ArchitectureError
from .norms import norm_names, norm_weights
from .parity import watching
from .record import Listener, denominators, final_hook, inner_points, require_causal, require_finite_tensor, stream_points
from .sites import Model, added_hooks, find, model_device, with_its_layer

PROBED = 4  # tokens of the prompt that the proof runs on
HookList = list[tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]]
# How far from affine, and from the recorded value, a held block may be: relative to how far the
# probe moved it. Free patterns or denominators are off by tenths; the rest is rounding.
_AFFINE_WITHIN = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
OPTIONS = ("use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_attn_result", "ungroup_grouped_query_attention")
_FORKS = ("use_split_qkv_input", "use_attn_in")  # attention reads copies of the stream, normed one by one


@dataclass(frozen=True)
class Holds:
    """How each pattern and denominator of a model is held: through its own point, unless it is named here.

    ``norms``: all norms that ran, in order. ``replayed_norms``: those whose output is computed anew.
    ``replayed_patterns``: layers whose heads are mixed anew.
    """

    norms: tuple[str, ...]
    replayed_norms: frozenset[str] = field(default_factory=frozenset)
    replayed_patterns: frozenset[int] = field(default_factory=frozenset)


def pattern_point(layer: int) -> str:
    """The hook of a layer's attention pattern."""
    return f"blocks.{layer}.attn.hook_pattern"


def scale_point(norm: str) -> str:
    """The hook of a norm's denominator; also the name that a held value goes by where there is no such hook."""
    return f"{norm}.hook_scale"


def hold_hooks(
    model: Model,
    holds: Holds,
    values: Mapping[str, Tensor],
    pattern_edits: Mapping[int, Sequence[Callable[[Tensor, Any], Tensor]]] | None = None,
) -> HookList:
    """Hooks that hold all patterns and denominators at ``values``, named by :func:`pattern_point` and :func:`scale_point`.

    Values have a batch of one in front. ``pattern_edits[layer]`` change the held pattern, in order.
    """
    hooks: HookList = []
    for name in holds.norms:
        value = values[scale_point(name)]
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
        # Some models lay the rows of a batch flat (OPT), and some cannot take a view (Falcon with ALiBi).
        here = value.to(tensor.device, tensor.dtype)
        return here.expand(tensor.numel() // here.numel(), *here.shape[1:]).reshape(tensor.shape).contiguous()

    return hold


def _replayed_norm(model: Model, name: str, scale: Tensor) -> HookList:
    """Compute a norm's output from its input, with a denominator given."""
    inputs: list[Tensor] = []

    def keep(x: Tensor, hook: HookPoint) -> None:
        inputs[:] = [x]

    def write(y: Tensor, hook: HookPoint) -> Tensor:
        x = inputs.pop()
        return norm_weights(model, name, x.shape[-1]).output(x, scale.to(x.device)).to(y.dtype)

    return [(f"{name}.hook_in", keep), (f"{name}.hook_out", write)]


def _replayed_pattern(
    model: Model, layer: int, pattern: Tensor, edits: Sequence[Callable[[Tensor, Any], Tensor]]
) -> HookList:
    """Mix values by a pattern given, in the place of what the module mixed itself."""
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
    """Whether a layer shows its values and what it mixes them to."""
    return all(find(model, f"blocks.{layer}.attn.{point}") is not None for point in ("v.hook_out", "o.hook_in"))


def can_replay_norm(model: Model, name: str) -> bool:
    """Whether a norm shows its input and its output."""
    return all(find(model, f"{name}.{point}") is not None for point in ("hook_in", "hook_out"))


def prove(model: Model, tokens: Int[Tensor, " pos"], outputs: Mapping[int, str], inputs: Iterable[str]) -> Holds:
    """Find a way to hold everything that was seen to work, on the first tokens of a prompt.

    Args:
        outputs: the hook at which each layer's MLP output is replaced.
        inputs: the hooks that dictionaries read.

    Raises ArchitectureError naming what cannot be held, or where the model is not what its hooks show.
    """
    forks = [option for option in _FORKS if getattr(model.cfg, option, False)]
    if forks:
        raise ArchitectureError(
            f"the option {forks[0]} is on: attention then reads copies of the stream that its norm's hook does not reach, "
            f"so denominators cannot be held. Switch it off with model.set_{forks[0]}(False)."
        )
    for layer in range(int(model.cfg.n_layers)):
        if find(model, pattern_point(layer)) is None:
            raise ArchitectureError(
                f"layer {layer} shows no attention pattern (a state-space, convolution or linear-attention layer), so what it "
                "moves between positions cannot be held and no exact graph exists."
            )
    proof = _Proof(model, tokens[:PROBED], outputs, tuple(dict.fromkeys(inputs)))
    norms = tuple(proof.scales)
    holds = Holds(norms, frozenset(name for name in norms if find(model, scale_point(name)) is None))
    for _ in range(3):
        found = proof.wrong(holds)
        if found is None:
            return holds
        holds = _another_way(model, holds, found)
    raise ArchitectureError(_refusal(model, found))


def probe_tokens(model: Model) -> Int[Tensor, " pos"]:
    """A few token ids, where a question about a model comes without a prompt."""
    return torch.arange(PROBED, device=model_device(model)) % int(model.cfg.d_vocab)


def moves_pattern(model: Model, layer: int) -> bool:
    """Whether adding to a layer's scores moves its pattern as a softmax would."""
    tokens, query, added = probe_tokens(model), PROBED - 1, 1.0

    def add(scores: Tensor, hook: HookPoint) -> Tensor:
        edited = scores.clone()
        edited[:, :, query, query - 1] += added
        return edited

    ratios = []
    for hooks in ([], [(f"blocks.{layer}.attn.hook_attn_scores", add)]):
        with torch.no_grad(), added_hooks(model, hooks), Listener(model, [pattern_point(layer)]) as listener:
            with stopping_at(model, pattern_point(layer)):
                model(tokens[None])
        pattern = listener.seen[pattern_point(layer)][0].double()
        ratios.append(pattern[:, query, query - 1].log() - pattern[:, query, query].log())
    moved = ratios[1] - ratios[0]
    return bool(((moved - added).abs() <= 0.05)[moved.isfinite()].all()) and bool(moved.isfinite().any())


@dataclass(frozen=True)
class _Wrong:
    """What a held pass got wrong: norms by name; blocks, with what was seen there."""

    norms: frozenset[str]
    layers: tuple[int, ...]
    what: str


def _another_way(model: Model, holds: Holds, found: _Wrong) -> Holds:
    norms = frozenset(n for n in found.norms if n not in holds.replayed_norms and can_replay_norm(model, n))
    if norms:
        return Holds(holds.norms, holds.replayed_norms | norms, holds.replayed_patterns)
    layers = {layer for layer in found.layers if can_replay_pattern(model, layer)} - holds.replayed_patterns
    if not layers:
        raise ArchitectureError(_refusal(model, found))
    return Holds(holds.norms, holds.replayed_norms, holds.replayed_patterns | layers)


def _refusal(model: Model, found: _Wrong) -> str:
    on = [option for option in OPTIONS if getattr(model.cfg, option, False)]
    hint = f" The option {on[0]} is on; try without it: model.set_{on[0]}(False)." if on else ""
    return (
        f"{found.what}, with attention patterns and norm denominators held. This architecture has something between its "
        f"residual streams that cannot be held (a gate, a second mixer, a norm without hooks), so no exact graph exists.{hint}"
    )


class _Proof:
    """One clean pass, and held passes on three streams: as recorded, moved once, moved twice."""

    def __init__(self, model: Model, tokens: Int[Tensor, " pos"], outputs: Mapping[int, str], inputs: tuple[str, ...]):
        self._model, self._tokens = model, tokens
        self._layers = range(int(model.cfg.n_layers))
        self._outputs, self._inputs = dict(outputs), inputs
        norms = norm_names(model)
        self._streams = [f"blocks.{layer}.hook_resid_pre" for layer in self._layers]
        self._last = final_hook(model)
        names = [*self._streams, *outputs.values(), *inputs, *stream_points(model, norms), self._last]
        names += [pattern_point(layer) for layer in self._layers]
        with torch.no_grad(), watching(model) as calls:
            with Listener(model, dict.fromkeys(names), None, inner_points(model, norms)) as listener:
                with stopping_at(model, self._last):
                    model(tokens[None])
        listener.check()
        for name, tensor in listener.seen.items():  # in the order in which they fired
            require_finite_tensor(name, tensor)
        calls.compare()
        self._clean = {name: with_its_layer(model, name, tensor.detach()) for name, tensor in listener.seen.items()}
        self.scales = denominators(model, norms, self._clean)
        self._values = {scale_point(name): scale for name, scale in self.scales.items()}
        for layer in self._layers:
            pattern = self._clean[pattern_point(layer)]
            require_causal(pattern[0], layer)
            self._values[pattern_point(layer)] = pattern
        self._dtype = self._clean[self._last].dtype
        generator = torch.Generator().manual_seed(0)
        self._moved = {name: self._move(self._clean[name], generator) for name in (*self._streams, *outputs.values())}

    @staticmethod
    def _move(x: Tensor, generator: torch.Generator) -> Tensor:
        """``x``, and ``x`` moved by one and by two times a random vector of its size at each position."""
        step = torch.randn(x.shape, generator=generator).to(x.device) * x.float().square().mean(-1, keepdim=True).sqrt()
        return torch.cat([x.float() + k * step for k in range(3)]).to(x.dtype)

    def wrong(self, holds: Holds) -> _Wrong | None:
        """What is not affine or not as recorded when held in these ways; None where all is."""
        model = self._model
        forced: HookList = [(name, _force(value)) for name, value in self._moved.items()]
        norm_ends = [f"{n}.{end}" for n in holds.norms if can_replay_norm(model, n) for end in ("hook_in", "hook_out")]
        arriving: dict[str, Tensor] = {}
        arrivals: HookList = [(name, _arrival(arriving, name)) for name in self._streams[1:]]
        hooks = [*arrivals, *hold_hooks(model, holds, self._values), *forced]
        # Norms are listened to first: what is written over their outputs is not theirs.
        with torch.no_grad(), edits_expected(), Listener(model, (), None, norm_ends) as ends, added_hooks(model, hooks):
            with Listener(model, dict.fromkeys([*self._inputs, self._last])) as listener:
                try:
                    with stopping_at(model, self._last):
                        model(self._tokens.expand(3, -1))
                except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
                    # TransformerLens' own code for an edited denominator fails on some norms (OLMo's, without a gain).
                    return _Wrong(frozenset(holds.norms), (), f"the model fails when its denominators are held ({error})")
        listener.check()
        seen = listener.seen
        norms = frozenset(n for n in holds.norms if n not in holds.replayed_norms and not self._norm_holds(n, ends.seen))
        if norms:
            first = next(n for n in holds.norms if n in norms)
            return _Wrong(norms, (), f"{first} does not keep its denominator")
        for layer in self._layers:
            name = self._streams[layer + 1] if layer + 1 in self._layers else self._last
            after = seen[self._last] if name == self._last else arriving[name]
            if not self._affine(after, self._clean[name]):
                layers = [at for at in self._layers if at == layer or not self._affine_after(at, arriving, seen)]
                return _Wrong(frozenset(), tuple(layers), f"layer {layer} is not linear in the stream that enters it")
        for name in self._inputs:
            if not self._affine(seen[name], self._clean[name]):
                return _Wrong(frozenset(), (), f"{name} is not linear in the residual stream")
        return None

    def _affine_after(self, layer: int, arriving: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> bool:
        last = layer + 1 not in self._layers
        name = self._last if last else self._streams[layer + 1]
        return self._affine(seen[name] if last else arriving[name], self._clean[name])

    def _affine(self, rows: Tensor, clean: Tensor) -> bool:
        here, once, twice = rows.float().flatten(2) if rows.ndim > 3 else rows.float()
        clean = clean[0].float().to(here.device)
        size = (once - here).abs().amax(-1).clamp_min(1e-30)
        noise = 1e-5 * float(clean.abs().max())
        tolerance = _AFFINE_WITHIN[self._dtype]
        off = torch.maximum((twice - 2 * once + here).abs().amax(-1), (here - clean).abs().amax(-1))
        moved = bool((once != here).any())  # a forced stream that moves nothing was not forced
        return moved and bool((off <= tolerance * size + noise).all())

    def _norm_holds(self, name: str, seen: Mapping[str, Tensor]) -> bool:
        ends = [f"{name}.{end}" for end in ("hook_in", "hook_out")]
        if any(end not in seen for end in ends):
            return True  # a HookedTransformer's norm: judged by what its block does
        x, y = (seen[end].float() for end in ends)
        expected = norm_weights(self._model, name, x.shape[-1]).output(x, self.scales[name].to(x.device))
        size = expected.abs().amax(-1).clamp_min(1e-30)
        off = ((expected - y).abs().amax(-1) / size).max()
        return bool(off <= _AFFINE_WITHIN[self._dtype])


@contextmanager
def edits_expected() -> Iterator[None]:
    """Silence the bridge's warning that an edited denominator leaves the native norm: that is the purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _force(value: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    def force(tensor: Tensor, hook: HookPoint) -> Tensor:
        return value.to(tensor.device)

    return force


def _arrival(arriving: dict[str, Tensor], name: str) -> Callable[[Tensor, HookPoint], None]:
    def keep(tensor: Tensor, hook: HookPoint) -> None:
        arriving[name] = tensor.detach()

    return keep
