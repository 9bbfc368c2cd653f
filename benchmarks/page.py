"""How large the page of a large graph is and how fast it answers, in headless Chromium.

``python -m benchmarks.page`` prints the figures; the limits are those the page was designed for.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from docs.make.chromium import chromium
from tests.browser import wait_until
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import GraphInfo, Label, Nodes
from tl_circuits.graph.scores import Edges

FEATURES, TOKENS, LOGITS, LAYERS, LINKS = 1960, 24, 16, 26, 60_000
FLAGS = ["--no-sandbox", "--disable-gpu"]


def large_graph() -> AttributionGraph:
    """2,000 nodes and 60,000 links with labels of the usual length."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([0] * FEATURES + [2] * TOKENS + [3] * LOGITS)
    n = len(kind)
    layer = torch.randint(0, LAYERS, (n,), generator=generator)
    layer[kind == 2], layer[kind == 3] = -1, LAYERS
    position = torch.randint(0, TOKENS, (n,), generator=generator)
    position[kind == 2], position[kind == 3] = torch.arange(TOKENS), TOKENS - 1
    pairs = torch.randint(0, n, (2, 40 * LINKS), generator=generator)
    pairs = pairs[:, (layer[pairs[0]] < layer[pairs[1]]) & (position[pairs[0]] <= position[pairs[1]])]
    pairs = torch.unique(pairs.flip(0), dim=1)  # by target, then source
    chosen = torch.randperm(pairs.shape[1], generator=generator)[:LINKS].sort().values
    target, source = pairs[:, chosen]
    weight = torch.randn(LINKS, generator=generator)
    weight = weight * weight.abs() ** 2
    zeros = torch.zeros(n)
    targets = torch.where(kind == 3, 1.0 / LOGITS, 0.0)
    value = torch.full((n,), float("nan"))
    nodes = Nodes(
        kind, layer, position, torch.arange(n), torch.rand(n, generator=generator), value, zeros, zeros, zeros, targets
    )
    words = tuple(f" word{i}" for i in range(TOKENS))
    info = GraphInfo(
        "".join(words), tuple(range(TOKENS)), words, words[:LOGITS], (1.0 / LOGITS,) * LOGITS, "made up", "made up",
        LAYERS, True, "linear", FEATURES, 10 * FEATURES, "0",
    )  # fmt: skip
    labels = {
        i: Label(f"say “ word{i}”, “ other{i}”", *(tuple(f" {w}{i}" for w in "abcde") for _ in range(3)))
        for i in range(FEATURES)
    }
    return AttributionGraph(info, nodes, Edges(source, target, weight), labels)


def main() -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        start = time.perf_counter()
        path = large_graph().to_html(Path(home) / "page.html")
        print(f"written in {time.perf_counter() - start:.1f} s")
        print(f"size: {path.stat().st_size / 1e6:.2f} MB (at most 1.2)")
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        page.goto(path.as_uri())
        page.wait_for_selector(".unit.box")
        paints = []
        for _ in range(5):
            page.reload()
            page.wait_for_selector(".unit.box")
            ready = page.evaluate("performance.now()")
            page.wait_for_timeout(200)
            first = page.evaluate(
                "performance.getEntriesByType('paint').find(e => e.name === 'first-contentful-paint').startTime"
            )
            paints.append((first, ready))
        print(
            f"first paint: {statistics.median(p[0] for p in paints):.0f} ms (at most 1000); the story is there after "
            f"{statistics.median(p[1] for p in paints):.0f} ms"
        )
        usual, most = page.evaluate(CLICKS)
        print(f"click on a box to picture and card drawn: {usual:.0f} ms, slowest: {most:.0f} ms (at most 50)")
        page.locator("button[data-view=nodes]").click()
        wait_until(page, "tlc.nodesView.painted")
        usual, most = page.evaluate(NODE_CLICKS)
        print(f"click on a node among all to drawn: {usual:.0f} ms, slowest: {most:.0f} ms (at most 50)")
        for name, step in (
            ("pan", "v.move({ k: 3, x: -300 - 5 * (i % 90), y: -300 })"),
            ("zoom", "v.zoomBy(i % 60 < 30 ? 1.03 : 1 / 1.03, 500, 300)"),
        ):
            print(f"{name}: {page.evaluate(FRAMES % step):.0f} frames a second (at least 45)")
        browser.close()


CLICKS = """async () => {
  const boxes = [...document.querySelectorAll('.unit.box')].slice(0, 12);
  const times = [];
  for (const box of boxes) {
    const start = performance.now();
    box.dispatchEvent(new MouseEvent('click', { bubbles: true }));
    document.body.getBoundingClientRect();  // layout is done
    times.push(performance.now() - start);
    await new Promise((done) => setTimeout(done, 50));
  }
  times.sort((a, b) => a - b);
  return [times[times.length >> 1], times.at(-1)];
}"""
NODE_CLICKS = """async () => {
  const times = [];
  for (let i = 0; i < 12; i += 1) {
    const start = performance.now();
    tlc.chooseNode(100 + 60 * i);
    document.body.getBoundingClientRect();
    tlc.nodesView.canvas.getContext('2d').getImageData(0, 0, 1, 1);  // the canvas is painted
    times.push(performance.now() - start);
    await new Promise((done) => setTimeout(done, 50));
  }
  times.sort((a, b) => a - b);
  return [times[times.length >> 1], times.at(-1)];
}"""
FRAMES = """async () => {
  const v = tlc.nodesView;
  v.zoomBy(1.5);
  await new Promise((done) => setTimeout(done, 600));
  const start = performance.now();
  for (let i = 0; i < 120; i += 1) { %s; await new Promise(requestAnimationFrame); }
  return 120000 / (performance.now() - start);
}"""

if __name__ == "__main__":
    main()
