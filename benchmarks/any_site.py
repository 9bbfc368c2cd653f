"""Autoencoders of the residual stream behind every block, at Gemma-2-2b's shapes: our trace, and the gradient method.

    python -m benchmarks.any_site [--layers 26] [--nodes 1000] [--tokens 10]

Weights are random, as time does not depend on them. To save memory, all blocks share theirs (no cache holds even one
block's), so do the autoencoders, and the vocabulary is cut to 32,000 tokens. The gradient
method is that of sparse feature circuits (Marks et al. 2025): a node's edges are activation times gradient, by one
backward pass a node through the block between two rebuilt streams. It is measured on fifty nodes and counted for all.
"""

import argparse
import json
from time import perf_counter

import torch

import tl_circuits as tlc
from tl_circuits.hooks import added_hooks

D, WIDTH, ACTIVE, MEASURED = 2304, 16_384, 60, 50


def model_of(layers: int):
    """A HookedTransformer with Gemma-2-2b's shapes and random weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=layers,
        d_model=D,
        n_ctx=1024,
        d_head=256,
        n_heads=8,
        n_key_value_heads=4,
        d_mlp=9216,
        d_vocab=32_000,
        act_fn="gelu_pytorch_tanh",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        attn_scores_soft_cap=50.0,
        output_logits_soft_cap=30.0,
        positional_embedding_type="rotary",
        rotary_dim=256,
        use_normalization_before_and_after=True,
        init_weights=False,
        device="cpu",
    )
    model = HookedTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and not name.startswith("blocks.0."):
                continue  # takes no memory before it is written to
            if name.endswith(".w"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.zero_()
        model.W_E.normal_(std=1.0)
    first = dict(model.blocks[0].named_parameters())
    for block in model.blocks[1:]:
        for name, parameter in block.named_parameters():
            parameter.data = first[name].data
    return model


def autoencoders(model, tokens):
    """JumpReLU autoencoders of every block's output, about sixty features active at a position."""
    generator = torch.Generator().manual_seed(0)
    layers = range(model.cfg.n_layers)
    seen = tlc.hooks.collect_sites(model, tokens[None], [f"blocks.{i}.hook_resid_post" for i in layers])
    made, W_enc, W_dec = (
        {},
        torch.randn(WIDTH, D, generator=generator) / D**0.5,
        torch.randn(WIDTH, D, generator=generator) / D**0.5,
    )
    for layer in layers:
        x = seen[f"blocks.{layer}.hook_resid_post"][0, 1:]
        threshold = float((x @ W_enc.T).flatten().sort().values[-ACTIVE * len(x)])
        made[layer] = tlc.Transcoder(
            W_enc, W_dec, torch.zeros(WIDTH), torch.zeros(D), activation="jumprelu",
            threshold=torch.full((WIDTH,), threshold), input_hook="hook_resid_post", output_hook="hook_resid_post",
        )  # fmt: skip
    return tlc.load_dictionary(made, layers=list(layers))


def gradient_seconds(model, dictionary, tokens, graph) -> float:
    """Seconds for the edges of all the graph's features by one backward pass a node."""
    nodes = graph._nodes
    features = (graph.is_kind("feature") & (nodes.layer > 0)).nonzero()[:, 0]
    by_layer = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MEASURED]]
    spent = 0.0
    for index in by_layer.tolist():
        layer, position, feature = (int(getattr(nodes, name)[index]) for name in ("layer", "position", "feature"))
        held = {}

        def begin(tensor, hook, held=held):
            held["leaf"] = tensor.detach().requires_grad_()
            return held["leaf"]

        def end(tensor, hook, held=held):
            held["x"] = tensor

        hooks = [(f"blocks.{layer - 1}.hook_resid_post", begin), (f"blocks.{layer}.hook_resid_post", end)]
        with torch.enable_grad(), added_hooks(model, hooks):
            model(tokens[None], stop_at_layer=layer + 1)
            started = perf_counter()
            value = held["x"][0, position] @ dictionary[layer].W_enc[feature]
            (grad,) = torch.autograd.grad(value, held["leaf"])
        active = dictionary.active(layer - 1, held["leaf"][0].detach())
        rows = dictionary.decoder_vectors(layer - 1, active.feature, layer - 1)
        ((grad[0][active.position] * rows).sum(-1) * active.activation).sum()
        spent += perf_counter() - started
    return spent / len(by_layer) * int(graph.is_kind("feature").sum())


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 26), ("nodes", 1000), ("tokens", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        model = model_of(asked.layers)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        tokens = torch.randint(1, 32_000, (asked.tokens,))
        dictionary = autoencoders(model, tokens)
        with tlc.attach(model, dictionary) as replacement:
            # proves holding, warms up
            tlc.attribute(replacement, tokens, max_nodes=10, skip_positions=[0], progress=False)
            started = perf_counter()
            graph = tlc.attribute(replacement, tokens, max_nodes=asked.nodes, skip_positions=[0], progress=False)
            ours = perf_counter() - started
        theirs = gradient_seconds(model, dictionary, tokens, graph)
    print(
        json.dumps(
            {
                "layers": asked.layers,
                "tokens": asked.tokens,
                "features": int(graph.is_kind("feature").sum()),
                "active": graph.info.n_active,
                "edges": len(graph._edges),
                "seconds": round(ours, 1),
                "gradient_seconds": round(theirs, 1),
                "sums": graph.completeness_error(),
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
