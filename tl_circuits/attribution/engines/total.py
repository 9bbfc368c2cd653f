"""Total effects: what every source does to the targets over all paths, computed in one backward pass.

A direct effect goes through attention and the residual stream only. A total effect also goes through every later
feature, whose ratio of activation to pre-activation is held fixed (1 for ReLU, JumpReLU and TopK features; for gated
neurons half of the ratio goes to each factor). With these ratios held the whole model is linear, so one gradient gives
the total effects of all sources: activation times gradient under frozen rules, as in RelP (arXiv 2508.21258).
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.batches import Engine
from tl_circuits.attribution.engines.frozen_mlp import DENSE_SHARE
from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.engines.passed import Keeper, passing_hooks
from tl_circuits.attribution.sources import Sources, output_name, output_of
from tl_circuits.attribution.targets import Targets
from tl_circuits.dictionaries.base import LayerActive, rows_at_once
from tl_circuits.hooks import Holds, Recording, differentiable_run, final_hook, final_stream, own_site


def held_ratio(active: LayerActive) -> Float[Tensor, " n"]:
    """The ratio of each feature's activation to its pre-activation, at which it is held; 0 for silent features."""
    return torch.where(active.activation == 0, 0.0, active.activation / torch.where(active.pre == 0, 1.0, active.pre))


def total_effects(
    engine: Engine, model: Any, recording: Recording, target: Targets, feature: int | None, holds: Holds
) -> Float[Tensor, " column"]:
    """The total effect of every column of ``engine.sources`` on one target.

    Args:
        engine: the engine with which the graph is traced.
        model: the model it was made for.
        recording: one run of the model on the prompt.
        target: one target: a logit, several combined by their weights (:func:`combined`), or a feature.
        feature: the target's column if it is a feature, whose effect on itself is its activation; else None.
        holds: how patterns and denominators can be held on this model.
    """
    if isinstance(engine, LinearEngine):
        return _by_sweep(engine, recording, target, feature)
    return _by_gradient(model, recording, engine.sources, target, feature, holds)


def combined(targets: Targets, weights: Float[Tensor, " n"]) -> Targets:
    """The weighted sum of targets at one place and position, as a single target."""
    vector = (weights[:, None] * targets.vector).sum(0, keepdim=True)
    return Targets(targets.place[:1], targets.position[:1], vector, (weights * targets.bias).sum()[None])


def _blocks(active: LayerActive, d: int) -> list[slice]:
    """The features in slices, for each of which the vectors are gathered at once."""
    step = rows_at_once(d, active.feature.device)
    return [slice(start, start + step) for start in range(0, active.feature.numel(), step)]


def _by_sweep(
    engine: LinearEngine, recording: Recording, target: Targets, feature: int | None
) -> Float[Tensor, " column"]:
    """Total effects with the linear engine's maps: one gradient ``g[pos]`` goes from the last layer to the first."""
    sources = engine.sources
    n_pos, n_layers = sources.n_pos, len(sources.layers)
    out = sources.tokens.new_zeros(sources.width)
    gradients = [source.active.activation.new_zeros(len(source.active.feature)) for source in sources.layers]
    g = torch.zeros_like(sources.tokens)
    depth = int(target.place[0])
    if depth == n_layers:
        there = target.to(engine.devices[n_layers])
        g = g.to(there.vector.device)
        g[there.position] += engine.reads[n_layers].transpose(there.vector, there.position)[0]
    for layer in range(min(depth, n_layers - 1), -1, -1):
        source = sources.layers[layer]
        device = source.constant.device
        g, positions = g.to(device), torch.arange(n_pos, device=device)
        at_site = g if source.norm is None else source.norm.transpose(g, positions)
        if layer < depth:
            _add_gradients(sources, layer, at_site, gradients)
            if source.error is not None:
                out[source.errors_at : source.errors_at + n_pos] = (at_site * source.error).sum(-1).to(out.device)
        into = _at_inputs(sources, recording, layer, gradients[layer])
        if layer == depth:
            here = target.to(device)
            into = torch.zeros_like(g) if into is None else into
            into[here.position] += here.vector
        if source.skip is not None:
            through = at_site @ source.skip
            through[list(sources.skipped)] = 0.0  # there the whole output is a constant
            into = through if into is None else into + through
        below = g if into is None else engine.reads[layer].transpose(into, positions)[0]
        g = _before_attention(engine, layer, g, None if into is None else below)
    out[:n_pos] = (g.to(sources.home) * sources.tokens).sum(-1)
    return _with_features(sources, out, gradients, feature)


