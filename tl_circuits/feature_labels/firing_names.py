"""A feature's name from the places where it fires: the tokens there, and those before them.

The examples of a feature name it only if they have something in common that chance would not give. That is measured on
the same text:

* *on*: the tokens it fires on are alike. Alike means that their embeddings point the same way: the mean cosine of all
  pairs, which is 1 for the same token. Sets of tokens drawn from the text at random say what chance gives.
* *after*: the tokens before are the same in most examples. How common each token is in the text, and how often it
  stands before the same strongest token, says what chance gives.

A name is used for a node only if it fits where the node stands: a feature that fires on “=” in the text has no such
name where it is active on “is”.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import comb

from tl_circuits.feature_labels.token_space import AGREE, FEWEST, TokenSpace, plain
from tl_circuits.graph.graph import AttributionGraph

BACK = 4  # tokens before the strongest one that are compared
_CHANCE = 1e-4  # how likely the same tokens before may be by chance, for one feature
_SHOWN = 3  # tokens in a name
_LONG = 24  # characters of one token in a name


@dataclass(frozen=True)
class Fired:
    """One place where a feature fires.

    Attributes:
        tokens: the token there and up to ``BACK`` before it, the strongest last, as indices into the vocabulary.
        texts: their texts.
        strength: how far the activation lies from the feature's mean, in its standard deviations.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    strength: float


