"""What a contrast graph compares a prompt with: other prompts, or a baseline made from texts."""

from collections.abc import Callable
from typing import Any

from tl_circuits.attribution.baseline import against, common_prefix, position_means
from tl_circuits.attribution.family import find_family
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.text_baseline import Baseline, require_baseline_fits, shared_first, text_means
from tl_circuits.errors import BaselineError
from tl_circuits.hooks import ReadPrompt, Recording, Replacement, at_any_site


def compare(
    replacement: Replacement,
    sources: Sources,
    recording: Recording,
    own: ReadPrompt,
    baseline: Any,
    align: Any,
    read: Callable[[Any], ReadPrompt],
    same_skips: bool,
) -> tuple[Sources, dict[str, Any]]:
    """Count every source by its difference from the baseline.

    Args:
        replacement: the model with its dictionary.
        sources: the sources of the prompt to explain, counted in full.
        recording: the run that they are from.
        own: the prompt to explain.
        baseline: one or several other prompts, or a :class:`Baseline`.
        align: how other prompts are aligned (see :func:`find_family`).
        read: tokenises another prompt as the one to explain was.
        same_skips: whether the caller chose the positions to leave out.

    Returns:
        The sources, and what the graph's info says about the comparison.

    Raises:
        BaselineError: the prompt cannot be compared with the baseline.
    """
    if at_any_site(replacement.dictionary):
        raise BaselineError(
            "a baseline is for transcoders and neurons; with autoencoders, or MLPs passed by their ratios, graphs are traced "
            "without baseline=."
        )
    if isinstance(baseline, Baseline):
        if align is not None:
            raise BaselineError("align= is for other prompts. A Baseline made from texts has no positions: leave align out.")
        require_baseline_fits(replacement, baseline)
        start = shared_first(recording.tokens, baseline)
        return against(sources, recording, text_means(sources, baseline), start), {"compared_with": (baseline.name,)}
    family = find_family(replacement.model, own, baseline, align, read, same_skips)
    start = common_prefix(recording.tokens, family)
    made = against(sources, recording, position_means(replacement, family, sources), start)
    said = {
        "baseline": tuple((member.token_ids, member.places) for member in family.members),
        "compared_with": tuple(member.text for member in family.members),
    }
    return made, said
