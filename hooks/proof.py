"""Find out by experiment how patterns and denominators can be held on a model, and prove that it works.

An attribution graph rests on this: with all patterns and denominators held, each block is an affine function of the
residual stream that enters it, and from the recorded stream it computes the recorded output. No check of a finished
graph would show that it fails, because edges add up in a wrong model as well.

The proof runs each block on three streams at once: the recorded one ``x``, ``x + step`` and ``x + 2 step``, with a
random step. An affine function moves by the same amount in both steps. So nothing needs to be known about the block's
weights or layout.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .collect import stopping_at
from .errors import ArchitectureError, TLCircuitsError
from .expected_warnings import edits_expected
from .holding import (
    Holds,
    HookList,
    can_replay_norm,
    can_replay_pattern,
    held_output,
    hold_hooks,
    pattern_point,
    scale_point,
)
from .norms import is_mlp_norm, norm_names
from .owned import put_module_hook
from .parity import watching
from .record import (
    FIRING_OPTIONS,
    Listener,
    denominators,
    final_hook,
    inner_points,
    require_causal,
    require_finite_tensor,
    stream_points,
)
from .sites import Model, find, model_device, walk, with_its_layer
from .turn import added_hooks, in_turn

PROBED = 4  # tokens of the prompt that the proof runs on
STREAMS = 3  # x, x + step, x + 2 step
# TransformerLens' options that change which hooks fire, or what attention reads.
OPTIONS = (*FIRING_OPTIONS, "ungroup_grouped_query_attention")
# How far a held block may be from affine, and from the recorded value, relative to how far a step moved it. Rounding
# stays below this; patterns or denominators that are not held are off by tenths.
_AFFINE_WITHIN = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_FORKS = ("use_split_qkv_input", "use_attn_in")  # attention then reads copies of the stream, each with its own norm


@in_turn
def prove(
    model: Model,
    tokens: Int[Tensor, " pos"],
    outputs: Mapping[int, str],
    inputs: Iterable[str],
    whole: bool = False,
) -> Holds:
    """Find a way to hold all patterns and denominators, and prove it on the first tokens of a prompt.

    Args:
        model: the model.
        tokens: the prompt ``[pos]``.
        outputs: the hook at which each layer's MLP output is replaced.
        inputs: the hooks that dictionaries read.
        whole: take the whole prompt, because hooks on the model may ask for its positions.

    Raises:
        ArchitectureError: something cannot be held, or a bridge computes something else than the model it wraps. The
            message names it.
    """
    forks = [option for option in _FORKS if getattr(model.cfg, option, False)]
    if forks:
        raise ArchitectureError(
            f"the option {forks[0]} is on: attention then reads copies of the stream that its norm's hook does not "
            f"reach, so denominators cannot be held. Switch it off with model.set_{forks[0]}(False)."
        )
    for layer in range(int(model.cfg.n_layers)):
        if find(model, pattern_point(layer)) is None:
            raise ArchitectureError(
                f"layer {layer} shows no attention pattern (a state-space, convolution or linear-attention layer), "
                "so what it moves between positions cannot be held and no exact graph exists."
            )
    # On a very short prompt nothing could be seen to fail: a single token attends to itself, held or not.
    if not whole or tokens.numel() < PROBED:
        tokens = tokens[:PROBED] if tokens.numel() >= PROBED else probe_tokens(model)
    inputs = tuple(dict.fromkeys(inputs))
    usual = _through_own_points(model, tokens, outputs, inputs)
    if usual is not None:
        return usual
    proof = _Proof(model, tokens, outputs, inputs)
    loose = proof.loose_norms()
    norms = tuple(name for name in proof.scales if name not in loose)
    holds = Holds(norms, frozenset(name for name in norms if find(model, scale_point(name)) is None), loose_norms=loose)
    found = proof.wrong(holds)
    for _ in range(2):
        if found is None:
            return holds
        holds = _another_way(model, holds, found)
        found = proof.wrong(holds)
    if found is None:
        return holds
    raise ArchitectureError(_refusal(model, found))


def probe_tokens(model: Model) -> Int[Tensor, " pos"]:
    """A few arbitrary token ids, for experiments on a model without a prompt."""
    return torch.arange(PROBED, device=model_device(model)) % int(model.cfg.d_vocab)


@in_turn
def moves_pattern(model: Model, layer: int) -> bool:
    """Whether a hook that adds to a layer's attention scores changes its pattern as softmax would."""
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
    """What failed when everything was held: norms by name, layers, and a sentence about it (``what``)."""

    norms: frozenset[str]
    layers: tuple[int, ...]
    what: str


