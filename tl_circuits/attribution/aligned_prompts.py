"""The prompts that a prompt is compared with, and which of their positions correspond to which of its own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tl_circuits.errors import BaselineError
from tl_circuits.graph.slots import find_slots
from tl_circuits.hooks import ReadPrompt, is_whole, token_text


@dataclass(frozen=True)
class Member:
    """One prompt of a family.

    ``text``: as it was given; of token ids or a graph, its tokens' texts, joined. ``places[p]``: the position of the
    prompt to explain that its position ``p`` is compared with, -1 for none.
    ``skipped``: its positions without features and error nodes.
    """

    text: str
    token_ids: tuple[int, ...]
    places: tuple[int, ...]
    skipped: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """The prompts that a contrast graph is measured against."""

    members: tuple[Member, ...]


def as_prompts(given: Any) -> list[Any]:
    """One prompt or several as a list of prompts: texts, token ids (a list or a tensor), or graphs."""
    if isinstance(given, str) or hasattr(given, "prompt_tokens") or getattr(given, "ndim", 0) == 1:
        return [given]
    found = list(given) if isinstance(given, Iterable) else [given]
    return [found] if found and all(is_whole(item) for item in found) else found


def find_family(
    model: Any, own: ReadPrompt, given: Any, align: Any, read: Callable[[Any], ReadPrompt], same_skips: bool
) -> Family:
    """Find the baseline's prompts, and which of their positions correspond to which of the prompt to explain.

    Args:
        model: gives the tokens' text, for messages.
        own: the prompt to explain.
        given: one other prompt, or several.
        align: None (prompts of one length), ``"end"``, or one ``{position: slot}`` a prompt, the explained one's first.
        read: tokenises a prompt in the same way as the one to explain.
        same_skips: whether the caller chose the positions to leave out; then the corresponding ones are left out in the
            other prompts, too.

    Raises:
        BaselineError: there is no prompt, or only the prompt itself; lengths differ and ``align`` is not given; or
            slots do not fit.
    """
    prompts = as_prompts(given)
    if not prompts:
        raise BaselineError("baseline is an empty list; give at least one other prompt, or leave it out.")
    reads = [read(prompt) for prompt in prompts]
    ids = [tuple(r.tokens.tolist()) for r in (own, *reads)]
    texts = [
        prompt if isinstance(prompt, str) else "".join(token_text(model, i) for i in one)
        for prompt, one in zip((own, *prompts), ids, strict=True)
    ]
    names = [repr(text) for text in texts]
    if all(one == ids[0] for one in ids):
        raise BaselineError(
            f"the baseline {names[1]} is the prompt itself, so all differences are zero. Give prompts that have "
            "another answer."
        )
    if align is None:
        _require_one_length(ids, names)
    try:
        slots = find_slots("end" if align is None else align, [len(one) for one in ids], ["the prompt", *names[1:]])
    except ValueError as error:
        raise BaselineError(str(error)) from error
    slot_of = [of.tolist() for of in slots.of]
    if same_skips:
        left_out = {slot_of[0][position] for position in own.skipped}
        reads = [
            ReadPrompt(r.tokens, tuple(p for p, s in enumerate(of) if s in left_out))
            for r, of in zip(reads, slot_of[1:], strict=True)
        ]
    members = (
        Member(text, i, _places(own, slot_of[0], r, of), r.skipped)
        for text, i, r, of in zip(texts[1:], ids[1:], reads, slot_of[1:], strict=True)
    )
    return Family(tuple(members))


def _require_one_length(ids: list[tuple[int, ...]], names: list[str]) -> None:
    other = next((i for i, one in enumerate(ids) if len(one) != len(ids[0])), None)
    if other is not None:
        raise BaselineError(
            f"the baseline {names[other]} has {len(ids[other])} tokens and the prompt has {len(ids[0])}. Give prompts "
            'of one length; or align="end", which counts positions from the end; or align=[{position: slot}, ...], the '
            "prompt's first."
        )


def _places(own: ReadPrompt, own_slots: list[int], other: ReadPrompt, slots: list[int]) -> tuple[int, ...]:
    """For each position of another prompt, the corresponding position of the prompt to explain, -1 for none.

    Positions left out at the start always correspond to each other: all prompts have the same tokens there.
    """
    at = {slot: position for position, slot in enumerate(own_slots) if slot >= 0 and position not in own.skipped}
    places = [at.get(slot, -1) if position not in other.skipped else -1 for position, slot in enumerate(slots)]
    for ours, theirs in zip(own.skipped, other.skipped, strict=False):
        places[theirs] = ours
    return tuple(places)
