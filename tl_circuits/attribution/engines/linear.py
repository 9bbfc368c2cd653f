"""The fast engine: rows of direct effects by a backward pass written out as matrix products.

With patterns and norm denominators frozen, every block is an affine map of the residual stream, known from the weights.
So the gradients of many targets go from the last layer to the first as plain matrix products, without autograd and for
all targets together. At each layer, a gradient times what a source writes there is that source's direct effect.
Equations: docs/method.md, "Computing rows"; Ameisen et al. 2025, "Circuit tracing".
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.engines.checks import (
    require_full_share,
    require_same,
    require_same_logits,
    require_same_streams,
)
from tl_circuits.attribution.engines.effects import Effects
from tl_circuits.attribution.engines.factored import Factored
from tl_circuits.attribution.engines.frozen_mlp import FrozenMLP, add_position_dots, position_dots
from tl_circuits.attribution.engines.rounding import rounded_attention, rounded_reads, stream_rounding
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets
from tl_circuits.hooks import (
    FrozenAttention,
    ReadMap,
    Recording,
    frozen_attention,
    frozen_norm,
    is_parallel,
    read_map,
    resid_mid,
)

_STREAM = ReadMap("residual", None)


class LinearEngine:
    """Direct effects on any targets of one prompt, exact in the local replacement model.

    Making one compares each frozen map with what the model computed on this prompt, and raises ArchitectureError if
    they differ: the engine never explains a model that it does not reproduce. Targets with ``layer == n_layers`` read
    the final norm's output; if the recording ends below the model's last layer, they read the stream there.
    """

    def __init__(self, model: Any, recording: Recording, sources: Sources):
        self.sources = sources
        self.parallel = is_parallel(model)
        dictionary = sources.dictionary
        layers = range(len(sources.layers))
        self.attention = [frozen_attention(model, recording, layer) for layer in layers]
        self.reads: dict[int, ReadMap] = {
            layer: read_map(model, recording, layer, dictionary.input_hook(layer))
            for layer in sources.dictionary_layers
        }
        self.devices = (*sources.devices, recording.resid_final.device)
        whole = recording.logits is not None
        self.reads[len(layers)] = ReadMap("normed", frozen_norm(model, recording, "ln_final")) if whole else _STREAM
        self.mlp = [FrozenMLP(sources, layer, self.reads.get(layer)) for layer in layers]
        self.final = self.reads[len(layers)].forward(recording.resid_final)[recording.position] if whole else None
        self.leading = Leading(recording, sources, self.attention)
        self._check(model, recording)  # before rounding is added, which would make everything fit
        if recording.dtype != torch.float32:
            self.attention = rounded_attention(self.attention, recording)
            self.reads |= rounded_reads(self.reads, model, recording, sources)
            for layer, mlp in enumerate(self.mlp):
                mlp.add_constant(stream_rounding(recording, sources, self.reads, layer))

    def _check(self, model: Any, recording: Recording) -> None:
        """Raise ArchitectureError unless every frozen map gives what the model computed on this prompt."""
        for layer, attention in enumerate(self.attention):
            ours = attention.forward(recording.resid_pre[layer])
            require_same(f"attention of layer {layer}", ours, recording.attn_out[layer], recording.dtype)
        require_same_streams(recording)
        for layer in self.sources.dictionary_layers:
            require_full_share(layer, self.sources.layers[layer])
            ours = self.reads[layer].forward(resid_mid(recording, model, layer))
            hook = self.sources.dictionary.input_hook(layer)
            require_same(hook, ours, recording.sites[hook], recording.dtype)
        if recording.logits is not None:
            require_same_logits(model, recording, self.reads[len(self.attention)])

    def below(self, layer: int) -> "LinearEngine":
        """The same engine for the layers below ``layer`` only: targets of that layer read the stream that enters it."""
        cut = copy.copy(self)
        cut.attention, cut.mlp = self.attention[:layer], self.mlp[:layer]
        cut.reads = {at: read for at, read in self.reads.items() if at < layer} | {layer: _STREAM}
        return cut

    def rows(self, targets: Targets) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The direct effect of every column on every target, and each target's bias.

        ``rows[t].sum() + bias[t]`` equals the target's value. A row ends before the columns of the
        deepest target's own layer; later columns have no effect.
        """
        order = torch.argsort(targets.place, descending=True, stable=True)
        sweep = _Sweep(self, targets[order])
        out, bias = sweep.run()
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return out, bias  # rows can be large; do not copy them for nothing
        restored = torch.argsort(order)
        return out[restored], bias[restored]


