"""The numbers: sums, engines, and brute force by intervention, on every architecture."""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, LlamaConfig

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.oracles import measured_columns
from tests.tiny import ARCHITECTURES, CONFIGS, VOCAB, checkpoint, cross_layer, prompt, tiny_bridge, transcoders

# float32 sums over a few hundred terms and a handful of layers: a few units in the last place.
SUMS, AGREE, MEASURED = 1e-4, 1e-4, 1e-3

DICTIONARIES = {
    "neurons": lambda m: tlc.mlp_neurons(m),
    "jumprelu": lambda m: transcoders(m),
    "relu_skip": lambda m: transcoders(m, activation="relu", skip=True),
    "topk": lambda m: transcoders(m, activation="topk"),
    "normalized": lambda m: transcoders(m, input_hook="ln2.hook_normalized"),
    "residual_skip": lambda m: transcoders(m, input_hook="ln2.hook_in", skip=True, output_hook="mlp.hook_out"),
    "some_layers": lambda m: transcoders(m, layers=[0, 2]),
    "cross_layer": lambda m: cross_layer(m),
    "cross_layer_before_post_norm": lambda m: cross_layer(m, slots=2, output_hook="mlp.hook_out"),
}


def trace(model, dictionary, **kwargs):
    with tlc.attach(model, dictionary) as replacement:
        return tlc.attribute(replacement, prompt(), progress=False, **kwargs)


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edges_and_bias_add_up_and_both_engines_agree(architecture, kind):
    model = tiny_bridge(architecture)
    dictionary = DICTIONARIES[kind](model)
    linear = trace(model, dictionary, max_nodes=120, engine="linear")
    autograd = trace(model, dictionary, max_nodes=120, engine="autograd")
    assert linear.info.engine == "linear" and autograd.info.engine == "autograd"
    assert len(linear._edges) > 100
    assert linear.completeness_error() < SUMS
    assert autograd.completeness_error() < SUMS
    assert linear.node_ids == autograd.node_ids
    ours, reference = linear.adjacency(), autograd.adjacency()
    # Relative to the largest edge into the same target: entries near zero are differences of large ones.
    scale = reference.abs().amax(1, keepdim=True).clamp_min(1e-12)
    assert ((ours - reference).abs() / scale).max() < AGREE
    assert (linear._nodes.bias - autograd._nodes.bias).abs().max() < 1e-3 * linear._nodes.value.nan_to_num().abs().max()


