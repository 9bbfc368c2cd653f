"""A set on disk takes the memory of the layer at work, not of the set."""

import psutil
import pytest
import torch

import tl_circuits as tlc
from tests import published


@pytest.mark.parametrize("writer", [published.circuit_tracer, published.saelens])
def test_only_the_layer_at_work_is_resident(writer, tmp_path, monkeypatch):
    """Sixteen layers of 17 MB each, 268 MB; SAELens' layout is converted on the way."""
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))
    one = published.random_layers(1, width=8192, d=512, dtype=torch.bfloat16)[0]
    writer(tmp_path / "set", [one] * 16)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    tlc.load_transcoders(tmp_path / "set", layers=[0], residency="disk").active(0, x)  # warm up what is used once
    process, largest = psutil.Process(), 0
    before = process.memory_info().rss
    transcoders = tlc.load_transcoders(tmp_path / "set", residency="disk")
    for layer in transcoders.layers:
        active = transcoders.active(layer, x)
        transcoders.decoder_vectors(layer, active.feature[:200], layer)
        largest = max(largest, process.memory_info().rss)
    assert active.feature.numel() > 1000
    assert largest - before < 160e6