class _Sweep:
    """One backward pass from the last layer to the first, for many targets at once.

    A target *joins* at the layer whose input it reads: from there on its gradient is carried along. Targets are sorted
    by layer, last first, so they join in order. Those that joined last are held in compact form (``_late``, see
    :class:`Factored`), those before them in full: ``_g[p - _first, i]`` is target ``i``'s gradient at position ``p``.
    """

    def __init__(self, engine: LinearEngine, targets: Targets):
        self._engine, self._targets = engine, targets
        sources = engine.sources
        self._tokens = sources.tokens
        # At the leading skipped positions there are no features, so the sweep need not visit them; what flows
        # through them is computed from the values they hold (see Leading).
        leading = engine.leading
        starts = int(targets.position.min()) >= leading.count
        self._leading = leading if leading.count and starts else None
        self._first = leading.count if self._leading else 0
        self._depth = int(targets.place[0])
        self._counts = torch.bincount(targets.place, minlength=self._depth + 1).tolist()
        self._effects = Effects(targets.bias, sources.before(self._depth))
        self._out, self._bias = self._effects.on(sources.home, 0)
        used = int(targets.position.max()) + 1 - self._first
        self._g = targets.vector.new_zeros(used, 0, targets.vector.shape[1])
        self._late: list[Factored] = []
        self._joined = 0

    def run(self) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        engine, n_layers = self._engine, len(self._engine.attention)
        if self._depth == n_layers:
            self._go_to(n_layers)
            self._join(*self._entering(n_layers))
        for layer in range(min(self._depth, n_layers - 1), -1, -1):
            self._go_to(layer)
            self._layer(layer, engine.parallel)
        last = self._first + self._g.shape[0]
        gradients = self._gradients()
        self._out[:, self._first : last] += position_dots(gradients, self._tokens[self._first :]).T
        shared = engine.sources.shared_tokens
        if shared is not None:
            add_position_dots(self._out[:, engine.sources.shared_column], gradients, shared[self._first :])
        return self._effects.joined()

    def _go_to(self, layer: int) -> None:
        """Bring what the sweep carries to the device of ``layer``, if it is not there already."""
        device = self._engine.devices[layer]
        if device != self._g.device:
            self._g, self._targets = self._g.to(device), self._targets.to(device)
            self._late = [late.to(device) for late in self._late]
            width = self._engine.sources.before(min(layer + 1, self._depth))
            self._out, self._bias = self._effects.on(device, width)

    def _gradients(self) -> Float[Tensor, "used n d_model"]:
        """The gradients of all targets that have joined."""
        return torch.cat([self._g, *(late.dense() for late in self._late)], dim=1) if self._late else self._g

    def _layer(self, layer: int, parallel: bool) -> None:
        """Go through one layer backwards: MLP, then attention (beside each other where the model has them parallel)."""
        engine, g, n = self._engine, self._gradients(), self._joined
        attention, mlp = engine.attention[layer], engine.mlp[layer]
        into_skip = None
        if n:
            mlp.add_effects(g, self._first, self._out[:n], self._bias[:n])
            into_skip = mlp.through_skip(g, self._first)
        entering = self._entering(layer)
        if into_skip is not None:  # a skip connection changes gradients at every position, so all are held in full
            self._g, self._late = g, []
            if not parallel:
                g += into_skip
        add_position_dots(self._bias[:n], g, attention.const[self._first :])
        if not parallel:  # a parallel MLP reads what attention reads
            vectors, position = entering
            self._bias[n : n + len(vectors)] += (vectors * attention.const[position]).sum(-1)
            self._join(*entering)
        self._attend(layer)
        if parallel:
            if into_skip is not None:
                self._g += into_skip
            self._join(*entering)

    def _attend(self, layer: int) -> None:
        """Take all gradients through a layer's attention, and expand those whose compact form no longer pays."""
        attention, first = self._engine.attention[layer], self._first
        shares = torch.cat(
            [self._g.new_zeros(0, self._g.shape[0]), *(late.shares.flatten(0, 1) for late in self._late)]
        )
        mixed, carried = attention.mix_back(self._g, shares, first)
        attention.add_to_stream(mixed[:, first:], self._g)
        sizes = [late.size for late in self._late]
        moved = [
            late.through(attention, part, first)
            for late, part in zip(self._late, carried.split(sizes, dim=1), strict=True)
        ]
        if self._leading is not None:
            at_leading = torch.cat([mixed[:, :first], *(values for _, values in moved)], dim=2)
            self._leading.add_effects(layer, at_leading, self._out, self._bias)
        self._late = [late for late, _ in moved]
        if layer:
            below = self._engine.attention[layer - 1]
            settled = [late for late in self._late if not late.worth_another(below)]
            self._g = torch.cat([self._g, *(late.dense() for late in settled)], dim=1) if settled else self._g
            self._late = self._late[len(settled) :]

    def _entering(self, layer: int) -> tuple[Float[Tensor, "new d_model"], Tensor]:
        """The targets that read at ``layer``: their vectors, as vectors on the residual stream, and their positions."""
        targets, n = self._targets, self._joined
        count = self._counts[layer] if layer <= self._depth else 0
        new = slice(n, n + count)
        position = targets.position[new]
        if count == 0:
            return targets.vector[new], position
        vectors, from_norm = self._engine.reads[layer].transpose(targets.vector[new], position)
        self._bias[new] += from_norm
        return vectors, position

    def _join(self, vectors: Float[Tensor, "new d_model"], position: Tensor) -> None:
        """Let targets join the sweep: the gradient of each is its vector, at its own position."""
        if len(vectors):
            self._late.append(Factored.joining(vectors, position - self._first, self._g.shape[0]))
            self._joined += len(vectors)


