"""The same small model, dictionary and prompt with circuit-tracer."""

import sys
from pathlib import Path

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from peer import save_graph
from safetensors.torch import load_file
from small_configs import CONFIGS, tokenizer
from transformer_lens import HookedTransformerConfig


def main(folder: Path, name: str) -> None:
    setup = load_file(folder / "small_setup.safetensors")
    config = HookedTransformerConfig(**CONFIGS[name] | {"dtype": torch.float32})
    layers = {}
    for layer in range(config.n_layers):
        made = SingleLayerTranscoder(64, setup["b_enc_0"].numel(), torch.nn.functional.relu, layer, dtype=torch.float32)
        made.load_state_dict({key: setup[f"{key}_{layer}"] for key in ("W_enc", "W_dec", "b_enc", "b_dec")})
        layers[layer] = made
    transcoders = TranscoderSet(layers, feature_input_hook="ln2.hook_normalized", feature_output_hook="hook_mlp_out")
    TransformerLensReplacementModel._deduplicate_attention_buffers = lambda self: None
    model = TransformerLensReplacementModel.from_config(config, transcoders)
    own = model.state_dict()
    weights = load_file(folder / "small_model.safetensors")
    moved = ((".mlp.", ".mlp.old_mlp."), ("unembed.", "unembed.old_unembed."))  # where it wraps modules
    renamed = {}
    for key, value in weights.items():
        options = [key, *(key.replace(old, new) for old, new in moved)]
        renamed[next((option for option in options if option in own), key)] = value
    missing = [key for key in renamed if key not in own]
    if missing:
        raise KeyError(f"no place for {missing[:3]} among {list(own)[:40]}")
    model.load_state_dict(renamed, strict=False)
    model.tokenizer = tokenizer()
    graph = attribute(setup["tokens"], model, max_feature_nodes=10**6, batch_size=64)
    save_graph(graph, folder)
    sys.stdout.write('{"done": true}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
