"""tl_circuits on an accelerator, in a process of its own: answers the jobs of benchmarks/accelerator.py."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tl_circuits as tlc
from benchmarks.accelerator_model import DTYPES, SHAPES, Shape, checksum, network, prompt, tokenizer, transcoder
from benchmarks.accelerator_profile import profiled
from benchmarks.accelerator_worker import REPEATS, Progress, Stopped, answer, measured, synchronize, tell
from benchmarks.ours import useful_gflop
from benchmarks.setup import MARGIN
from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.targets import Targets


def bridge(shape: Shape, dtype: torch.dtype, device: str) -> TransformerBridge:
    """The random model, wrapped by TransformerLens."""
    words = tokenizer(shape)
    # else TransformerLens opens it by name
    words.init_kwargs |= {"name_or_path": "gemma-2-shaped", "add_bos_token": True}
    return TransformerBridge.boot_transformers(
        "gemma-2-shaped", hf_model=network(shape, dtype, device), tokenizer=words, device=device, dtype=dtype
    ).eval()


class Sweeps:
    """Counts the linear engine's nodes and times its sweeps while one trace runs, and stops the trace in time."""

    def __init__(self, device: str, limit: float):
        self.progress = Progress(device, limit)
        self._device, self._spans = device, list[tuple[Any, Any]]()
        self._targets: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator["Sweeps"]:
        """Watch all traces in this block."""
        rows = LinearEngine.rows

        def watched(engine: LinearEngine, targets: Targets) -> tuple[Tensor, Tensor]:
            features = int((targets.place < len(engine.attention)).sum())
            if features:
                self.progress.begin_features()
            began = self._now()
            found = rows(engine, targets)
            self._spans.append((began, self._now()))
            self._targets.append((targets.place, targets.position))
            if features:
                self.progress.add(features)
            return found

        LinearEngine.rows = watched  # type: ignore[method-assign,assignment]
        try:
            yield self
        finally:
            LinearEngine.rows = rows  # type: ignore[method-assign]

    def _now(self) -> Any:
        """A mark in the GPU's queue of work, which does not make the program wait; on a CPU the time."""
        if not self._device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """Seconds in sweeps."""
        synchronize(self._device)
        if self._device.startswith("cuda"):
            return sum(start.elapsed_time(stop) for start, stop in self._spans) / 1e3
        return sum(stop - start for start, stop in self._spans)

    @property
    def count(self) -> int:
        """How many sweeps there were."""
        return len(self._spans)

    @property
    def places(self) -> float:
        """Layers below a node times positions up to its own, summed over all nodes; the first position passes nothing
        on."""
        return float(sum(int((place * position).sum()) for place, position in self._targets))


