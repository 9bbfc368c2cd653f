"""Baselines: compare a prompt with other prompts, position by position, for a contrast graph.

A contrast graph answers "why this answer *here*?". Every source counts by how it differs from the baseline, which is
its mean over the other prompts: ``(a - ā)·d`` for a feature, embedding minus mean embedding, error minus mean error.
What the baseline has as well is one more source; its effect on each node is in the column ``shared``. The frozen maps
are those of the prompt that is explained, so edges and biases still add up.

Transluce 2026 (arXiv 2601.22594) chooses circuits of neurons by such differences; RelP (arXiv 2508.21258) holds the
same things fixed.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.aligned_prompts import Family
from tl_circuits.attribution.sources import Sources, add_decoded, find_sources, output_of, recorded_sites
from tl_circuits.dictionaries.base import LayerActive
from tl_circuits.errors import BaselineError, NotFiniteError
from tl_circuits.hooks import Recording, Replacement, record


@dataclass(frozen=True)
class LayerMean:
    """Mean activations and mean error at one place over the baseline's prompts (a layer, or one of its dictionaries).

    ``position`` is that of the prompt to explain. A feature that is not listed is 0 on all of the baseline's prompts.
    ``written``: the mean of everything that features and error write. ``activation`` is times the input's own factor,
    for autoencoders that normalise their input.
    """

    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    error: Float[Tensor, "pos d_out"] | None
    written: Float[Tensor, "pos d_out"]


@dataclass(frozen=True)
class PositionMeans:
    """The baseline at each position of the prompt to explain: mean embeddings, and a :class:`LayerMean` a place.

    ``answers``: the likeliest next token of each prompt of the baseline.
    """

    tokens: Float[Tensor, "pos d_model"]
    layers: tuple[LayerMean, ...]
    answers: tuple[int, ...] = ()


def position_means(replacement: Replacement, family: Family, sources: Sources, position: int) -> PositionMeans:
    """Run the baseline's prompts, one at a time, and average embeddings, activations and errors at each position.

    ``position`` is where the prompt's answer is read; a baseline prompt's is read at the corresponding position, or at
    its last one. At a position that no baseline prompt has, all means are zero, so sources count in full, as without a
    baseline.
    """
    total = _Sums(sources)
    model, dictionary = replacement.model, sources.dictionary
    sites = recorded_sites(model, dictionary)
    answers = []
    for member in family.members:
        tokens = torch.tensor(member.token_ids)
        read_at = member.places.index(position) if position in member.places else len(tokens) - 1
        try:
            recording = record(model, tokens, read_at, sites)
        except NotFiniteError as error:
            raise BaselineError(f"the baseline prompt {member.text!r} cannot be run: {error}") from error
        answers.append(int(recording.whole_logits.argmax()))
        # Exact dictionaries have no errors, so their outputs need not be taken apart.
        found = None if dictionary.exact else find_sources(model, dictionary, recording, ())
        total.add(recording, found, torch.tensor(member.places))
    return replace(total.means(), answers=tuple(answers))


class _Sums:
    """Sums over the baseline's prompts, by position of the prompt to explain."""

    def __init__(self, sources: Sources):
        self._sources = sources
        self._count = torch.zeros(sources.n_pos)
        self._tokens = torch.zeros_like(sources.tokens)
        self._errors = [None if s.error is None else torch.zeros_like(s.error) for s in sources.layers]
        self._written = [torch.zeros_like(s.constant) for s in sources.layers]
        self._keys: list[list[Tensor]] = [[] for _ in sources.layers]
        self._values: list[list[Tensor]] = [[] for _ in sources.layers]

    def add(self, recording: Recording, found: Sources | None, places: Int[Tensor, " their_pos"]) -> None:
        """Add one prompt; its position ``p`` corresponds to position ``places[p]`` of the prompt to explain.

        ``found`` has its errors; None if the dictionary is exact and there are none.
        """
        here = (places >= 0).nonzero()[:, 0]
        own = places[here]
        self._count.index_add_(0, own, torch.ones(len(own)))
        _add(self._tokens, own, recording.streams[0].float(), here)
        for place, written in enumerate(self._written):
            output, active = _written(self._sources, recording, place)
            _add(written, own, output, here)
            errors, error = self._errors[place], output if found is None else found.layers[place].error
            if errors is not None:
                assert error is not None  # a place has errors on all prompts or on none
                _add(errors, own, error, here)
            at = places.to(active.position.device)[active.position]
            inside = at >= 0
            self._keys[place].append(at[inside] * self._width(place) + active.feature[inside])
            self._values[place].append(active.counted[inside].float())

    def _width(self, place: int) -> int:
        dictionary = self._sources.dictionary
        return dictionary.width(place) if place in dictionary.layers else 1

    def means(self) -> PositionMeans:
        """The means: each sum divided by the number of prompts that have the position."""
        count = self._count.clamp_min(1)
        layers = []
        for place, total in enumerate(self._errors):
            keys, where = torch.cat(self._keys[place]).unique(return_inverse=True)
            # On the CPU, because a GPU adds several numbers to one place in no fixed order.
            values = (
                torch.zeros(len(keys)).index_add_(0, where.cpu(), torch.cat(self._values[place]).cpu()).to(keys.device)
            )
            position, feature = keys // self._width(place), keys % self._width(place)
            mean = values / count.to(values.device)[position]
            error = None if total is None else total / count.to(total.device)[:, None]
            written = self._written[place] / count.to(values.device)[:, None]
            layers.append(LayerMean(position, feature, mean, error, written))
        return PositionMeans(self._tokens / count.to(self._tokens.device)[:, None], tuple(layers))


