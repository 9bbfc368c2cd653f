"""The fast engine: rows of direct effects by one closed-form backward pass in matrix products."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.frozen_mlp import FrozenMLP, position_dot
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import Targets
from tl_circuits.errors import ArchitectureError
from tl_circuits.hooks import (
    ReadMap,
    Recording,
    frozen_attention,
    frozen_norm,
    is_parallel,
    read_map,
    resid_mid,
    unembed_weights,
)

# How far the frozen maps may be from what the model computed, relative to the largest entry.
_MAP_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class LinearEngine:
    """Direct effects on any targets of one prompt, exact in the local replacement model.

    One sweep from the last layer to the first carries the gradient ``g[pos, n]`` of all targets
    at once; a target joins at the layer it reads. Patterns and denominators are constants, so the
    gradient is the direct effect per unit written (Ameisen et al. 2025).
    """

    def __init__(self, model: Any, recording: Recording, sources: Sources):
        self.sources = sources
        self._parallel = is_parallel(model)
        dictionary = sources.dictionary
        layers = range(len(sources.layers))
        self._attention = [frozen_attention(model, recording, layer) for layer in layers]
        self._reads: dict[int, ReadMap] = {
            layer: read_map(model, recording, layer, dictionary.input_hook(layer))
            for layer in dictionary.layers
        }
        final = frozen_norm(model, recording, "ln_final")
        self._reads[len(layers)] = ReadMap("normed", final)
        self._mlp = [FrozenMLP(sources, layer, self._reads.get(layer)) for layer in layers]
        self._check(model, recording)

    def _check(self, model: Any, recording: Recording) -> None:
        """Compare every map with what the model computed, so that nothing is explained wrongly."""
        tolerance = _MAP_TOLERANCE[recording.logits.dtype]

        def compare(what: str, ours: Tensor, models: Tensor) -> None:
            models = models.float()
            gap = float((ours - models).abs().max() / models.abs().max().clamp_min(1e-30))
            if not gap <= tolerance:
                raise ArchitectureError(
                    f"{what}: the frozen linear map is off by {gap:.2%} of the model's own value (tolerance "
                    f"{tolerance:.2%}), so this architecture is not one the linear engine knows. "
                    'Use engine="autograd".'
                )

        resid = recording.resid_pre[0].float()
        for layer, attention in enumerate(self._attention):
            ours = attention.forward(recording.resid_pre[layer])
            compare(f"attention of layer {layer}", ours, recording.attn_out[layer])
            resid = resid + recording.attn_out[layer].float() + recording.mlp_out[layer].float()
            if layer + 1 < len(self._attention):
                compare(f"residual stream after layer {layer}", resid, recording.resid_pre[layer + 1])
        compare("residual stream at the end", resid, recording.resid_final)
        for layer in self.sources.dictionary.layers:
            ours = self._reads[layer].forward(resid_mid(recording, model, layer))
            hook = self.sources.dictionary.input_hook(layer)
            compare(hook, ours, recording.sites[hook])
        logits = explained_logits(model, recording, self._reads[len(self._attention)])
        compare("logits", logits, recording.logits[-1])

    def rows(self, targets: Targets) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """The direct effect of every column on every target, and each target's bias.

        ``rows[t].sum() + bias[t]`` equals the target's value. A row ends before the columns of the
        deepest target's own layer; later columns have no effect.
        """
        order = torch.argsort(targets.layer, descending=True, stable=True)
        ordered = targets[order]
        n_pos, depth, n = int(ordered.position.max()) + 1, int(ordered.layer[0]), len(ordered)
        out = ordered.vector.new_zeros(n, self.sources.before(depth))
        bias = ordered.bias.clone()
        counts = torch.bincount(ordered.layer, minlength=depth + 1).tolist()
        g = ordered.vector.new_zeros(n_pos, 0, ordered.vector.shape[1])
        n_layers = len(self._attention)
        if depth == n_layers:
            g = self._join(g, ordered, bias, depth, counts[depth])
        for layer in range(min(depth, n_layers - 1), -1, -1):
            joined = g.shape[1]
            into_skip = None
            if joined:
                self._mlp[layer].add_effects(g, out[:joined], bias[:joined])
                into_skip = self._mlp[layer].through_skip(g)
            attention = self._attention[layer]
            if self._parallel:
                bias[:joined] += position_dot(g, attention.const)
                g = g + attention.transpose(g) if into_skip is None else g + into_skip + attention.transpose(g)
                g = self._join(g, ordered, bias, layer, counts[layer])
            else:
                g = g if into_skip is None else g + into_skip
                g = self._join(g, ordered, bias, layer, counts[layer])
                bias[: g.shape[1]] += position_dot(g, attention.const)
                g = g + attention.transpose(g)
        out[:, :n_pos] = torch.einsum("pnd,pd->np", g, self.sources.tokens[:n_pos])
        if torch.equal(order, torch.arange(n, device=order.device)):
            return out, bias  # rows can be large; do not copy them for nothing
        restored = torch.argsort(order)
        return out[restored], bias[restored]

    def _join(
        self, g: Float[Tensor, "pos n d_model"], targets: Targets, bias: Tensor, layer: int, count: int
    ) -> Float[Tensor, "pos joined d_model"]:
        """``g`` with the targets that read at ``layer`` appended."""
        if count == 0:
            return g
        joined = g.shape[1]
        new = slice(joined, joined + count)
        position = targets.position[new]
        vectors, from_norm = self._reads[layer].transpose(targets.vector[new], position)
        bias[new] += from_norm
        entering = g.new_zeros(g.shape[0], count, g.shape[2])
        entering[position, torch.arange(count, device=g.device)] = vectors
        return torch.cat([g, entering], dim=1)


def explained_logits(model: Any, recording: Recording, final: ReadMap) -> Float[Tensor, " d_vocab"]:
    """The last position's logits as the frozen final norm and unembedding give them."""
    unembed = unembed_weights(model)
    logits = final.forward(recording.resid_final)[-1].to(unembed.W_U.dtype) @ unembed.W_U + unembed.b_U
    logits = logits.float()
    return logits if unembed.softcap is None else unembed.softcap * torch.tanh(logits / unembed.softcap)
