"""Vocabulary labels."""

from dataclasses import replace

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.feature_labels.vocabulary import extreme


def test_a_feature_that_writes_one_tokens_unembedding_is_labelled_with_it():
    model = tiny_bridge("llama")
    made = transcoders(model)
    direction = model.W_U[:, 42].detach()
    others = model.W_U.detach().mean(1)
    layers = {layer: made[layer] for layer in made.layers}
    W_dec = made[2].W_dec.clone()
    W_dec[:] = (direction - others) * 5
    layers[2] = tlc.Transcoder(
        made[2].W_enc, W_dec, made[2].b_enc, made[2].b_dec, threshold=made[2].threshold, activation="jumprelu"
    )
    with tlc.attach(model, layers) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=40, progress=False)
        labelled = tlc.label_features(replacement, graph)
    last = [i for i, layer in enumerate(labelled.nodes.layer) if layer == 2 and labelled.is_kind("feature")[i]]
    assert last and all(labelled.labels[i].promotes[0] == "w39" for i in last)
    assert not graph.labels  # the graph given is not changed


def test_every_feature_and_neuron_gets_a_label():
    for architecture in ("gemma3", "gpt2"):
        model = tiny_bridge(architecture)
        for dictionary in (transcoders(model), tlc.mlp_neurons(model)):
            with tlc.attach(model, dictionary) as replacement:
                graph = tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)
                graph = tlc.label_features(replacement, graph)
            features = graph.is_kind("feature").nonzero()[:, 0].tolist()
            assert set(graph.labels) == set(features) != set()
            assert all(graph.label(i).startswith(("say “", "sees “")) for i in features)


def test_whether_a_feature_says_or_sees_does_not_depend_on_how_long_its_vectors_are():
    model = tiny_bridge("llama")
    made, shorts = transcoders(model), []
    for factor in (1.0, 1e-4, 1e4):
        layers = {i: replace(made[i], W_dec=made[i].W_dec * factor) for i in made.layers}
        with tlc.attach(model, layers) as replacement:
            graph = tlc.attribute(replacement, prompt(), max_nodes=500, progress=False)
            labels = tlc.label_features(replacement, graph, list(range(int(graph.is_kind("feature").sum())))).labels
            first = {
                graph.node_ids[i]: label.short for i, label in labels.items() if graph.node_ids[i].startswith("L0/")
            }
        shorts.append(first)
    assert shorts[0] == shorts[1] == shorts[2] and {short.split()[0] for short in shorts[0].values()} == {"say", "sees"}


def test_a_negative_activation_turns_promotion_round():
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        labelled = tlc.label_features(replacement, graph)
        negative = [i for i in labelled.labels if float(graph._nodes.activation[i]) < 0]
        i = negative[0]
        layer, feature = int(graph._nodes.layer[i]), graph._nodes.feature[i : i + 1]
        effect = -replacement.dictionary.decoder_vectors(layer, feature, layer)[0] @ model.W_U
    assert labelled.labels[i].promotes[0] == model.tokenizer.decode([int(torch.argmax(effect))])


@pytest.mark.parametrize("d_vocab", [4, 600, 512 * 9, 512 * 9 + 1, 7001])
@pytest.mark.parametrize("largest", [True, False])
def test_the_most_extreme_tokens_are_those_of_a_whole_sort(d_vocab, largest):
    products = torch.randn(6, d_vocab, generator=torch.Generator().manual_seed(d_vocab))
    # at both ends of the vocabulary, and in one block
    products[0, -3:] = products[1, :3] = torch.tensor([9.0, -9.0, 8.0])
    values, tokens = extreme(products, 5, largest)
    wanted = products.sort(1, descending=largest)
    assert torch.equal(tokens, wanted.indices[:, :5]) and torch.equal(values, wanted.values[:, :5])
