"""Slots: positions of different prompts that correspond to each other, counted from the end or named by a template."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Align = Literal["end"] | Sequence[Mapping[int, str]]


@dataclass(frozen=True)
class Slots:
    """Slot names from left to right, and ``of[i][p]``: the slot of position ``p`` of prompt ``i``, -1 for none."""

    names: tuple[str, ...]
    of: tuple[np.ndarray, ...]


def find_slots(align: Align, lengths: Sequence[int], prompts: Sequence[str]) -> Slots:
    """Find the slots of several prompts.

    Args:
        align: ``"end"``: slot ``-1`` is the last position of every prompt, ``-2`` the one before, and so on. Or one
            ``{position: slot name}`` for each prompt; slots are then ordered by their mean position.
        lengths: the prompts' numbers of tokens.
        prompts: what they are called in errors.

    Raises:
        ValueError: slots do not fit the prompts.
    """
    if isinstance(align, str):
        longest = max(lengths)
        names = tuple(str(i - longest) for i in range(longest))
        return Slots(names, tuple(np.arange(longest - n, longest) for n in lengths))
    if len(align) != len(lengths):
        raise ValueError(
            f"align needs one {{position: slot name}} for each graph: {len(align)} given, {len(lengths)} graphs."
        )
    placed: list[dict[int, str]] = []
    where: dict[str, list[int]] = defaultdict(list)
    for mapping, length, prompt in zip(align, lengths, prompts, strict=True):
        placed.append({})
        for position, name in mapping.items():
            if not -length <= position < length:
                raise ValueError(
                    f"slot {name!r} of {prompt} is position {position}, but the prompt has {length} tokens: "
                    f"give 0..{length - 1}, or -1 for the last."
                )
            position %= length
            if placed[-1].setdefault(position, name) != name:
                both = f"{placed[-1][position]!r} and {name!r}"
                raise ValueError(f"position {position} of {prompt} is in two slots, {both}.")
            where[name].append(position)
    if not where:
        raise ValueError('align names no position of any prompt; name some, or take align="end".')
    ordered = sorted(where, key=lambda name: (sum(where[name]) / len(where[name]), name))
    index = {name: i for i, name in enumerate(ordered)}
    of = []
    for slots, length in zip(placed, lengths, strict=True):
        of.append(np.full(length, -1))
        of[-1][list(slots)] = [index[name] for name in slots.values()]
    return Slots(tuple(ordered), tuple(of))
