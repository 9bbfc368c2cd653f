"""What edits come to in a batch of runs: which entry of which tensor becomes what, worked out before the model runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .any_site import flat
from .edits import (
    Ablate,
    Add,
    CellEdit,
    Edit,
    ErrorEdit,
    HeadEdit,
    Patch,
    PatternEdit,
    Scale,
    ScoreEdit,
    Set,
    TokenEdit,
    Where,
    one_or_several,
)
from .errors import ArgumentError, EditError
from .numbers import real, shown
from .places import BlockPlace, by_place, place_number, places
from .prompt import to_tokens
from .record import Listener
from .sites import Model, layer_device, with_its_layer


@dataclass(frozen=True)
class Ops:
    """Edits of one kind at one place, worked out entry by entry: ``new = gain · old + shift``.

    ``row`` is the number of the run in the batch; ``feature`` is -1 for error terms and tokens.
    """

    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    gain: Float[Tensor, " n"]
    shift: Float[Tensor, " n"]

    def to(self, device: torch.device) -> "Ops":
        """The same on another device."""
        return Ops(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def within(self, start: int, stop: int) -> "Ops":
        """The entries at positions ``start .. stop-1``, positions counted from ``start``."""
        kept = (self.position >= start) & (self.position < stop)
        return Ops(self.row[kept], self.position[kept] - start, self.feature[kept], self.gain[kept], self.shift[kept])


@dataclass(frozen=True)
class HeadOps:
    """Edits of one layer's attention, entry by entry: each ``value`` is set in a pattern, or added to a score."""

    row: Int[Tensor, " n"]
    head: Int[Tensor, " n"]
    query: Int[Tensor, " n"]
    key: Int[Tensor, " n"]
    value: Float[Tensor, " n"]

    def __getitem__(self, index: Tensor) -> "HeadOps":
        return HeadOps(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> "HeadOps":
        """The same on another device."""
        return HeadOps(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def within(self, start: int, stop: int) -> "HeadOps":
        """The entries with queries at ``start .. stop-1``, queries counted from ``start``."""
        kept = self[(self.query >= start) & (self.query < stop)]
        return replace(kept, query=kept.query - start)


@dataclass(frozen=True)
class Plan:
    """All edits of a batch of runs, on the layer's device.

    Those of features and errors are by number of the place (:mod:`.places`), those of attention by layer.
    """

    features: dict[int, Ops]
    errors: dict[int, Ops]
    tokens: Ops | None
    patterns: dict[int, HeadOps] = field(default_factory=dict)
    scores: dict[int, HeadOps] = field(default_factory=dict)

    def within(self, start: int, stop: int) -> "Plan":
        """The part of the plan at positions ``start .. stop-1``."""
        return Plan(
            {layer: ops.within(start, stop) for layer, ops in self.features.items()},
            {layer: ops.within(start, stop) for layer, ops in self.errors.items()},
            None if self.tokens is None else self.tokens.within(start, stop),
            {layer: ops.within(start, stop) for layer, ops in self.patterns.items()},
            {layer: ops.within(start, stop) for layer, ops in self.scores.items()},
        )


def positions_of(where: Where, n_prompt: int, n_total: int) -> list[int]:
    """The positions that ``where`` names, counted from the start.

    Args:
        where: one position, several, a slice, or None for all.
        n_prompt: the prompt's length, from whose end negative positions count.
        n_total: the length with generated tokens, to which open slices run.

    Raises:
        EditError: a position is outside, or a slice selects nothing.
    """
    if where is None:
        return list(range(n_total))
    try:
        where = one_or_several(where)
    except ArgumentError as error:
        raise EditError(f"a position is a whole number, several, a slice or None, got {shown(where)}.") from error
    if isinstance(where, slice):
        if where.step not in (None, 1):
            raise EditError(f"a slice of positions must have step 1, got {where}.")
        start = 0 if where.start is None else where.start + (n_prompt if where.start < 0 else 0)
        stop = n_total if where.stop is None else where.stop + (n_prompt if where.stop < 0 else 0)
        found = list(range(max(start, 0), min(stop, n_total)))
        if not found:
            raise EditError(
                f"the slice {where.start}:{where.stop} selects none of the {n_total} positions. A slice that starts "
                "after the prompt is for tlc.generate only."
            )
        return found
    each = [where] if isinstance(where, int) else list(where)
    if not each:
        raise EditError("an edit names no position; give at least one, or None for all.")
    for position in each:
        if not -n_prompt <= position < n_total:
            raise EditError(f"there is no position {position!r}: positions are {-n_prompt}..{n_total - 1}.")
    return [p + n_prompt if p < 0 else p for p in each]


def as_edits(given: Any) -> tuple[Any, ...]:
    """One edit or several as a tuple.

    Raises:
        ArgumentError: it is neither.
    """
    if isinstance(given, Edit):
        return (given,)
    if isinstance(given, (str, bytes, type)) or not isinstance(given, Iterable):
        raise ArgumentError(
            f"edits are an edit, such as tlc.Ablate(layer, position, feature), or a list of them, got {shown(given)}."
        )
    return tuple(given)


def make_plan(model: Model, dictionary: Any, edit_sets: Sequence[Sequence[Any]], n_prompt: int, n_total: int) -> Plan:
    """Work out which entries each edit changes, for every run of a batch.

    Args:
        model: the model.
        dictionary: the attached dictionary.
        edit_sets: the edits of each run.
        n_prompt: the prompt's length.
        n_total: the length with generated tokens.

    Raises:
        EditError: a layer, position or feature does not exist, a layer has no dictionary, or several and the edit does
            not say which, a value is not finite, or two edits of a run change the same thing.
    """
    every = places(dictionary, int(model.cfg.n_layers))
    entries: dict[tuple[str, int], list[tuple[int, int, int, float, float]]] = {}
    for row, edits in enumerate(edit_sets):
        taken: set[tuple[str, int, int, int]] = set()
        for edit in edits:
            if isinstance(edit, HeadEdit):
                continue
            kind, at, cells = _resolve(model, dictionary, edit, n_prompt, n_total)
            for position, feature, gain, shift in cells:
                cell = (kind, at, position, feature)
                if cell in taken:
                    raise EditError(
                        f"{edit} changes the same place as another edit of this run ({_name(cell, every)}); merge the "
                        "two into one."
                    )
                taken.add(cell)
                entries.setdefault((kind, at), []).append((row, position, feature, gain, shift))

    def ops(at: int, cells: list[tuple[int, int, int, float, float]]) -> Ops:
        device = layer_device(model, every[at].layer if at >= 0 else 0)
        row, position, feature, gain, shift = zip(*cells, strict=True)
        whole = [torch.tensor(column, device=device) for column in (row, position, feature)]
        real = [torch.tensor(column, device=device, dtype=torch.float32) for column in (gain, shift)]
        return Ops(*whole, *real)

    by_kind = {
        kind: {at: ops(at, cells) for (k, at), cells in sorted(entries.items()) if k == kind}
        for kind in ("feature", "error", "token")
    }
    patterns, scores = (_head_ops(model, edit_sets, kind, n_prompt, n_total) for kind in (PatternEdit, ScoreEdit))
    return Plan(by_kind["feature"], by_kind["error"], by_kind["token"].get(-1), patterns, scores)


def _head_ops(
    model: Model, edit_sets: Sequence[Sequence[Any]], kind: type[HeadEdit], n_prompt: int, n_total: int
) -> dict[int, HeadOps]:
    """All edits of patterns, or all of scores, by layer."""
    cells: dict[int, dict[tuple[int, int, int, int], float]] = {}
    for row, edits in enumerate(edit_sets):
        for edit in edits:
            if not isinstance(edit, kind):
                continue
            _require_number(edit, "value")
            for name, count in (("layer", int(model.cfg.n_layers)), ("head", int(model.cfg.n_heads))):
                given = getattr(edit, name)
                if type(given) is not int or not 0 <= given < count:
                    raise EditError(f"{edit}: {name} {shown(given)} is not in 0..{count - 1}.")
            (query,), (key,) = (positions_of(_one(edit, place), n_prompt, n_total) for place in ("query", "key"))
            if key > query:
                raise EditError(f"{edit}: key {key} lies behind query {query}; attention only looks back.")
            place = (row, edit.head, query, key)
            if place in cells.setdefault(edit.layer, {}):
                raise EditError(f"{edit} changes the same place as another edit of this run; merge the two into one.")
            cells[edit.layer][place] = float(edit.value)
    made = {}
    for layer, found in sorted(cells.items()):
        row, head, query, key = torch.tensor(list(found)).T
        ops = HeadOps(row, head, query, key, torch.tensor(list(found.values())))
        made[layer] = ops.to(layer_device(model, layer))
    return made


def _one(edit: Any, place: str) -> int:
    position = getattr(edit, place)
    if type(position) is not int:
        raise EditError(f"{edit}: {place} must be one position, got {shown(position)}.")
    return position


def _require_number(edit: Any, name: str) -> None:
    real(getattr(edit, name, 0.0), f"{edit}: {name}", EditError)


def _name(cell: tuple[str, int, int, int], every: Sequence[BlockPlace]) -> str:
    kind, at, position, feature = cell
    place = every[at]
    where = f"layer {place.layer}" + (f", {place.site}," if place.site else "")
    return {
        "feature": f"feature {feature} of {where} at position {position}",
        "error": f"the error of {where} at position {position}",
        "token": f"the token at position {position}",
    }[kind]


def _resolve(
    model: Model, dictionary: Any, edit: Any, n_prompt: int, n_total: int
) -> tuple[str, int, list[tuple[int, int, float, float]]]:
    """Kind, number of the place (-1 for tokens), and ``(position, feature, gain, shift)`` of each cell that changes."""
    if not isinstance(edit, CellEdit):  # edits of heads are no cells, and were taken out before
        raise EditError(
            f"an edit is Ablate, Set, Scale, Add, Patch, ErrorEdit, TokenEdit, PatternEdit or ScoreEdit, got {edit!r}."
        )
    for name in ("value", "factor"):
        _require_number(edit, name)
    where = positions_of(edit.position, n_prompt, n_total)
    if isinstance(edit, TokenEdit):
        return "token", -1, [(p, -1, float(edit.factor), 0.0) for p in where]
    n_layers = int(model.cfg.n_layers)
    if type(edit.layer) is not int or not 0 <= edit.layer < n_layers:
        raise EditError(f"{edit}: layer {shown(edit.layer)} is not in 0..{n_layers - 1}.")
    if isinstance(edit, ErrorEdit):
        if edit.layer not in dictionary.layers and getattr(dictionary, "mlps", "error") == "ratio":
            raise EditError(
                f"{edit}: layer {edit.layer} has no error node, because no dictionary replaces its MLP and the MLP is "
                "passed (mlps='ratio')."
            )
        return "error", _place(dictionary, edit), [(p, -1, float(edit.factor), 0.0) for p in where]
    if edit.layer not in dictionary.layers:
        raise EditError(
            f"{edit}: layer {edit.layer} has no dictionary; the attached ones are "
            f"{', '.join(map(str, dictionary.layers))}."
        )
    try:
        found = one_or_several(edit.feature)
        features = [found] if isinstance(found, int) else list(found)
    except (ArgumentError, TypeError) as error:  # TypeError: None and slices, which name no feature
        raise EditError(f"{edit}: a feature is a whole number, or several.") from error
    if not features:
        raise EditError(f"{edit} names no feature; give at least one.")
    at, placed = _place(dictionary, edit), by_place(dictionary)
    width = placed.width(at)
    for feature in features:
        if not 0 <= feature < width:
            raise EditError(f"{edit}: feature {feature!r} is not in 0..{width - 1} of layer {edit.layer}.")
    if isinstance(edit, Patch):
        return "feature", at, _patched(model, placed, at, edit, where, features)
    gain, shift = {
        Ablate: (0.0, 0.0),
        Set: (0.0, float(getattr(edit, "value", 0.0))),
        Scale: (float(getattr(edit, "factor", 1.0)), 0.0),
        Add: (1.0, float(getattr(edit, "value", 0.0))),
    }[type(edit)]
    return "feature", at, [(p, f, gain, shift) for p in where for f in features]


def _place(dictionary: Any, edit: Any) -> int:
    try:
        return place_number(dictionary, edit.layer, edit.site, EditError)
    except EditError as error:
        raise EditError(f"{edit}: {error}") from error


def _patched(
    model: Model, dictionary: Any, at: int, edit: Patch, where: list[int], features: list[int]
) -> list[tuple[int, int, float, float]]:
    tokens = to_tokens(model, edit.source, dictionary.prompt_rule)
    if max(where) >= tokens.numel():
        raise EditError(
            f"{edit}: the source prompt has {tokens.numel()} tokens, position {max(where)} is not among them."
        )
    name = dictionary.input_hook(at)
    with torch.no_grad(), Listener(model, [name]) as listener:
        model(tokens[None])
    x = with_its_layer(model, name, flat(listener.seen[name])[0])
    index = torch.tensor(features, device=x.device)
    cells = []
    for position in where:
        inputs = x[position].expand(len(features), -1)
        values = dictionary.activations_at(at, index, inputs).tolist()
        cells += [(position, f, 0.0, v) for f, v in zip(features, values, strict=True)]
    return cells