def _add(
    total: Float[Tensor, "pos d"], own: Int[Tensor, " n"], their: Float[Tensor, "their_pos d"], here: Tensor
) -> None:
    device = total.device
    total.index_add_(0, own.to(device), their.to(device)[here.to(device)])


def _written(sources: Sources, recording: Recording, place: int) -> tuple[Float[Tensor, "pos d_out"], LayerActive]:
    """What features and error together write at a place's output site, and which features are active."""
    dictionary = sources.dictionary
    if place not in dictionary.layers:
        output = output_of(sources, recording, place).float()
        none = torch.empty(0, dtype=torch.long, device=output.device)
        return output, LayerActive(none, none, output.new_empty(0), output.new_empty(0))
    x, skip = recording.sites[dictionary.input_hook(place)], dictionary.skip(place)
    output = recording.sites[dictionary.output_hook(place)].float() - dictionary.constant_on(place, x)
    return (output if skip is None else output - x.float() @ skip.T), dictionary.active(place, x)


def common_prefix(tokens: Int[Tensor, " pos"], family: Family) -> int:
    """How many tokens at its start the prompt shares with the whole family; a causal model computes the same there."""
    count = len(tokens)
    for member in family.members:
        same = [
            place == position and token == int(tokens[position])
            for position, (token, place) in enumerate(zip(member.token_ids, member.places, strict=True))
            if position < count
        ]
        count = min(count, same.index(False) if False in same else len(same))
    return count


