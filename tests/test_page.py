"""The page in a real browser."""

import json
import re
from dataclasses import replace

import pytest

import tl_circuits as tlc
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.graph.graph import Label
from tl_circuits.view.page_data import MOST_FEATURES, page_data
from tl_circuits.view.page_file import page_html

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NASTY = "</script><img src=x onerror=alert(1)>&\"'‏שלום"


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        traced = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        return tlc.label_features(replacement, traced)


@pytest.fixture(scope="module")
def browser(chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, graph, tmp_path):
    nasty = Label(NASTY + "x" * 10_000, (NASTY,), (NASTY,), (NASTY,))
    shown = replace(graph, labels=graph.labels | {0: nasty}, info=replace(graph.info, prompt=NASTY))
    path = shown.to_html(tmp_path / "page.html")
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.problems, tab.requests = [], []
    tab.on("console", lambda message: tab.problems.append(message.text))
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto(path.as_uri())
    yield tab
    assert tab.problems == []
    assert tab.requests == [path.as_uri()]  # nothing but the file itself
    tab.close()


def test_the_page_asks_the_question_and_draws_every_node(page, graph):
    assert page.inner_text("h1").startswith("Why “w") and "%" in page.inner_text("h1")
    assert page.locator("svg .node").count() == len(graph)
    assert page.locator("svg .link").count() > 10
    assert page.locator(".story li").count() == 3


def test_a_click_shows_label_inputs_and_outputs(page, graph):
    row = graph.nodes[graph.nodes.kind == "feature"].sort_values("influence").iloc[-1]
    page.locator(f'[data-id="{row.id}"]').click(force=True)
    card = page.inner_text(".card")
    assert row.id in card and "Strongest inputs" in card and "Promotes" in card
    weights = graph.edges[graph.edges.target == row.id].weight
    assert f"{weights.abs().max() / (weights.abs().sum() + graph._nodes.residue_mass[row.name]):.1%}".replace("%", " %") in card
    page.locator(".list button").first.click()
    assert row.id not in page.inner_text(".card .soft >> nth=0")


def test_keys_do_what_the_mouse_does(page):
    page.locator("svg .node").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("svg .node.chosen").count() == 1
    first = page.inner_text(".card h2 >> nth=0")
    page.keyboard.press("ArrowUp")
    assert page.inner_text(".card h2 >> nth=0") != first
    page.keyboard.press("Escape")
    assert page.locator("svg .node.chosen").count() == 0


def test_markup_in_labels_stays_text(page, graph):
    page.locator(f'[data-id="{graph.node_ids[0]}"]').click(force=True)
    assert NASTY in page.inner_text(".card h2 >> nth=0")
    assert page.locator("img").count() == 0
    assert NASTY in page.inner_text(".prompt")


def test_a_narrow_screen_keeps_everything_inside(browser, graph, tmp_path):
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto(graph.to_html(tmp_path / "narrow.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.close()


def test_the_policy_allows_nothing_from_outside(graph):
    text = page_html(graph)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert policy.startswith("default-src &#x27;none&#x27;") and "unsafe" not in policy
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))


def test_a_large_graph_is_pruned_to_what_can_be_looked_at():
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(12), max_nodes=1500, progress=False)
    data = page_data(graph)
    assert data["features_traced"] > MOST_FEATURES >= data["features_shown"] > 0
    assert all(0 <= s < len(data["nodes"]) and 0 <= t < len(data["nodes"]) for s, t, _, _ in data["links"])
