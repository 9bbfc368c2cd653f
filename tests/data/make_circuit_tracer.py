"""Makes the circuit-tracer fixtures: run it with an environment that has circuit-tracer 0.5.0.

A hand-made graph of two layers, three tokens and two outputs. Feature 1 of layer 0 at position 2 and
the error of layer 1 at position 2 share the id `0_1_2`, as circuit-tracer writes them.
"""

import sys
from pathlib import Path
from unittest import mock

import circuit_tracer.utils.create_graph_files  # noqa: F401  the package hides the module behind its function
import torch
from circuit_tracer.attribution.targets import LogitTarget
from circuit_tracer.graph import Graph
from circuit_tracer.utils.tl_nnsight_mapping import UnifiedConfig

files = sys.modules["circuit_tracer.utils.create_graph_files"]


class Tokenizer:
    def decode(self, token):
        return ["<bos>", ' "quoted"', "\n"][int(token)]


def main(out: Path) -> None:
    torch.manual_seed(0)
    features = torch.tensor([[0, 1, 4], [0, 2, 1], [0, 2, 7], [1, 1, 0], [1, 2, 3], [1, 2, 9]])
    n, n_pos, n_layers, n_logits = 5, 3, 2, 2
    total = n + n_layers * n_pos + n_pos + n_logits
    layer = torch.tensor([0, 0, 1, 1, 1] + [0] * 3 + [1] * 3 + [-1] * 3 + [9] * 2)
    is_error = torch.zeros(total, dtype=torch.bool)
    is_error[n : n + n_layers * n_pos] = True
    matrix = torch.randn(total, total)
    matrix[is_error] = 0
    matrix[total - n_logits - n_pos : total - n_logits] = 0
    later = layer[:, None] > layer[None]
    matrix[~later] = 0
    matrix[:, total - n_logits :] = 0
    cfg = UnifiedConfig(
        n_layers=n_layers,
        d_model=8,
        d_head=4,
        n_heads=2,
        d_mlp=16,
        d_vocab=3,
        tokenizer_name="nowhere",
        model_name="tiny",
        original_architecture="LlamaForCausalLM",
        dtype=torch.float32,
    )
    graph = Graph(
        input_string='<bos> "quoted"\n',
        input_tokens=torch.tensor([0, 1, 2]),
        active_features=features,
        adjacency_matrix=matrix,
        cfg=cfg,
        selected_features=torch.tensor([0, 1, 3, 4, 5]),
        activation_values=torch.rand(6) + 0.5,
        logit_targets=[LogitTarget(" a", 1), LogitTarget("a−b", 4)],
        logit_probabilities=torch.tensor([0.7, 0.25]),
        scan="someone/transcoders",
        vocab_size=3,
    )
    graph.to_pt(str(out / "circuit_tracer.pt"))
    with mock.patch.object(files, "AutoTokenizer", mock.Mock(from_pretrained=lambda name: Tokenizer())):
        files.create_graph_files(graph, "tiny", str(out), node_threshold=1.0, edge_threshold=1.0)
    (out / "tiny.json").rename(out / "circuit_tracer.json")
    (out / "graph-metadata.json").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
