"""Decoding with a key/value cache reads the whole text before."""

import pytest
import torch

from tests.tiny import ARCHITECTURES, hook_state, prompt, tiny_bridge
from tl_circuits.errors import ArchitectureError
from tl_circuits.hooks.decode import CachedModel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cached_steps_give_the_logits_of_the_whole_text(arch):
    model, tokens = tiny_bridge(arch), prompt(12)[None]
    state = hook_state(model)
    with torch.no_grad():
        cached = CachedModel(model)
        steps = [cached(tokens[:, part]) for part in (slice(0, 7), slice(7, 8), slice(8, 12))]
        whole = model(tokens)[0, [6, 7, 11]]
    assert torch.allclose(torch.stack(steps), whole, atol=1e-5)  # the same sums in products of other shapes
    assert hook_state(model) == state


def test_a_model_that_ignores_its_cache_is_refused(monkeypatch):
    model = tiny_bridge("llama")
    for block in model.blocks:
        monkeypatch.setattr(block.attn, "_update_kv_cache", lambda k, v, **kwargs: (k, v))
    with torch.no_grad(), pytest.raises(ArchitectureError, match="kept keys and values of 0 tokens, not of 7"):
        CachedModel(model)(prompt(7)[None])
