"""Which words mattered: the total effects of tokens, and sums over paths where a file does not say them."""

from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests import tiny
from tests.accelerator import DEVICE
from tl_circuits.graph.words import path_effects


@pytest.mark.parametrize("make", [tlc.mlp_neurons, tiny.transcoders, lambda model: tiny.transcoders(model, skip=True)])
@pytest.mark.parametrize("against", [None, tiny.prompt(7, seed=5)])
def test_words_are_total_effects_and_sums_over_all_paths_of_a_whole_graph(make, against):
    model = tiny.tiny_bridge("gpt2")
    with tlc.attach(model, make(model)) as replacement:
        graph = tlc.attribute(
            replacement, tiny.prompt(7), baseline=against, max_nodes=100_000, row_mass=1.0, progress=False
        )
    total = graph._nodes.total_effect.double()
    kept = ~graph.is_kind("logit")
    # Sums of float32 edges over paths through three layers, against one gradient.
    assert (path_effects(graph) - total)[kept].abs().max() <= 1e-5 * total.abs().max()
    words = graph.words
    assert torch.allclose(torch.tensor(words.effect.to_numpy()), total[graph.is_kind("embedding")])
    assert words.share.abs().sum() == pytest.approx(1.0) and list(words.position) == list(range(7))
    foreign = replace(graph, _nodes=replace(graph._nodes, total_effect=None))
    assert (foreign.words.effect - words.effect).abs().max() <= 1e-4 * words.effect.abs().max()


def test_the_city_matters_most_and_alone_against_other_cities():
    prompt = "the capital of the state containing Dallas is"
    others = [prompt.replace("Dallas", city) for city in ("Oakland", "Miami")]
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        graph = tlc.attribute(replacement, prompt, baseline=others, max_nodes=50, progress=False)
        # Held as the graph holds, the token's embedding replaced by the mean of the others moves the target as said.
        words = graph.words
    assert words.share[7] == pytest.approx(1.0) and words.token[7] == "Dallas"