def _before_attention(
    engine: LinearEngine, layer: int, g: Float[Tensor, "pos d_model"], from_mlp: Float[Tensor, "pos d_model"] | None
) -> Float[Tensor, "pos d_model"]:
    """The gradient at the stream that enters a block, from that before its MLP and that which came through the MLP."""
    if from_mlp is not None and not engine.parallel:
        g = g + from_mlp
    attention, after = engine.attention[layer], g[:, None].clone()
    mixed, _ = attention.mix_back(g[:, None], g.new_zeros(0, len(g)), 0)
    attention.add_to_stream(mixed, after)
    return after[:, 0] + from_mlp if from_mlp is not None and engine.parallel else after[:, 0]


def _add_gradients(sources: Sources, layer: int, at_site: Float[Tensor, "pos d_out"], gradients: list[Tensor]) -> None:
    """Add to each feature's gradient what one unit of it does by writing to this layer's output."""
    dictionary = sources.dictionary
    for writer in dictionary.writers(layer) if layer in dictionary.layers else ():
        active = sources.layers[writer].active.to(at_site.device)
        width = dictionary.width(writer)
        if active.feature.numel() > DENSE_SHARE * width * len(at_site):
            rows = dictionary.decoder_vectors(writer, torch.arange(width, device=at_site.device), layer)
            gradients[writer] += (at_site @ rows.T)[active.position, active.feature].to(gradients[writer].device)
            continue
        for part in _blocks(active, at_site.shape[1]):
            rows = dictionary.decoder_vectors(writer, active.feature[part], layer)
            gradients[writer][part] += (at_site[active.position[part]] * rows).sum(-1).to(gradients[writer].device)


def _at_inputs(
    sources: Sources, recording: Recording, layer: int, gradient: Float[Tensor, " n"]
) -> Float[Tensor, "pos d_in"] | None:
    """The gradient at the dictionary's input, from that at its features; None if the layer has no dictionary."""
    dictionary, active = sources.dictionary, sources.layers[layer].active
    if layer not in dictionary.layers:
        return None
    x = recording.sites[dictionary.input_hook(layer)].float()
    return dictionary.weighted_reads(layer, active, gradient * held_ratio(active), x)


def _with_features(
    sources: Sources, out: Float[Tensor, " column"], gradients: list[Tensor], feature: int | None
) -> Float[Tensor, " column"]:
    """Fill the features' effects into ``out``: the part of the activation that counts, times the gradient."""
    for source, gradient in zip(sources.layers, gradients, strict=True):
        out[source.features_at : source.errors_at] = (source.active.counted * gradient).to(out.device)
        if feature is not None and source.features_at <= feature < source.errors_at:
            out[feature] = source.active.counted[feature - source.features_at].to(out.device)
    return out


def _by_gradient(
    model: Any, recording: Recording, sources: Sources, target: Targets, feature: int | None, holds: Holds
) -> Float[Tensor, " column"]:
    """Total effects by automatic differentiation, through a run in which all features' ratios are held."""
    run = _FeatureRun(model, sources, recording)
    seen = differentiable_run(model, recording.tokens, holds, recording.held, run.replaced, run.wanted(model))
    return run.effects(model, seen, target, feature)


