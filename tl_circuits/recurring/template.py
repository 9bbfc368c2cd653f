"""The words of several prompts as one template: the tokens seen at each slot, joined."""

import re
from collections import Counter
from collections.abc import Sequence

from tl_circuits.graph.nodes import GraphInfo

COUNTED = re.compile(r"-\d+")  # the name of a slot that is counted from the end
SEEN_NAMED = 4  # of the tokens seen in one place, a name lists so many


def target_names(infos: Sequence[GraphInfo]) -> tuple[str, ...]:
    """A name for the prompts' first targets, for their second ones, and so on: the tokens seen there, joined."""
    ranks = max(len(info.target_names) for info in infos)
    seen = [Counter(i.target_names[rank] for i in infos if rank < len(i.target_names)) for rank in range(ranks)]
    return tuple(_joined(commonest(counter)) for counter in seen)


def commonest(counter: Counter[str]) -> tuple[str, ...]:
    return tuple(sorted(counter, key=lambda text: (-counter[text], text)))


def _joined(texts: tuple[str, ...]) -> str:
    if len(texts) == 1:
        return texts[0]
    more = ["…"] if len(texts) > SEEN_NAMED else []
    return " / ".join([text.strip() or text for text in texts[:SEEN_NAMED]] + more)


def in_template(texts: tuple[str, ...]) -> str:
    if len(texts) == 1:
        return texts[0]
    return f"{' ' if texts[0].startswith(' ') else ''}[{_joined(texts)}]"


def words_of(slot: str, texts: tuple[str, ...]) -> str:
    """What a graph calls a slot: its name if a person gave it one, else the tokens seen there."""
    return in_template(texts) if COUNTED.fullmatch(slot) else slot
