"""Run a model with edits, through ordinary TransformerLens hooks.

``freeze`` says what keeps the value of the run without edits: ``"none"``: nothing. ``"attention"``: attention patterns
and norm denominators. ``"all"``: also all MLP outputs and all that dictionaries rebuild, so that an edit has its direct
effects only. (Where MLPs are passed in graphs, ``"all"`` holds their activation ratios instead of their outputs.)
``constrained_layers`` holds the MLP outputs of some layers (constrained patching, Ameisen et al. 2025).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .any_site import flat, own_sites, passed_mlps, passing_points
from .attach import Replacement, output_site
from .edit_plan import Ops, Plan
from .errors import EditError
from .expected_warnings import edits_expected
from .head_edits import head_edit_hooks, held_pattern_edits
from .held_mlp import HeldMLP, held_mlp
from .holding import Holds, HookList, hold_hooks, pattern_point, scale_point, why_loose
from .owned import others_hooks
from .places import by_place, places
from .record import (
    Listener,
    denominators,
    final_hook,
    final_stream,
    inner_points,
    require_causal,
    require_logits,
    stream_points,
    unembedding_only,
)
from .sites import Model, find, layer_of, with_its_layer
from .turn import added_hooks, in_turn

FREEZE_MODES = ("all", "attention", "none")
_STREAM = "blocks.0.hook_resid_pre"


def require_freeze(freeze: str) -> None:
    """Raise EditError for an unknown freeze mode."""
    if freeze not in FREEZE_MODES:
        raise EditError(f"freeze must be one of {', '.join(FREEZE_MODES)}, got {freeze!r}.")


@dataclass(frozen=True)
class CleanRun:
    """What the model without edits computed on a prompt.

    ``seen``: tensors by hook name, with their batch dimension; every norm's denominator is there as
    ``NORM.hook_scale``, even if the norm has no such hook.
    """

    seen: dict[str, Tensor]
    holds: Holds
    final: Float[Tensor, "pos d_model"]
    skipped: tuple[int, ...]
    held_mlps: dict[int, HeldMLP] = field(default_factory=dict, repr=False, compare=False)

    def held_mlp(self, replacement: Replacement, layer: int) -> HeldMLP:
        """A passed MLP with the ratios that it has in this run; made once."""
        if layer not in self.held_mlps:
            points = passing_points(replacement.model, replacement.dictionary, (layer,))
            read, written = (self.seen[name].reshape(self.final.shape) for name in points)
            self.held_mlps[layer] = held_mlp(replacement.model, layer, read, written, self.skipped)
        return self.held_mlps[layer]


@in_turn
def clean_run(replacement: Replacement, tokens: Int[Tensor, " pos"], skipped: Sequence[int] = ()) -> CleanRun:
    """Run the model without edits and keep everything that a freeze mode may hold.

    At ``skipped`` positions a graph counts the whole MLP output as constant. So if MLP outputs are held, changes do not
    pass through a transcoder's skip connection there.
    """
    model, dictionary = replacement.model, by_place(replacement.dictionary)
    layers = range(int(model.cfg.n_layers))
    holds = replacement.holds(tokens)
    names = [*stream_points(model, holds.norms), *(pattern_point(layer) for layer in layers)]
    names += [output_site(replacement, place) for place in range(len(places(dictionary, len(layers))))]
    names += passing_points(model, dictionary, layers)
    names += [dictionary.input_hook(place) for place in dictionary.layers] + [_STREAM, final_hook(model)]
    inner = inner_points(model, holds.norms)
    with torch.no_grad(), Listener(model, dict.fromkeys(names), None, inner) as listener, unembedding_only(model, -1):
        logits = model(tokens[None])[0, -1]
    listener.check()
    seen = {name: with_its_layer(model, name, tensor.detach()) for name, tensor in listener.seen.items()}
    seen |= {name: flat(seen[name]) for name in own_sites(dictionary)}
    for layer in layers:
        require_causal(seen[pattern_point(layer)][0], layer)
    seen |= {scale_point(name): scale for name, scale in denominators(model, holds.norms, seen).items()}
    final = final_stream(model, seen[final_hook(model)][0])
    require_logits(model, final[-1], logits)
    return CleanRun(seen, holds, final, tuple(skipped))


def edit_hooks(
    replacement: Replacement,
    plan: Plan,
    clean: CleanRun | None,
    freeze: str = "none",
    constrained_layers: Sequence[int] = (),
    arrivals: dict[str, Tensor] | None = None,
) -> HookList:
    """The hooks that carry out edits; use them with ``run_with_hooks`` or ``add_hook``.

    Args:
        replacement: the model and its dictionary.
        plan: the edits.
        clean: the run whose values are held; may be None if nothing is.
        freeze: what is held: ``"none"``, ``"attention"`` or ``"all"``.
        constrained_layers: layers whose dictionaries' outputs, or MLP output, are held in addition.
        arrivals: filled, when the hooks run, with what autoencoders read, before edits change it.

    Raises:
        EditError: the freeze mode is unknown, a layer's attention cannot be edited, or values are held and ``clean``
            is None.
    """
    require_freeze(freeze)
    model, n_layers = replacement.model, int(replacement.model.cfg.n_layers)
    layers = set(range(n_layers)) if freeze == "all" else set(constrained_layers)
    held = {number for number, place in enumerate(places(replacement.dictionary, n_layers)) if place.layer in layers}
    hooks: HookList = []
    if freeze == "none":
        hooks += head_edit_hooks(replacement, plan)
    if clean is None:
        if freeze != "none" or held:
            raise EditError(
                f"freeze={freeze!r} with constrained_layers={sorted(layers)} holds values of a run without edits, and "
                "clean is None; give clean=clean_run(replacement, tokens)."
            )
    elif freeze != "none":
        _require_norms_held(clean.holds, layers)
        _require_own_softmax(model, plan)
        hooks += hold_hooks(model, clean.holds, clean.seen, held_pattern_edits(plan))
    if plan.tokens is not None:
        hooks.append((_STREAM, _scale_rows(plan.tokens)))
    if freeze == "all" and clean is not None:
        for layer in passed_mlps(replacement.dictionary, n_layers):
            hooks += _passing(replacement, clean, layer)
        # a layer without a dictionary holds nothing beyond these ratios
        if passed_mlps(replacement.dictionary, n_layers):
            held &= set(by_place(replacement.dictionary).layers)
    if arrivals is not None:
        hooks += [(name, _arrival(arrivals, name)) for name in own_sites(replacement.dictionary)]
    changes = _Changes(replacement, plan, clean, held)
    for place in range(len(places(replacement.dictionary, n_layers))):
        hooks += changes.hooks(place)
    return hooks


def _require_own_softmax(model: Model, plan: Plan) -> None:
    """Raise EditError for edits of scores whose held pattern a user's hook has changed: no softmax made that one."""
    others = others_hooks(model)
    for layer in plan.scores:
        point = find(model, pattern_point(layer))
        changed = next((name for name in others if find(model, name) is point), None)
        if changed is not None:
            raise EditError(
                f"a hook that is not of this package, on {changed}, changes the pattern of layer {layer}, so an "
                "added score cannot be worked out from the held pattern. Use freeze='none', set the pattern "
                "(PatternEdit), or take the hook off."
            )


