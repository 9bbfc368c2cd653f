"""Run a text through a model once, and note where the features of its dictionary fire."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.feature_labels.top_firing import TopFiring
from tl_circuits.hooks import (
    Replacement,
    by_place,
    collect_sites,
    context_length,
    first_tokens,
    flat,
    left_out,
    model_device,
    plain_ids,
    without_first,
)

CONTEXT = 64  # tokens in a piece
_TOKENS_AT_ONCE = 1024
_ACTIVATIONS_AT_ONCE = 2**25  # 128 MB: fewer tokens at once for a wide dictionary


@dataclass(frozen=True)
class Pieces:
    """Pieces of text as token ids.

    Attributes:
        ids: the ids of each piece, without ``first``.
        first: the special tokens that stand before every piece.
    """

    ids: tuple[tuple[int, ...], ...]
    first: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        """How many tokens all pieces have, without ``first``."""
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class Firing:
    """Where features fire in a text.

    Attributes:
        pieces: the text.
        layers: the features of each layer; by number of the place, if some layer has several dictionaries.
    """

    pieces: Pieces
    layers: Mapping[int, TopFiring]


def cut(replacement: Replacement, passages: Iterable[str], max_tokens: int) -> Pieces:
    """Passages as pieces of at most ``CONTEXT`` tokens, fewer if the model takes fewer. A piece never holds tokens of
    two passages.

    Args:
        replacement: the model with its dictionary.
        passages: the texts; no more of them are read than needed.
        max_tokens: stop after this many tokens.
    """
    model = replacement.model
    first = first_tokens(model, replacement.dictionary.prompt_rule)
    wide = max(1, min(CONTEXT, context_length(model) - len(first)))
    pieces: list[tuple[int, ...]] = []
    left = max_tokens
    for passage in passages:
        ids = without_first(plain_ids(model.tokenizer, passage), first)[:left]
        pieces += [tuple(ids[start : start + wide]) for start in range(0, len(ids), wide)]
        left -= len(ids)
        if left <= 0:
            break
    return Pieces(tuple(pieces), tuple(first))


def where_features_fire(
    replacement: Replacement, pieces: Pieces, features: Mapping[int, Int[Tensor, " feature"]], progress: bool = False
) -> Firing:
    """Run pieces of text through the model and keep the strongest examples of some features.

    Layers above the last one asked for are not run. Memory depends on the features and on the size of a batch, not on
    the text. The positions that the dictionary leaves out do not count, nor does the first position, which models
    treat unlike all others.

    Args:
        replacement: the model with its dictionary.
        pieces: the text.
        features: by number of the place (the layer, unless some layer has several dictionaries), the indices of the
            features, ascending.
        progress: show a progress bar on stderr.
    """
    dictionary = by_place(replacement.dictionary)
    tops = {place: TopFiring.empty(chosen) for place, chosen in sorted(features.items())}
    names = {place: dictionary.input_hook(place) for place in tops}
    hooks = list(dict.fromkeys(names.values()))
    widest = max((dictionary.width(place) for place in tops), default=1)
    at_once = max(CONTEXT + len(pieces.first), min(_TOKENS_AT_ONCE, _ACTIVATIONS_AT_ONCE // widest))
    with (
        torch.no_grad(),
        tqdm(total=pieces.n_tokens, desc="where features fire", unit="token", disable=not progress) as bar,
    ):
        for numbers, tokens, real in _batches(pieces, at_once):
            counted = real & ~_left_out(replacement, tokens)
            seen = collect_sites(replacement.model, tokens.to(model_device(replacement.model)), hooks) if tops else {}
            for place, top in tops.items():
                x = flat(seen[names[place]])
                acts = dictionary.activate(place, dictionary.pre_activations(place, x), x)
                if len(top.feature) < acts.shape[-1]:
                    acts = acts[..., top.feature.long().to(acts.device)]
                tops[place] = top.with_batch(acts.float().cpu(), counted, numbers, len(pieces.first))
            bar.update(int(real.sum()) - len(pieces.first) * len(tokens))
    return Firing(pieces, tops)


def _batches(
    pieces: Pieces, at_once: int
) -> Iterator[tuple[Int[Tensor, " batch"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Numbers, tokens and which of them are real, for pieces of similar length together."""
    order = sorted(range(len(pieces.ids)), key=lambda i: len(pieces.ids[i]))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * (len(pieces.first) + len(pieces.ids[i])) > at_once:
            yield _padded(pieces, batch)
            batch = []
        batch.append(i)
    if batch:
        yield _padded(pieces, batch)


def _padded(
    pieces: Pieces, batch: Sequence[int]
) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    rows = [[*pieces.first, *pieces.ids[i]] for i in batch]
    longest = max(map(len, rows))
    # A causal model does not see what follows, so any token may fill up a shorter piece.
    tokens = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return torch.tensor(batch), tokens, torch.arange(longest) < lengths[:, None]


def _left_out(replacement: Replacement, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The positions without features, and the first one."""
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, 0] = True
    for row, ids in enumerate(tokens):
        mask[row, list(left_out(replacement.model, ids, replacement.dictionary.prompt_rule))] = True
    return mask
