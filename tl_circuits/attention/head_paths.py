"""One edge, split by the attention heads that it passes: none, one, two, three, and all else.

With attention patterns and norm denominators frozen, every head is a matrix from the residual stream at one position to
the stream at another, and a direct effect is a sum over all chains of heads between source and target ("head
loadings", "Tracing Attention Computation Through Feature Interactions", Anthropic 2025). The skip connection of a
transcoder acts at one position and counts as part of the residual stream here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attention.retrace import Retraced
from tl_circuits.attribution.sources import LayerSources
from tl_circuits.hooks import FrozenAttention, ReadMap

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class LayerHeads:
    """One layer's heads as matrices on the stream, with norms folded in: ``out[q] = Σ_k mix[h, q, k] x[k] W_V W_O``.

    The weights stay on the layer's device. Methods take tensors from any device and give their results there.
    """

    W_V: Float[Tensor, "n_kv d_model d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    mix: Float[Tensor, "n_heads query key"]

    def values(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n_heads n d_head"]:
        """What every head computes as its values from streams."""
        made = (x.to(self.W_V.device) @ self.W_V).to(x.device)
        return made.repeat_interleave(self.W_O.shape[0] // self.W_V.shape[0], 0)

    def values_back(self, g: Float[Tensor, "n_heads d_head"]) -> Float[Tensor, "n_heads d_model"]:
        """Gradients at the stream, from gradients at each head's values."""
        grouped = g.to(self.W_V.device).unflatten(0, (self.W_V.shape[0], -1))
        return torch.einsum("kge,kde->kgd", grouped, self.W_V).flatten(0, 1).to(g.device)

    def written(self, values: Float[Tensor, "n_heads d_head"]) -> Float[Tensor, "n_heads d_model"]:
        """What every head writes to the stream from one of its values."""
        return torch.einsum("he,hed->hd", values.to(self.W_O.device), self.W_O).to(values.device)

    def written_back(self, g: Float[Tensor, "*n d_model"]) -> Float[Tensor, "n_heads *n d_head"]:
        """Gradients at every head's value, from one or several gradients at the stream that the heads write to."""
        there = g.to(self.W_O.device)
        return (self.W_O @ there if g.ndim == 1 else there @ self.W_O.transpose(1, 2)).to(g.device)

    def through(self, spread: Float[Tensor, "n key"], places: Float[Tensor, "m query"]) -> Float[Tensor, "n_heads n m"]:
        """How much each head carries from keys to queries.

        Args:
            spread: shares over key positions.
            places: shares over query positions.
        """
        away = self.mix.device
        return (spread.to(away) @ (self.mix.transpose(1, 2) @ places.to(away).T)).to(spread.device)


def layer_heads(attention: FrozenAttention) -> LayerHeads:
    """The heads of one frozen attention."""
    return LayerHeads(attention.W_V, attention.W_O, attention.mixing())


@dataclass(frozen=True)
class Writer:
    """What a source writes at its position.

    Attributes:
        position: the position.
        writes: by layer, what it adds to the stream at the end of that block.
        start: what it adds before block 0 (a token's embedding).
    """

    position: int
    writes: dict[int, Float[Tensor, " d_model"]]
    start: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class Reader:
    """What a target reads.

    Attributes:
        position: the position.
        layer: whose MLP reads; the number of layers for logits.
        vector: the direction that is read, on the stream that this MLP (for logits: the last norm) reads.
    """

    position: int
    layer: int
    vector: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class EdgeParts:
    """The parts of one edge. They sum to its weight.

    Attributes:
        residual: what passed no head.
        heads: what passed one head, by (layer, head).
        chains: the largest chains of several heads, with what passed them.
        rest: all other chains of several heads together.
    """

    residual: float
    heads: dict[Head, float]
    chains: list[tuple[tuple[Head, ...], float]]
    rest: float