class Leading:
    """The skipped positions at the prompt's start (usually one, the beginning-of-sequence token), computed in advance.

    No later position acts on them and their MLPs are constants, so their streams are known: a linear function of their
    own tokens plus a constant. ``_values[L]`` holds the attention values of layer L at these positions, one part for
    each of their tokens, one for what a baseline has there as well, and one constant part. Later positions see them
    only through these values; so a sweep leaves them out and multiplies its gradient at the values with the parts.
    """

    def __init__(self, recording: Recording, sources: Sources, attention: list[FrozenAttention]):
        count = 0
        while count in sources.skipped:
            count += 1
        self.count = count
        self._values: list[Float[Tensor, "part kv pos d_head"]] = []
        if count == 0:
            return
        tokens = sources.tokens[:count]
        self._shared_column = sources.shared_column
        n_parts = count + (sources.shared_tokens is not None)
        streams = torch.zeros(n_parts, count, tokens.shape[1], device=tokens.device)
        streams[range(count), range(count)] = tokens
        if sources.shared_tokens is not None:
            streams[count] = sources.shared_tokens[:count]
        for layer, block in enumerate(attention):
            streams = streams.to(block.const.device)
            rest = recording.resid_pre[layer][:count].float() - streams.sum(0)
            parts = torch.cat([streams, rest[None]])
            self._values.append(parts[:, None] @ block.W_V)
            streams = streams + torch.stack([block.linear(part) for part in streams])
            if sources.shared_tokens is not None:
                streams[count] += recording.mlp_out[layer][:count].float()  # the baseline has these MLP outputs too

    def add_effects(
        self,
        layer: int,
        values: Float[Tensor, "kv count n d_head"],
        out: Float[Tensor, "total column"],
        bias: Float[Tensor, " total"],
    ) -> None:
        """Add these positions' effects on the first ``n`` targets; ``values`` are the gradients at a layer's values."""
        n = values.shape[2]
        parts = torch.einsum("kqne,skqe->ns", values, self._values[layer])
        out[:n, : self.count] += parts[:, : self.count]
        if self._shared_column is not None:
            out[:n, self._shared_column] += parts[:, self.count]
        bias[:n] += parts[:, -1]
