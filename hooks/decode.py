"""One step of decoding with a key/value cache, on either kind of model."""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .sites import Model


class CachedModel:
    """A model with the keys and values of what it has read so far.

    Call it with the next tokens ``[1, new]``; it returns the logits after the last of them.
    """

    def __init__(self, model: Model):
        self._model = model
        self._length = 0
        self._hooked = "past_kv_cache" in inspect.signature(model.forward).parameters
        self._cache: Any = None
        if self._hooked:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            device = next(model.parameters()).device
            self._cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, 1)

    @property
    def length(self) -> int:
        """How many tokens were read."""
        return self._length

    def __call__(self, tokens: Int[Tensor, "1 new"]) -> Float[Tensor, " d_vocab"]:
        new = tokens.shape[1]
        total = self._length + new
        if self._hooked:
            mask = torch.ones_like(tokens)  # given, or a model without a tokenizer refuses
            logits = self._model(tokens, past_kv_cache=self._cache, attention_mask=mask)
        else:
            positions = torch.arange(self._length, total, device=tokens.device)[None]
            logits, self._cache = self._model(
                tokens,
                return_type="logits_and_cache",
                use_cache=True,
                past_key_values=self._cache,
                attention_mask=tokens.new_ones(1, total),
                position_ids=positions,
            )
        self._length = total
        return logits[0, -1].float()
