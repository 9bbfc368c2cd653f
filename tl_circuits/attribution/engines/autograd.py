"""The reference engine: direct effects by automatic differentiation of the frozen model.

It is slow but simple, and works on any architecture, since it looks at no weights but those of MLPs that are passed
with their ratios held. One forward pass is made with attention patterns and norm denominators detached, and with every
tensor that a dictionary rebuilds (without one: every MLP's output) replaced by a leaf tensor of the same value. Then
the gradient of a target at such a leaf is the direct effect of each unit written there, one backward pass a target.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.engines.passed import Keeper, passing_hooks
from tl_circuits.attribution.sources import LayerSources, Sources, output_name, output_of
from tl_circuits.attribution.targets import Targets
from tl_circuits.hooks import Holds, Recording, differentiable_run, final_hook, final_stream, own_site

_TOKENS = "blocks.0.hook_resid_pre"


class AutogradEngine:
    """Direct effects on any targets of one prompt; rows have the same columns and meaning as the linear engine's."""

    def __init__(self, model: Any, recording: Recording, sources: Sources, holds: Holds):
        self.sources = sources
        dictionary, n_places = sources.dictionary, len(sources.places)
        self._final = recording.final
        with_leaf = [at for at in range(n_places) if at in dictionary.layers or dictionary.mlps == "error"]
        # Tensors recorded in inference mode cannot take part in autograd; clones made outside of it can.
        with torch.inference_mode(False):
            self._tokens_leaf = recording.resid_pre[0][None].clone().requires_grad_()
            self._leaves = {
                place: output_of(sources, recording, place)[None].clone().requires_grad_() for place in with_leaf
            }
            skips = {
                place: source.skip.clone() for place, source in enumerate(sources.layers) if source.skip is not None
            }
        inputs: dict[int, Tensor] = {}
        replaced = [(_TOKENS, lambda tensor: self._tokens_leaf)]
        replaced += passing_hooks(model, recording, sources)
        own = Keeper()
        for place in with_leaf:
            if place in skips:
                replaced.append((dictionary.input_hook(place), self._keeper(inputs, place)))
            write = self._writer(place, skips.get(place), inputs)
            autoencoder = own_site(dictionary, place) is not None
            replaced.append((output_name(sources, place), own.replacing(place, write) if autoencoder else write))
        reads = {
            place: dictionary.input_hook(place) for place in dictionary.layers if own_site(dictionary, place) is None
        }
        wanted = [*reads.values(), final_hook(model)]
        seen = differentiable_run(model, recording.tokens, holds, recording.held, replaced, wanted)
        self._values = {place: seen[name] for place, name in reads.items()} | own.read
        with torch.inference_mode(False), torch.enable_grad():
            self._values[n_places] = final_stream(model, seen[final_hook(model)])

    @property
    def final(self) -> Float[Tensor, " d_model"] | None:
        """The final norm's output, which the unembedding reads, at the position whose logits are explained.

        None if only the first layers were recorded.
        """
        return self._final

    def _keeper(self, inputs: dict[int, Tensor], place: int) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            inputs[place] = tensor
            return tensor

        return keep

    def _writer(self, place: int, skip: Tensor | None, inputs: dict[int, Tensor]) -> Any:
        """A hook that replaces the MLP's output by its leaf.

        A transcoder's skip connection is linear in the MLP's input, so gradients must pass it: it is added with the
        value zero (``through - through.detach()``) but with its gradient.
        """

        def write(tensor: Tensor) -> Tensor:
            if skip is None:
                return self._leaves[place]
            through = inputs[place].to(skip.device).float() @ skip.T
            mask = torch.ones_like(through)
            mask[:, list(self.sources.skipped)] = 0.0
            through = through * mask
            return self._leaves[place] + (through - through.detach()).to(tensor.dtype)

        return write

    def rows(self, targets: Targets) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The direct effect of every column on every target, and each target's bias: its value minus all effects."""
        out = targets.vector.new_zeros(len(targets), self.sources.before(int(targets.place.max())))
        value = targets.bias.clone()
        leaves = [self._tokens_leaf, *self._leaves.values()]
        for i in range(len(targets)):
            with torch.inference_mode(False), torch.enable_grad():
                x = self._values[int(targets.place[i])][int(targets.position[i])].float()
                scalar = (x * targets.vector[i, : len(x)].clone().to(x.device)).sum()
                grads = torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True)
            value[i] += scalar.detach().to(value.device)
            tokens, *at_leaves = (None if grad is None else grad[0].float() for grad in grads)
            if tokens is not None:
                out[i, : self.sources.n_pos] = (tokens * self.sources.tokens).sum(-1)
                if self.sources.shared_tokens is not None:
                    out[i, self.sources.shared_column] += (tokens * self.sources.shared_tokens).sum()
            for place, grad in zip(self._leaves, at_leaves, strict=True):
                if grad is not None and place < int(targets.place[i]):
                    self._effects(place, grad, out[i])
        return out, value - out.double().sum(-1).float()

    def _effects(self, place: int, grad: Float[Tensor, "pos d_out"], row: Float[Tensor, " column"]) -> None:
        source: LayerSources = self.sources.layers[place]
        dictionary = self.sources.dictionary
        writers = dictionary.writers(place) if place in dictionary.layers else ()
        for writer in writers:
            wrote = self.sources.layers[writer]
            active = wrote.active.to(grad.device)
            decoders = dictionary.decoder_vectors(writer, active.feature, place)
            effects = (grad[active.position] * decoders).sum(-1) * active.counted
            row[wrote.features_at : wrote.errors_at] += effects.to(row.device)
        if source.shared is not None:
            row[self.sources.shared_column] += (grad * source.shared).sum().to(row.device)
        if source.error is not None:
            row[source.errors_at : source.errors_at + self.sources.n_pos] = (grad * source.error).sum(-1).to(row.device)