def _require_norms_held(holds: Holds, held: set[int]) -> None:
    """Raise EditError where an MLP outside the layers ``held`` has a norm that cannot be held."""
    loose = [name for name in holds.loose_norms if layer_of(name) not in held]
    if loose:
        raise EditError(why_loose(loose[0]))


def _scale_rows(ops: Ops) -> Callable[[Tensor, HookPoint], Tensor]:
    def scale(tensor: Tensor, hook: HookPoint) -> Tensor:
        here, edited = ops.to(tensor.device), tensor.clone()
        edited[here.row, here.position] *= here.gain[:, None].to(tensor.dtype)
        return edited

    return scale


def _arrival(arrivals: dict[str, Tensor], name: str) -> Callable[[Tensor, HookPoint], None]:
    def keep(tensor: Tensor, hook: HookPoint) -> None:
        arrivals[name] = flat(tensor.detach())

    return keep


def _passing(replacement: Replacement, clean: CleanRun, layer: int) -> HookList:
    """Hooks that pass an MLP with its ratios held: its output changes by what the change of its input makes."""
    read, written = passing_points(replacement.model, replacement.dictionary, (layer,))
    mlp = clean.held_mlp(replacement, layer)
    inputs: list[Tensor] = []

    def keep(x: Tensor, hook: HookPoint) -> None:
        inputs[:] = [x]

    def write(y: Tensor, hook: HookPoint) -> Tensor:
        shape = (-1, *clean.final.shape)
        moved = mlp.linear(inputs.pop().reshape(shape).float() - clean.seen[read].reshape(shape).float())
        return (clean.seen[written].reshape(shape).float() + moved).to(y.dtype).reshape(y.shape)

    return [(read, keep), (written, write)]


