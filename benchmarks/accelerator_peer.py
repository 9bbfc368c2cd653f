"""circuit-tracer on an accelerator, run by the Python of its own environment: answers the jobs of
benchmarks/accelerator.py."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerator_model import DTYPES, SHAPES, Shape, checksum, network, prompt, tokenizer, transcoder
from accelerator_worker import REPEATS, Progress, Stopped, answer, measured, tell
from circuit_tracer import attribute
from circuit_tracer.attribution.context_transformerlens import AttributionContext
from circuit_tracer.graph import Graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from safetensors.torch import save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights


def config(shape: Shape, dtype: torch.dtype, device: str) -> HookedTransformerConfig:
    """What TransformerLens has for google/gemma-2-2b, with these sizes; sliding windows at even layers, as Gemma has
    them."""
    return HookedTransformerConfig(
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        n_key_value_heads=shape.n_kv,
        d_head=shape.d_head,
        d_mlp=shape.d_mlp,
        d_vocab=shape.d_vocab,
        n_ctx=shape.n_ctx,
        eps=1e-6,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=10000,
        rotary_dim=shape.d_head,
        use_attn_scale=True,
        use_local_attn=True,
        window_size=shape.window,
        attn_types=["local", "global"] * (shape.n_layers // 2),
        attn_scores_soft_cap=50.0,
        output_logits_soft_cap=30.0,
        use_normalization_before_and_after=True,
        original_architecture="Gemma2ForCausalLM",
        init_weights=False,
        dtype=dtype,
        device=device,
    )


def replacement_model(
    shape: Shape, dtype: torch.dtype, device: str, near: list[list[int]]
) -> tuple[TransformerLensReplacementModel, int]:
    """The random model with its transcoders, and the weights' check sum; encoder rows in ``near`` are set to zero."""
    settings = config(shape, dtype, device)
    hf = network(shape, dtype, device)
    total = checksum(hf.parameters())
    with torch.device(device):
        model = TransformerLensReplacementModel(settings)
    missing, unexpected = model.load_state_dict(convert_gemma_weights(hf, settings), strict=False)
    unset = [name for name in missing if not name.endswith((".mask", ".IGNORE", ".rotary_sin", ".rotary_cos"))]
    if unset or unexpected:
        raise RuntimeError(f"weights without a place: {unexpected[:3]}; places without weights: {unset[:3]}")
    del hf
    layers = {}
    for layer in range(shape.n_layers):
        tensors = transcoder(shape, layer, dtype, device)
        rows = [feature for at, feature in near if at == layer]
        tensors["W_enc"][rows] = 0.0
        total += checksum(tensors.values())
        threshold = tensors.pop("threshold")
        with torch.device("meta"):  # as circuit-tracer's own loaders do, so that weights are not held twice
            made = SingleLayerTranscoder(shape.d_model, shape.width, JumpReLU(threshold, 0.1), layer, dtype=dtype)
        made.load_state_dict(tensors | {"activation_function.threshold": threshold}, assign=True)
        layers[layer] = made
    transcoders = TranscoderSet(layers, feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out")
    model._configure_replacement_model(transcoders)
    model.tokenizer = tokenizer(shape)
    return model, total


@contextmanager
def watching(progress: Progress) -> Iterator[None]:
    """Count the feature nodes of all runs in this block, and stop a run in time."""
    compute = AttributionContext.compute_batch

    def counted(context: AttributionContext, *args: Any, **kwargs: Any) -> torch.Tensor:
        of_features = "retain_graph" in kwargs  # the logits' rows come first, without it
        if of_features:
            progress.begin_features()
        rows = compute(context, *args, **kwargs)
        if of_features:
            progress.add(len(rows))
        return rows

    AttributionContext.compute_batch = counted
    try:
        yield
    finally:
        AttributionContext.compute_batch = compute


class Peer:
    """The model, and what can be asked of it."""

    def __init__(self, shape: Shape, dtype: str, device: str, near: list[list[int]]):
        self.shape, self.device = shape, device
        self.model, self.checksum = replacement_model(shape, DTYPES[dtype], device, near)

    def trace(self, length: int, nodes: int, batch: int) -> Graph:
        return attribute(prompt(self.shape, length), self.model, max_feature_nodes=nodes, batch_size=batch)

    def check(self, job: dict[str, Any]) -> dict[str, Any]:
        """A first small run."""
        graph = self.trace(min(4, job["length"]), 4, 4)
        return {"finite": bool(torch.isfinite(graph.adjacency_matrix).all())}

    def speed(self, job: dict[str, Any]) -> dict[str, Any]:
        """Times of whole runs at one batch size."""
        length, nodes, batch, limit = job["length"], job["nodes"], job["batch"], job["limit"]
        seconds: list[float] = []
        memory: dict[str, float] = {}
        progress, graph = Progress(self.device, limit), None
        while len(seconds) < REPEATS and (not seconds or sum(seconds) + seconds[-1] < limit / 4):
            graph = None
            progress = Progress(self.device, limit)

            def traced(now: Progress = progress) -> Graph | None:
                now.began = time.perf_counter()
                try:
                    with watching(now):
                        return self.trace(length, nodes, batch)
                except Stopped:
                    return None

            graph, took, memory = measured(self.device, traced, first=not seconds)
            seconds.append(took if graph is not None else progress.reckoned(nodes))
            if graph is None:
                break
        return {
            "finished": graph is not None,
            "seconds": median(seconds),
            "all_seconds": seconds,
            "done": progress.done,
            "nodes_per_s": nodes / median(seconds),
            **memory,
            **({} if graph is None else {"active": len(graph.active_features)}),
        }

    def graph(self, job: dict[str, Any]) -> dict[str, Any]:
        """Leave a graph in a folder, to be compared."""
        graph = self.trace(job["length"], job["nodes"], job["batch"])
        selected = graph.selected_features.to(graph.active_features.device)
        tensors = {
            "adjacency": graph.adjacency_matrix,
            "features": graph.active_features[selected],
            "logits": torch.tensor([target.vocab_idx for target in graph.logit_targets]),
        }
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            Path(job["folder"], "peer.safetensors"),
        )
        return {"nodes": len(graph.adjacency_matrix), "active": len(graph.active_features)}


def main(shape: str, dtype: str, device: str, near: str = "") -> None:
    began = time.perf_counter()
    peer = Peer(SHAPES[shape], dtype, device, json.loads(Path(near).read_text()) if near else [])
    tell({"ready_seconds": time.perf_counter() - began, "checksum": peer.checksum, "torch": torch.__version__})
    answer(device, lambda job: getattr(peer, job["do"])(job))


if __name__ == "__main__":
    main(*sys.argv[1:5])