def _another_way(model: Model, holds: Holds, found: _Wrong) -> Holds:
    norms = frozenset(n for n in found.norms if n not in holds.replayed_norms and can_replay_norm(model, n))
    if norms:
        return replace(holds, replayed_norms=holds.replayed_norms | norms)
    layers = {layer for layer in found.layers if can_replay_pattern(model, layer)} - holds.replayed_patterns
    if not layers:
        raise ArchitectureError(_refusal(model, found))
    return replace(holds, replayed_patterns=holds.replayed_patterns | layers)


def _refusal(model: Model, found: _Wrong) -> str:
    on = [option for option in OPTIONS if getattr(model.cfg, option, False)]
    hint = f" The option {on[0]} is on; try without it: model.set_{on[0]}(False)." if on else ""
    dtype = next(model.parameters()).dtype
    if dtype in (torch.float16, torch.bfloat16):
        hint += (
            f" In {str(dtype).removeprefix('torch.')}, rounding of large numbers may look the same: try torch.float32."
        )
    return (
        f"{found.what}, with attention patterns and norm denominators held. This architecture has something between "
        "its residual streams that cannot be held (a gate, a second mixer, a norm without hooks), so no exact graph "
        f"exists.{hint}"
    )


def _through_own_points(
    model: Model, tokens: Int[Tensor, " pos"], outputs: Mapping[int, str], inputs: tuple[str, ...]
) -> Holds | None:
    """Prove the usual case in a single pass: everything is held through its own point. None if that does not work.

    Everything is held at the values that the first of the three streams has in the same pass, so no clean pass is
    needed.
    """
    norms = norm_names(model)
    # A norm inside an MLP may not run once for every position, and it takes a clean pass to find out.
    if any(find(model, scale_point(name)) is None for name in norms) or _replayable_in_mlps(model, norms):
        return None
    places = _Places.of(model, outputs, inputs)
    fired: dict[str, Tensor] = {}
    held = [*(scale_point(name) for name in norms), *(pattern_point(layer) for layer in places.layers)]
    step = _Step()
    hooks: HookList = [(name, _hold_first(fired, name)) for name in held]
    hooks += [(name, _force_from_first(step)) for name in (*places.streams, *outputs.values())]
    seen = _moved_run(model, tokens, places, norms, hooks)
    if seen is None:
        return None
    for name, tensor in fired.items():
        require_finite_tensor(name, tensor)
    for layer in places.layers:
        if pattern_point(layer) in fired:
            require_causal(fired[pattern_point(layer)][0], layer)
    ran = tuple(name for name in norms if scale_point(name) in fired)
    scales = {name: fired[scale_point(name)] for name in ran}
    if _judge(model, places, Holds(ran), seen, scales, clean=None) is not None:
        return None
    seen.calls.compare(rows=1)  # only the first stream is a run of the model
    return Holds(ran)


def _replayable_in_mlps(model: Model, norms: Iterable[str]) -> list[str]:
    return [name for name in norms if is_mlp_norm(name) and can_replay_norm(model, name)]


@dataclass(frozen=True)
class _Places:
    """The hooks that the proof changes (streams, outputs) or looks at (inputs, last)."""

    layers: range
    streams: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    last: str

    @classmethod
    def of(cls, model: Model, outputs: Mapping[int, str], inputs: tuple[str, ...]) -> "_Places":
        layers = range(int(model.cfg.n_layers))
        streams = tuple(f"blocks.{layer}.hook_resid_pre" for layer in layers)
        return cls(layers, streams, tuple(outputs.values()), inputs, final_hook(model))

    def after(self, layer: int) -> str:
        """The hook that shows the stream after a layer; after the last one, what the unembedding reads."""
        return self.streams[layer + 1] if layer + 1 in self.layers else self.last


@dataclass(frozen=True)
class _Seen:
    """What a run on three streams showed, by hook: tensors, norms' inputs and outputs, and calls of modules.

    Streams are as they arrived at a block, before the proof replaced them.
    """

    tensors: dict[str, Tensor]
    norm_ends: dict[str, Tensor]
    calls: Any


