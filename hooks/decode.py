"""Generate token by token with a key/value cache, on a HookedTransformer or a TransformerBridge."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import ArchitectureError
from .owned import put_module_hook
from .sites import Model
from .turn import turn


class CachedModel:
    """A model that remembers the keys and values of the tokens it has read.

    Call it with the next tokens ``[1, new]``; it returns the logits after the last of them, ``[d_vocab]``.
    """

    def __init__(self, model: Model):
        self._model = model
        self._length = 0
        self._hooked = not hasattr(model, "original_model")  # only a bridge has the Hugging Face model
        self._cache: Any = None
        if self._hooked:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            device = next(model.parameters()).device
            self._cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, 1)

    @property
    def length(self) -> int:
        """How many tokens it has read."""
        return self._length

    def __call__(self, tokens: Int[Tensor, "1 new"]) -> Float[Tensor, " d_vocab"]:
        """Read ``tokens``; raises ArchitectureError if the model does not keep their keys and values."""
        total = self._length + tokens.shape[1]
        logits = self._step(tokens) if self._hooked else self._bridge_step(tokens, total)
        self._length = total
        return logits[0, -1].float()

    def _step(self, tokens: Int[Tensor, "1 new"]) -> Float[Tensor, "1 new d_vocab"]:
        mask = torch.ones_like(tokens)  # without a tokenizer, the model cannot make the mask itself
        return self._model(tokens, past_kv_cache=self._cache, attention_mask=mask)

    def _bridge_step(self, tokens: Int[Tensor, "1 new"], total: int) -> Float[Tensor, "1 new d_vocab"]:
        with _caches_read(self._model):
            logits, self._cache = self._model(
                tokens,
                return_type="logits_and_cache",
                use_cache=True,
                attention_mask=tokens.new_ones(1, total),
                position_ids=torch.arange(self._length, total, device=tokens.device)[None],
                **{_cache_name(self._model): self._cache},
            )
        kept = 0 if self._cache is None else int(self._cache.get_seq_length())
        if kept != total:
            raise ArchitectureError(
                f"the model kept keys and values of {kept} tokens, not of {total}, so it would not see the text "
                "before. Generate with use_past_kv_cache=False."
            )
        return logits


def _cache_name(model: Model) -> str:
    """The name of the cache argument of the Hugging Face model; transformers 5.24 changed it."""
    return "cache" if "cache" in inspect.signature(model.original_model.forward).parameters else "past_key_values"


@contextmanager
def _caches_read(model: Model) -> Iterator[None]:
    """Pass the cache to attention as ``past_key_values``, the name that TransformerBridge expects."""

    def rename(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("cache")
        return None if cache is None else (args, kwargs | {"past_key_values": cache})

    with turn(model), ExitStack() as stack:
        for block in model.blocks:
            stack.callback(put_module_hook(block.attn, rename, before=True, with_kwargs=True))
        yield
