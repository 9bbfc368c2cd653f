"""What published sets want before a text, and which positions they were not trained on.

The first position of a prompt, whatever stands there, has activations far larger than all others, so sets are
trained and run with a special token there that is left out. circuit-tracer does so for every set it opens; for
instruction-tuned Gemma-3 it leaves out the beginning of a person's turn as well. The rules here are the same.
"""

from collections.abc import Sequence

from tl_circuits.hooks import PromptRule

SPECIAL_FIRST = PromptRule(prepend=True, skip_first=1)
"""A special token before every text, position 0 left out: the rule of published sets."""

_GEMMA_3_TURN = (2, 105, 2364, 107)  # <bos><start_of_turn>user\n
GEMMA_3_CHAT = PromptRule(prepend=True, skip_first=1, skip_prefixes=(_GEMMA_3_TURN,))
"""As :data:`SPECIAL_FIRST`, and of a prompt that begins with a person's turn all four tokens that open it."""


def published_rule(made_for: str | None) -> PromptRule:
    """The rule of a published set by the name of the model it was made for."""
    model = made_for or ""
    return GEMMA_3_CHAT if "gemma-3" in model and model.endswith("-it") else SPECIAL_FIRST


def left_out_by_circuit_tracer(model: str, tokens: Sequence[int]) -> tuple[int, ...]:
    """The positions that circuit-tracer leaves out of every graph of a model: by their number, whatever stands there."""
    count = len(_GEMMA_3_TURN) if published_rule(model) is GEMMA_3_CHAT else 1
    return tuple(range(min(count, len(tokens))))
