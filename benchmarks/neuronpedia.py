"""Files, labels and dashboards: how long, how large. Run: python -m benchmarks.neuronpedia [files labels dashboards]"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

import tl_circuits as tlc
from tl_circuits.graph import AttributionGraph, Edges, GraphInfo, Label, Nodes


def random_graph(n_nodes: int, n_links: int, n_layers: int = 26, n_pos: int = 20) -> AttributionGraph:
    """A graph of the asked size whose links run from earlier to later layers, labels on every feature."""
    generator = torch.Generator().manual_seed(0)
    n_features = n_nodes - 10 - n_pos - n_layers * n_pos // 10
    n_errors = n_nodes - 10 - n_pos - n_features
    kind = torch.repeat_interleave(torch.arange(4), torch.tensor([n_features, n_errors, n_pos, 10]))
    layer = torch.cat([
        torch.randint(0, n_layers, (n_features,), generator=generator).sort().values,
        torch.arange(n_errors) % n_layers, torch.full((n_pos,), -1), torch.full((10,), n_layers),
    ])  # fmt: skip
    errors = torch.arange(n_errors) // n_layers
    position = torch.cat([torch.arange(n_features) % n_pos, errors, torch.arange(n_pos), torch.full((10,), n_pos - 1)])
    feature = torch.cat(
        [
            torch.randperm(max(16384, n_features), generator=generator)[:n_features],
            torch.full((n_errors,), -1),
            torch.arange(n_pos),
            torch.arange(10),
        ]
    )
    source = torch.randint(0, n_nodes - 10, (3 * n_links,), generator=generator)
    target = torch.randint(0, n_nodes, (3 * n_links,), generator=generator)
    good = (layer[source] < layer[target]) & ((kind[target] == 0) | (kind[target] == 3))
    key = (target * n_nodes + source)[good].unique()
    key = key[torch.randperm(len(key), generator=generator)[:n_links]].sort().values
    weight = torch.randn(len(key), generator=generator)
    value = torch.randn(n_nodes, generator=generator)
    value[(kind == 1) | (kind == 2)] = float("nan")
    zero = torch.zeros(n_nodes)
    nodes = Nodes(
        kind, layer, position, feature, zero + 1.5, value, zero + 0.25, zero + 0.125, zero + 0.5, (kind == 3) * 0.1
    )
    words = tuple(f" word{i}" for i in range(n_pos))
    info = GraphInfo(
        "".join(words), tuple(range(n_pos)), words, tuple(f" out{i}" for i in range(10)), (0.1,) * 10, "gemma-2-2b",
        "transcoders", n_layers, False, "linear", n_features, n_features, "0",
    )  # fmt: skip
    labels = {i: Label("say “something”, “else”") for i in range(n_features)}
    return AttributionGraph(info, nodes, Edges(key % n_nodes, key // n_nodes, weight), labels)


def files() -> None:
    """Export and import at 2,000 nodes and 60,000 links; memory of an export at 50,000 and two million."""
    graph = random_graph(2000, 60_000)
    with tempfile.TemporaryDirectory() as folder:
        for target in ("neuronpedia", "circuit-tracer"):
            started = time.perf_counter()
            path = graph.to_neuronpedia(folder, target, slug="g", overwrite=True)
            exported = time.perf_counter() - started
            started = time.perf_counter()
            read = tlc.load_graph(path)
            print(
                f"{target}: {len(graph)} nodes, {len(graph._edges)} links: export {exported:.2f} s, "
                f"{path.stat().st_size / 1e6:.2f} MB, import {time.perf_counter() - started:.2f} s ({len(read)} nodes)"
            )
        code = "import benchmarks.neuronpedia as b; b.large(__import__('sys').argv[1])"
        subprocess.run([sys.executable, "-c", code, folder], check=True)


def large(folder: str) -> None:
    """In a process of its own, so that its largest memory is the export's."""
    import resource

    graph = random_graph(50_000, 2_000_000)
    _ = graph.influence, graph.node_ids
    before = psutil.Process().memory_info().rss
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    path = graph.to_neuronpedia(Path(folder) / "large.json", slug="large")
    took, size = time.perf_counter() - started, path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"export of {len(graph)} nodes, {len(graph._edges)} links: {took:.1f} s, {size / 1e6:.0f} MB; memory before "
        f"{before / 1e6:.0f} MB (highest ever before {peak_before / 1e6:.0f}), highest during {peak / 1e6:.0f} MB"
    )


