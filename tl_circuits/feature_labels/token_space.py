"""How alike and how common the tokens of a text are, and what chance gives."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuits.feature_labels.top_firing import EXAMPLES

FEWEST = 3  # examples that a name needs
AGREE = 0.6  # share of the examples that have to be alike
_DRAWS = 500


class TokenSpace:
    """How alike and how common the tokens of a text are.

    Args:
        pieces: the text, as pieces of token ids.
        embeddings: the model's token embeddings.
        texts: by token, its text.
        also: tokens that do not occur in the text, and that are asked about.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[int]],
        embeddings: Float[Tensor, "d_vocab d_model"],
        texts: Mapping[int, str],
        also: Sequence[int] = (),
    ):
        self._pieces, self._texts = pieces, texts
        self._plain = {token: plain(text) for token, text in texts.items()}
        ids = torch.tensor([i for piece in pieces for i in piece])
        distinct, counts = torch.cat([ids, torch.tensor(list(also), dtype=torch.long)]).unique(return_counts=True)
        share = counts / counts.sum()
        self._rows = {token: row for row, token in enumerate(distinct.tolist())}
        self.spaced = any(text.startswith(" ") for text in texts.values())
        names = [self._plain[token] for token in self._rows]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self._share: Counter[str] = Counter()
        for name, part in zip(names, share.tolist(), strict=True):
            self._share[name] += part
        self._name = torch.tensor([numbers[name] for name in names])
        self._places = torch.searchsorted(distinct, ids)
        vectors = embeddings[distinct.to(embeddings.device)].detach().float().cpu()
        self._vectors = torch.nn.functional.normalize(vectors - (vectors * share[:, None]).sum(0), dim=1)

    def text(self, token: int) -> str:
        """A token's text."""
        return self._texts[token]

    def share(self, text: str) -> float:
        """How large a part of the text a token is, whatever its case and the space before it."""
        return self._share[plain(text)]

    @cached_property
    def start_share(self) -> float:
        """How large a part of the text stands at the start of a piece."""
        return len(self._pieces) / max(1, len(self._places))

    def rule_share(self, tokens: Collection[str], phrase: Mapping[int, str]) -> float:
        """How large a part of the text are places with one of ``tokens`` (any, if there are none) after a phrase."""
        if not phrase:
            return sum(self._share[token] for token in tokens)
        nearest = max(phrase)
        count = 0
        for number, at in self._where.get(phrase[nearest], ()):
            piece, end = self._pieces[number], at - nearest
            if end >= len(piece) or end + min(phrase) < 0 or (tokens and self._plain[piece[end]] not in tokens):
                continue
            count += all(self._plain[piece[end + offset]] == text for offset, text in phrase.items())
        return count / max(1, len(self._places))

    def share_before(self, text: str, offset: int, tokens: Collection[str]) -> float:
        """Of the places where one of ``tokens`` stands, the share that has ``text`` at ``offset`` before it."""
        found = self._before(offset, tokens)
        wanted = plain(text)
        return sum(there == wanted for there in found) / max(1, len(found))

    def _before(self, offset: int, tokens: Collection[str]) -> list[str]:
        places = [place for token in tokens for place in self._where.get(token, ())]
        return [self._plain[self._pieces[p][at + offset]] if at + offset >= 0 else "" for p, at in places]

    @cached_property
    def _where(self) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for number, piece in enumerate(self._pieces):
            for at, token in enumerate(piece):
                found.setdefault(self._plain[token], []).append((number, at))
        return found

    def alike(self, tokens: Sequence[int]) -> Float[Tensor, "n n"]:
        """The cosines of tokens with each other; 1 for tokens that differ in case or space only."""
        return self._alike(torch.tensor([[self._rows[t] for t in tokens]]))[0]

    def _alike(self, rows: Int[Tensor, "draw n"]) -> Float[Tensor, "draw n n"]:
        vectors, names = self._vectors[rows], self._name[rows]
        return torch.where(names[:, :, None] == names[:, None], 1.0, vectors @ vectors.mT)

    @cached_property
    def _by_chance(self) -> dict[tuple[int, int], float]:
        """For n tokens drawn at random, of which the k most alike are kept: a mean cosine that no draw reached.

        Half of the draws take places of the text, where common tokens repeat; half take distinct tokens, since rare
        ones have embeddings of their own kind.
        """
        generator, found = torch.Generator().manual_seed(0), {}
        for n in range(FEWEST, EXAMPLES + 1):
            places = self._places[torch.randint(len(self._places), (_DRAWS, n), generator=generator)]
            drawn = torch.cat([places, torch.randint(len(self._rows), (_DRAWS, n), generator=generator)])
            for kept, mean in _most_alike(self._alike(drawn)):
                found[n, int(kept[0].sum())] = float(mean.max())
        return found

    def most_alike(self, tokens: Sequence[int]) -> list[int]:
        """Which of the tokens are more alike than chance gives: their places in ``tokens``, as many as possible. Empty
        if fewer than the share that a name needs are.
        """
        for kept, mean in _most_alike(self.alike(tokens)[None]):
            n = int(kept[0].sum())
            if n < AGREE * len(tokens):
                break
            # Where chance gives the same token again and again, only the same token everywhere says something.
            if float(mean[0]) > min(self._by_chance[len(tokens), n], 0.999):
                return kept[0].nonzero()[:, 0].tolist()
        return []


def _most_alike(cosines: Float[Tensor, "draw n n"]) -> list[tuple[Bool[Tensor, "draw n"], Float[Tensor, " draw"]]]:
    """All tokens with their mean cosine, then without the one that fits worst, and so on down to three."""
    kept, found = torch.ones(cosines.shape[:2], dtype=torch.bool), []
    for n in range(cosines.shape[1], FEWEST - 1, -1):
        sums = (cosines * kept[:, None]).sum(2)
        found.append((kept.clone(), ((sums * kept).sum(1) - n) / (n * (n - 1))))
        kept[torch.arange(len(kept)), sums.masked_fill(~kept, torch.inf).argmin(1)] = False
    return found


def plain(text: str) -> str:
    """A token's text without its case and the spaces around it; a token of spaces alone stays."""
    return text.strip().casefold() or text
