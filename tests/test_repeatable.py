"""A model that gives other numbers at each run, or computes in other types than its weights have, is refused."""

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import own_bridge, prompt
from tl_circuits.errors import ArchitectureError


@pytest.fixture(scope="module")
def replacement():
    model = own_bridge("gpt2")
    with tlc.attach(model, tlc.mlp_neurons(model)) as attached:
        yield attached


def trace(replacement):
    return tlc.attribute(replacement, prompt(6), max_nodes=20, progress=False)


def test_training_mode_is_refused_where_something_is_dropped_and_allowed_elsewhere(replacement):
    model, evaluated = replacement.model, trace(replacement)
    drops = [m for m in {*model.modules(), *model.original_model.modules()} if isinstance(m, torch.nn.Dropout)]
    before = [(m, m.p) for m in drops]
    model.train()
    try:
        for m in drops:
            m.p = 0.0
        assert trace(replacement) == evaluated
        for m in drops:  # each of them matters, also the one after the embedding
            m.p = 0.1
            with pytest.raises(ArchitectureError, match=r"training mode.*10%.*model\.eval\(\)"):
                trace(replacement)
            m.p = 0.0
        drops[0].p = 0.1
        with pytest.raises(ArchitectureError, match="training mode"):
            tlc.faithfulness(replacement, evaluated, n=2)
        with pytest.raises(ArchitectureError, match="training mode"):
            tlc.intervene(replacement, prompt(6), [tlc.Ablate(0, 2, 3)])
    finally:
        model.eval()
        for m, p in before:
            m.p = p
    assert trace(replacement) == evaluated


def test_autocast_and_another_default_type_are_refused_in_words(replacement):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ArchitectureError, match="autocast is on"):
        trace(replacement)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ArchitectureError, match=r"default type is torch\.float64"):
            trace(replacement)
    finally:
        torch.set_default_dtype(torch.float32)
