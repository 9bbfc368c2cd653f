"""The fast engine for graphs with autoencoders or passed MLPs: rows of direct effects as matrix products.

As in :mod:`~tl_circuits.attribution.engines.linear`, the gradients of many targets go from the last layer to the first.
What is new: where the whole residual stream is rebuilt, features and error are sources and every gradient ends; where
only what attention or the MLP adds is rebuilt, gradients go on along the stream alone; and MLPs without a dictionary
are passed with their activation ratios held. Equations: docs/method.md, "Any site".
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.engines.frozen_mlp import FrozenMLP, add_position_dots
from tl_circuits.attribution.engines.site_maps import MLP, BlockMaps, block_maps, final_map
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets
from tl_circuits.hooks import FrozenAttention, ReadMap, Recording, is_parallel

Transform = Callable[[Float[Tensor, "used n d_model"], int], Float[Tensor, "used n d_site"]]


class SiteEngine:
    """Direct effects on any targets of one prompt, exact in the wider local replacement model.

    Making one compares each frozen map with what the model computed on this prompt, and raises ArchitectureError if
    they differ. Targets whose place is :attr:`end`, the number of all places, read the final norm's output.
    """

    def __init__(self, model: Any, recording: Recording, sources: Sources):
        self.sources = sources
        self.parallel = is_parallel(model)
        self.blocks = block_maps(model, recording, sources)
        self.end = len(sources.places)
        self.read_final = final_map(model, recording)
        whole = recording.logits is not None
        self.final = self.read_final.forward(recording.resid_final)[recording.position] if whole else None
        self.writes = {
            place: FrozenMLP(sources, place, self.blocks[where.layer].read)
            for place, where in enumerate(sources.places)
            if place in sources.dictionary.layers or sources.layers[place].error is not None
        }
        self.joins = self._joins()

    def _joins(self) -> Int[Tensor, " place"]:
        """For each place, and for the logits, when targets that read there join a sweep: larger numbers first.

        That is the order of places, but in parallel blocks targets at the MLP read the block's input, so they join
        after those that read attention's output.
        """
        order = list(range(len(self.sources.places) + 1))
        for block in self.blocks if self.parallel else ():
            at = [block.places[site] for site in ("attn.hook_z", "hook_attn_out") if site in block.places]
            if block.at_mlp is not None and at:
                order[block.at_mlp] = min(at)
                for place in at:
                    order[place] += 1
        return torch.tensor(order, device=self.sources.home)

    def below(self, layer: int) -> "SiteEngine":
        """The same engine up to what ``layer``'s heads read.

        Targets at its :attr:`end` read the stream that enters the layer. If an autoencoder of the layer's own rebuilds
        that stream (``hook_resid_pre``), they read its features and errors.
        """
        cut = copy.copy(self)
        cut.blocks, cut.read_final, cut.end = (
            self.blocks[:layer],
            ReadMap("residual", None),
            self.sources.up_to_heads(layer),
        )
        return cut

    def rows(self, targets: Targets) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The direct effect of every column on every target, and each target's bias.

        ``rows[t].sum() + bias[t]`` equals the target's value. A row ends before the columns of the deepest target's own
        layer; later columns have no effect.
        """
        by_position = torch.argsort(targets.position, stable=True)
        order = by_position[torch.argsort(self.joins[targets.place[by_position]], descending=True, stable=True)]
        out, bias = _Sweep(self, targets[order]).run()
        restored = torch.argsort(order)
        return out[restored], bias[restored]


