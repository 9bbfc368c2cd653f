"""Trace a small random model with all its features, and leave model, dictionary and graph in a folder."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

import tl_circuits as tlc
from benchmarks.small_configs import CONFIGS, VOCAB, WIDTH


def main(folder: Path, name: str) -> None:
    model = HookedTransformer(HookedTransformerConfig(**CONFIGS[name] | {"dtype": torch.float32})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.randint(3, VOCAB, (12,), generator=generator)
    tokens[0] = 1  # circuit-tracer wants a special token first
    tensors, transcoders = {"tokens": tokens}, {}
    for layer in range(model.cfg.n_layers):
        W_enc, W_dec = (torch.randn(WIDTH, 64, generator=generator) / 8 for _ in range(2))
        b_enc, b_dec = torch.randn(WIDTH, generator=generator) * 0.1 - 0.8, torch.randn(64, generator=generator) * 0.1
        tensors |= {f"W_enc_{layer}": W_enc, f"W_dec_{layer}": W_dec, f"b_enc_{layer}": b_enc, f"b_dec_{layer}": b_dec}
        transcoders[layer] = tlc.Transcoder(W_enc, W_dec, b_enc, b_dec, input_hook="ln2.hook_normalized")
    save_file({k: v.detach().contiguous() for k, v in model.named_parameters()}, folder / "small_model.safetensors")
    save_file(tensors, folder / "small_setup.safetensors")
    with tlc.attach(model, transcoders) as replacement:
        graph = tlc.attribute(replacement, tokens, max_nodes=10**6, skip_positions=[0], progress=False)
    table = {key: getattr(graph._nodes, key).contiguous() for key in ("kind", "layer", "position", "feature")}
    save_file(table | {"adjacency": graph.adjacency()}, folder / "ours.safetensors")
    sys.stdout.write('{"done": true}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