def _moved_run(
    model: Model,
    tokens: Int[Tensor, " pos"],
    places: _Places,
    norms: Iterable[str],
    hooks: HookList,
) -> _Seen | None:
    """Run the model on three streams at once; None if TransformerLens fails on edited values."""
    ends = [f"{name}.{end}" for name in norms if can_replay_norm(model, name) for end in ("hook_in", "hook_out")]
    arriving: dict[str, Tensor] = {}
    arrivals: HookList = [(name, _arrival(arriving, name)) for name in places.streams[1:]]
    wanted = dict.fromkeys([*places.inputs, places.last])
    # The listener on norms comes before our hooks, so that it sees their own outputs and not what we write over them.
    with torch.no_grad(), edits_expected(), watching(model, attention_only=True) as calls:
        with Listener(model, (), None, ends) as at_norms, added_hooks(model, [*arrivals, *hooks]):
            with Listener(model, wanted) as listener, _returned(model, filter(is_mlp_norm, norms)) as returned:
                try:
                    with stopping_at(model, places.last):
                        model(tokens.expand(STREAMS, -1))
                except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
                    if isinstance(error, TLCircuitsError):
                        raise
                    return None
    listener.check()
    # A dictionary may read the stream itself; then it counts as it arrived, not as what the proof put in its place.
    return _Seen(listener.seen | arriving, at_norms.seen | returned, calls)


