"""One measurement of circuit-tracer, run by the Python of its own environment: a line of JSON.

Its ``_deduplicate_attention_buffers`` gives every layer the last layer's rotary table, which is
wrong on Gemma-3, so it is switched off here.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from circuit_tracer import attribute
from circuit_tracer.attribution.context_transformerlens import AttributionContext
from circuit_tracer.graph import Graph, compute_graph_scores
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import measured  # noqa: E402


def load(folder: Path, checkpoint: str) -> TransformerLensReplacementModel:
    layers = {}
    for layer in range(18):
        tensors = load_file(folder / f"layer_{layer}.safetensors")
        width = len(tensors["threshold"])
        made = SingleLayerTranscoder(640, width, JumpReLU(torch.zeros(width), 0.1), layer, dtype=torch.float32)
        made.load_state_dict(
            {
                "W_enc": tensors["W_enc"],
                "W_dec": tensors["W_dec"],
                "b_enc": torch.zeros(width),
                "b_dec": torch.zeros(640),
                "activation_function.threshold": tensors["threshold"],
            }
        )
        layers[layer] = made
    transcoders = TranscoderSet(layers, feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out")
    TransformerLensReplacementModel._deduplicate_attention_buffers = lambda self: None
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    return TransformerLensReplacementModel.from_pretrained_and_transcoders(
        "google/gemma-3-270m",
        transcoders,
        hf_model=model,
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def save_graph(graph: Graph, folder: Path) -> None:
    replacement, completeness = compute_graph_scores(graph)
    save_file(
        {
            "adjacency": graph.adjacency_matrix.contiguous(),
            "features": graph.active_features[graph.selected_features].contiguous(),
            "probabilities": graph.logit_probabilities.contiguous(),
            "scores": torch.tensor([replacement, completeness]),
        },
        folder / "peer.safetensors",
    )


class Stopped(Exception):
    """The run took longer than it may."""


class Watch:
    """Counts the nodes done, batch by batch, and stops a run after ``limit`` seconds."""

    def __init__(self, limit: float):
        self.limit, self.done, self.in_batches = limit, 0, 0.0
        self.began = time.perf_counter()
        compute = AttributionContext.compute_batch

        def counted(context: AttributionContext, *args: Any, **kwargs: Any) -> torch.Tensor:
            before = time.perf_counter()
            rows = compute(context, *args, **kwargs)
            if "retain_graph" in kwargs:  # features; the logits' rows come first, without it
                self.done += len(rows)
                self.in_batches += time.perf_counter() - before
            if time.perf_counter() - self.began > self.limit and self.done:
                raise Stopped
            return rows

        AttributionContext.compute_batch = counted

    def reckoned(self, seconds: float, n_nodes: int) -> float:
        """The whole run's seconds, its remaining nodes taken to be as fast as those done."""
        return seconds + (n_nodes - self.done) * self.in_batches / self.done


def main(folder: Path, checkpoint: str, n_tokens: int, n_nodes: int, batch_size: int, limit: int = 3600) -> None:
    # Running out of memory shall end this process alone, with an error. Mapped files do not count.
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * psutil.virtual_memory().total),) * 2)
    model = load(folder, checkpoint)
    tokens = load_file(folder / "tokens.safetensors")["tokens"][:n_tokens]
    attribute(tokens[:4], model, max_feature_nodes=4, batch_size=4)
    watch = Watch(limit)

    def traced() -> Graph | None:
        try:
            return attribute(tokens, model, max_feature_nodes=n_nodes, batch_size=batch_size)
        except Stopped:
            return None

    graph, seconds, peak = measured(traced)
    if graph is not None and n_nodes <= 500 and n_tokens <= 10:
        save_graph(graph, folder)
    sys.stdout.write(
        json.dumps(
            {
                "nodes": n_nodes,
                "finished": graph is not None,
                "peak_mb": peak,
                "seconds": seconds if graph is not None else watch.reckoned(seconds, n_nodes),
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:7]))
