"""A feature's name from its weights: the tokens that it promotes, suppresses or reads more than others do.

Some tokens, such as those that hardly occur in training, lie at the end of many features' lists. So a token's product
with a feature is divided by what is usual for the token: the root mean square of its products with a sample of the
dictionary's features. A token names a feature if it then stands out from the vocabulary more than any token does for
random directions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.feature_labels.token_space import plain
from tl_circuits.feature_labels.vocabulary import FEATURES_AT_ONCE, extreme, vocabulary_products
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
        features = torch.cat(
            [torch.randint(dictionary.width(place), (each,), generator=generator) for place in dictionary.layers]
        )
        for at, chosen in zip(places.split(FEATURES_AT_ONCE), features.split(FEATURES_AT_ONCE), strict=True):
            parts = [_unit(products) for products in vocabulary_products(replacement, at, chosen, torch.ones(len(at)))]
            squares = [part.square().sum(0) for part in parts]
            sums = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
        written, read = ((s / (each * len(dictionary.layers))).sqrt().clamp_min(1e-30) for s in sums)
        W_U, W_E = unembed_weights(replacement.model).W_U.detach(), embed_weights(replacement.model).detach()
        directions = torch.randn(_DIRECTIONS, W_E.shape[1], generator=generator)
        chance = (directions.to(W_U) @ W_U).float(), (directions.to(W_E) @ W_E.T).float()
    least = [float(_Peaks(rows, usual).largest().max()) for rows, usual in zip(chance, (written, read), strict=True)]
    return UsualProducts(written, read, *least)


def _unit(products: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
    """Products around their mean, each feature's scaled to length 1, so that long vectors count no more."""
    centred = products - products.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-30)


class _Peaks:
    """How far tokens stand out, in standard deviations over the vocabulary, features by rows."""

    def __init__(self, products: Float[Tensor, "n d_vocab"], usual: Float[Tensor, " d_vocab"]):
        self._relative = (products - products.mean(1, keepdim=True)).div_(usual.to(products.device))
        std, mean = torch.std_mean(self._relative, dim=1)
        self._std, self._mean = std.clamp_min(1e-30), mean

    def largest(self) -> Float[Tensor, " n"]:
        """Each row's largest value, in standard deviations above the row's mean."""
        return (self._relative.amax(1) - self._mean) / self._std

    def smallest(self) -> Float[Tensor, " n"]:
        """Each row's smallest value, in standard deviations below the row's mean, as a positive number."""
        return (self._mean - self._relative.amin(1)) / self._std

    def tokens(self, rows: Int[Tensor, " row"], largest: bool) -> list[list[int]]:
        """The tokens of some rows that stand out most, furthest first."""
        return extreme(self._relative[rows], _LOOKED_AT, largest)[1].tolist()


def weight_names(
    model: Any, usual: UsualProducts, effects: Float[Tensor, "n d_vocab"], likes: Float[Tensor, "n d_vocab"]
) -> list[list[WeightName]]:
    """Each feature's names that are sharper than chance, of the three kinds: tokens it promotes, suppresses and reads.

    Args:
        model: the model.
        usual: what is usual for its tokens.
        effects: what the features write to each logit.
        likes: how well each token's embedding fits their encoders.
    """
    names: list[list[WeightName]] = [[] for _ in effects]
    written, read = _Peaks(effects, usual.written), _Peaks(likes, usual.read)
    kinds = (
        ("say", written, written.largest(), usual.least_written, True),
        ("suppresses", written, written.smallest(), usual.least_written, False),
        ("sees", read, read.largest(), usual.least_read, True),
    )
    for verb, peaks, sharpness, least, largest in kinds:
        sharp = (sharpness > least).nonzero()[:, 0]
        for feature, tokens in zip(sharp.tolist(), peaks.tokens(sharp, largest), strict=True):
            found: dict[str, tuple[int, str]] = {}
            for token in tokens:
                text = token_text(model, token)
                if "\ufffd" not in text and text.strip():
                    found.setdefault(plain(text), (token, text))
            named = list(found.values())[:_NAMED]
            text = f"{verb} " + ", ".join(f"“{text}”" for _, text in named)
            if named:
                names[feature].append(WeightName(text, float(sharpness[feature]), tuple(token for token, _ in named)))
    return names


def sharpest(names: list[WeightName]) -> WeightName | None:
    """The sharpest of a feature's names; None if it has none."""
    return max(names, key=lambda name: name.sharpness, default=None)