class _Sweep:
    """One backward pass from the last layer to the first, for targets sorted by when they join, then position.

    A target *joins* where it reads, and leaves where the whole stream is rebuilt. Those that joined since the last
    attention are held as single vectors (``_vectors``, at ``_at``); those before them in full: ``_g[p, i]``.
    """

    def __init__(self, engine: SiteEngine, targets: Targets):
        self._engine, self._targets = engine, targets
        sources = engine.sources
        self._depth = int(targets.place.max())
        self._counts = torch.bincount(targets.place, minlength=len(sources.places) + 1).tolist()
        self._out = targets.vector.new_zeros(len(targets), sources.before(self._depth))
        self._bias = targets.bias.clone()
        self._used = int(targets.position.max()) + 1
        self._d_model = sources.tokens.shape[1]
        self._start = self._joined = 0
        self._leave()

    def run(self) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """Go through all layers, and then to the tokens."""
        sources, blocks = self._engine.sources, self._engine.blocks
        end = self._engine.end
        if self._depth == end:
            vectors, at, rows = self._entering(end, self._d_model)
            on_stream, bias = self._engine.read_final.transpose(vectors, at)
            self._bias[rows] += bias
            self._join(on_stream, at)
            if end > sources.first_place(len(blocks)):  # what heads read is rebuilt in their own layer
                self._rebuilt_stream(end - 1)
        deepest = len(blocks) - 1 if self._depth == end else sources.places[self._depth].layer
        for layer in range(deepest, -1, -1):
            self._layer(blocks[layer])
        tokens, shared = sources.tokens, sources.shared_tokens
        for g, first, rows in self._pieces():
            if shared is not None:
                add_position_dots(self._out[rows, sources.shared_column], g, shared[first:])
            for offset, here in enumerate(g):
                self._out[rows, first + offset] += torch.mv(here, tokens[first + offset])
        return self._out, self._bias

    def _layer(self, block: BlockMaps) -> None:
        if "hook_resid_post" in block.places:
            self._rebuilt_stream(block.places["hook_resid_post"])
        self._add_constant(block.rounding)
        if self._engine.parallel:
            self._parallel(block)
        else:
            from_mlp = self._mlp(block)
            self._add(*from_mlp)
            self._join_at_mlp(block)
            if "hook_resid_mid" in block.places:
                self._rebuilt_stream(block.places["hook_resid_mid"])
                self._add_constant(block.before_mid)
            self._attend(block)
        if "hook_resid_pre" in block.places:
            self._rebuilt_stream(block.places["hook_resid_pre"])

    def _parallel(self, block: BlockMaps) -> None:
        """A block whose attention and MLP both read its input: what came through the MLP is added after attention."""
        dense, single = self._mlp(block)
        n, at = self._g.shape[1], self._at
        self._attend(block)
        if dense is not None:
            self._g[:, :n] += dense
        if single is not None and len(single):
            self._g[at, n + torch.arange(len(at), device=at.device)] += single
        self._join_at_mlp(block)

    def _leave(self) -> None:
        """Let all targets leave that have joined."""
        like, self._start = self._targets.vector, self._joined
        self._g = like.new_zeros(self._used, 0, self._d_model)
        self._vectors, self._at = like.new_zeros(0, self._d_model), self._targets.position[:0]

    def _join(self, vectors: Float[Tensor, "new d_model"], at: Int[Tensor, " new"]) -> None:
        self._vectors, self._at = torch.cat([self._vectors, vectors]), torch.cat([self._at, at])
        self._joined += len(at)

    def _entering(self, place: int, width: int) -> tuple[Float[Tensor, "new d"], Int[Tensor, " new"], slice]:
        """The targets that read at this place: their vectors, positions and rows."""
        rows = slice(self._joined, self._joined + self._counts[place])
        return self._targets.vector[rows, :width], self._targets.position[rows], rows

    def _pieces(self) -> Iterator[tuple[Float[Tensor, "used n d_model"], int, slice]]:
        """The gradients of all targets that have joined: those in full, then single vectors by position.

        Each piece comes with the position of its first entry and the rows of its targets.
        """
        n = self._start + self._g.shape[1]
        if n > self._start:
            yield self._g, 0, slice(self._start, n)
        positions, counts = self._at.unique_consecutive(return_counts=True)
        first = 0
        for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
            yield self._vectors[None, first : first + count], position, slice(n + first, n + first + count)
            first += count

    def _add_constant(self, constant: Float[Tensor, "pos d_model"] | None) -> None:
        if constant is None:
            return
        for g, first, rows in self._pieces():
            add_position_dots(self._bias[rows], g, constant[first:])

    def _add_effects(self, place: int, at_site: Transform | None = None) -> None:
        """Add the effects of a place's features, errors and constants; ``at_site`` takes gradients to their site."""
        for g, first, rows in self._pieces():
            there = g if at_site is None else at_site(g, first)
            self._engine.writes[place].add_effects(there, first, self._out[rows], self._bias[rows])

    def _rebuilt_stream(self, place: int) -> None:
        """The whole stream is rebuilt here: gradients end at features and error, and what reads it joins."""
        self._add_effects(place)
        self._leave()
        vectors, at, _ = self._entering(place, self._d_model)
        self._join(vectors, at)

    def _mlp(self, block: BlockMaps) -> tuple[Tensor | None, Tensor | None]:
        """Effects and constants of a block's MLP; what comes through it, for gradients in full and single vectors."""
        if block.at_mlp is not None:
            self._add_effects(block.at_mlp)
            source = self._engine.sources.layers[block.at_mlp]
            if source.skip is None:
                return None, None
            through = self._engine.writes[block.at_mlp].through_skip
            dense = through(self._g, 0) if self._g.shape[1] else None
            single = [through(g, first) for g, first, _ in self._pieces() if g is not self._g]
            return dense, torch.cat([part[0] for part in single if part is not None]) if single else None
        if block.passed is None:
            return None, None
        self._add_constant(block.passed.const)
        used, n = self._g.shape[:2]
        positions = torch.arange(used, device=self._g.device).repeat_interleave(n)
        dense = block.passed.transpose(self._g.reshape(used * n, -1), positions).reshape(used, n, -1) if n else None
        return dense, block.passed.transpose(self._vectors, self._at)

    def _add(self, dense: Tensor | None, single: Tensor | None) -> None:
        if dense is not None:
            self._g = self._g + dense
        if single is not None:
            self._vectors = self._vectors + single

    def _join_at_mlp(self, block: BlockMaps) -> None:
        """Let targets join that read the MLP's input (transcoders, neurons) or its output (autoencoders)."""
        if block.at_mlp is None:
            return
        vectors, at, rows = self._entering(block.at_mlp, self._d_model)
        if not len(at):
            return
        if MLP in block.places:
            vectors, bias = block.own_read.transpose(vectors, at)
            self._bias[rows] += bias
        else:
            self._bias[rows] += (vectors * block.own_passed.const[at]).sum(-1)
            vectors = block.own_passed.transpose(vectors, at)
        self._join(vectors, at)

    def _attend(self, block: BlockMaps) -> None:
        """Take gradients through a block's attention, or end them at what rebuilds it; all are whole after it."""
        attention, at_z, at_out = block.attention, block.places.get("attn.hook_z"), block.places.get("hook_attn_out")
        if at_out is not None:
            self._add_effects(at_out)
            if at_z is None:
                self._join_below(at_out, attention)
                return
            self._settle(None)
            self._read_heads(at_out, at_z, block)
            self._join_below(at_z, block.own_heads.into)
        elif at_z is not None:
            self._add_constant(block.own_heads.const)
            self._add_effects(at_z, lambda g, first: _at_heads(block, g, first))
            self._join_below(at_z, block.own_heads.into)
        else:
            self._add_constant(attention.const)
            if self._joined > self._start:
                mixed, carried = attention.mix_back(self._g, self._shares(self._at), 0)
                attention.add_to_stream(mixed, self._g)
                self._settle(_moved(attention, self._vectors, carried) if len(self._at) else None)

    def _read_heads(self, at_out: int, at_z: int, block: BlockMaps) -> None:
        """Targets of what attention adds, where the heads' outputs are rebuilt too: they read these alone."""
        vectors, at, rows = self._entering(at_out, self._d_model)
        self._bias[rows] += (vectors * block.own_heads.const[at]).sum(-1)
        positions, counts = at.unique_consecutive(return_counts=True)
        first = rows.start
        for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
            own = slice(first, first + count)
            there = _at_heads(block, vectors[None, first - rows.start : first - rows.start + count], position)
            self._engine.writes[at_z].add_effects(there, position, self._out[own], self._bias[own])
            first += count
        self._g = torch.cat([self._g, self._g.new_zeros(self._used, len(at), self._d_model)], dim=1)
        self._joined += len(at)

    def _join_below(self, place: int, attention: FrozenAttention) -> None:
        """Let targets join that read what ``attention`` writes; those that joined before go on along the stream."""
        self._settle(None)
        vectors, at, rows = self._entering(place, attention.W_O.shape[2])
        if not len(at):
            return
        self._bias[rows] += (vectors * attention.const[at]).sum(-1)
        _, carried = attention.mix_back(self._g[:, :0].new_zeros(self._used, 0, vectors.shape[1]), self._shares(at), 0)
        self._g = torch.cat([self._g, _moved(attention, vectors, carried)], dim=1)
        self._joined += len(at)

    def _shares(self, at: Int[Tensor, " n"]) -> Float[Tensor, "n used"]:
        """Each single vector's share at every position: one at its own."""
        return torch.nn.functional.one_hot(at, self._used).to(self._g.dtype)

    def _settle(self, below: Float[Tensor, "used n d_model"] | None) -> None:
        """Hold single vectors in full, together with what attention moved of them (``below``)."""
        n = len(self._at)
        if n:
            full = self._g.new_zeros(self._used, n, self._d_model) if below is None else below
            full[self._at, torch.arange(n, device=self._at.device)] += self._vectors
            self._g = torch.cat([self._g, full], dim=1)
            self._vectors, self._at = self._vectors[:0], self._at[:0]


def _at_heads(block: BlockMaps, g: Float[Tensor, "used n d_model"], first: int) -> Float[Tensor, "used n z"]:
    used, n, _ = g.shape
    positions = torch.arange(first, first + used, device=g.device).repeat_interleave(n)
    return block.own_heads.back(g.reshape(used * n, -1), positions).reshape(used, n, -1)


def _moved(
    attention: FrozenAttention, vectors: Float[Tensor, "n d_out"], carried: Float[Tensor, "n_heads n key"]
) -> Float[Tensor, "key n d_model"]:
    """What attention's heads make of single vectors at their output, at every position of the stream."""
    through = attention.through_heads(attention.at_heads(vectors))
    return torch.einsum("hnk,hnd->knd", carried, through)