def labels() -> None:
    """500 features against a server on this computer that takes 100 ms to answer; then without it."""
    from tests.fake_neuronpedia import running

    graph = random_graph(700, 5000)
    n = graph._nodes
    with tempfile.TemporaryDirectory() as folder, running() as site:
        os.environ["TL_CIRCUITS_CACHE"], os.environ["TL_CIRCUITS_NEURONPEDIA"] = folder, site.url
        site.latency = 0.1
        features = graph.is_kind("feature").nonzero()[:, 0].tolist()
        graph = graph._subgraph(
            ~graph.is_kind("feature") | (torch.arange(len(graph)) < 500),
            torch.zeros(len(graph._edges), dtype=torch.bool),
        )
        for i in features[:500:2]:
            site.add_feature("tiny-model", int(n.layer[i]), int(n.feature[i]), "cities")
        for state in ("first time", "again, server gone"):
            started = time.perf_counter()
            made = tlc.add_labels(graph, model="tiny-model", source_set="tiny-set")
            print(
                f"labels of 500 features, {state}: {time.perf_counter() - started:.3f} s ({len(made.labels)} labels, "
                f"{len(site.asked)} questions)"
            )
            site.stop()


def dashboards(n_tokens: int) -> None:
    """Three layers of 2,304 features (random JumpReLU transcoders) of SmolLM2-135M."""
    model = tlc.load_model("smollm2-135m", device="cpu")
    generator = torch.Generator().manual_seed(0)
    d = int(model.cfg.d_model)
    made = {
        layer: tlc.Transcoder(
            W_enc=torch.randn(2304, d, generator=generator) / d**0.5,
            W_dec=torch.randn(2304, d, generator=generator) / d**0.5,
            b_enc=torch.zeros(2304),
            b_dec=torch.zeros(d),
            threshold=torch.full((2304,), 0.25),
            activation="jumprelu",
            input_hook="mlp.hook_in",
            output_hook="hook_mlp_out",
        )
        for layer in range(3)
    }
    rng = random.Random(0)
    words = [w for path in Path(tlc.__file__).parent.rglob("*.py") for w in path.read_text().split()]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(n_tokens // 12)))
        with tlc.attach(model, tlc.load_transcoders(made)) as replacement:
            started = time.perf_counter()
            found = tlc.make_dashboards(replacement, [text], Path(folder) / "out", max_tokens=n_tokens)
            took = time.perf_counter() - started
        active = (
            sum((found.read(1, f) or {"activation_frequency": 0.0})["activation_frequency"] for f in range(2304)) / 2304
        )
        size = sum(p.stat().st_size for p in found.folder.iterdir())
    peak = psutil.Process().memory_info().rss
    print(
        json.dumps(
            {
                "tokens": n_tokens,
                "seconds": round(took, 1),
                "tokens_per_second": round(n_tokens / took),
                "active_share_layer_1": round(active, 4),
                "rss_gb": round(peak / 1e9, 2),
                "files_mb": round(size / 1e6, 1),
            }
        )
    )


def main() -> None:
    """Run the parts named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["files", "labels", "dashboards"])
    parser.add_argument("--tokens", type=int, default=100_000)
    asked = parser.parse_args()
    for part in asked.parts:
        dashboards(asked.tokens) if part == "dashboards" else {"files": files, "labels": labels}[part]()


if __name__ == "__main__":
    main()
