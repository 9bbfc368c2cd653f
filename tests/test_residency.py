"""A set on disk takes the memory of the layer at work, not of the set."""

import os
import subprocess
import sys

import pytest
import torch

import tl_circuits as tlc
from tests import published
from tests.tiny import prompt, tiny_bridge
from tl_circuits.errors import DivergenceError, NotFiniteError

# In a process of its own: what other tests have freed would be counted in a process that they share.
MEASURE = """
import sys, psutil, torch, tl_circuits as tlc
x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
for folder in sys.argv[1:]:
    tlc.load_transcoders(folder, layers=[0], residency="disk").active(0, x)  # warm up what is used once
    process, largest = psutil.Process(), 0
    before = process.memory_info().rss
    transcoders = tlc.load_transcoders(folder, residency="disk")
    for layer in transcoders.layers:
        active = transcoders.active(layer, x)
        transcoders.decoder_vectors(layer, active.feature[:200], layer)
        largest = max(largest, process.memory_info().rss)
    print(active.feature.numel(), largest - before)
"""


def test_only_the_layer_at_work_is_resident(tmp_path):
    """Sixteen layers of 17 MB each, 268 MB; SAELens' layout is converted on the way."""
    one = published.random_layers(1, width=8192, d=512, dtype=torch.bfloat16)[0]
    folders = []
    for writer in (published.circuit_tracer, published.saelens):
        folders.append(str(tmp_path / writer.__name__))
        writer(tmp_path / writer.__name__, [one] * 16)
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders], env={**os.environ, "TL_CIRCUITS_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = told.stdout.splitlines()
    assert len(lines) == 2
    for active, grown in (map(int, line.split()) for line in lines):
        assert active > 1000
        assert grown < 160e6


@pytest.mark.parametrize("residency", ["disk", "device"])
def test_a_run_that_diverges_says_so_wherever_the_weights_are(residency, tmp_path):
    """Layer 1 has no dictionary: its gated MLP squares what layer 0 was made to write, and layer 2 encodes
    infinities."""
    layers = published.random_layers(3, width=40, d=32)
    for t in layers:
        t["W_enc"] /= 32**0.5
    published.circuit_tracer(tmp_path / "set", layers, hooks=("mlp.hook_in", "hook_mlp_out"))
    found = tlc.load_transcoders(tmp_path / "set", residency=residency, layers=[0, 2])
    with tlc.attach(tiny_bridge("llama"), found) as replacement:
        edit = tlc.Set(layer=0, position=3, feature=5, value=1e36)
        with pytest.raises(DivergenceError, match="outgrew floating point"):
            tlc.intervene(replacement, prompt(), [edit])


def test_a_matrix_with_nan_on_disk_is_told_from_an_input_with_nan(tmp_path):
    layers = published.random_layers(2, width=7, d=4)
    published.circuit_tracer(tmp_path / "set", layers)
    found, x = tlc.load_transcoders(tmp_path / "set", residency="disk"), torch.full((2, 4), float("inf"))
    assert not found.pre_activations(0, x).isfinite().all()
    assert not found.decode(0, {0: torch.full((2, 7), float("nan"))}, torch.ones(2, 4)).isfinite().all()
    layers[1]["W_dec"][3, 2] = float("nan")
    published.circuit_tracer(tmp_path / "damaged", layers)
    damaged = tlc.load_transcoders(tmp_path / "damaged", residency="disk")
    with pytest.raises(NotFiniteError, match="layer 1: W_dec as read from disk holds NaN"):
        damaged.decode(1, {1: torch.ones(2, 7)}, torch.ones(2, 4))
