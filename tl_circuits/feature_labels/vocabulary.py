"""Labels without a network: what a feature reads and writes, as tokens of the vocabulary."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.feature_labels.directions import read_directions, written_directions
from tl_circuits.feature_labels.feature_files import TOKENS_KEPT
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.lookup import node_index
from tl_circuits.graph.nodes import Label
from tl_circuits.hooks import Replacement, embed_weights, in_turn, token_text, unembed_weights
from tl_circuits.support.checked import checked

FEATURES_AT_ONCE = 128
_BLOCK = 512  # tokens


@checked
@in_turn
def label_features(
    replacement: Replacement, graph: AttributionGraph, nodes: Sequence[str | int] | None = None, progress: bool = False
) -> AttributionGraph:
    """Label features by their weights: which tokens they promote, suppress and respond to.

    No network and no texts are needed. A feature promotes the tokens with the largest ``decoder · W_U`` and suppresses
    those with the smallest; if its activation in the graph is negative, it is the other way round. It reads the tokens
    whose embeddings have the largest product with its encoder. The short label shows whichever of promoting and reading
    stands out more: how far the largest product lies above the mean, in standard deviations over the vocabulary. Every
    feature gets a label, also one whose products are noise; :func:`name_features` measures whether they are
    (docs/method.md, "Names of features" and "Limits").

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        nodes: which features to label, by id or index; None for all.
        progress: show a progress bar on stderr.

    Returns:
        A new graph with these labels; nodes that are no features are passed over.

    Raises:
        BelongingError: for a graph of another model or dictionary.
        TargetError: for a node that the graph does not have.

    Examples:
        >>> labelled = tlc.label_features(replacement, graph)
        >>> labelled.nodes.set_index("id").label["L3/F667@8"]
        'say “Austin”, “TX”'
    """
    require_belonging(replacement, graph)
    features = graph.is_kind("feature")
    wanted = (
        features.nonzero()[:, 0].tolist()
        if nodes is None
        else [i for i in (node_index(graph, node) for node in nodes) if features[i]]
    )
    labels = dict(graph.labels)
    at = node_places(replacement.dictionary, graph)
    wanted = sorted(wanted, key=lambda index: int(at[index]))  # a layer's weights are read once
    with torch.no_grad(), tqdm(total=len(wanted), desc="labelling", unit="feature", disable=not progress) as bar:
        for start in range(0, len(wanted), FEATURES_AT_ONCE):
            part = wanted[start : start + FEATURES_AT_ONCE]
            labels.update(zip(part, _labels(replacement, graph, at[part], part), strict=True))
            bar.update(len(part))
    return replace(graph, labels=labels)


def _labels(
    replacement: Replacement, graph: AttributionGraph, places: Int[Tensor, " n"], indices: list[int]
) -> list[Label]:
    effects, likes = vocabulary_products(
        replacement, places, graph._nodes.feature[indices], active_side(graph, indices)
    )
    labels = []
    for tokens, writes_more in zip(
        strongest_tokens(replacement.model, effects, likes), _peak(effects) >= _peak(likes), strict=True
    ):
        promotes, suppresses, seen = tokens
        short = f"say {_quoted(promotes)}" if writes_more else f"sees {_quoted(seen)}"
        labels.append(Label(short, promotes, suppresses, seen))
    return labels


def strongest_tokens(
    model: Any, effects: Float[Tensor, "n d_vocab"], likes: Float[Tensor, "n d_vocab"]
) -> list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]:
    """The tokens that each feature promotes most, suppresses most, and reads, strongest first."""
    tops = (extreme(effects, TOKENS_KEPT), extreme(effects, TOKENS_KEPT, largest=False), extreme(likes, TOKENS_KEPT))
    promotes, suppresses, seen = (
        [tuple(token_text(model, i) for i in row) for row in tokens.tolist()] for _, tokens in tops
    )
    return list(zip(promotes, suppresses, seen, strict=True))


def extreme(
    products: Float[Tensor, "n d_vocab"], count: int, largest: bool = True
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Each row's ``count`` largest (or smallest) products, most extreme first, and their tokens.

    Those of a row lie in the blocks of tokens whose own extremes are the most extreme, so only these are sorted:
    torch's ``topk`` of whole rows takes longer than the products with the vocabulary themselves.
    """
    count = min(count, products.shape[1])
    n_blocks = products.shape[1] // _BLOCK
    if n_blocks <= count:
        found = products.topk(count, largest=largest)
        return found.values, found.indices
    blocks = products[:, : n_blocks * _BLOCK].unflatten(1, (n_blocks, _BLOCK))
    ends = blocks.amax(2) if largest else blocks.amin(2)
    chosen = ends.topk(count, largest=largest).indices
    tokens = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=chosen.device)).flatten(1)
    rest = torch.arange(n_blocks * _BLOCK, products.shape[1], device=chosen.device).expand(len(products), -1)
    tokens = torch.cat([tokens, rest], 1)
    values, at = products.gather(1, tokens).topk(count, largest=largest)
    return values, tokens.gather(1, at)


def active_side(graph: AttributionGraph, indices: Sequence[int]) -> Float[Tensor, " n"]:
    """On which side of zero features are active in a graph: 1 above, -1 below.

    A feature that is silent on the prompt of a contrast graph has the side of its baseline.
    """
    nodes = graph._nodes
    side = nodes.activation[list(indices)].sign()
    if nodes.baseline is not None:
        side = torch.where(side == 0, nodes.baseline[list(indices)].sign(), side)
    return torch.where(side == 0, 1.0, side)


def vocabulary_products(
    replacement: Replacement, places: Int[Tensor, " n"], features: Int[Tensor, " n"], side: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]]:
    """What features write to each logit, and how well each token's embedding fits their encoders.

    With a large vocabulary this is most of the time that names take. A feature costs less the more of them, of whatever
    layers, are asked for at once.

    Args:
        replacement: the model with its dictionary.
        places: for each feature, the number of its dictionary's place: its layer, unless some layer has several.
        features: the features' indices.
        side: 1 for features that are active above zero, -1 below: those promote what their decoder suppresses.
    """
    model, dictionary = replacement.model, replacement.dictionary
    W_U, W_E = unembed_weights(model).W_U, embed_weights(model)
    written, read = W_U.new_empty(len(features), W_U.shape[0]), W_E.new_empty(len(features), W_E.shape[1])
    for place in places.unique().tolist():
        here = (places == place).nonzero()[:, 0]
        signs = side[here][:, None].to(W_U.device)
        of_place = features[here].to(W_U.device)
        written[here.to(W_U.device)] = (written_directions(model, dictionary, place, of_place) * signs).to(W_U)
        read[here.to(W_E.device)] = read_directions(model, dictionary, place, of_place).to(W_E)
    if W_U.data_ptr() == W_E.data_ptr() and W_U.T.shape == W_E.shape:  # many models have one matrix for both
        effects, likes = (torch.cat([written, read]) @ W_U).float().chunk(2)
        return effects, likes
    return (written @ W_U).float(), (read @ W_E.T).float()


def _peak(products: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """How far each row's largest value lies above its mean, in standard deviations."""
    std, mean = torch.std_mean(products, dim=1)
    return (products.amax(1) - mean) / std.clamp_min(1e-30)


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(f"“{token}”" for token in tokens[:2])