@pytest.mark.parametrize("kind", ["neurons", "relu_skip", "some_layers"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adding_a_source_moves_every_target_by_its_edge(architecture, kind):
    """Brute force: no gradients, the model itself run with one contribution added twice over."""
    model = tiny_bridge(architecture)
    dictionary = DICTIONARIES[kind](model)
    with tlc.attach(model, dictionary) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        adjacency = graph.adjacency()
        nodes = graph._nodes
        generator = torch.Generator().manual_seed(0)
        sources = torch.randperm(len(graph) - len(graph.info.target_names), generator=generator)[:8].tolist()
        before, columns = measured_columns(replacement, graph, sources)
        checked = 0
        for target in graph.is_kind("feature").nonzero()[:, 0].tolist():
            layer, position = int(nodes.layer[target]), int(nodes.position[target])
            x = before[dictionary.input_hook(layer)][position]
            vector, _ = dictionary.read_vectors(layer, nodes.feature[target : target + 1].to(x.device), x[None])
            row = adjacency[target].abs().max()
            for source, after in zip(sources, columns, strict=True):
                effect = float(vector[0] @ (after[dictionary.input_hook(layer)][position] - x).float())
                assert abs(effect - float(adjacency[target, source])) <= MEASURED * float(row), (source, target)
                checked += abs(effect) > 1e-6
        assert checked > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_explained_logits_are_the_models_own(architecture):
    model = tiny_bridge(architecture)
    with torch.no_grad():
        logits = model(prompt()[None])[0, -1]
    graph = trace(model, tlc.mlp_neurons(model), targets=[5, 17], max_nodes=20)
    nodes = graph._nodes
    value = nodes.value[graph.is_kind("logit")]
    cap = float(getattr(model.cfg, "output_logits_soft_cap", -1.0))
    uncapped = logits if cap <= 0 else cap * torch.atanh(logits / cap)
    assert torch.allclose(value, (uncapped - uncapped.mean())[[5, 17]], atol=2e-4)  # float32 rounding
    assert torch.allclose(nodes.weight[graph.is_kind("logit")], logits.softmax(-1)[[5, 17]], atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "kind", "dtype"),
    [
        ("llama", "neurons", torch.float16),
        ("llama", "neurons", torch.bfloat16),
        ("gemma3", "relu_skip", torch.bfloat16),
        ("gemma3", "residual_skip", torch.bfloat16),
        ("gpt2", "cross_layer_before_post_norm", torch.bfloat16),
        ("neox", "residual_skip", torch.bfloat16),
    ],
)
def test_half_precision_models_are_traced_in_float32(architecture, kind, dtype):
    """What the model rounds away counts as constant; without that these sums are off by a hundredth."""
    model = tiny_bridge(architecture, dtype)
    graph = trace(model, DICTIONARIES[kind](model), max_nodes=60, engine="linear")
    assert graph.completeness_error() < SUMS
    assert graph._edges.weight.dtype is torch.float32


@pytest.mark.parametrize("kind", ["jumprelu", "residual_skip", "cross_layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_vectors_with_shares_are_as_good_as_full_gradients(architecture, kind, monkeypatch):
    """How long a late target's gradient is kept as a few vectors is a matter of speed alone."""
    model = tiny_bridge(architecture)
    factored = importlib.import_module("tl_circuits.attribution.engines.factored")
    graphs = []
    for worth in (0.0, 1e9):  # never beyond the first layer; down to the embeddings
        monkeypatch.setattr(factored, "WORTH", worth)
        graphs.append(trace(model, DICTIONARIES[kind](model), max_nodes=60, engine="linear"))
    full, few = graphs
    assert few.node_ids == full.node_ids and few.completeness_error() < SUMS
    scale = full.adjacency().abs().amax(1, keepdim=True).clamp_min(1e-12)
    assert ((few.adjacency() - full.adjacency()).abs() / scale).max() < AGREE


def test_gated_neurons_with_biases_add_up(tmp_path):
    settings = CONFIGS["llama"].to_dict() | {"mlp_bias": True, "attention_bias": True}
    model = TransformerBridge.boot_transformers(
        checkpoint(LlamaConfig(**settings), str(tmp_path)), device=DEVICE
    ).eval()
    assert model.blocks[1].mlp.gate.bias.abs().min() > 0
    linear, autograd = (
        trace(model, tlc.mlp_neurons(model), max_nodes=60, engine=engine) for engine in ("linear", "autograd")
    )
    assert linear.completeness_error() < SUMS and autograd.completeness_error() < SUMS
    assert linear.node_ids == autograd.node_ids and torch.allclose(linear.adjacency(), autograd.adjacency(), atol=1e-4)
    assert torch.allclose(linear._nodes.bias, autograd._nodes.bias, atol=1e-4)


def test_a_neuron_whose_gate_is_exactly_closed_does_no_harm(tmp_path):
    folder = checkpoint(CONFIGS["llama"], str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][:7] = 0
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = TransformerBridge.boot_transformers(folder, device=DEVICE).eval()
    linear, autograd = (
        trace(model, tlc.mlp_neurons(model), max_nodes=60, engine=engine) for engine in ("linear", "autograd")
    )
    assert linear.completeness_error() < SUMS and autograd.completeness_error() < SUMS
    assert torch.allclose(linear.adjacency(), autograd.adjacency(), atol=1e-4)
    # they are not active
    assert not [i for i in linear.node_ids if i.startswith("L1/F") and int(i[4:].split("@")[0]) < 7]
    by_effect = trace(model, tlc.mlp_neurons(model), max_nodes=60, select="total_effect")
    assert by_effect.completeness_error() < SUMS and by_effect._nodes.total_effect.isfinite().all()


def test_same_input_gives_same_bytes(tmp_path):
    model = tiny_bridge("gemma3")
    files = []
    for i in range(2):
        path = trace(model, transcoders(model), max_nodes=70).save(tmp_path / f"{i}.safetensors")
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_batch_size_changes_no_edge_beyond_rounding():
    model = tiny_bridge("llama")
    one = trace(model, transcoders(model), max_nodes=50, batch_size=1)
    many = trace(model, transcoders(model), max_nodes=50, batch_size=64)
    assert one.node_ids == many.node_ids
    assert torch.allclose(one.adjacency(), many.adjacency(), atol=1e-5)  # other summation order


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["linear", "autograd"])
def test_works_inside_no_grad_and_inference_mode(guard, engine):
    model = tiny_bridge("llama")
    plain = trace(model, transcoders(model), max_nodes=30, engine=engine)
    with guard():
        guarded = trace(model, transcoders(model), max_nodes=30, engine=engine)
    assert torch.allclose(plain.adjacency(), guarded.adjacency(), atol=1e-6)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kv=st.sampled_from([1, 2, 4]),
    d_head=st.sampled_from([2, 4, 6]),
    layers=st.integers(1, 4),
    length=st.integers(1, 7),
    width=st.integers(8, 50),
    skip=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_small_llama_adds_up(tmp_path_factory, kv, d_head, layers, length, width, skip, seed):
    config = LlamaConfig(
        hidden_size=4 * d_head,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv,
        head_dim=d_head,
        vocab_size=VOCAB,
        max_position_embeddings=16,
    )
    model = TransformerBridge.boot_transformers(
        checkpoint(config, str(tmp_path_factory.mktemp("m")), seed), device=DEVICE
    )
    dictionary = transcoders(model, skip=skip, width=width, seed=seed)
    with tlc.attach(model, dictionary) as replacement:
        linear, autograd = (
            tlc.attribute(replacement, prompt(length, seed), max_nodes=40, engine=e, progress=False)
            for e in ("linear", "autograd")
        )
    assert linear.completeness_error() < SUMS
    assert linear.node_ids == autograd.node_ids
    assert torch.allclose(linear.adjacency(), autograd.adjacency(), atol=1e-4)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(heads=st.sampled_from([1, 2, 4]), layers=st.integers(1, 3), length=st.integers(2, 7), seed=st.integers(0, 999))
def test_any_small_gpt2_adds_up(tmp_path_factory, heads, layers, length, seed):
    config = GPT2Config(n_embd=16, n_layer=layers, n_head=heads, vocab_size=VOCAB, n_positions=16)
    model = TransformerBridge.boot_transformers(
        checkpoint(config, str(tmp_path_factory.mktemp("m")), seed), device=DEVICE
    )
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(length, seed), max_nodes=40, progress=False)
    assert graph.completeness_error() < SUMS
    assert not graph.is_kind("error").any()