@contextmanager
def _returned(model: Model, norms: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield what norms return to their callers, after all hooks, by the names of their output hooks."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: Any, args: Any, output: Tensor) -> None:
            seen[f"{name}.hook_out"] = output.detach()

        return keep

    with ExitStack() as stack:
        for name in norms:
            stack.callback(put_module_hook(walk(model, name), keeper(name)))
        yield seen


def _judge(
    model: Model,
    places: _Places,
    holds: Holds,
    seen: _Seen,
    scales: Mapping[str, Tensor],
    clean: Mapping[str, Tensor] | None,
) -> _Wrong | None:
    """What is not affine, or (if there is a clean run) not as in that run; None if everything is right."""
    dtype = seen.tensors[places.last].dtype
    norms = frozenset(
        name
        for name in holds.norms
        # A replayed norm is judged by its block's output. Not so inside an MLP, whose output the proof replaces.
        if (name not in holds.replayed_norms or is_mlp_norm(name))
        and not _norm_holds(model, name, seen.norm_ends, scales[name], dtype)
    )
    if norms:
        first = next(name for name in holds.norms if name in norms)
        return _Wrong(norms, (), f"{first} does not keep its denominator")

    def affine(name: str) -> bool:
        rows = seen.tensors[name]
        return _affine(rows, rows[: len(rows) // STREAMS] if clean is None else clean[name], dtype)

    layers = tuple(layer for layer in places.layers if not affine(places.after(layer)))
    if layers:
        return _Wrong(frozenset(), layers, f"layer {layers[0]} is not linear in the stream that enters it")
    for name in places.inputs:
        if not affine(name):
            return _Wrong(frozenset(), (), f"{name} is not linear in the residual stream")
    return None


def _affine(rows: Tensor, clean: Tensor, dtype: torch.dtype) -> bool:
    """Whether three runs' tensors lie on a line at equal distances, and the first is the clean run's."""
    here, once, twice = rows.float().reshape(STREAMS, -1, rows.shape[-1])
    clean = clean.float().reshape(-1, clean.shape[-1]).to(here.device)
    size = (once - here).abs().amax(-1).clamp_min(1e-30)
    noise = 1e-5 * float(clean.abs().max())
    off = torch.maximum((twice - 2 * once + here).abs().amax(-1), (here - clean).abs().amax(-1))
    moved = bool((once != here).any())  # if the step changes nothing, the stream was not really replaced
    return moved and bool((off <= _AFFINE_WITHIN[dtype] * size + noise).all())


def _norm_holds(model: Model, name: str, ends: Mapping[str, Tensor], scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether a norm's output is its input over the held denominator."""
    points = [f"{name}.{end}" for end in ("hook_in", "hook_out")]
    if any(point not in ends for point in points):
        return True  # a HookedTransformer's norm shows neither; it is judged by its block's output
    x, y = (ends[point].float() for point in points)
    expected = held_output(model, name, x, scale)
    size = expected.abs().amax(-1).clamp_min(1e-30)
    return bool(((expected - y).abs().amax(-1) / size).max() <= _AFFINE_WITHIN[dtype])


class _Step:
    """Random steps, as long as the vector at each position that they move; the same in every run."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def streams(self, x: Float[Tensor, "1 pos d"]) -> Float[Tensor, "3 pos d"]:
        """``x``, ``x + step`` and ``x + 2 step``, as a batch of three."""
        size = x.float().square().mean(-1, keepdim=True).sqrt()
        step = torch.randn(x.shape, generator=self._generator).to(x.device) * size
        return torch.cat([x.float() + k * step for k in range(STREAMS)]).to(x.dtype)


class _Proof:
    """The proof for models that need more than their own points: one clean pass, and held passes compared with it."""

    def __init__(self, model: Model, tokens: Int[Tensor, " pos"], outputs: Mapping[int, str], inputs: tuple[str, ...]):
        self._model, self._tokens = model, tokens
        self._places = places = _Places.of(model, outputs, inputs)
        norms = norm_names(model)
        names = [*places.streams, *places.outputs, *inputs, *stream_points(model, norms), places.last]
        names += [pattern_point(layer) for layer in places.layers]
        with torch.no_grad(), watching(model) as calls:
            with Listener(model, dict.fromkeys(names), None, inner_points(model, norms)) as listener:
                with stopping_at(model, places.last):
                    model(tokens[None])
        listener.check()
        for name, tensor in listener.seen.items():  # in the order in which they fired
            require_finite_tensor(name, tensor)
        calls.compare()
        self._clean = {name: with_its_layer(model, name, tensor.detach()) for name, tensor in listener.seen.items()}
        self.scales = denominators(model, norms, self._clean)
        self._values = {scale_point(name): scale for name, scale in self.scales.items()}
        for layer in places.layers:
            pattern = self._clean[pattern_point(layer)]
            require_causal(pattern[0], layer)
            self._values[pattern_point(layer)] = pattern
        step = _Step()
        self._moved = {name: step.streams(self._clean[name]) for name in (*places.streams, *places.outputs)}

    def loose_norms(self) -> tuple[str, ...]:
        """The norms inside MLPs that do not run once for every position: experts' norms see what is routed to them."""
        model = self._model
        names = _replayable_in_mlps(model, norm_names(model))
        if not names:
            return ()
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks: HookList = [(f"{name}.hook_in", _append(kept)) for name, kept in seen.items()]
        hooks += [(name, _force(value)) for name, value in self._moved.items()]
        with torch.no_grad(), added_hooks(model, hooks), stopping_at(model, self._places.last):
            model(self._tokens.expand(STREAMS, -1))
        return tuple(name for name in names if not self._in_order(seen[name], self._clean.get(f"{name}.hook_in")))

    def _in_order(self, seen: list[Tensor], clean: Tensor | None) -> bool:
        """Whether a norm ran once on every position of all three streams, in order, so that the clean one is first."""
        if clean is None or len(seen) != 1 or seen[0].numel() != STREAMS * clean.numel():
            return False
        if clean.shape[0 if clean.ndim == 2 else 1] != self._tokens.numel():
            return False
        first = seen[0].reshape(STREAMS, -1)[0].float()
        return bool((first - clean.flatten().float()).abs().max() <= _AFFINE_WITHIN[clean.dtype] * clean.abs().max())

    def wrong(self, holds: Holds) -> _Wrong | None:
        """What is not affine or not as recorded if everything is held in these ways; None if everything is right."""
        forced: HookList = [(name, _force(value)) for name, value in self._moved.items()]
        hooks = [*hold_hooks(self._model, holds, self._values), *forced]
        seen = _moved_run(self._model, self._tokens, self._places, holds.norms, hooks)
        if seen is None:  # OLMo's norms have no gain, which TransformerLens' code for edited denominators expects
            what = "the model fails when its denominators are edited"
            return _Wrong(frozenset(holds.norms), tuple(self._places.layers), what)
        return _judge(self._model, self._places, holds, seen, self.scales, self._clean)


def _hold_first(fired: dict[str, Tensor], name: str) -> Callable[[Tensor, HookPoint], Tensor]:
    def hold(tensor: Tensor, hook: HookPoint) -> Tensor:
        rows = tensor.reshape(STREAMS, -1, *tensor.shape[1:])  # OPT lays the rows of a batch flat
        fired[name] = rows[0] if rows.shape[1] == 1 else rows[:1].flatten(0, 1)[None]
        return rows[:1].expand_as(rows).reshape(tensor.shape).contiguous()

    return hold


def _force_from_first(step: _Step) -> Callable[[Tensor, HookPoint], Tensor]:
    def force(tensor: Tensor, hook: HookPoint) -> Tensor:
        return step.streams(tensor[:1])

    return force


def _force(value: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    def force(tensor: Tensor, hook: HookPoint) -> Tensor:
        return value.to(tensor.device)

    return force


def _append(kept: list[Tensor]) -> Callable[[Tensor, HookPoint], None]:
    def keep(tensor: Tensor, hook: HookPoint) -> None:
        kept.append(tensor.detach())

    return keep


def _arrival(arriving: dict[str, Tensor], name: str) -> Callable[[Tensor, HookPoint], None]:
    def keep(tensor: Tensor, hook: HookPoint) -> None:
        arriving[name] = tensor.detach()

    return keep
