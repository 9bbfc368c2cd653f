"""Continue a prompt while edits act."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.same_values import require_same_run
from tl_circuits.errors import PromptError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import (
    CachedModel,
    Replacement,
    added_hooks,
    as_edits,
    clean_run,
    context_length,
    edit_hooks,
    in_turn,
    make_plan,
    read_prompt,
    token_text,
)
from tl_circuits.interventions.intervene import require_run_belongs
from tl_circuits.support.checked import checked


@checked
@in_turn
def generate(
    replacement: Replacement,
    prompt: Any,
    edits: Sequence[Any] | Any = (),
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    use_past_kv_cache: bool = True,
    on_token: Callable[[str], Any] | None = None,
) -> str:
    """Let the model continue a prompt while edits act. Nothing else is held.

    Edits at positions of the prompt act while the prompt is read. Edits at open-ended slices (``slice(8, None)``) and
    at all positions (None) also act on the generated tokens.

    Args:
        replacement: the model with a dictionary attached.
        prompt: text, token ids, or a graph.
        edits: one edit or several.
        max_new_tokens: the most tokens to generate; an end-of-sequence token ends the text earlier.
        temperature: 0 takes the likeliest token each time; above 0, tokens are sampled.
        seed: makes sampling repeatable.
        use_past_kv_cache: keep keys and values of earlier tokens, which is faster.
        on_token: called with the text of each new token.

    Returns:
        The prompt and the continuation as one text.

    Raises:
        EditError: for edits that name what does not exist or contradict each other.
        PromptError: if the text would not fit into the model's context.

    Examples:
        >>> tlc.generate(replacement, prompt, max_new_tokens=1)
        'the capital of the state containing Dallas is Austin'
        >>> from tl_circuits.dictionaries.builtin.state_features import state_features, swap_edits
        >>> swap = swap_edits(state_features(replacement), "Texas", "California")
        >>> tlc.generate(replacement, prompt, swap, max_new_tokens=1)
        'the capital of the state containing Dallas is Sacramento'
    """
    replacement.require_attached()
    model, dictionary = replacement.model, replacement.dictionary
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}.")
    edits = as_edits(edits)
    require_run_belongs(replacement, prompt, [edits])
    read = read_prompt(model, dictionary, prompt)
    tokens = read.tokens
    if isinstance(prompt, AttributionGraph):
        require_same_run(replacement, prompt, clean_run(replacement, tokens, read.skipped))
    n = tokens.numel()
    total = n + max_new_tokens
    if total > context_length(model):
        raise PromptError(
            f"{n} prompt tokens and {max_new_tokens} new ones do not fit the model's context of "
            f"{context_length(model)}."
        )
    plan = make_plan(model, dictionary, [edits], n, total)
    generator = torch.Generator().manual_seed(seed)
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    cached = CachedModel(model) if use_past_kv_cache else None
    written: list[int] = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            start = cached.length if cached else 0
            fresh = tokens[start:]  # with a cache, only what the model has not read yet
            hooks = edit_hooks(replacement, plan.within(start, tokens.numel()), None, "none")
            with added_hooks(model, hooks):
                logits = cached(fresh[None]) if cached else model(fresh[None])[0, -1].float()
            token = _pick(logits, temperature, generator)
            if token == eos:
                break
            written.append(token)
            tokens = torch.cat([tokens, tokens.new_tensor([token])])
            if on_token is not None:
                on_token(token_text(model, token))
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return "".join(token_text(model, i) for i in tokens.tolist())
    before = prompt if isinstance(prompt, str) else tokenizer.decode(tokens[:n].tolist(), skip_special_tokens=True)
    return before + _continuation(tokenizer, tokens[:n].tolist(), written)


def _continuation(tokenizer: Any, before: list[int], written: list[int]) -> str:
    """The text of ``written`` after ``before``. Decoded by itself, it would often lose its first space."""
    head, whole = tokenizer.decode(before), tokenizer.decode(before + written)
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(written)


def _pick(logits: Float[Tensor, " d_vocab"], temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.cpu().double() / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
