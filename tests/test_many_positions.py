"""On a GPU many positions go through one product. However few fit into memory at once, the graph is the CPU's."""

import pytest
import torch

import tl_circuits as tlc
from tests.pretend_devices import PretendDevices, on_one_device
from tests.tiny import cross_layer, prompt, tiny_bridge, transcoders
from tl_circuits.attribution.engines import frozen_mlp

DICTIONARIES = {"transcoders": transcoders, "cross_layer": cross_layer, "neurons": tlc.mlp_neurons}


def traced(model, kind):
    with tlc.attach(model, DICTIONARIES[kind](model)) as replacement:
        return tlc.attribute(replacement, prompt(9), max_nodes=30, engine="linear", progress=False)


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize(("rows", "products"), [(40, 700), (10**6, 10**9)])
def test_positions_in_spans_of_any_length_give_the_same_graph(architecture, kind, rows, products, monkeypatch):
    expected = traced(tiny_bridge(architecture), kind)
    with PretendDevices():
        model = on_one_device(architecture, torch.float32)
        monkeypatch.setattr(frozen_mlp, "rows_at_once", lambda d, device: rows)
        monkeypatch.setattr(frozen_mlp, "PRODUCTS_OF_A_GPU", products)
        monkeypatch.setattr(frozen_mlp, "CACHED_FLOATS_OF_A_GPU", 0 if rows < 10**6 else 10**9)
        found = traced(model, kind)
    assert found.node_ids == expected.node_ids
    # float32, other order of sums
    assert torch.allclose(found.adjacency(), expected.adjacency(), atol=1e-6)
