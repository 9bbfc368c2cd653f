"""Many tabs of a browser on one server, each steering: errors, cross-talk, time to an answer, memory.

``python -m benchmarks.tabs`` starts ``tl-circuits view`` with a model as a process of its own, opens twenty tabs, moves
the slider of another box in each, then lets all tabs steer on at once until the server has answered 500 times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import tl_circuits as tlc
from benchmarks.page import FLAGS
from docs.make.chromium import chromium
from tl_circuits.interventions.box_effects import measure_boxes
from tl_circuits.view.server import free_port

TOKEN = "a-token-for-the-benchmark"
# What a tab does on its own: one wish after the other, of its own nodes, each by another factor.
STEER = """async ([nodes, factors]) => {
  const found = [];
  for (const factor of factors) {
    const start = performance.now();
    const result = await tlc.host.steer({ nodes, factor });
    found.push([factor, performance.now() - start, result]);
  }
  return found;
}"""


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tabs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=500)
    arguments = parser.parse_args()
    model = tlc.load_model(arguments.model, device="cpu")
    with tempfile.TemporaryDirectory() as home, tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, arguments.prompt, max_nodes=300, progress=False)
        graph = tlc.label_features(replacement, graph)
        path = graph.save(Path(home) / "capital.graph.safetensors")
        # Each tab steers features of its own, which the answer must name.
        features = [i for i in graph.nodes.sort_values("influence", ascending=False).id if "/F" in i]
        own = [features[k :: arguments.tabs][:4] for k in range(arguments.tabs)]
        with viewing(path, arguments.model) as (port, pid), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
            report(
                use_tabs(browser, f"http://127.0.0.1:{port}/?token={TOKEN}", own, arguments.requests, pid),
                own,
                replacement,
                graph,
            )
            browser.close()


@contextmanager
def viewing(path: Path, model: str) -> Iterator[tuple[int, int]]:
    """``tl-circuits view`` of a graph with its model, as a process of its own: its port and its process id."""
    port = free_port("127.0.0.1", 7960)
    server = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "tl-circuits"),
            "view",
            str(path),
            "--model",
            model,
            "--port",
            str(port),
            "--token",
            TOKEN,
        ]
    )
    try:
        wait_for(port)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait()


def wait_for(port: int) -> None:
    """Return when something listens on the port; raises TimeoutError after five minutes."""
    for _ in range(3000):
        if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in psutil.net_connections("tcp")):
            return
        time.sleep(0.1)
    raise TimeoutError("the server did not start")


def use_tabs(browser: Any, address: str, own: list[list[str]], requests: int, pid: int) -> dict[str, Any]:
    """Steer in every tab at once, in rounds; what came back, what went wrong, and the server's memory."""
    problems: list[str] = []
    pages = []
    for _ in own:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".unit.box")
        pages.append(page)
    for k, page in enumerate(pages):  # by hand, as it were
        page.locator(".unit.box").nth(k % page.locator(".unit.box").count()).click()
        page.locator("input.steer").fill("0")
    for page in pages:
        page.wait_for_selector(".result table", timeout=600_000)
    per_tab = -(-(requests - len(own)) // len(own))
    answers: list[tuple[int, float, float, Any]] = []
    process, memory = psutil.Process(pid), []
    rounds = 4
    for turn in range(rounds):
        count = per_tab * (turn + 1) // rounds - per_tab * turn // rounds
        factors = [(turn * count + n) % 9 / 4 - 1 for n in range(count)]
        for k, page in enumerate(pages):  # all start before any is waited for
            page.evaluate(f"(given) => {{ window.job = ({STEER})(given); }}", [own[k], factors])
        for k, page in enumerate(pages):
            answers += [(k, *row) for row in page.evaluate("() => window.job")]
        memory.append(process.memory_info().rss / 2**20)
    return {"problems": problems, "answers": answers, "memory": memory, "steered_by_hand": len(pages)}


def report(found: dict[str, Any], own: list[list[str]], replacement: Any, graph: Any) -> None:
    """Print what was found, each tab's last answer compared with the model asked directly."""
    answers = found["answers"]
    mixed = sum(result is None or result["nodes"] != own[k] for k, _, _, result in answers)
    last = {k: (factor, result) for k, factor, _, result in answers}
    wrong = 0
    for k, (factor, result) in last.items():
        (direct,) = measure_boxes(replacement, graph, [own[k]], factor)
        wrong += json.dumps(direct["top"]) != json.dumps(result["top"])
    times = sorted(t / 1000 for _, _, t, _ in answers)
    print(
        f"{len(own)} tabs, {found['steered_by_hand'] + len(answers)} steered runs: {len(found['problems'])} errors, "
        f"{mixed} answers of another tab"
    )
    print(f"answers that differ from the model asked alone: {wrong} of {len(last)}")
    print(f"a tab waits {statistics.median(times):.2f} s (longest {times[-1]:.2f}) with all tabs asking at once")
    print("server's memory after each quarter: " + ", ".join(f"{m:.0f} MB" for m in found["memory"]))


if __name__ == "__main__":
    main()