class HeadPaths:
    """All heads of a retraced prompt; splits edges by the heads they pass."""

    def __init__(self, local: Retraced):
        self._sources, self._engine = local.sources, local.linear
        self._parallel = local.linear.parallel
        self.heads = [layer_heads(attention) for attention in local.linear.attention]
        self._skips = {
            layer: source.skip for layer, source in enumerate(local.sources.layers) if source.skip is not None
        }

    @cached_property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return len(self.heads)

    def leave(self, source: Writer) -> "Leaving":
        """A source, carried by the residual stream to the heads of every block."""
        stream = self._forward(source)
        values = {layer: self.heads[layer].values(x[None])[:, 0] for layer, x in stream.items()}
        written = [self.heads[layer].written(value) for layer, value in values.items()]
        spread = [heads.mix[:, :, source.position].to(source.start.device) for heads in self.heads]
        return Leaving(source, values, written, spread)

    def arrive(self, target: Reader) -> "Arriving":
        """A target, carried back by the residual stream to the heads of every block."""
        ends, gradients = self._backward(target)
        at_values = {layer: self.heads[layer].written_back(g) for layer, g in gradients.items()}
        read = [self.heads[layer].values_back(g) for layer, g in sorted(at_values.items())]
        places = [self.heads[layer].mix[:, target.position].to(target.vector.device) for layer in sorted(gradients)]
        return Arriving(target, ends, at_values, read, places)

    def paths(self, source: "Leaving", target: "Arriving", edge: float, chains: int) -> EdgeParts:
        """Split one edge by heads.

        Args:
            source: the edge's source (:meth:`leave`).
            target: the edge's target (:meth:`arrive`).
            edge: the edge's weight.
            chains: the most chains of several heads to list.
        """
        start, end = source.source.position, target.target.position
        residual = self._residual(source.source, target.ends) if start == end else 0.0
        heads: dict[Head, float] = {}
        for layer, g in sorted(target.at_values.items()):
            values = (source.values[layer] * g).double().sum(-1) * self.heads[layer].mix[:, end, start].to(g.device)
            heads |= {(layer, head): value for head, value in enumerate(values.tolist())}
        best = Largest(chains)
        layers = sorted(target.at_values)
        if chains and len(layers) > 1:
            self._pairs(best, layers, source, target)
            # with skips, what a head wrote changes on its way, and triples would need every position
            if not self._skips:
                self._triples(best, layers, source, target)
        rest = edge - residual - sum(heads.values()) - sum(value for _, value in best.found())
        return EdgeParts(residual, heads, best.found(), rest)

    def _skip(self, layer: int, x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        """What the skip connection of a layer adds, from streams at the first ``pos`` positions."""
        made: LayerSources = self._sources.layers[layer]
        n, n_pos, d_model = x.shape
        home, x = x.device, x.to(self._sources.devices[layer])
        positions = torch.arange(n_pos, device=x.device).repeat(n)
        flat = _read_linear(self._engine.reads[layer], x.reshape(-1, d_model), positions) @ self._skips[layer].T
        flat = flat if made.norm is None else made.norm.push(flat, positions)
        out = flat.reshape(n, n_pos, d_model)
        out[:, [p for p in self._sources.skipped if p < n_pos]] = 0.0  # at skipped positions the MLP is a constant
        return out.to(home)

    def _skip_at(self, layer: int, x: Float[Tensor, " d_model"], position: int) -> Float[Tensor, " d_model"]:
        if layer not in self._skips or position in self._sources.skipped:
            return torch.zeros_like(x)
        made, device = self._sources.layers[layer], self._sources.devices[layer]
        where = torch.tensor([position], device=device)
        out = _read_linear(self._engine.reads[layer], x[None].to(device), where) @ self._skips[layer].T
        return (out if made.norm is None else made.norm.push(out, where))[0].to(x.device)

    def _skip_back(self, layer: int, g: Float[Tensor, " d_model"], position: int) -> Float[Tensor, " d_model"]:
        here = g[None, None].to(self._sources.devices[layer])
        back = self._engine.mlp[layer].through_skip(here, position)
        return torch.zeros_like(g) if back is None else back[0, 0].to(g.device)

    def _forward(self, source: Writer) -> dict[int, Tensor]:
        """The source on the stream that enters every block, carried by the residual stream alone."""
        x, at = source.start, {}
        for layer in range(self.n_layers):
            at[layer] = x
            x = x + self._skip_at(layer, x, source.position)
            if layer in source.writes:
                x = x + source.writes[layer]
        return at

    def _backward(self, target: Reader) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The target's gradient at the end of every block, and at the outputs of every block's heads."""
        g, ends, heads = target.vector, {}, {}
        last = min(target.layer, self.n_layers - 1)  # a logit's layer is the one after the last block
        for layer in range(last, -1, -1):
            if layer == target.layer:  # the MLP of this layer reads; its own output comes later
                if not self._parallel:
                    heads[layer] = g
                continue
            ends[layer] = g
            through = g + self._skip_back(layer, g, target.position)
            heads[layer] = g if self._parallel else through
            g = through
        ends[-1] = g
        return ends, heads

    def _residual(self, source: Writer, read: dict[int, Tensor]) -> float:
        total = source.start.double() @ read[-1].double()
        for layer, written in source.writes.items():
            if layer in read:
                total = total + written.double() @ read[layer].double()
        return float(total)

    def _pairs(self, best: "Largest", layers: list[int], source: "Leaving", target: "Arriving") -> None:
        """Chains of two heads: what the first head wrote is carried to the second head's layer and read there."""
        n_heads, n_pos = source.spread[0].shape
        states = source.written[0].new_zeros(0, 1, source.written[0].shape[-1])  # [head so far, position or 1, d_model]
        weights = source.spread[0].new_zeros(0, n_pos)
        for i, layer in enumerate(layers):
            read, places = target.read[i], target.places[i]
            if len(states):
                dots = states @ read.T
                if states.shape[1] == 1:
                    values = dots[:, 0] * (weights @ places.T)
                else:
                    values = torch.einsum("np,nph,hp->nh", weights, dots, places)
                best.add(values, lambda n, h, layer=layer: (self._nth(layers, n, n_heads), (layer, h)))
            states = self._advance(layer, states, source.written[layer])
            weights = torch.cat([weights, source.spread[layer]])

    def _nth(self, layers: list[int], n: int, n_heads: int) -> Head:
        return layers[n // n_heads], n % n_heads

    def _advance(self, layer: int, states: Tensor, joining: Tensor) -> Tensor:
        """Carry what heads wrote through one block's skip connection, and add what this block's own heads wrote.

        In a parallel block the MLP reads the stream before the block's own heads write, so these are added after the
        skip.
        """
        joining = joining[:, None]
        if layer not in self._skips:
            joining = joining.expand(-1, states.shape[1], -1)
            return torch.cat([states, joining])
        n_pos = self._sources.n_pos
        states, joining = states.expand(-1, n_pos, -1), joining.expand(-1, n_pos, -1)
        if self._parallel:
            return torch.cat([states + self._skip(layer, states), joining])
        both = torch.cat([states, joining])
        return both + self._skip(layer, both)

    def _triples(self, best: "Largest", layers: list[int], source: "Leaving", target: "Arriving") -> None:
        """Chains of three heads, computed for each head in the middle."""
        n_heads = source.spread[0].shape[0]
        for i in range(1, len(layers) - 1):
            heads, above = self.heads[layers[i]], layers[i + 1 :]
            written, spread = (
                torch.cat([part[layer] for layer in layers[:i]]) for part in (source.written, source.spread)
            )
            if layers[i] not in target.beyond:
                target.beyond[layers[i]] = heads.written_back(torch.cat(target.read[i + 1 :]))
            places = torch.cat(target.places[i + 1 :])
            values = heads.values(written) @ target.beyond[layers[i]].transpose(1, 2)
            values = values * heads.through(spread, places)

            def name(h: int, a: int, b: int, middle: int = layers[i], above: list[int] = above) -> tuple[Head, ...]:
                return self._nth(layers, a, n_heads), (middle, h), self._nth(above, b, n_heads)

            best.add(values, name)


@dataclass(frozen=True)
class Leaving:
    """A source at every block's heads.

    Attributes:
        source: the source.
        values: by layer, what each head computes from it as values.
        written: for each layer, what each head then writes.
        spread: for each layer, to which positions each head carries it.
    """

    source: Writer
    values: dict[int, Float[Tensor, "n_heads d_head"]]
    written: list[Float[Tensor, "n_heads d_model"]]
    spread: list[Float[Tensor, "n_heads pos"]]


@dataclass(frozen=True)
class Arriving:
    """A target at the heads of the blocks that can reach it, first block first.

    Attributes:
        target: the target.
        ends: its gradient at the end of every block; -1 stands for the stream before block 0.
        at_values: by layer, its gradient at every head's values.
        read: for each layer, the direction that each head reads for it.
        places: for each layer, the positions at which each head reads.
        beyond: by layer, its gradient at the values of that layer's heads through all later heads. Kept for the next
            edge.
    """

    target: Reader
    ends: dict[int, Float[Tensor, " d_model"]]
    at_values: dict[int, Float[Tensor, "n_heads d_head"]]
    read: list[Float[Tensor, "n_heads d_model"]]
    places: list[Float[Tensor, "n_heads pos"]]
    beyond: dict[int, Float[Tensor, "n_heads later d_head"]] = field(default_factory=dict)


class Largest:
    """The largest values seen so far by absolute size, with the heads they belong to."""

    def __init__(self, count: int):
        self._count = count
        self._kept: list[tuple[tuple[Head, ...], float]] = []

    def add(self, values: Tensor, name: Callable[..., tuple[Head, ...]]) -> None:
        """Take in a tensor of values. ``name`` turns the indices of an entry into its heads."""
        top = values.abs().flatten().topk(min(self._count, values.numel())).indices
        cells = torch.unravel_index(top.cpu(), values.shape)
        sizes = values.flatten()[top].tolist()
        for value, *cell in zip(sizes, *(c.tolist() for c in cells), strict=True):
            if value != 0.0:
                self._kept.append((name(*cell), value))
        self._kept.sort(key=lambda item: -abs(item[1]))
        del self._kept[self._count :]

    def found(self) -> list[tuple[tuple[Head, ...], float]]:
        """The heads and the value of each entry, largest first."""
        return list(self._kept)


def _read_linear(read: ReadMap, x: Float[Tensor, "n d_model"], positions: Tensor) -> Float[Tensor, "n d_model"]:
    """The part of a dictionary's input that is linear in the stream."""
    if read.norm is None or read.stage == "residual":
        return x
    if read.stage == "normed":
        return read.norm.push(x, positions)
    x = x - x.mean(-1, keepdim=True) if read.norm.weights.centred else x
    return x / read.norm.scale[positions]


def sum_parts(several: Sequence[EdgeParts], count: int) -> EdgeParts:
    """The parts of several edges added up, as between two supernodes. At most ``count`` chains of heads are listed."""
    heads: dict[Head, float] = {}
    chains: dict[tuple[Head, ...], float] = {}
    for paths in several:
        for head, value in paths.heads.items():
            heads[head] = heads.get(head, 0.0) + value
        for chain, value in paths.chains:
            chains[chain] = chains.get(chain, 0.0) + value
    ordered = sorted(chains.items(), key=lambda item: -abs(item[1]))
    dropped = sum(value for _, value in ordered[count:])
    return EdgeParts(
        residual=sum(p.residual for p in several),
        heads=heads,
        chains=ordered[:count],
        rest=sum(p.rest for p in several) + dropped,
    )
