"""A step that trains all layers together, so that the model still says the same with every MLP replaced.

Layers that were trained one by one each leave an error, and in a model with all MLPs replaced these errors add up. Here
the loss is the divergence of the replaced model's next-token distribution from the model's own (Karvonen 2025), plus a
multiple of each layer's unexplained variance on what the model itself writes, so that a layer stays true to its MLP.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear

from tl_circuits.dictionaries.training.layer import LayerTraining, Numbers
from tl_circuits.dictionaries.training.network import Network, watched
from tl_circuits.dictionaries.training.step import Read, token_weights


def step_together(
    network: Network, layers: Mapping[int, LayerTraining], ids: Int[Tensor, "piece context"], rate: float, local: float
) -> tuple[dict[int, Numbers], float]:
    """Train all layers on some pieces of text.

    Position 0 is left as it is, as in the steps of one layer and at use. A layer with levels has its weights rounded to
    four bits wherever they are used, and its gradient is taken as if they were not ("straight through", Bengio et al.
    2013), so that what is learnt is good once rounded.

    Args:
        network: the model.
        layers: each layer's training; their weights are changed.
        ids: the text.
        rate: the learning rate.
        local: nats that a layer's unexplained variance counts for, if it is all of it.

    Returns:
        What each layer reports, and the divergence in nats a token.
    """
    leaves = {
        n: {name: t.detach().requires_grad_() for name, t in layer.tensors.items()} for n, layer in layers.items()
    }
    used = {n: _straight_through(leaves[n], layer) for n, layer in layers.items()}
    numbers: dict[int, Numbers] = {}
    first: dict[int, Tensor] = {}

    def compare(layer: int, x: Tensor, y: Tensor) -> None:
        first[layer] = y[:, :1]
        start = layers[layer].start
        x, y = (part[:, 1:].flatten(0, 1).float() for part in (x / start.x_scale, y / start.y_scale))
        with torch.enable_grad():
            ids, acts, out = _read(used[layer], x, layers[layer].k)
            error = out - y
            (local * (token_weights(y) * error.square().sum(1)).mean() / start.variance).backward()
        numbers[layer] = layers[layer].noted(Read(ids, acts.detach(), error.detach()))

    def made(layer: int, x: Tensor) -> Tensor:
        start = layers[layer].start
        out = _read(used[layer], x[:, 1:].flatten(0, 1).float() / start.x_scale, layers[layer].k)[2] * start.y_scale
        return torch.cat([first[layer], out.view(len(x), -1, out.shape[1])], dim=1)

    with torch.no_grad(), watched(network.mlps, compare):
        right = _said(network, ids)
    with torch.enable_grad(), _instead(network.mlps, made):
        divergence = kl_div(_said(network, ids), right, reduction="sum", log_target=True) / len(right)
        divergence.backward()
    for n, layer in layers.items():
        layer.update({name: leaf.grad for name, leaf in leaves[n].items()}, rate)
    return numbers, float(divergence.detach())


def _said(network: Network, ids: Tensor) -> Float[Tensor, "token d_vocab"]:
    """The log probabilities of the next token, after every token but the first."""
    return network.whole(input_ids=ids, use_cache=False).logits[:, 1:].flatten(0, 1).float().log_softmax(-1)


def _straight_through(leaves: Mapping[str, Tensor], layer: LayerTraining) -> dict[str, Tensor]:
    """The weights as they are used, with the gradient of the weights themselves."""
    found = dict(leaves)
    for name in layer.levels:
        change = layer.rounded(name) - layer.tensors[name]
        with torch.enable_grad():
            found[name] = leaves[name] + change
    return found


def _read(weights: Mapping[str, Tensor], x: Float[Tensor, "token d_in"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and activations of active features, and what they write: as ``step.read``, but dense and for autograd."""
    pre = linear(x, weights["W_enc"], weights["b_enc"])
    top = pre.topk(k, dim=-1, sorted=False)
    acts = top.values.relu()
    out = torch.zeros_like(pre).scatter(1, top.indices, acts) @ weights["W_dec"] + weights["b_dec"]
    if "W_skip" in weights:
        out = out + linear(x, weights["W_skip"])
    return top.indices, acts, out


@contextmanager
def _instead(mlps: Mapping[int, nn.Module], made: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Call ``made`` in place of the MLPs, which do not run."""
    try:
        for layer, mlp in mlps.items():
            mlp.forward = lambda x, layer=layer: made(layer, x)
        yield
    finally:
        for mlp in mlps.values():
            mlp.__dict__.pop("forward", None)
