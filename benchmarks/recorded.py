"""Twenty graphs and what is made of them, as check sums: the same before and after a change that should change nothing.

python -m benchmarks.recorded before.json          # on the code as it was
python -m benchmarks.recorded after.json           # on the code as it is, same machine, same libraries
python -m benchmarks.recorded --same before.json after.json
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tl_circuits as tlc
from tests import tiny

FACTS = ("the capital of the state containing Dallas is", "the capital of the state containing Oakland is")
REAL = {"smollm2-135m": "The capital of France is", "gemma-3-270m": "The opposite of hot is"}


def opened() -> Iterator[tuple[str, Any, Any, dict[str, Any]]]:
    """A name, a replacement, a prompt and options for each of twenty graphs."""
    facts = tlc.load_model("tiny-facts", device="cpu")
    with tlc.attach(facts, tlc.load_transcoders("tiny-facts")) as replacement:
        for i, prompt in enumerate(FACTS):
            for engine in ("linear", "autograd"):
                yield f"facts-{i}-{engine}", replacement, prompt, {"engine": engine, "max_nodes": 400}
        yield "facts-difference", replacement, FACTS[0], {"targets": [tlc.LogitDifference(" Austin", " Sacramento")]}
        yield "facts-feature", replacement, FACTS[0], {"targets": [tlc.FeatureTarget(2, 7, _active(replacement))]}
    for architecture in tiny.ARCHITECTURES:
        model = tiny.tiny_bridge(architecture)
        model.cfg.model_name = architecture  # it would be the temporary folder's name
        with tlc.attach(model, tiny.transcoders(model)) as replacement:
            yield f"{architecture}-transcoders", replacement, tiny.prompt(), {"max_nodes": 200}
        with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
            yield f"{architecture}-neurons", replacement, tiny.prompt(), {"max_nodes": 200}
    for name, prompt in REAL.items():
        model = tlc.load_model(name, device="cpu")
        with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
            yield name, replacement, prompt, {"max_nodes": 500}


def _active(replacement: Any) -> int:
    """The strongest feature of layer 2 at position 7 on the first prompt."""
    nodes = tlc.attribute(replacement, FACTS[0], progress=False).nodes
    here = nodes[(nodes.kind == "feature") & (nodes.layer == 2) & (nodes.position == 7)]
    return int(here.sort_values("activation").feature.iloc[-1])


def outputs(graph: Any, folder: Path) -> dict[str, str]:
    """Check sums of the file, the pages, the exports and the tables of one graph."""
    pruned = graph.prune()
    written = {
        "graph": graph.save(folder / "g.safetensors"),
        "page": pruned.to_html(folder / "g.html"),
        "neuronpedia": pruned.to_neuronpedia(folder / "np.json", slug="slug", source_set="set", scan="scan"),
        "circuit-tracer": pruned.to_neuronpedia(folder, "circuit-tracer", slug="slug", scan="scan"),
        "dot": pruned.to_dot(folder / "g.dot"),
    }
    made = {name: _sum(path.read_bytes()) for name, path in written.items()}
    made["nodes"] = _sum(graph.nodes.to_csv(index=False).encode())
    made["edges"] = _sum(graph.edges.to_csv(index=False).encode())
    made["boxes"] = _sum(repr(pruned.supernodes()).encode())
    made["scores"] = repr(graph.scores())
    return made


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def record() -> dict[str, dict[str, str]]:
    """The sums of all twenty, and of one intervention on each graph of features."""
    made = {}
    for name, replacement, prompt, options in opened():
        graph = tlc.attribute(replacement, prompt, progress=False, **options)
        with tempfile.TemporaryDirectory() as folder:
            made[name] = outputs(graph, Path(folder))
        strongest = int(torch.where(graph.is_kind("feature"), graph.influence, -1).argmax())
        edits = tlc.edits_of(graph, graph.node_ids[strongest])
        moved = tlc.intervene(replacement, prompt, edits, freeze="attention")
        made[name]["intervention"] = _sum(moved.logits.detach().float().numpy().tobytes())
        sys.stderr.write(f"{name}\n")
    return made


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same, as ``graph output``."""
    pairs = sorted({(name, part) for made in (before, after) for name in made for part in made[name]})
    return [f"{name} {part}" for name, part in pairs if before.get(name, {}).get(part) != after.get(name, {}).get(part)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--same", action="store_true", help="compare two files")
    given = parser.parse_args()
    if given.same:
        one, other = (json.loads(path.read_text()) for path in given.files)
        found = differences(one, other)
        print("\n".join(found) or f"{len(one)} graphs and all made of them are the same")
        sys.exit(bool(found))
    torch.set_num_threads(1)
    given.files[0].write_text(json.dumps(record(), indent=1))
