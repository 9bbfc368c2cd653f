"""Draws every figure of the README and the documentation again: ``python -m docs.make.figures`` (``make docs``)."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import tl_circuits as tlc
from docs.make.chromium import chromium
from tl_circuits.cli.state_swap import StateSwap, swap_state

FOLDER = Path(__file__).resolve().parents[1] / "images"
QUESTION = ("Lubbock", "California")
COUNTRIES = ("Germany", "Italy", "Japan", "China", "Greece")
logger = logging.getLogger("figures")


def story() -> StateSwap:
    """The story that most figures tell: the built-in model on a two-hop question."""
    with tlc.attach(tlc.load_model("tiny-facts", device="cpu"), tlc.load_transcoders("tiny-facts")) as replacement:
        return swap_state(replacement, *QUESTION)


def draw_story(told: StateSwap, folder: Path) -> None:
    """The figures that need neither a browser nor another model."""
    told.graph.plot(folder / "two-hop.svg", overwrite=True)
    told.swapped.plot(folder / "swap.svg", overwrite=True)


def draw_faithfulness(told: StateSwap, folder: Path) -> None:
    """Predicted against measured effects of removing nodes, under the three ways of freezing."""
    with tlc.attach(told.without.model, tlc.load_transcoders("tiny-facts")) as replacement:
        graph = tlc.attribute(replacement, told.graph.info.prompt, progress=False)
        tlc.faithfulness(replacement, graph, n=40).plot(folder / "faithfulness.png")


def screenshot(graph: tlc.AttributionGraph, path: Path, removed: list[dict[str, Any]] | None = None) -> None:
    """What a browser shows of the graph's page; ``removed``: what removing its boxes did."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 808})
        page.goto(graph.to_html(Path(home, "page.html"), ablations=removed).as_uri())
        page.wait_for_selector(".tlc svg .unit")
        page.screenshot(path=path)
        browser.close()


def draw_page(told: StateSwap, folder: Path) -> None:
    """The page of the same graph."""
    screenshot(told.graph, folder / "page.png")


def draw_capital(_: StateSwap, folder: Path) -> None:
    """The README's picture: the page of SmolLM2 through its MLP neurons, against other countries."""
    model = tlc.load_model("smollm2-135m", device="cpu")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        others = [f"The capital of {country} is" for country in COUNTRIES]
        graph = tlc.attribute(replacement, "The capital of France is", baseline=others, max_nodes=1000, progress=False)
        graph = tlc.name_features(replacement, graph, progress=False)
        removed = tlc.box_ablations(replacement, graph, controls=20, progress=False)
    screenshot(graph, folder / "capital.png", removed)


EARLIER = ("capital-before.png",)
"""Kept as an earlier version drew it, for docs/pictures.md."""

FIGURES = {
    "two-hop.svg": draw_story,
    "swap.svg": draw_story,
    "faithfulness.png": draw_faithfulness,
    "page.png": draw_page,
    "capital.png": draw_capital,
}


def main() -> None:
    told = story()
    for draw in dict.fromkeys(FIGURES.values()):
        draw(told, FOLDER)
        logger.info("drawn: %s", ", ".join(name for name, by in FIGURES.items() if by is draw))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
