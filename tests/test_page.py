"""The page in a real browser."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import tl_circuits as tlc
from tests.browser import NASTY, tab, wait_until
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.graph.nodes import Example, Label
from tl_circuits.graph.page_limits import MOST_NODES
from tl_circuits.neuronpedia.export import their_ids
from tl_circuits.view.bundle import script
from tl_circuits.view.page_data import MOST_LINKS, _strongest_links, packed_json, page_data
from tl_circuits.view.page_file import page_html
from tl_circuits.view.story import Arrow, Unit, _percent, _sentence, _told_ways, story_of, too_little


@pytest.fixture(scope="module")
def graph():
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        traced = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        return tlc.explain_heads(replacement, tlc.label_features(replacement, traced), 4)


@pytest.fixture(scope="module")
def file(graph, tmp_path_factory):
    found, chance = graph.supernodes().groups, last_boxes(graph)[0]
    ablations = [
        {
            "nodes": list(ids),
            "target": "w7",
            "predicted": -0.5,
            "measured": -0.4,
            "measured_free": -0.3,
            "freeze": "attention",
            "top": [{"token": NASTY, "before": 0.75, "after": 0.25}],
            "answer": "w7",
            "before": 0.75,
            "after": 0.25,
            "logit": -2.0,
            "random": [0.68, *[0.71] * 10, 0.74],
            "random_logits": [-0.1] * 12,
            "tested": set(ids) != chance,
        }
        for ids in [*(ids for _, ids in found), [node for _, ids in found for node in ids]]
    ]
    return graph.to_html(tmp_path_factory.mktemp("page") / "page.html", ablations=ablations).as_uri()


@pytest.fixture
def page(browser, file):
    with tab(browser, file) as opened:
        yield opened


def last_boxes(graph):
    """The ids of the last box of each sentence."""
    story = story_of(graph)
    return [{graph.node_ids[i] for i in story.units[way[-2]].members} for way in story.ways]


def box(page, n=0):
    return page.locator(".unit.box").nth(n)


def test_the_page_tells_the_story_it_was_given(page, graph):
    story = story_of(graph)
    assert page.inner_text("h1") == story.headline and story.headline.startswith("Why “w")
    told = [li.inner_text() for li in page.locator(".sentences li").all()]
    assert len(told) == len(story.sentences) == 2 and all(
        li.startswith(s) for li, s in zip(told, story.sentences, strict=True)
    )
    assert page.locator(".unit.box").count() == len(graph.supernodes().groups) <= 12
    assert page.locator(".unit.token").count() == 9
    first = graph.info.target_names[0]
    # named without a click
    chance = page.locator(".unit.target .name").first.text_content().removeprefix(f"“{first}” ")
    assert abs(float(chance.removesuffix(" %")) - 100 * graph.info.target_probabilities[0]) < 0.6


def test_a_sentence_says_whether_removing_its_last_box_does_more_than_removing_random_sets(
    browser, page, graph, tmp_path
):
    story = story_of(graph)
    lead, checks = page.inner_text(".tale > p"), page.locator(".sentences .check").all_inner_texts()
    # every box of the page was removed
    assert (
        lead == "What the replacement model says (tests remove the last box of each chain):"
        and len(checks) == len(story.ways) == 2
    )
    for n, check in enumerate(checks):
        assert check.strip().startswith("Last box tested: " if n else "Last box not told apart from chance: ")
        assert "without it, “w7” goes 75 % → 25 % in the model" in check
        assert "12 random sets of the same size: 75 % → 71 % (68 % to 74 %)" in check
    with tab(browser, graph.to_html(tmp_path / "page.html").as_uri()) as unmeasured:
        assert (
            unmeasured.inner_text(".tale > p")
            == "What the replacement model says (not tested yet: remove a box to see what the model does):"
        )
        assert [li.inner_text() for li in unmeasured.locator(".sentences li").all()] == list(story.sentences)
        last = story.units[story.ways[0][-2]]  # as a live model would give it
        unmeasured.evaluate(
            "(nodes) => tlc.keepMeasured({nodes, answer: 'w7', before: 0.5, after: 0.25})",
            [graph.node_ids[i] for i in last.members],
        )
        assert "Last box measured: without it, “w7” goes 50 % → 25 % in the model." in unmeasured.inner_text(
            ".sentences li"
        )


def test_what_the_model_does_without_all_boxes_stands_below_their_share(page, graph):
    value = story_of(graph).carried.value
    assert page.inner_text(".meter .check") == (
        f"In the model itself, it goes from {value:.3g} to {value - 0.3:.3g}, and “w7” goes 75 % → 25 %; "
        "12 random sets of the same size: 75 % → 71 % (68 % to 74 %)."
    )


def test_every_step_of_a_sentence_is_a_drawn_arrow_with_its_share(page, graph):
    story = story_of(graph)
    shares = {(arrow.source, arrow.target): arrow.share for arrow in story.arrows}
    for way, sentence in zip(story.ways, story.sentences, strict=True):
        for step in zip(way, way[1:], strict=False):
            of = "the answer" if story.units[step[1]].kind == "target" else "what reaches "
            assert f"{_percent(abs(shares[step]))} of {of}" in sentence
    drawn = page.evaluate(
        "() => tlc.scene.arrows.map(a => [tlc.scene.units[a.source].name, tlc.scene.units[a.target].name])"
    )
    for way in story.ways:
        assert all([story.units[s].name, story.units[t].name] in drawn for s, t in zip(way, way[1:], strict=False))


def test_no_sentence_is_told_if_boxes_carry_little(browser, tmp_path):
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=3, progress=False)
    story = story_of(graph)
    assert story.carried.share < 0.1 and story.sentences == ()
    assert "other prompts to compare with, transcoders instead of neurons or more nodes" in too_little(story, graph)
    with tab(browser, graph.to_html(tmp_path / "page.html").as_uri()) as page:
        assert page.inner_text(".tale").startswith("The boxes carry") and page.locator(".sentences").count() == 0


def test_the_page_shows_first_which_words_mattered(page, graph):
    frame = graph.words
    words = page.locator(".word")
    assert words.count() == len(frame) and frame.share.abs().sum() == pytest.approx(1.0)
    strongest = int(frame.share.abs().idxmax())
    bars = page.evaluate("() => [...document.querySelectorAll('.word-bar')].map(b => b.offsetHeight)")
    assert bars.index(max(bars)) == strongest
    assert (
        page.evaluate("document.querySelector('.words').compareDocumentPosition(document.querySelector('.sentences'))")
        == 4
    )
    words.nth(strongest).click()
    assert f"token@{int(frame.position[strongest])}" in page.inner_text(".card")


def test_what_raises_the_answer_is_told_first():
    """Even if what lowers it does more: the question is why."""
    kinds = ("token", "box", "box", "target")
    units = tuple(Unit(kind, str(i), "", (i,), 0.0, 1.0, 0.0) for i, kind in enumerate(kinds))
    arrows = (Arrow(0, 1, 1.0), Arrow(0, 2, 1.0), Arrow(1, 3, -0.9), Arrow(2, 3, 0.2))
    assert _told_ways(units, arrows) == ((0, 2, 3), (0, 1, 3))


def test_what_a_box_that_is_held_back_does_is_told_of_the_box_itself():
    drawn = (("token", "“a”"), ("box", "b"), ("box", "c"), ("target", "“d”"))
    units = tuple(Unit(kind, name, "", (i,), 0.0, 0.0, 1.0) for i, (kind, name) in enumerate(drawn))
    flows = torch.zeros(4, 4)
    flows[1, 0], flows[2, 1], flows[3, 2] = 0.5, -0.02, 0.5
    assert _sentence(units, flows, (0, 1, 2, 3)) == (
        "“a” activates [b] (1 feature; 50 % of what reaches it), which holds back [c] (1 feature; a weak step: 2.0 % "
        "of what reaches it); [c] would raise “d” (50 % of the answer)."
    )


def test_python_and_the_page_compute_the_same_arrows_and_meter(page, graph):
    story = story_of(graph)
    names = [unit.name for unit in story.units]
    ours = {(names[a.source], names[a.target]): a.share for a in story.arrows}
    scene = page.evaluate(
        "() => ({arrows: tlc.scene.arrows.map(a => [tlc.scene.units[a.source].name, tlc.scene.units[a.target].name, "
        "a.share]), meter: [...document.querySelectorAll('.influence .key')].map(k => k.textContent)})"
    )
    theirs = {(s, t): share for s, t, share in scene["arrows"]}
    assert theirs.keys() == ours.keys() != set()
    # Weights travel as float32, masses and influences with five digits.
    assert all(abs(theirs[pair] - ours[pair]) < 1e-4 for pair in ours)
    shown = float(scene["meter"][0].split()[0])
    assert abs(shown - 100 * story.meter.shown) < 0.6
    assert abs(story.meter.shown + story.meter.error + story.meter.hidden - 1) < 1e-9


def test_when_little_is_shown_the_page_says_so_first(page, graph):
    assert story_of(graph).carried.share < 0.5
    assert page.locator(".meter.few").inner_text().startswith("Less than half is explained")
    assert (
        page.evaluate("document.querySelector('.meter').compareDocumentPosition(document.querySelector('.sentences'))")
        == 4
    )


def test_errors_are_one_counted_band(page, graph):
    band = page.locator(".unit.errors")
    assert band.count() == 1 and f"{int(graph.is_kind('error').sum())} places" in band.text_content()
    page.locator(".unit").first.focus()
    page.keyboard.press("e")
    assert "What the features miss" in page.inner_text(".card h2")


# How many points of arrows, a pixel apart, lie inside a unit that the arrow neither leaves nor enters.
HIDDEN = """() => {
  const units = [...document.querySelectorAll(".story .unit")]
    .map((g) => [g.dataset.key, g.querySelector(".body").getBBox()]);
  let hidden = 0;
  for (const path of document.querySelectorAll(".story .hit")) {
    const others = units.filter(([key]) => key !== path.dataset.from && key !== path.dataset.to);
    const length = path.getTotalLength();
    for (let at = 0; at <= length; at += 1) {
      const { x, y } = path.getPointAtLength(at);
      hidden += others.some(([, b]) => x > b.x && x < b.x + b.width && y > b.y && y < b.y + b.height);
    }
  }
  return hidden;
}"""


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_no_arrow_runs_through_a_box_whatever_the_detail(browser, file, width, height):
    with tab(browser, file, width=width, height=height) as page:
        for level in range(int(page.locator(".detail input").get_attribute("max")) + 1):
            page.locator(".detail input").fill(str(level))
            assert page.locator(".story .hit").count() > 3 and page.evaluate(HIDDEN) == 0
            boxes = page.locator(".story .unit .body").evaluate_all(
                "(all) => all.map((one) => one.getBBox()).map((b) => [b.x, b.y, b.width, b.height])"
            )
            assert not any(
                x < p + w and p < x + wide and y < q + h and q < y + high
                for n, (x, y, wide, high) in enumerate(boxes)
                for p, q, w, h in boxes[:n]
            )


def test_the_whole_picture_is_on_the_first_screen_of_a_laptop(browser, file):
    with tab(browser, file, width=1440, height=900) as page:
        assert (
            page.evaluate(
                "Math.max(...[...document.querySelectorAll('.unit')].map((g) => g.getBoundingClientRect().bottom))"
            )
            < 900
        )
        assert page.locator(".sentences").bounding_box()["x"] > page.locator(".picture").bounding_box()["width"]
        page.locator(".unit.box").first.click()  # what is chosen comes first in the column beside the picture
        assert page.locator(".card").bounding_box()["y"] < page.locator(".told").bounding_box()["y"]


def test_a_box_expands_in_place_and_a_feature_shows_its_card(page, graph):
    key = next(k for k in range(12) if int(box(page, k).locator(".foot").nth(1).text_content()) > 1)
    before = page.locator(".unit.box").count()
    box(page, key).click()
    page.locator(".card").get_by_text("Expand").click()
    inside = page.locator(".unit.inside")
    assert inside.count() > 1 and page.locator(".unit.box").count() == before + inside.count() - 1
    inside.first.focus()
    inside.first.click()
    card = page.inner_text(".card")
    assert "How strongly it fires" in card and "Strongest inputs" in card and "Makes more likely" in card
    page.keyboard.press("Escape")
    assert page.locator(".unit.inside").count() == 0


def test_keys_group_rename_pin_and_undo_and_a_reload_finds_it(page):
    boxes = page.locator(".unit.box").count()
    box(page, 0).focus()
    page.keyboard.press(" ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    page.keyboard.press("g")
    assert page.locator(".unit.own").count() == 1 and page.locator(".unit.box").count() == boxes - 1
    page.keyboard.press("l")
    page.keyboard.type(NASTY)
    page.keyboard.press("Enter")
    assert NASTY in page.locator(".unit.own title").text_content()
    page.keyboard.press("p")
    page.reload()
    page.wait_for_selector(".unit.own")
    assert NASTY in page.locator(".unit.own title").text_content() and page.locator(".unit.own .pin").count() == 1
    with page.expect_download() as download:
        page.get_by_text("Save notes").click()
    notes = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert notes["groups"][0][0] == NASTY and set(notes["pins"]) == set(notes["groups"][0][1:])
    page.locator(".unit.own").click()
    page.locator(".card").get_by_text("Ungroup").click()
    assert page.locator(".unit.own").count() == 0
    page.keyboard.press("Control+z")
    assert page.locator(".unit.own").count() == 1


def test_every_key_of_the_help_works_and_the_help_lists_them(page):
    page.locator(".unit.box").first.focus()
    page.keyboard.press("?")
    listed = page.locator("dialog dt").all_inner_texts()
    for key in (
        "← →",
        "↑ ↓",
        "Enter",
        "Esc",
        "Space",
        "G",
        "L",
        "H",
        "P",
        "S",
        "E",
        "/",
        "+ −",
        "Shift ← → ↑ ↓",
        "1 2 3",
        "Ctrl Z",
        "?",
    ):
        assert key in listed
    assert "0 to fit" in page.inner_text("dialog")
    page.keyboard.press("Escape")

    def chosen():
        return page.evaluate("tlc.chosen?.key ?? null")

    page.locator(".unit.target").first.focus()
    page.keyboard.press("ArrowDown")
    below = chosen()
    page.keyboard.press("ArrowLeft")
    beside = chosen()
    page.keyboard.press("ArrowUp")
    assert None not in (below, beside, chosen()) and below != beside != chosen()
    wide = next(k for k in range(12) if int(box(page, k).locator(".foot").nth(1).text_content()) > 1)
    box(page, wide).focus()
    page.keyboard.press("Enter")
    assert page.locator(".unit.inside").count() > 1
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.locator(".unit.inside").count() == 0
    page.keyboard.press("Escape")
    assert chosen() is None
    box(page, 0).click(modifiers=["Shift"])
    assert page.locator(".unit.marked").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".unit.marked").count() == 0
    box(page, 0).click(modifiers=["Control"])
    assert page.locator(".unit .pin").count() == 1
    box(page, 0).click()
    page.keyboard.press("s")
    assert page.evaluate("document.activeElement.matches('button.remove')")
    for key, view in (("2", "nodes"), ("3", "table"), ("1", "story")):
        page.keyboard.press(key)
        assert page.get_attribute(f"button[data-view={view}]", "aria-pressed") == "true"


def test_the_key_for_steering_says_why_where_there_is_nothing_to_steer(browser, graph, tmp_path):
    # nothing was measured, and there is no model
    with tab(browser, graph.to_html(tmp_path / "bare.html").as_uri()) as page:

        def said():
            page.keyboard.press("s")
            return page.locator(".card .said").all_inner_texts()

        assert said() == said() == ["Choose a box first, then S steers it."]
        page.locator(".unit.target").first.click()
        assert said() == ["Only boxes of the story can be steered or removed here. Choose a box."]
        box(page).click()
        assert page.locator(".card .said").count() == 0
        (words,) = said()
        assert "has not been measured" in words and "tl-circuits view FILE --model NAME" in words


def test_undo_takes_back_only_what_this_tab_changed_and_tabs_keep_each_others_fields(browser, page, graph, file):
    with tab(browser, file, context=page.context) as other:
        page.evaluate("(id) => tlc.book.togglePins([id])", graph.node_ids[0])
        other.evaluate("(id) => tlc.book.nameNode(id, 'mine')", graph.node_ids[1])
        kept = f"JSON.parse(localStorage.getItem('tl_circuits:{graph.fingerprint}'))"
        assert page.evaluate(kept)["pins"] == [graph.node_ids[0]] and page.evaluate(kept)["names"] == {
            graph.node_ids[1]: "mine"
        }
        page.get_by_role("button", name="Undo").click()
        assert page.evaluate(kept)["pins"] == [] and page.evaluate(kept)["names"] == {graph.node_ids[1]: "mine"}
        assert page.get_by_role("button", name="Undo").count() == 0


def test_a_box_dropped_on_a_box_makes_a_group(page):
    page.evaluate("scrollTo(0, 300)")
    a, b = box(page, 0).locator(".body").bounding_box(), box(page, 1).locator(".body").bounding_box()
    page.mouse.move(a["x"] + 20, a["y"] + 20)
    page.mouse.down()
    page.mouse.move(b["x"] + 20, b["y"] + 20, steps=3)
    page.mouse.up()
    assert page.locator(".unit.own").count() == 1


def test_removing_a_box_works_offline(page):
    box(page, 2).click()
    page.locator("button.remove").click()
    result = page.inner_text(".result")
    assert "Measured in the model" in result and "75 %" in result and "25 %" in result
    assert "predicted −0.50, measured −0.40" in result and NASTY in result


def chosen_link(page, graph):
    """Opens the first link that has a story, from the card of its target; what Python knows of it."""
    story = graph.head_stories[0]
    page.evaluate("(id) => tlc.chooseNode(tlc.graph.indexOf.get(id))", story["target"])
    page.evaluate(
        "([s, t]) => tlc.chooseLink(tlc.graph.indexOf.get(s), tlc.graph.indexOf.get(t))",
        [story["source"], story["target"]],
    )
    return story


def test_a_link_says_which_heads_carried_it_and_why_they_looked(page, graph):
    story = chosen_link(page, graph)
    head, card = story["heads"][0], page.inner_text(".card")
    assert f"{story['source']} > {story['target']}" in card
    name = f"layer {head['layer']} head {head['head']}"
    first = page.locator(".carriers tbody tr", has=page.locator(f"th:text-is('{name}')")).inner_text()
    assert f"{abs(head['loading']):.3g}"[:4] in first and ("−" in first) == (head["loading"] < 0 or story["weight"] < 0)
    shares = [row.split("\t")[2] for row in page.inner_text(".carriers tbody").splitlines() if row.strip()]
    total = sum(float(s.replace("−", "-").removesuffix(" %")) for s in shares)
    assert abs(total - 100) < 5  # each is rounded; together they are the link
    assert f"Why {name} looks there" in card and f"{head['score']:.2f}".lstrip("-") in card
    for heading in ("What asks (query side)", "What answers (key side)", "Pairs that meet"):
        assert card.count(heading) == 2  # of the score, and of its difference to the next best position
    assert f"Why not at “{graph.info.tokens[head['baseline']['key']]}”" in card
    page.locator(".card .list button.row").first.click()  # a reason that is a node opens it
    assert "Which heads carried it" not in page.inner_text(".card")


def test_links_are_reached_by_key_by_table_and_by_arrow_and_escape_goes_back(page, graph):
    told = next(s for s in graph.head_stories if s["target"].startswith("logit"))
    page.evaluate("(id) => tlc.chooseNode(tlc.graph.indexOf.get(id))", told["target"])
    before = page.inner_text(".card h2")
    page.locator(".card .why").first.focus()
    page.keyboard.press("Enter")
    assert "Which heads carried it" in page.inner_text(".card") and page.evaluate("document.activeElement === tlc.card")
    page.keyboard.press("Escape")
    assert page.inner_text(".card h2") == before
    page.locator(".unit.target").first.focus()
    page.keyboard.press("h")
    one = page.inner_text(".card h2")
    page.keyboard.press("h")
    assert " → " in one and one != page.inner_text(".card h2")
    page.get_by_text("The picture as a table").click()
    rows = page.locator(".story details tbody button")
    assert rows.count() == page.evaluate("tlc.scene.arrows.length") and any(
        text.startswith("by ") for text in rows.all_inner_texts()
    )
    rows.nth(1).focus()
    page.keyboard.press("Enter")
    chosen = page.inner_text(".card h2")
    page.keyboard.press("Escape")
    from_, to = page.evaluate(
        "(() => { const a = tlc.scene.arrows[1]; return [tlc.scene.units[a.source].key, "
        "tlc.scene.units[a.target].key]; })()"
    )
    page.evaluate(
        "([f, t]) => [...document.querySelectorAll('.hit')].find(h => h.dataset.from === f && h.dataset.to === "
        "t).dispatchEvent(new MouseEvent('click', {bubbles: true}))",
        [from_, to],
    )
    assert page.inner_text(".card h2") == chosen


def test_a_link_without_a_story_says_how_to_get_one(page, graph):
    told = {(s["source"], s["target"]) for s in graph.head_stories}
    source, target = next(pair for pair in zip(graph.edges.source, graph.edges.target, strict=True) if pair not in told)
    page.evaluate("([s, t]) => tlc.chooseLink(tlc.graph.indexOf.get(s), tlc.graph.indexOf.get(t))", [source, target])
    assert "trace --heads" in page.inner_text(".card")


def test_search_table_and_csv(page, graph):
    page.keyboard.press("/")
    page.keyboard.type("L1/F")
    assert page.locator(".table tbody tr").count() == sum(i.startswith("L1/F") for i in graph.node_ids)
    with page.expect_download() as download:
        page.get_by_text("Download CSV").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))
    assert {r["id"] for r in rows} == {i for i in graph.node_ids if i.startswith("L1/F")}


def test_all_nodes_can_be_clicked_zoomed_and_walked(page, graph):
    page.locator("button[data-view=nodes]").click()
    wait_until(page, "tlc.nodesView.painted")
    row = graph.nodes[graph.nodes.kind == "feature"].sort_values("influence").iloc[-1]
    x, y = page.evaluate("(i) => [tlc.nodesView.x[i], tlc.nodesView.y[i]]", int(row.name))
    page.locator("canvas").click(position={"x": x, "y": y})
    assert row.id in page.inner_text(".card")
    page.locator("canvas").focus()
    page.keyboard.press("ArrowUp")
    assert row.id not in page.inner_text(".card .soft >> nth=0")
    page.mouse.wheel(0, -300)
    page.keyboard.press("+")
    assert page.evaluate("tlc.nodesView.zoom.k") > 1.3
    left = page.evaluate("tlc.nodesView.zoom.x")
    page.keyboard.press("Shift+ArrowLeft" if left < 0 else "Shift+ArrowRight")
    assert page.evaluate("tlc.nodesView.zoom.x") != left
    page.evaluate("tlc.nodesView.zoomBy(8, 0, 0)")
    for i in (int(row.name), len(graph) - 1):  # what is chosen comes into sight
        page.evaluate("(i) => tlc.chooseNode(i)", i)
        x, y = page.evaluate(
            "(i) => { const v = tlc.nodesView, {x, y, k} = v.zoom; return [(x + k * v.x[i]) / v.wide, (y + k * "
            "v.y[i]) / v.high]; }",
            i,
        )
        assert 0 < x < 1 and 0 < y < 1
    page.keyboard.press("0")
    assert page.evaluate("tlc.nodesView.zoom.k") == 1


def test_the_slider_changes_how_many_boxes(page):
    usual = page.locator(".unit.box").count()
    page.locator(".detail input").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".unit.box").count() <= 6 < usual


def test_markup_in_labels_stays_text(browser, graph, tmp_path):
    strongest = graph.node_ids.index(graph.supernodes().groups[0][1][0])
    texts = (Example((NASTY, "y" * 10_000, " on"), (0.5, 2.5, 0.0)), Example((" off", NASTY), (-1.0, 0.0)))
    nasty = Label(NASTY + "x" * 10_000, (NASTY,), (NASTY,), (NASTY,), origin=NASTY, examples=texts)
    blank = Label("say “\n”, “ ”", ("\n", " "), ("x",), ("y",))
    second = [graph.node_ids.index(i) for i in graph.supernodes().groups[1][1]]
    shown = replace(
        graph,
        labels=graph.labels | dict.fromkeys(second, blank) | {strongest: nasty},
        info=replace(graph.info, prompt=NASTY),
    )
    with tab(browser, shown.to_html(tmp_path / "page.html").as_uri()) as page:
        assert NASTY in page.inner_text(".prompt") and page.locator("img").count() == 0
        page.evaluate("(i) => tlc.chooseNode(i)", strongest)
        assert NASTY in page.inner_text(".card h2")
        page.evaluate("(i) => tlc.chooseNode(i)", second[0])
        assert page.inner_text(".card h2") == "say “⏎”, “␣”"
        assert page.locator(".unit title", has_text="say “⏎”, “␣”").count() == 1  # the box that Python named
        page.evaluate("(i) => tlc.chooseNode(i)", strongest)
        first, second = page.locator(".card .example").all()
        assert (
            first.locator(".lit.d1").text_content() == NASTY
            and second.locator(".lit.d2.minus").text_content() == " off"
        )
        assert first.locator("strong.lit.d5").text_content().startswith("yyy") and len(first.text_content()) < 200
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        inside = """() => [...document.querySelectorAll('.unit')].filter((unit) => {
          const body = unit.querySelector('.body').getBBox(), badge = unit.querySelector('.badge')?.getBBox();
          const boxes = (selector) => [...unit.querySelectorAll(selector)].map((t) => t.getBBox());
          return boxes('text').some((t) => t.x + t.width > body.x + body.width || t.x < body.x)
            || (badge && boxes('.name').some((t) => t.y < badge.y + badge.height - 4 && t.x + t.width > badge.x));
        }).map((unit) => unit.textContent.slice(0, 60))"""
        assert page.evaluate(inside) == []  # names neither leave their boxes nor lie under the counts
        page.set_viewport_size({"width": 390, "height": 844})
        wait_until(page, "tlc.width < 390")
        assert page.evaluate(inside) == []
        page.locator(".unit.box").first.click()
        page.evaluate("scrollTo(0, 0)")
        assert page.locator(".card").bounding_box()["y"] + 60 < 844  # what was tapped is told without scrolling
        page.get_by_label("Close this card").click()
        assert "How to read this" in page.inner_text(".card")


def test_a_graph_without_labels_errors_or_a_token_as_target_is_shown(browser, tmp_path):
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        layer, feature = 1, 5
        graph = tlc.attribute(
            replacement, prompt(12), [tlc.FeatureTarget(layer, 8, feature)], max_nodes=1500, progress=False
        )
    with tab(browser, graph.to_html(tmp_path / "page.html").as_uri(), width=390, height=844) as page:
        assert page.inner_text("h1").startswith("Why")
        assert page.locator(".unit.errors").count() == 0 and page.locator(".unit.target").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_notes_kept_for_another_graph_are_offered_not_applied(browser, graph, file):
    with tab(browser, file) as page:
        kept = {
            "version": 1,
            "graph": "other",
            "pins": [graph.node_ids[0]],
            "groups": [],
            "names": {"gone": "x"},
            "text": "",
        }
        page.evaluate(
            "([hash, kept]) => localStorage.setItem(`tl_circuits:${hash}`, JSON.stringify(kept))",
            [graph.fingerprint, kept],
        )
        page.reload()
        page.wait_for_selector("p.warning:not([hidden])")
        assert page.evaluate("tlc.notes.pins") == []
        page.get_by_text("Use what fits").click()
        assert page.evaluate("tlc.notes.pins") == [graph.node_ids[0]]


def test_axe_finds_no_serious_violation(page, graph):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    for view, scheme in (("story", "light"), ("nodes", "light"), ("table", "dark"), ("story", "dark")):
        page.emulate_media(color_scheme=scheme)
        page.locator(f"button[data-view={view}]").click()
        found = [v for v in axe.run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found] == []
        chosen_link(page, graph)


def test_a_browser_without_decompression_gets_a_sentence(browser, file):
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(file)
    wait_until(page, "document.getElementById('graph').textContent.includes('DecompressionStream')")
    page.close()


def test_the_policy_allows_nothing_from_outside(graph):
    text = page_html(graph)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert policy.startswith("default-src &#x27;none&#x27;") and "unsafe" not in policy
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("entry", ["file.js", "served.js", "widget.js"])
def test_the_modules_share_one_scope_without_clashing(entry):
    names = re.findall(r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+)", script(entry), re.M)
    listed = re.findall(r"^(?:export )?const (\w+ = .*);", script(entry), re.M)
    names += [name for line in listed for name in re.findall(r", ([A-Z_]{3,}) =", line)]
    assert len(names) == len(set(names)) and not re.search(r"^import ", script(entry), re.M)


def test_the_share_of_links_that_a_page_holds_is_that_of_their_influence(graph, monkeypatch):
    monkeypatch.setattr("tl_circuits.view.page_data.MOST_LINKS", 100)
    kept, share = _strongest_links(graph, [])
    edges = graph.edges
    size = edges.weight.abs()
    flow = size / size.groupby(edges.target).transform("sum") * edges.target.map(graph.nodes.set_index("id").influence)
    assert len(kept) == 100 < len(edges) and share == pytest.approx(
        flow.iloc[kept.tolist()].sum() / flow.sum(), rel=1e-5
    )


def test_a_large_graph_is_cut_to_what_a_page_can_hold():
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(31), max_nodes=3600, progress=False)
    data = page_data(graph)
    assert len(data["nodes"]["kind"]) <= MOST_NODES < len(graph) and data["links_traced"] > MOST_LINKS
    assert 0.5 < data["links_share"] < 1 and packed_json(data) == packed_json(page_data(graph))


def merged_scores(content, pinned):
    """Scores of pinned nodes from an exported file, dense: other features' outputs go into the error of their place."""
    rank = {"embedding": 2, "logit": 3, "mlp reconstruction error": 1}
    nodes = sorted(content["nodes"], key=lambda n: rank.get(n["feature_type"], 0))
    at = {n["node_id"]: i for i, n in enumerate(nodes)}
    matrix = np.zeros((len(nodes), len(nodes)))
    for link in content["links"]:
        matrix[at[link["target"]], at[link["source"]]] = link["weight"]
    kinds = np.array([rank.get(n["feature_type"], 0) for n in nodes])
    errors = {(n["layer"], n["ctx_idx"]): i for i, n in enumerate(nodes) if kinds[i] == 1}
    for i, node in enumerate(nodes):
        if kinds[i] == 0 and node["node_id"] not in pinned:
            if (node["layer"], node["ctx_idx"]) in errors:
                matrix[:, errors[node["layer"], node["ctx_idx"]]] += matrix[:, i]
            matrix[i], matrix[:, i] = 0, 0
    shares = np.abs(matrix) / np.maximum(np.abs(matrix).sum(1, keepdims=True), 1e-10)
    weights = np.array([n.get("token_prob", 0) if k == 3 else 0 for n, k in zip(nodes, kinds, strict=True)])
    reach = weights @ (np.linalg.inv(np.eye(len(nodes)) - shares) - np.eye(len(nodes)))
    tokens, lost = reach[kinds == 2].sum(), reach[kinds == 1].sum()
    output = reach + weights
    return tokens / (tokens + lost), ((1 - shares[:, kinds == 1].sum(1)) * output).sum() / output.sum()


def test_scores_of_what_is_pinned_are_those_of_an_exported_file_in_python_and_in_the_page(page, graph, tmp_path):
    pins = [i for i in graph.node_ids if "/F" in i][::3]
    exported = json.loads(graph.to_neuronpedia(tmp_path / "g.json", slug="s", scan="m").read_bytes())
    theirs = dict(zip(graph.node_ids, their_ids(graph), strict=True))
    wanted = merged_scores(exported, {theirs[i] for i in pins})
    found = graph.scores(pins)
    assert (found.replacement, found.completeness) == pytest.approx(wanted, abs=1e-6)
    assert graph.scores([i for i in graph.node_ids if "/F" in i]) == graph.scores()
    page.evaluate("(ids) => tlc.book.togglePins(ids)", pins)
    line = page.inner_text(".pinned-scores")
    shown = [float(number) for number in re.findall(r"([\d.]+) %", line)]
    assert shown == pytest.approx([100 * value for value in wanted], abs=0.6)
