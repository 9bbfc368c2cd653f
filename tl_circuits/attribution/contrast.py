"""What a contrast graph compares a prompt with: other prompts, or a baseline made from texts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tl_circuits.attribution.aligned_prompts import Family, Member, find_family
from tl_circuits.attribution.baseline import against, common_prefix, position_means
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.text_baseline import Baseline, require_baseline_fits, shared_first, text_means
from tl_circuits.errors import BaselineError
from tl_circuits.graph.nodes import GraphInfo
from tl_circuits.hooks import ReadPrompt, Recording, Replacement


@dataclass(frozen=True)
class Compared:
    """The sources of a prompt, each counted by its difference from a baseline.

    ``answers``: what the model says next on the baseline's prompts. ``said``: what the graph's info keeps of the
    baseline.
    """

    sources: Sources
    answers: tuple[int, ...] = ()
    said: dict[str, Any] = field(default_factory=dict)


def compare(
    replacement: Replacement,
    sources: Sources,
    recording: Recording,
    position: int,
    own: ReadPrompt,
    baseline: Any,
    align: Any,
    read: Callable[[Any], ReadPrompt],
    same_skips: bool,
) -> Compared:
    """Count every source by its difference from the baseline.

    Args:
        replacement: the model with its dictionary.
        sources: the sources of the prompt to explain, counted in full.
        recording: the run that they are from.
        position: where the answer is read.
        own: the prompt to explain.
        baseline: one or several other prompts, or a :class:`Baseline`.
        align: how other prompts are aligned (see :func:`find_family`).
        read: tokenises another prompt as the one to explain was.
        same_skips: whether the caller chose the positions to leave out.

    Raises:
        BaselineError: the prompt cannot be compared with the baseline.
    """
    if isinstance(baseline, Baseline):
        if align is not None:
            raise BaselineError(
                "align= is for other prompts. A Baseline made from texts has no positions: leave align out."
            )
        require_baseline_fits(replacement, baseline)
        start = shared_first(recording.tokens, baseline)
        made = against(sources, recording, text_means(sources, baseline), start)
        return Compared(made, said={"compared_with": (baseline.name,)})
    family = find_family(replacement.model, own, baseline, align, read, same_skips)
    start = common_prefix(recording.tokens, family)
    means = position_means(replacement, family, sources, position)
    said = {
        "baseline": tuple((member.token_ids, member.places) for member in family.members),
        "compared_with": tuple(member.text for member in family.members),
    }
    return Compared(against(sources, recording, means, start), means.answers, said)


def compare_again(replacement: Replacement, sources: Sources, recording: Recording, info: GraphInfo) -> Sources:
    """The sources counted as in a graph that was traced before; ``sources`` themselves if it has no baseline.

    Raises:
        BaselineError: the graph's baseline was made from texts, which the graph does not keep.
    """
    if not info.compared_with:
        return sources
    if not info.baseline:
        raise BaselineError(
            f"the graph compares with {info.compared}, which its file does not keep. Trace the prompt against other "
            "prompts or without a baseline."
        )
    texts = info.compared_with
    members = (Member(text, ids, places, ()) for text, (ids, places) in zip(texts, info.baseline, strict=True))
    family = Family(tuple(members))
    means = position_means(replacement, family, sources, len(recording.tokens) - 1)
    return against(sources, recording, means, common_prefix(recording.tokens, family))
