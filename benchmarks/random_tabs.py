"""Tabs that are opened and closed at random on one server: how many answers are wrong, or never come.

``python -m benchmarks.random_tabs`` starts ``tl-circuits view`` with a model as a process of its own. Clients ask for
steered runs; half of them close the socket at a random moment instead of waiting. Every answer that comes is compared
with the model asked alone.
"""

import argparse
import json
import random
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

import tl_circuits as tlc
from benchmarks.tabs import TOKEN, viewing
from tl_circuits.interventions.box_effects import measure_boxes

PROMPT = "the capital of the state containing Dallas is"
FACTORS = (-1.0, 0.0, 0.5, 2.0)
FEATURES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = tlc.load_model("tiny-facts", device="cpu")
    with tempfile.TemporaryDirectory() as home, tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        graph = tlc.attribute(replacement, PROMPT, max_nodes=100, progress=False)
        path = graph.save(Path(home) / "capital.graph.safetensors")
        features = [i for i in graph.nodes.sort_values("influence", ascending=False).id if "/F" in i][:FEATURES]
        alone = {
            (node, factor): measure_boxes(replacement, graph, [[node]], factor)[0]
            for node in features
            for factor in FACTORS
        }
        share = -(-arguments.answers // arguments.clients)
        with viewing(path, "tiny-facts") as (port, _), ThreadPoolExecutor(arguments.clients) as pool:
            began = time.monotonic()
            found = list(
                pool.map(
                    lambda c: client(port, share, alone, random.Random(f"{arguments.seed}.{c}")),
                    range(arguments.clients),
                )
            )
            report(found, time.monotonic() - began)


def client(port: int, answers: int, alone: dict[Any, Any], chance: random.Random) -> dict[str, int]:
    """Open tabs one after the other until so many answers came; what happened, counted."""
    counts = {"answers": 0, "wrong": 0, "missing": 0, "closed": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/graphs", headers={"x-token": TOKEN})
    with urllib.request.urlopen(request, timeout=60) as listed:
        graph = json.load(listed)[0]["id"]
    while counts["answers"] + counts["missing"] < answers:
        node, factor = chance.choice(list(alone))
        with connect(f"ws://127.0.0.1:{port}/live?token={TOKEN}") as line:
            line.send(json.dumps({"do": "steer", "graph": graph, "number": 1, "nodes": [node], "factor": factor}))
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.3)
                counts["closed"] += 1
                continue
            try:
                result = json.loads(line.recv(timeout=120))["result"]
            except (TimeoutError, KeyError):
                counts["missing"] += 1
                continue
        counts["answers"] += 1
        right = alone[node, factor]
        counts["wrong"] += any(
            abs(result[name] - right[name]) > 1e-4 * max(1.0, abs(right[name])) for name in ("measured", "predicted")
        )
        counts["wrong"] += [t["token"] for t in result["top"]] != [t["token"] for t in right["top"]]
    return counts


def report(found: list[dict[str, int]], seconds: float) -> None:
    """Print the sums over all clients."""
    total = {name: sum(one[name] for one in found) for name in found[0]}
    print(f"{total['answers']} answers in {seconds:.0f} s, beside {total['closed']} tabs closed while the model worked")
    print(f"{total['wrong']} wrong, {total['missing']} missing")


if __name__ == "__main__":
    main()
