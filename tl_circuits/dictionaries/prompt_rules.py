"""The prompt rules of published sets: which token they expect before a text, and which positions they leave out.

The first position of a prompt has far larger activations than all others, whichever token is there. So sets are trained
and run with a special token at that position, which is left out. circuit-tracer does this for every set that it opens,
and for instruction-tuned Gemma-3 it also leaves out the opening of a person's turn. The rules here are the same.
"""

from collections.abc import Sequence

from tl_circuits.hooks import PromptRule

SPECIAL_FIRST = PromptRule(prepend=True, skip_first=1)
"""A special token before every text, position 0 left out: the rule of published sets."""

_GEMMA_3_TURN = (2, 105, 2364, 107)  # <bos><start_of_turn>user\n
GEMMA_3_CHAT = PromptRule(prepend=True, skip_first=1, skip_prefixes=(_GEMMA_3_TURN,))
"""As :data:`SPECIAL_FIRST`; if a prompt begins with a person's turn, its first four tokens are left out."""


def published_rule(made_for: str | None) -> PromptRule:
    """The prompt rule of a published set that was made for the model of this name."""
    model = made_for or ""
    return GEMMA_3_CHAT if "gemma-3" in model and model.endswith("-it") else SPECIAL_FIRST


def left_out_by_circuit_tracer(model: str, tokens: Sequence[int]) -> tuple[int, ...]:
    """The positions that circuit-tracer leaves out for a model: always the same number, whichever tokens are there."""
    count = len(_GEMMA_3_TURN) if published_rule(model) is GEMMA_3_CHAT else 1
    return tuple(range(min(count, len(tokens))))
