"""What other prompts have at the same places: the baseline that a contrast graph is measured against.

A contrast graph answers "why this answer *here*": every source counts by what differs from the baseline, ``(a - ā)·d``
for a feature, token embedding minus mean embedding, error minus mean error. What the baseline has too is one more
source, whose effect on each node stands in the column ``shared``. The frozen maps stay this prompt's, so the sums hold.
Neuron circuits chosen by such differences: Transluce 2026, arXiv 2601.22594; the same held rules: RelP, arXiv 2508.21258.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.family import Family
from tl_circuits.attribution.sources import LayerSources, Sources, add_decoded, find_sources
from tl_circuits.dictionaries.base import LayerActive
from tl_circuits.hooks import Recording, Replacement, record


@dataclass(frozen=True)
class LayerMean:
    """Mean activations and mean error of one layer over the baseline's prompts.

    Features are listed by place of the prompt to explain; those not listed are 0 everywhere.
    """

    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    error: Float[Tensor, "pos d_out"] | None


@dataclass(frozen=True)
class PositionMeans:
    """The baseline at each position of one prompt: mean token embeddings, and a :class:`LayerMean` a layer."""

    tokens: Float[Tensor, "pos d_model"]
    layers: tuple[LayerMean, ...]


def position_means(replacement: Replacement, family: Family, sources: Sources) -> PositionMeans:
    """Run the baseline's prompts, one at a time, and average what is found at each position.

    A position that no baseline prompt has counts in full, as without a baseline.
    """
    total = _Sums(sources)
    model, dictionary = replacement.model, sources.dictionary
    sites = [f(layer) for layer in dictionary.layers for f in (dictionary.input_hook, dictionary.output_hook)]
    for member in family.members:
        tokens = torch.tensor(member.token_ids)
        recording = record(model, tokens, len(tokens) - 1, sites)
        total.add(find_sources(model, dictionary, recording, member.skipped), torch.tensor(member.places))
    return total.means()


class _Sums:
    """Sums over prompts, by position of the explained prompt."""

    def __init__(self, sources: Sources):
        self._sources = sources
        self._count = torch.zeros(sources.n_pos)
        self._tokens = torch.zeros_like(sources.tokens)
        self._errors = [None if s.error is None else torch.zeros_like(s.error) for s in sources.layers]
        self._keys: list[list[Tensor]] = [[] for _ in sources.layers]
        self._values: list[list[Tensor]] = [[] for _ in sources.layers]

    def add(self, found: Sources, places: Int[Tensor, " their_pos"]) -> None:
        """Add one prompt, whose positions lie at ``places``."""
        here = (places >= 0).nonzero()[:, 0]
        own = places[here]
        self._count.index_add_(0, own, torch.ones(len(own)))
        self._tokens.index_add_(0, own.to(self._tokens.device), found.tokens[here.to(found.tokens.device)])
        for layer, source in enumerate(found.layers):
            total = self._errors[layer]
            if total is not None:
                total.index_add_(0, own.to(total.device), source.error[here.to(total.device)])
            active = source.active
            at = places.to(active.position.device)[active.position]
            inside = at >= 0
            self._keys[layer].append(at[inside] * self._width(layer) + active.feature[inside])
            self._values[layer].append(active.activation[inside].float())

    def _width(self, layer: int) -> int:
        dictionary = self._sources.dictionary
        return dictionary.width(layer) if layer in dictionary.layers else 1

    def means(self) -> PositionMeans:
        """All sums over the number of prompts that have the position."""
        count = self._count.clamp_min(1)
        layers = []
        for layer, total in enumerate(self._errors):
            keys, where = torch.cat(self._keys[layer]).unique(return_inverse=True)
            values = torch.zeros(len(keys), device=keys.device).index_add_(0, where, torch.cat(self._values[layer]))
            position, feature = keys // self._width(layer), keys % self._width(layer)
            mean = values / count.to(values.device)[position]
            error = None if total is None else total / count.to(total.device)[:, None]
            layers.append(LayerMean(position, feature, mean, error))
        return PositionMeans(self._tokens / count.to(self._tokens.device)[:, None], tuple(layers))


def against(sources: Sources, recording: Recording, means: PositionMeans) -> Sources:
    """The same sources, each counted by what differs from the baseline; what both have is ``shared``.

    Features that are active in the baseline and silent here join, with activation 0.
    """
    keep = torch.ones(sources.n_pos, dtype=torch.bool)
    keep[list(sources.skipped)] = False
    column, layers = sources.n_pos + 1, []
    actives = [_union(sources, recording, layer, means.layers[layer], keep) for layer in range(len(sources.layers))]
    for layer, source in enumerate(sources.layers):
        made = replace(source, active=actives[layer], features_at=column, errors_at=column + len(actives[layer].feature))
        made = replace(made, shared=_shared(sources, layer, actives, means.layers[layer].error))
        if source.error is not None:
            made = replace(made, error=source.error - means.layers[layer].error)
        layers.append(made)
        column = made.errors_at + (0 if made.error is None else sources.n_pos)
    return replace(sources, layers=tuple(layers), tokens=sources.tokens - means.tokens, shared_tokens=means.tokens)


def _union(sources: Sources, recording: Recording, layer: int, mean: LayerMean, keep: Tensor) -> LayerActive:
    """Features active here or in the baseline, sorted by position, then feature."""
    source, dictionary = sources.layers[layer], sources.dictionary
    active = source.active
    if layer not in dictionary.layers:
        return replace(active, baseline=active.activation.clone())
    width, device = dictionary.width(layer), active.position.device
    kept = keep.to(device)[mean.position.to(device)]
    their = (mean.position.to(device) * width + mean.feature.to(device))[kept]
    keys = torch.cat([active.position * width + active.feature, their]).unique()
    position, feature = keys // width, keys % width
    columns = {name: active.activation.new_zeros(len(keys)) for name in ("pre", "activation", "baseline")}
    ours = torch.searchsorted(keys, active.position * width + active.feature)
    columns["pre"][ours], columns["activation"][ours] = active.pre, active.activation
    columns["baseline"][torch.searchsorted(keys, their)] = mean.activation.to(device)[kept]
    silent = torch.ones(len(keys), dtype=torch.bool, device=device)
    silent[ours] = False
    x = recording.sites[dictionary.input_hook(layer)].float()
    vectors, bias = dictionary.silent_vectors(layer, feature[silent], x[position[silent]])
    columns["pre"][silent] = (vectors * x[position[silent]]).sum(-1) + bias
    return LayerActive(position, feature, **columns)


def _shared(
    sources: Sources, layer: int, actives: Sequence[LayerActive], error: Float[Tensor, "pos d_out"] | None
) -> Float[Tensor, "pos d_out"]:
    """What the baseline's mean activations and mean error write to a layer's output site."""
    source: LayerSources = sources.layers[layer]
    dictionary = sources.dictionary
    total = torch.zeros_like(source.constant) if error is None else error.clone()
    for writer in dictionary.writers(layer) if layer in dictionary.layers else ():
        of_baseline = replace(actives[writer], activation=actives[writer].baseline, baseline=None)
        add_decoded(total, dictionary, writer, layer, of_baseline)
    return total