def against(sources: Sources, recording: Recording, means: PositionMeans, start: int) -> Sources:
    """The same sources, each counted by its difference from the baseline; what both have is ``shared``.

    Features that are active in the baseline only are added, with activation 0. At the first ``start`` positions,
    which are the same for all, nothing differs: they get no features, and everything they write is shared.
    """
    skipped = sorted({*sources.skipped, *range(start)})
    keep = torch.ones(sources.n_pos, dtype=torch.bool)
    keep[skipped] = False
    column, layers = sources.n_pos + 1, []
    for place, source in enumerate(sources.layers):
        if place not in sources.dictionary.layers and sources.dictionary.mlps == "ratio":
            # A passed MLP writes nothing of its own, so there is nothing to share.
            layers.append(replace(source, features_at=column, errors_at=column))
            continue
        mean, kept = means.layers[place], keep.to(source.constant.device)[:, None]
        active = _union(sources, recording, place, mean, keep)
        made = replace(
            source,
            active=active,
            constant=torch.where(kept, source.constant, 0.0),
            shared=torch.where(kept, mean.written, output_of(sources, recording, place).float()),
            error=_without(source.error, mean.error, kept),
            features_at=column,
            errors_at=column + len(active.feature),
        )
        layers.append(made)
        column = made.errors_at + (0 if made.error is None else sources.n_pos)
    shared = torch.where(keep.to(sources.home)[:, None], means.tokens, sources.tokens)
    compared = replace(
        sources, layers=tuple(layers), tokens=sources.tokens - shared, shared_tokens=shared, skipped=tuple(skipped)
    )
    return (
        compared if recording.dtype == torch.float32 or not sources.dictionary.exact else _rounded(compared, recording)
    )


def _without(
    error: Float[Tensor, "pos d_out"] | None, mean: Float[Tensor, "pos d_out"] | None, kept: Tensor
) -> Float[Tensor, "pos d_out"] | None:
    """Error terms minus the baseline's mean ones, zero where they are not ``kept``; None if the place has none."""
    if error is None:
        return None
    assert mean is not None  # a place has errors on all prompts or on none
    return torch.where(kept, error - mean, 0.0)


def _rounded(sources: Sources, recording: Recording) -> Sources:
    """The sources with the rounding of half precision added to the constants, so that parts add up to the output."""
    layers = []
    for place, source in enumerate(sources.layers):
        if source.shared is None:  # a passed MLP
            layers.append(source)
            continue
        rest = output_of(sources, recording, place).float() - source.shared
        if place in sources.dictionary.layers:
            decoded = torch.zeros_like(rest)
            add_decoded(decoded, sources.dictionary, place, place, source.active)
            keep = torch.ones(sources.n_pos, 1, device=rest.device)
            keep[list(sources.skipped)] = 0.0
            source = replace(source, constant=(rest - decoded) * keep)
        layers.append(source)
    return replace(sources, layers=tuple(layers))


def _union(sources: Sources, recording: Recording, place: int, mean: LayerMean, keep: Tensor) -> LayerActive:
    """The features that are active here or in the baseline, sorted by position, then feature."""
    dictionary, active = sources.dictionary, sources.layers[place].active
    active = active[keep.to(active.position.device)[active.position]]
    if place not in dictionary.layers:
        return replace(active, baseline=active.activation.clone())
    width, device = dictionary.width(place), active.position.device
    kept = keep.to(device)[mean.position.to(device)]
    their = (mean.position.to(device) * width + mean.feature.to(device))[kept]
    keys = torch.cat([active.position * width + active.feature, their]).unique()
    position, feature = keys // width, keys % width
    columns = {name: active.activation.new_zeros(len(keys)) for name in ("pre", "activation", "baseline")}
    ours = torch.searchsorted(keys, active.position * width + active.feature)
    columns["pre"][ours], columns["activation"][ours] = active.pre, active.activation
    columns["baseline"][torch.searchsorted(keys, their)] = mean.activation.to(device)[kept]
    x = recording.sites[dictionary.input_hook(place)].float()
    scale = dictionary.written_scale(place, x)
    if scale is not None:
        # Means are of what features write. What they write here is the activation times this input's own factor.
        columns["baseline"] = columns["baseline"] / scale[position]
        columns["scale"] = scale[position]
    silent = torch.ones(len(keys), dtype=torch.bool, device=device)
    silent[ours] = False
    vectors, bias = dictionary.silent_vectors(place, feature[silent], x[position[silent]])
    columns["pre"][silent] = (vectors * x[position[silent]]).sum(-1) + bias
    return LayerActive(position, feature, **columns)
