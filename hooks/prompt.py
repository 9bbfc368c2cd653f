"""From a prompt to token ids and back: which special tokens are put before a text, and which positions count.

A prompt is a text, token ids, or an attribution graph (an object with ``prompt_tokens()``), which stands for exactly
the ids that it was traced on. A text gets the special tokens that the model itself puts before texts
(``cfg.default_prepend_bos``, or the tokenizer), but never twice: a text that starts with them already, such as one from
``apply_chat_template(tokenize=False)``, is left as it is.

A dictionary adds a :class:`PromptRule`: published transcoders were trained on text that follows a special token, and
without the first positions, whose activations are far larger than all others.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import PromptError
from .identity import first_difference, model_sample
from .sites import Model, context_length, model_device


@dataclass(frozen=True)
class PromptRule:
    """Which special token a dictionary expects before a text, and at which first positions it has no features.

    Args:
        prepend: whether a special token (the tokenizer's bos, else pad, else eos) is put before a text that starts
            with none. False leaves it to the model. Token ids are never changed.
        skip_first: how many first positions get no features. None: position 0, if it holds the beginning-of-sequence
            token.
        skip_prefixes: beginnings of prompts, as token ids; a prompt that begins so gets no features in these
            positions.

    Raises:
        ValueError: ``skip_first`` is negative.

    Examples:
        >>> print(tlc.PromptRule(prepend=True, skip_first=1))
        special token first; position 0 left out
        >>> print(transcoders.prompt_rule)
        the model's own first token; BOS left out
        >>> mine = tlc.load_transcoders(transcoders, prompt_rule=tlc.PromptRule(skip_first=2))
        >>> print(mine.prompt_rule)
        the model's own first token; positions 0..1 left out
    """

    prepend: bool = False
    skip_first: SupportsIndex | None = None
    skip_prefixes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.skip_first is not None:
            skip_first = operator.index(self.skip_first)
            object.__setattr__(self, "skip_first", skip_first)
            if skip_first < 0:
                raise ValueError(f"skip_first is how many first positions are left out, 0 or more; got {skip_first}.")
        prefixes = tuple(tuple(operator.index(i) for i in prefix) for prefix in self.skip_prefixes)
        object.__setattr__(self, "skip_prefixes", prefixes)

    def __str__(self) -> str:
        before = "special token first" if self.prepend else "the model's own first token"
        first = {None: "BOS left out", 0: "nothing left out", 1: "position 0 left out"}
        skipped = None if self.skip_first is None else operator.index(self.skip_first)
        left = first.get(skipped, f"positions 0..{(skipped or 1) - 1} left out")
        chat = "".join(f", {len(prefix)} of a prompt that begins {list(prefix)}" for prefix in self.skip_prefixes)
        return f"{before}; {left}{chat}"


MODELS_OWN = PromptRule()
"""What the model itself puts before texts; no features at position 0 if it holds a beginning-of-sequence token."""


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt as token ids, with the positions that have no features and error nodes."""

    tokens: Int[Tensor, " pos"]
    skipped: tuple[int, ...]


def read_prompt(model: Model, dictionary: Any, prompt: Any) -> ReadPrompt:
    """The token ids of a prompt, and the positions that have no features, by the dictionary's ``prompt_rule``.

    Args:
        model: the model.
        dictionary: its dictionary.
        prompt: text or token ids; or a graph, whose token ids and left-out positions are taken.

    Returns:
        ``tokens``, a tensor ``[pos]`` on the model's device, and ``skipped``, the positions without features.

    Raises:
        PromptError: as :func:`to_tokens` does.

    Examples:
        >>> read = tlc.hooks.read_prompt(model, transcoders, "Dallas is in")
        >>> read.tokens.tolist(), read.skipped
        ([1, 210, 7, 11], (0,))
    """
    rule = dictionary.prompt_rule
    tokens = to_tokens(model, prompt, rule)
    usual = left_out(model, tokens, rule)
    return ReadPrompt(tokens, prompt.skipped_positions(usual) if _is_graph(prompt) else usual)


def to_tokens(model: Model, prompt: Any, rule: PromptRule = MODELS_OWN) -> Int[Tensor, " pos"]:
    """The token ids of a prompt.

    Args:
        model: the model.
        prompt: a text; token ids as a tensor, an array or a list, which are not changed; or an attribution graph,
            which stands for its token ids.
        rule: whether a special token is put before a text if the model itself does not.

    Returns:
        A tensor of whole numbers ``[pos]``, on the model's device.

    Raises:
        PromptError: the prompt is empty, a batch, longer than the model's context, or a graph of many prompts; or ids
            are not whole numbers or not in the vocabulary.

    Examples:
        >>> tlc.hooks.to_tokens(model, "Dallas is in")  # 1 is the beginning-of-sequence token
        tensor([  1, 210,   7,  11])
        >>> tlc.hooks.to_tokens(model, "<bos> Dallas is in")  # it is not put there twice
        tensor([  1, 210,   7,  11])
    """
    if isinstance(prompt, str):
        tokens = torch.tensor(text_to_ids(model, prompt, rule), dtype=torch.long)
    else:
        tokens = _given_ids(prompt.prompt_tokens() if _is_graph(prompt) else prompt)
    if _is_graph(prompt):
        _require_same_vocabulary(model, prompt.info)
    if tokens.numel() == 0:
        raise PromptError("the prompt is empty; give at least one token.")
    d_vocab, n_ctx = int(model.cfg.d_vocab), context_length(model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise PromptError(f"token ids must be in 0..{d_vocab - 1}, got {low if low < 0 else high}.")
    if tokens.numel() > n_ctx:
        raise PromptError(f"the prompt has {tokens.numel()} tokens, the model's context is {n_ctx}. Shorten it.")
    return tokens.to(device=model_device(model))


def text_to_ids(model: Model, text: str, rule: PromptRule = MODELS_OWN) -> list[int]:
    """Token ids of a text of any length. Special tokens that it starts with are not put before it again.

    Raises:
        PromptError: the text is empty, or the model has no tokenizer.
    """
    if not text:
        raise PromptError("the prompt is empty; give at least one token.")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PromptError("the model has no tokenizer, so give the prompt as token ids.")
    special = _special_ids(tokenizer)
    ids = model.to_tokens(text, truncate=False)[0].tolist()
    own = plain_ids(tokenizer, text)
    whole = any(ids[at : at + len(own)] == own for at in range(len(ids) - len(own) + 1))
    if not whole and not (ids and ids[0] in special):
        # If a tokenizer has no special tokens, TransformerLens writes "<|endoftext|>" before the text, where it joins
        # the first word.
        raise PromptError(
            f"TransformerLens reads this text as the ids {ids[:8]}, and its tokenizer as {own[:8]}: what is put before "
            "the text is no token of this tokenizer. Give token ids, or set model.cfg.default_prepend_bos = False."
        )
    if own and own[0] in special:
        ids = _once(ids, own)
    first = special_token(tokenizer)
    if rule.prepend and first is not None and not (ids and ids[0] in special):
        ids = [first, *ids]
    return ids


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text itself, without special tokens that a tokenizer would add."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def first_tokens(model: Model, rule: PromptRule = MODELS_OWN) -> list[int]:
    """The special tokens that are put before a text that does not start with one."""
    ids, own = text_to_ids(model, "a", rule), plain_ids(model.tokenizer, "a")
    special = _special_ids(model.tokenizer) - set(own)
    return [i for n, i in enumerate(ids) if all(j in special for j in ids[: n + 1])]


def without_first(ids: list[int], first: Sequence[int]) -> list[int]:
    """``ids`` without the special tokens ``first`` at their beginning, if they are there."""
    return ids[len(first) :] if first and ids[: len(first)] == list(first) else ids


def special_token(tokenizer: Any) -> int | None:
    """The token that :class:`PromptRule` prepends: bos, else pad, else eos, else any special token there is."""
    bos = tokenizer.bos_token_id
    # If a tokenizer has no bos, TransformerLens sets it to eos; the arguments it was made with still show that.
    if bos == tokenizer.eos_token_id and getattr(tokenizer, "init_kwargs", {}).get("bos_token") is None:
        bos = None
    named = (bos, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in (*named, *tokenizer.all_special_ids) if i is not None), None)


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens, without the one for unknown words: that stands for a word of the text."""
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id}
    return set(tokenizer.all_special_ids) - unknown


def _once(ids: list[int], own: list[int]) -> list[int]:
    """``ids`` of a text with each leading special token only once.

    ``own`` are the tokens of the text itself. In ``ids`` they follow what the model added. If ``own`` begins with what
    the added tokens end with, these were in the text already and are dropped.
    """
    for start in range(len(ids) - len(own), -1, -1):
        if ids[start : start + len(own)] == own:
            added = ids[:start]
            repeated = next((n for n in range(start, 0, -1) if own[:n] == added[start - n :]), 0)
            return added[: start - repeated] + ids[start:]
    # `own` is not found in `ids`: the added tokens changed how the text is split, so take the text as it is.
    return own


def _given_ids(prompt: Any) -> Int[Tensor, " pos"]:
    """Token ids given as a tensor, an array, a column of a frame or a list."""
    try:
        given = prompt.to_numpy() if hasattr(prompt, "to_numpy") else prompt
        tokens = given if isinstance(given, Tensor) else torch.tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"the prompt must be an attribution graph, text or token ids, got {prompt!r}: {error}."
        ) from error
    if tokens.ndim == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.ndim != 1:
        raise PromptError(
            f"the prompt must be one sequence of shape (pos,), got {tuple(tokens.shape)}. "
            "A graph explains one prompt: loop over the batch."
        )
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        raise PromptError(f"token ids must be whole numbers, got {tokens.dtype}.")
    return tokens.detach().to(torch.long)


def _is_graph(prompt: Any) -> bool:
    return hasattr(prompt, "prompt_tokens")


def _require_same_vocabulary(model: Model, info: Any) -> None:
    """Raise PromptError if a graph's token ids mean other words on this model than on the one it was traced on."""
    if getattr(model, "tokenizer", None) is None:
        return  # nothing to compare with
    d_vocab = int(model.cfg.d_vocab)
    pairs = list(zip(info.token_ids, info.tokens, strict=True))
    if pairs and all(text == f"#{token}" for token, text in pairs):  # traced without a tokenizer
        own = first_difference(info.sample, model_sample(model))
        if own is None:
            return
    texts = [token_text(model, token) if token < d_vocab else None for token, _ in pairs]
    same = sum(here is not None and here.strip() == text.strip() for here, (_, text) in zip(texts, pairs, strict=True))
    if not info.sample and 2 * same >= len(pairs):
        return  # another program's file, which may write some tokens in another way
    for here, (token, text) in zip(texts, pairs, strict=True):
        if here != text:
            meaning = "does not exist" if here is None else f"is {here!r}"
            raise PromptError(
                f"the graph given as a prompt was traced on {info.model!r}, where token {token} is {text!r}; on this "
                f"model it {meaning}. Give the text instead: graph.info.prompt."
            )


def bos_positions(model: Model, tokens: Int[Tensor, " pos"]) -> tuple[int, ...]:
    """The position of the beginning-of-sequence token, if the prompt starts with it.

    Args:
        model: the model, whose tokenizer says which token it is.
        tokens: token ids ``[pos]``.

    Returns:
        ``(0,)`` if position 0 holds the beginning-of-sequence token, else ``()``.

    Examples:
        >>> tokens = tlc.hooks.to_tokens(model, prompt)
        >>> tlc.hooks.bos_positions(model, tokens), tlc.hooks.bos_positions(model, tokens[1:])
        ((0,), ())
    """
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    return (0,) if bos is not None and int(tokens[0]) == int(bos) else ()


def left_out(model: Model, tokens: Int[Tensor, " pos"], rule: PromptRule = MODELS_OWN) -> tuple[int, ...]:
    """The first positions of a prompt that get no features and no error nodes, by ``rule``."""
    ids = tokens.tolist()
    usual = len(bos_positions(model, tokens)) if rule.skip_first is None else operator.index(rule.skip_first)
    counts = [len(prefix) for prefix in rule.skip_prefixes if tuple(ids[: len(prefix)]) == prefix]
    return tuple(range(min(max([usual, *counts]), len(ids))))


def token_text(model: Model, token: int) -> str:
    """The text of a vocabulary id, or ``#id`` without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return f"#{token}" if tokenizer is None else tokenizer.decode([token])


def prompt_text(
    model: Model, tokens: Int[Tensor, " pos"], rule: PromptRule = MODELS_OWN, given: str | None = None
) -> tuple[str, bool]:
    """A text for token ids, and whether tokenising it gives exactly these ids again.

    Tried in turn: ``given``; the text of the ids without leading special tokens (which tokenising puts back); and
    with more and more of these. Each is tokenised with the model's own rule and with ``rule``; if none gives the ids
    back, the text of all ids is returned, with False.
    """
    ids, tokenizer = tokens.tolist(), getattr(model, "tokenizer", None)
    if tokenizer is None:
        return "".join(token_text(model, i) for i in ids), False
    special = _special_ids(tokenizer)
    leading = next((n for n, i in enumerate(ids) if i not in special), len(ids))
    texts = [] if given is None else [given]
    texts += [_decoded(tokenizer, ids[start:]) for start in range(leading, -1, -1)]
    for text in texts:
        if text and all(text_to_ids(model, text, by) == ids for by in {MODELS_OWN, rule}):
            return text, True
    return texts[-1], False


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