class _FeatureRun:
    """A differentiable run in which each MLP's output is a leaf, and gradients also pass through the features.

    To the leaf, the features' outputs are added with value zero but with their gradients. So the gradient at a leaf is
    total: it includes all paths through later features.
    """

    def __init__(self, model: Any, sources: Sources, recording: Recording):
        self._sources, dictionary = sources, sources.dictionary
        self._own = Keeper()
        with_leaf = [at for at in range(len(sources.places)) if at in dictionary.layers or dictionary.mlps == "error"]
        self._written: dict[int, Tensor] = {}  # the activations at each place that has run
        self._skips: dict[int, Tensor] = {}
        with torch.inference_mode(False):
            self._tokens = recording.resid_pre[0][None].clone().requires_grad_()
            self._leaves = {
                place: output_of(sources, recording, place)[None].clone().requires_grad_() for place in with_leaf
            }
            self._reading = {place: self._vectors(recording, place) for place in sources.dictionary_layers}
        self.replaced = [("blocks.0.hook_resid_pre", lambda tensor: self._tokens)]
        self.replaced += passing_hooks(model, recording, sources)
        for place in with_leaf:
            if own_site(dictionary, place) is not None:
                self.replaced.append(
                    (output_name(self._sources, place), self._own.replacing(place, partial(self._pass, place)))
                )
                continue
            if place in dictionary.layers:
                self.replaced.append((dictionary.input_hook(place), partial(self._encode, place)))
            self.replaced.append((output_name(self._sources, place), partial(self._write, place)))

    def _vectors(self, recording: Recording, place: int) -> Float[Tensor, "n d_in"]:
        """The vector by which each feature reads its input, times its held ratio."""
        active, dictionary = self._sources.layers[place].active, self._sources.dictionary
        x = recording.sites[dictionary.input_hook(place)].float()
        vectors, _ = dictionary.read_vectors(place, active.feature, x[active.position])
        ratio = held_ratio(active) if active.scale is None else held_ratio(active) * active.scale
        return (vectors * ratio[:, None]).clone()

    def _pass(self, place: int, x: Tensor) -> Tensor:
        """What an autoencoder writes in place of what it reads."""
        self._encode(place, x)
        return self._write(place, x)

    def _encode(self, place: int, x: Tensor) -> Tensor:
        active, skip = self._sources.layers[place].active, self._sources.layers[place].skip
        self._written[place] = (x[0].float()[active.position.clone()] * self._reading[place]).sum(-1)
        if skip is not None:
            keep = torch.ones(self._sources.n_pos, 1, device=skip.device)
            keep[list(self._sources.skipped)] = 0.0
            self._skips[place] = x[0].to(skip.device).float() @ skip.clone().T * keep
        return x

    def _write(self, place: int, out: Tensor) -> Tensor:
        """The leaf; gradients pass it to the features that write here, and to the skip connection."""
        leaf, dictionary = self._leaves[place], self._sources.dictionary
        if place not in dictionary.layers:
            return leaf
        through = torch.zeros_like(leaf[0], dtype=torch.float32)
        for writer in dictionary.writers(place):
            active = self._sources.layers[writer].active.to(through.device)
            rows = dictionary.decoder_vectors(writer, active.feature, place).clone()
            through = through.index_add(
                0, active.position.clone(), rows * self._written[writer].to(through.device)[:, None]
            )
        if place in self._skips:
            through = through + self._skips[place]
        return leaf + (through - through.detach())[None].to(out.dtype)

    def wanted(self, model: Any) -> list[str]:
        """The hooks whose tensors targets may read; what autoencoders read is kept by the run itself."""
        dictionary = self._sources.dictionary
        reads = (dictionary.input_hook(place) for place in dictionary.layers if own_site(dictionary, place) is None)
        return [*reads, final_hook(model)]

    def effects(
        self, model: Any, seen: dict[str, Tensor], target: Targets, feature: int | None
    ) -> Float[Tensor, " column"]:
        """The total effect of every column on the target, from the leaves' gradients."""
        sources, dictionary = self._sources, self._sources.dictionary
        place, position = int(target.place[0]), int(target.position[0])
        with torch.inference_mode(False), torch.enable_grad():
            last = place == len(sources.places)
            if last:
                x = final_stream(model, seen[final_hook(model)])
            else:
                x = self._own.read[place] if place in self._own.read else seen[dictionary.input_hook(place)]
            scalar = (x[position].float() * target.vector[0, : x.shape[-1]].clone().to(x.device)).sum()
            leaves = [self._tokens, *self._leaves.values()]
            grads = torch.autograd.grad(scalar, leaves, allow_unused=True)
        tokens, *at_sites = (None if grad is None else grad[0].float() for grad in grads)
        out = sources.tokens.new_zeros(sources.width)
        if tokens is not None:
            out[: sources.n_pos] = (tokens * sources.tokens).sum(-1)
        gradients = [source.active.activation.new_zeros(len(source.active.feature)) for source in sources.layers]
        for at, grad in zip(self._leaves, at_sites, strict=True):
            source = sources.layers[at]
            if grad is None or at >= place:
                continue
            _add_gradients(sources, at, grad, gradients)
            if source.error is not None:
                out[source.errors_at : source.errors_at + sources.n_pos] = (grad * source.error).sum(-1).to(out.device)
        return _with_features(sources, out, gradients, feature)
