"""A feature's name from its weights: the tokens that it promotes, suppresses or reads more than others do.

Some tokens, such as those that hardly occur in training, lie at the end of many features' lists. So a token's product
with a feature is divided by what is usual for the token: the root mean square of its products with a sample of the
dictionary's features. A token names a feature if it then stands out from the vocabulary more than any token does for
random directions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.feature_labels.token_space import plain
from tl_circuits.feature_labels.vocabulary import FEATURES_AT_ONCE, vocabulary_products
from tl_circuits.hooks import Replacement, by_place, embed_weights, token_text, unembed_weights

_SAMPLE = 256  # features that say what is usual for a token
_DIRECTIONS = 64  # random directions that say what chance gives
_LOOKED_AT = 12
_NAMED = 2


@dataclass(frozen=True)
class WeightName:
    """A name from weights.

    Attributes:
        text: the name, such as ``suppresses “ French”, “ France”``.
        sharpness: how far its first token stands out, in standard deviations over the vocabulary.
        tokens: the tokens that it names, as vocabulary ids, strongest first.
    """

    text: str
    sharpness: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class UsualProducts:
    """What is usual for the tokens of a vocabulary, and what chance gives.

    Attributes:
        written: by token, the root mean square of its logit's products with the sample, features scaled to length 1.
        read: the same for its embedding.
        least_written: how far the first token of a random direction stands out, the largest of 64.
        least_read: the same for embeddings.
    """

    written: Float[Tensor, " d_vocab"]
    read: Float[Tensor, " d_vocab"]
    least_written: float
    least_read: float


def usual_products(replacement: Replacement) -> UsualProducts:
    """Measure what is usual with features sampled from all layers of the attached dictionary, always the same ones."""
    dictionary, generator = by_place(replacement.dictionary), torch.Generator().manual_seed(0)
    each = max(1, _SAMPLE // len(dictionary.layers))
    sums: list[Tensor] = []
    with torch.no_grad():
        places = torch.tensor(dictionary.layers).repeat_interleave(each)
        features = torch.cat([torch.randint(dictionary.width(place), (each,), generator=generator) for place in dictionary.layers])
        for at, chosen in zip(places.split(FEATURES_AT_ONCE), features.split(FEATURES_AT_ONCE), strict=True):
            parts = [_unit(products) for products in vocabulary_products(replacement, at, chosen, torch.ones(len(at)))]
            squares = [part.square().sum(0) for part in parts]
            sums = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
        written, read = ((s / (each * len(dictionary.layers))).sqrt().clamp_min(1e-30) for s in sums)
        W_U, W_E = unembed_weights(replacement.model).W_U.detach(), embed_weights(replacement.model).detach()
        directions = torch.randn(_DIRECTIONS, W_E.shape[1], generator=generator)
        chance = (directions.to(W_U) @ W_U).float(), (directions.to(W_E) @ W_E.T).float()
    least = [max(float(_peaks(row, usual).max()) for row in rows) for rows, usual in zip(chance, (written, read), strict=True)]
    return UsualProducts(written, read, *least)


def _unit(products: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
    """Products around their mean, each feature's scaled to length 1, so that long vectors count no more than short ones."""
    centred = products - products.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _peaks(products: Float[Tensor, " d_vocab"], usual: Float[Tensor, " d_vocab"]) -> Float[Tensor, " d_vocab"]:
    """How far each token stands out, in standard deviations over the vocabulary."""
    relative = (products - products.mean()) / usual.to(products.device)
    return (relative - relative.mean()) / relative.std().clamp_min(1e-30)


def weight_names(
    model: Any, usual: UsualProducts, effect: Float[Tensor, " d_vocab"], like: Float[Tensor, " d_vocab"]
) -> Iterator[WeightName]:
    """The names that are sharper than chance, of the three kinds: tokens it promotes, suppresses and reads."""
    written, read = _peaks(effect, usual.written), _peaks(like, usual.read)
    kinds = (("say", written, usual.least_written), ("suppresses", -written, usual.least_written), ("sees", read, usual.least_read))
    for verb, peaks, least in kinds:
        if float(peaks.max()) <= least:
            continue
        top = peaks.topk(min(_LOOKED_AT, len(peaks)))
        found: dict[str, tuple[int, str]] = {}
        for token in top.indices.tolist():
            text = token_text(model, token)
            if "\ufffd" not in text and text.strip():
                found.setdefault(plain(text), (token, text))
        named = list(found.values())[:_NAMED]
        text = f"{verb} " + ", ".join(f"“{text}”" for _, text in named)
        if named:
            yield WeightName(text, float(top.values[0]), tuple(token for token, _ in named))


def sharpest_weight_name(
    model: Any, usual: UsualProducts, effect: Float[Tensor, " d_vocab"], like: Float[Tensor, " d_vocab"]
) -> WeightName | None:
    """The sharpest of the three names; None if none is sharper than chance.

    Args:
        model: the model.
        usual: what is usual for its tokens.
        effect: what the feature writes to each logit.
        like: how well each token's embedding fits its encoder.
    """
    return max(weight_names(model, usual, effect, like), key=lambda name: name.sharpness, default=None)