class Ours:
    """The model with its transcoders attached, and what can be asked of it."""

    def __init__(self, shape: Shape, dtype: str, device: str):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.model = bridge(shape, DTYPES[dtype], device)
        self.tensors = {layer: transcoder(shape, layer, DTYPES[dtype], device) for layer in range(shape.n_layers)}
        made = {
            layer: tlc.Transcoder(
                t["W_enc"], t["W_dec"], t["b_enc"], t["b_dec"], threshold=t["threshold"], activation="jumprelu"
            )
            for layer, t in self.tensors.items()
        }
        self.replacement = tlc.attach(self.model, tlc.load_transcoders(made))

    def weights(self) -> list[Tensor]:
        """All weights, those of the model and of the transcoders."""
        own = list(self.model.original_model.parameters())
        return own + [tensor for tensors in self.tensors.values() for tensor in tensors.values()]

    def trace(self, length: int, nodes: int) -> tlc.AttributionGraph:
        """One trace, always with the linear engine: an error if it does not take this model."""
        return tlc.attribute(
            self.replacement,
            prompt(self.shape, length),
            max_nodes=nodes,
            engine="linear",
            select="influence",
            skip_positions=[0],
            progress=False,
        )

    def check(self, job: dict[str, Any]) -> dict[str, Any]:
        """Whether the random model computes something sane, after a first small trace."""
        tokens = prompt(self.shape, job["length"])
        with torch.no_grad():
            logits = self.model(tokens[None].to(self.device))[0, -1].float()
            names = [f"blocks.{layer}.mlp.hook_in" for layer in range(self.shape.n_layers)]
            _, cache = self.model.run_with_cache(tokens[None].to(self.device), names_filter=lambda name: name in names)
            counts = []
            for name, tensors in zip(names, self.tensors.values(), strict=True):
                pre = cache[name][0, 1:].float() @ tensors["W_enc"].float().T
                counts.append(float((pre > tensors["threshold"].float()).sum()) / max(1, len(pre)))
        self.trace(min(4, job["length"]), 4)
        top = logits.softmax(-1).topk(10).values
        return {
            "finite": bool(torch.isfinite(logits).all()),
            "logits_std": float(logits.std()),
            "top": top.tolist(),
            "active_a_position": [round(count, 1) for count in counts],
        }

    def rates(self, job: dict[str, Any]) -> dict[str, Any]:
        """How fast the device multiplies large matrices, in GFLOP/s; TF32 is float32 rounded to 10 bits."""
        size = 8192 if self.device.startswith("cuda") else 1024
        found = {}
        for name, dtype, precision in (
            ("float32", torch.float32, "highest"),
            ("tf32", torch.float32, "high"),
            ("bfloat16", torch.bfloat16, "highest"),
        ):
            with _precision(precision):
                a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
                found[name] = median(_rate(a, b, self.device) for _ in range(7))
        return found

    def speed(self, job: dict[str, Any]) -> dict[str, Any]:
        """Times of whole traces."""
        length, nodes = job["length"], job["nodes"]
        seconds: list[float] = []
        in_sweeps: list[float] = []
        whole: list[float] = []
        memory: dict[str, float] = {}
        sweeps, graph = Sweeps(self.device, job["limit"]), None
        with _precision(job.get("precision", "highest")):
            while len(seconds) < REPEATS and (not seconds or sum(seconds) + seconds[-1] < job["limit"] / 4):
                graph = None
                sweeps = Sweeps(self.device, job["limit"])

                def traced(watch: Sweeps = sweeps) -> tlc.AttributionGraph | None:
                    try:
                        with watch.watching():
                            return self.trace(length, nodes)
                    except Stopped:
                        return None

                graph, took, memory = measured(self.device, traced, first=not seconds)
                in_sweeps.append(sweeps.seconds)
                whole.append(took if graph is not None else sweeps.progress.elapsed)
                seconds.append(took if graph is not None else sweeps.progress.reckoned(nodes))
                if graph is None:
                    break
        gflop = useful_gflop(sweeps.places, self.shape.d_model, self.shape.d_value)
        return {
            "finished": graph is not None,
            "seconds": median(seconds),
            "all_seconds": seconds,
            "done": sweeps.progress.done,
            "nodes_per_s": nodes / median(seconds),
            "sweep_seconds": median(in_sweeps),
            "sweeps": sweeps.count,
            "gflops": gflop / median(whole),
            "gflops_in_sweeps": gflop / median(in_sweeps),
            **memory,
            **(
                {}
                if graph is None
                else {"active": graph.info.n_active, "completeness_error": graph.completeness_error()}
            ),
        }

    def profile(self, job: dict[str, Any]) -> dict[str, Any]:
        """Where the time of one trace goes."""
        self.trace(job["length"], job["nodes"])
        _, seconds, _ = measured(self.device, lambda: self.trace(job["length"], job["nodes"]))
        return profiled(self.device, lambda: self.trace(job["length"], job["nodes"]), seconds)

    def near(self, job: dict[str, Any]) -> dict[str, Any]:
        """Set encoder rows to zero whose pre-activation comes near the threshold, so that rounding decides nothing."""
        tokens = prompt(self.shape, job["length"])
        names = [f"blocks.{layer}.mlp.hook_in" for layer in range(self.shape.n_layers)]
        with torch.no_grad():
            _, cache = self.model.run_with_cache(tokens[None].to(self.device), names_filter=lambda name: name in names)
            rows = []
            for layer, tensors in self.tensors.items():
                pre = cache[names[layer]][0].float() @ tensors["W_enc"].float().T
                threshold = tensors["threshold"].float()
                near = ((pre - threshold).abs() < MARGIN * threshold).any(0).nonzero()[:, 0]
                tensors["W_enc"][near] = 0.0
                rows += [[layer, feature] for feature in near.tolist()]
        Path(job["folder"], "near.json").write_text(json.dumps(rows))
        return {"rows": len(rows), "checksum": checksum(self.weights())}

    def graph(self, job: dict[str, Any]) -> dict[str, Any]:
        """Leave a graph in a folder, to be compared."""
        graph = self.trace(job["length"], job["nodes"])
        table = {name: getattr(graph._nodes, name).contiguous() for name in ("kind", "layer", "position", "feature")}
        save_file(table | {"adjacency": graph.adjacency().contiguous()}, Path(job["folder"], "ours.safetensors"))
        return {"nodes": len(graph), "active": graph.info.n_active, "completeness_error": graph.completeness_error()}


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """Multiply float32 matrices as torch.set_float32_matmul_precision says, in this block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rate(a: Tensor, b: Tensor, device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    a @ b
    synchronize(device)
    return 2 * len(a) ** 3 / (time.perf_counter() - began) / 1e9


def main(shape: str, dtype: str, device: str) -> None:
    began = time.perf_counter()
    ours = Ours(SHAPES[shape], dtype, device)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    tell(
        {
            "ready_seconds": time.perf_counter() - began,
            "checksum": checksum(ours.weights()),
            "device": name,
            "torch": torch.__version__,
            "shape": asdict(ours.shape),
        }
    )
    answer(device, lambda job: getattr(ours, job["do"])(job))


if __name__ == "__main__":
    main(*sys.argv[1:4])