class _Changes:
    """The hooks for edits of features and errors.

    Changes are computed at a dictionary's input, and added where it writes.
    """

    def __init__(self, replacement: Replacement, plan: Plan, clean: CleanRun | None, held: set[int]):
        self._replacement, self._plan, self._held = replacement, plan, held
        self._seen: dict[str, Tensor] = {} if clean is None else clean.seen
        self._skipped = [] if clean is None else list(clean.skipped)
        self._inputs: dict[int, Tensor] = {}
        dictionary = self._dictionary = by_place(replacement.dictionary)
        # An error term is the output minus all features that write to the place, so all their inputs are needed.
        self._read = set(plan.features).union(
            *(dictionary.writers(place) for place in plan.errors if place in dictionary.layers)
        )

    def hooks(self, place: int) -> HookList:
        dictionary = self._dictionary
        has = place in dictionary.layers
        writers = [w for w in (dictionary.writers(place) if has else ()) if w in self._plan.features]
        held, error = place in self._held, self._plan.errors.get(place)
        hooks: HookList = []
        if has and (held or place in self._read):
            hooks.append((dictionary.input_hook(place), self._keeper(place)))
        if writers or held or error is not None:
            hooks.append((output_site(self._replacement, place), self._writer(place, writers, error)))
        return hooks

    def _keeper(self, place: int) -> Callable[[Tensor, HookPoint], None]:
        name = self._dictionary.input_hook(place)

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            self._inputs[place] = flat(with_its_layer(self._replacement.model, name, tensor))

        return keep

    def _writer(self, place: int, writers: list[int], error: Ops | None) -> Callable[[Tensor, HookPoint], Tensor]:
        held = place in self._held

        def write(tensor: Tensor, hook: HookPoint) -> Tensor:
            shape, tensor = tensor.shape, flat(tensor)
            out = tensor.float()
            if held:
                out = self._seen[output_site(self._replacement, place)].float().expand_as(out)
                out = out + self._through_skip(place)
            change = torch.zeros_like(out)
            for writer in writers:
                self._add(change, writer, place)
            if error is not None:
                self._scale_error(change, tensor, place, error)
            return (out + change).to(tensor.dtype).reshape(shape)

        return write

    def _input(self, place: int) -> Tensor:
        """The input that the place's features are computed from; that of the clean run if the place is held."""
        if place in self._held:
            name = self._dictionary.input_hook(place)
            return self._seen[name].expand_as(self._inputs[place])
        return self._inputs[place]

    def _add(self, change: Tensor, writer: int, place: int) -> None:
        ops, dictionary = self._plan.features[writer], self._dictionary
        if ops.row.numel() == 0:
            return
        x = self._input(writer)[ops.row, ops.position]
        old = dictionary.activations_at(writer, ops.feature, x)
        difference = ops.gain * old + ops.shift - old
        scale = dictionary.written_scale(writer, x)
        difference = difference if scale is None else difference * scale
        rows = difference[:, None] * dictionary.decoder_vectors(writer, ops.feature, place)
        here = ops.to(change.device)
        change.index_put_((here.row, here.position), rows.to(change.device), accumulate=True)

    def _scale_error(self, change: Tensor, tensor: Tensor, place: int, ops: Ops) -> None:
        dictionary = self._dictionary
        if ops.row.numel() == 0:
            return
        held = place in self._held
        output = self._seen[output_site(self._replacement, place)] if held else tensor
        error = output.float().expand_as(change)[ops.row, ops.position]
        if place in dictionary.layers:
            acts = {}
            for writer in dictionary.writers(place):
                at = ops.to(self._input(writer).device)
                x = self._input(writer)[at.row, at.position]
                acts[writer] = dictionary.activate(writer, dictionary.pre_activations(writer, x), x)
            error = error - dictionary.decode(place, acts, self._input(place)[ops.row, ops.position])
        change.index_put_((ops.row, ops.position), (ops.gain - 1)[:, None] * error, accumulate=True)

    def _through_skip(self, place: int) -> Tensor | float:
        """What a skip connection adds to a held output: it is linear and not held, so it follows its input."""
        dictionary = self._dictionary
        skip = dictionary.skip(place) if place in dictionary.layers else None
        if skip is None:
            return 0.0
        moved = self._inputs[place].float() - self._seen[dictionary.input_hook(place)].float()
        through = moved @ skip.T
        through[:, self._skipped] = 0.0
        return through


@in_turn
def run_edited(
    replacement: Replacement,
    tokens: Int[Tensor, "batch pos"],
    hooks: HookList,
    wanted: Sequence[str] = (),
    arrivals: Mapping[str, Tensor] | None = None,
) -> tuple[Float[Tensor, "batch pos d_model"], dict[str, Tensor]]:
    """Run the model with hooks, and remove them again in any case.

    Returns:
        What the unembedding reads, and the tensors of the ``wanted`` hooks; for those in ``arrivals`` (of
        :func:`edit_hooks`), as they were before edits changed them.
    """
    model = replacement.model
    with torch.no_grad(), edits_expected():
        with added_hooks(model, hooks), Listener(model, dict.fromkeys([*wanted, final_hook(model)])) as listener:
            with unembedding_only(model, None):
                model(tokens)
    listener.check()
    seen = {name: with_its_layer(model, name, tensor.detach()) for name, tensor in listener.seen.items()}
    return final_stream(model, seen[final_hook(model)]), {
        name: (arrivals or {}).get(name, seen[name]) for name in wanted
    }