@dataclass(frozen=True)
class FiringName:
    """A name from examples.

    Attributes:
        text: the name, such as ``on “ Paris, Berlin, Rome”`` or ``after “ capital of”``.
        sharpness: how far the places that the name means stand out from the text, in standard deviations: the mean of
            the examples' strengths, where examples that the name does not cover count as 0. It is at most what a
            feature would have that fires equally at all such places and nowhere else, ``√((1 - p) / p)`` for a share p
            of the text: a name that fits everywhere names nothing.
        rule: by offset from the strongest token (0, -1, ...), the tokens that the name asks for there; empty if it asks
            for the start of a text.
    """

    text: str
    sharpness: float
    rule: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Where a node stands: its token and up to ``BACK`` before it, without special tokens, its own last."""

    tokens: tuple[int, ...]


def name_from(examples: Sequence[Fired], space: TokenSpace) -> FiringName | None:
    """Name a feature after its strongest examples, strongest first.

    Args:
        examples: where it fires; those below half of the strongest are not used.
        space: the tokens of the text.

    Returns:
        The name; None if there are too few examples or they have too little in common.
    """
    if not examples or examples[0].strength <= 0:
        return None
    told = {tuple(map(plain, e.texts)): e for e in reversed(examples)}  # the same words again say nothing new
    strong = sorted((e for e in told.values() if e.strength >= 0.5 * examples[0].strength), key=lambda e: -e.strength)
    if len(strong) < FEWEST:
        return None
    enough = max(FEWEST, AGREE * len(strong))
    starts = [i for i, e in enumerate(strong) if len(e.tokens) == 1]
    if len(starts) >= enough:
        return FiringName("at the start of a text", _sharpness(strong, starts, space.start_share), {})
    # A part of a character has no text that could stand in a name.
    alike = [i for i in space.most_alike([e.tokens[-1] for e in strong]) if "\ufffd" not in strong[i].texts[-1]]
    alike = alike if len(alike) >= enough else []
    phrase = _phrase(strong, space, bool(alike))
    both = [
        i for i in alike or range(len(strong)) if all(_has(strong[i], offset, text) for offset, text in phrase.items())
    ]
    if phrase and len(both) >= enough:
        covered = both
    elif alike:
        phrase, covered = {}, alike
    else:
        return None
    rule = {offset: _ids_there(strong, covered, offset) for offset in (*phrase, *([0] if alike else []))}
    share = space.rule_share({plain(strong[i].texts[-1]) for i in covered} if alike else (), phrase)
    return FiringName(
        _words(strong, covered, phrase, bool(alike), space.spaced), _sharpness(strong, covered, share), rule
    )


def fits(name: FiringName, place: Place, space: TokenSpace) -> bool:
    """Whether a name is true of a node that stands at ``place``."""
    if not name.rule:
        return len(place.tokens) == 1
    for offset, asked in name.rule.items():
        if len(place.tokens) < 1 - offset:
            return False
        here = place.tokens[offset - 1]
        if plain(space.text(here)) in {plain(space.text(t)) for t in asked}:
            continue
        if offset != 0 or len(asked) < FEWEST:
            return False
        cosines, n = space.alike([*asked, here]), len(asked)
        usual = float((cosines[:n, :n].sum() - n) / (n * (n - 1)))
        if float(cosines[n, :n].mean()) < 0.5 * usual:
            return False
    return True


def _phrase(strong: Sequence[Fired], space: TokenSpace, alike: bool) -> dict[int, str]:
    """The tokens that stand before, by offset. One token may differ between them, and if the strongest tokens are
    alike, at least two have to be the same. Otherwise the one just before has to be.
    """
    before = _same_before(strong, space, {plain(e.texts[-1]) for e in strong} if alike else ())
    phrase = {
        offset: text
        for offset, text in before.items()
        if all(step in before or step == -1 for step in range(-1, offset, -1))
    }
    return phrase if (len(phrase) > 1 if alike else -1 in phrase) else {}


def _sharpness(strong: Sequence[Fired], covered: Sequence[int], share: float) -> float:
    most = ((1 - share) / share) ** 0.5 if share > 0 else float("inf")
    return sum(min(strong[i].strength, most) for i in covered) / len(strong)


def _has(example: Fired, offset: int, text: str) -> bool:
    return len(example.texts) >= 1 - offset and plain(example.texts[offset - 1]) == text


def _ids_there(strong: Sequence[Fired], covered: Sequence[int], offset: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(strong[i].tokens[offset - 1] for i in covered))


def _same_before(strong: Sequence[Fired], space: TokenSpace, tokens: Collection[str]) -> dict[int, str]:
    """By offset, the token that most examples have there, where chance would not explain it."""
    found, n = {}, len(strong)
    for offset in range(-1, -BACK - 1, -1):
        there = Counter(plain(e.texts[offset - 1]) for e in strong if len(e.texts) >= 1 - offset)
        if not there:
            break
        text, count = there.most_common(1)[0]
        p = min(1.0, max(space.share(text), space.share_before(text, offset, tokens)))
        by_chance = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))
        if count >= max(FEWEST, AGREE * n) and by_chance < _CHANCE:
            found[offset] = text
    return found


def _words(strong: Sequence[Fired], covered: Sequence[int], phrase: dict[int, str], alike: bool, spaced: bool) -> str:
    counts = Counter(plain(strong[i].texts[-1]) for i in covered)
    forms = {
        name: Counter(e.texts[-1] for e in strong if plain(e.texts[-1]) == name).most_common(1)[0][0] for name in counts
    }
    named = [name for name, _ in counts.most_common(_SHOWN)]
    if counts[named[0]] >= AGREE * len(covered):
        named = named[:1]
    if not phrase:
        return f"on {quoted([forms[name] for name in named])}"
    example = strong[covered[0]].texts
    words = [example[offset - 1] if offset in phrase else " …" for offset in range(min(phrase), 0)]
    before = "".join(words) if spaced else " ".join(word.strip() for word in words)
    return f"after “{before}{' ▸' + forms[named[0]].strip() if alike and len(named) == 1 else ''}”"


def quoted(tokens: Sequence[str]) -> str:
    """Tokens in one pair of quotation marks: ``“ Paris, Berlin, Rome”``. Long ones are cut."""
    cut = [t if len(t) <= _LONG else t[:_LONG] + "…" for t in tokens]
    return "“" + ", ".join([cut[0], *(t.strip() or t for t in cut[1:])]) + "”"


def place_of(graph: AttributionGraph, node: int) -> Place:
    """Where a node of a graph stands. Positions that were left out, such as a special first token, are not part of
    it."""
    position = int(graph._nodes.position[node])
    start = max((p + 1 for p in graph.info.skip_positions or () if p < position), default=0)
    return Place(tuple(graph.info.token_ids[max(start, position - BACK) : position + 1]))
