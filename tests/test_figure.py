"""Figures without a browser, and the notebook widget without a notebook."""

import re
import warnings

import pytest

import tl_circuits as tlc
from tests.browser import NASTY
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.errors import OutputError
from tl_circuits.view.figure import WIDE, _places, plural, small_print
from tl_circuits.view.routes import routes
from tl_circuits.view.story import story_of

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def traced():
    model = tiny_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        boxes = tlc.box_ablations(replacement, graph)
        result = tlc.intervene(replacement, prompt(), tlc.edits_of(graph, boxes[0]["nodes"]))
    return graph.group(NASTY + "$x^2$", graph.supernodes().groups[0][1]), boxes, result


def test_the_story_is_drawn_in_every_format_the_same_each_time(traced, tmp_path):
    graph, _, result = traced
    for ending, magic in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        path = graph.plot(tmp_path / f"story{ending}")
        first = path.read_bytes()
        assert first.startswith(magic)
        assert graph.plot(path, overwrite=True).read_bytes() == first
        assert result.plot(tmp_path / f"bars{ending}").read_bytes().startswith(magic)
    with pytest.raises(OutputError, match="exists"):
        graph.plot(tmp_path / "story.svg")
    with pytest.raises(OutputError, match=r"\.svg, \.png, \.pdf"):
        graph.plot(tmp_path / "story.gif")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == sorted([".svg", ".png", ".pdf"] * 2)


def test_arrows_of_a_figure_run_through_no_box_and_end_side_by_side(traced):
    graph, *_ = traced
    story = story_of(graph)
    places, _ = _places(story)
    ends = [(places[arrow.source], places[arrow.target]) for arrow in story.arrows]
    assert len(ends) > 8
    entered = []
    for (source, target), points in zip(ends, routes(ends, places, WIDE), strict=True):
        assert (
            source[0] <= points[0][0] <= source[0] + source[2] and target[0] <= points[-1][0] <= target[0] + target[2]
        )
        entered.append(points[-1])
        for (xa, ya), (xb, yb) in zip(points[1:-1:2], points[2:-1:2], strict=True):  # through the gaps: straight up
            assert xa == xb
            for x, y, wide, high in places:
                assert not (x < xa < x + wide and min(ya, yb) < y + high and y < max(ya, yb))
        for (_, ya), (_, yb) in zip(points[::2], points[1::2], strict=True):  # between the rows: nothing stands there
            assert ya == yb or not any(min(ya, yb) < y + high and y < max(ya, yb) for _, y, _, high in places)
    assert len(set(entered)) == len(entered)


def test_an_arrow_passes_a_row_by_the_gap_on_its_way_and_goes_round_a_box_in_its_own_row():
    low, left, middle, right, top = (
        (0.0, 0.0, 2.0, 0.5),
        (0.5, 1.0, 2.0, 0.5),
        (3.0, 1.0, 2.0, 0.5),
        (7.0, 1.0, 2.0, 0.5),
        (1.0, 2.0, 1.0, 0.5),
    )
    places = [low, left, middle, right, top]
    (up,), (down,), (beside,), (over,) = (
        routes([ends], places, 10.0) for ends in ((low, top), (top, low), (left, middle), (left, right))
    )
    # the nearest gap's edge
    assert up[0] == (1.0, 0.5) and up[-1] == (1.5, 2.0) and up[1][0] == up[2][0] == pytest.approx(0.46)
    assert [y for _, y in up[1:-1]] == [1.0, 1.5] and [y for _, y in down] == [2.0, 1.5, 1.0, 0.5]
    assert beside == [(2.5, 1.25), (3.0, 1.25)] and over == [(1.5, 1.5), (8.0, 1.5)]
    three = routes([(low, top)] * 3, places, 10.0)
    assert len({points[1][0] for points in three}) == 3  # side by side in the gap


def test_without_a_path_a_plot_is_a_picture_that_a_notebook_shows(traced):
    graph, _, result = traced
    for thing in (graph, result):
        picture = thing.plot()
        assert picture._repr_png_().startswith(b"\x89PNG") and picture == thing.plot()
        assert repr(picture) == "Picture()"


def font_of(characters, name, path):
    """A font file in which each character is a triangle."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for k, point in enumerate(((0, 0), (500, 800), (900, 0))):
        (pen.lineTo if k else pen.moveTo)(point)
    pen.closePath()
    glyphs = [".notdef", *(f"u{ord(c):04x}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): f"u{ord(c):04x}" for c in characters})
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)
    return path


def test_characters_that_the_usual_font_lacks_get_a_font_that_has_them_or_one_warning_in_words(
    traced, tmp_path, monkeypatch
):
    from matplotlib import font_manager

    from tl_circuits.support.fonts import MOST_QUOTED, OWN_FONT

    own = [e for e in font_manager.fontManager.ttflist if e.name == OWN_FONT]  # a computer with no other font
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    system = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: system)
    graph = traced[0].group("東京の都", traced[0].groups[0][1])
    with pytest.warns(
        UserWarning, match="no font of this computer has the characters “の”, “京”, “東”, “都”.*fonts-noto-cjk"
    ) as told:
        boxes = graph.plot().png
    assert len(told) == 1 and " more" not in str(told[0].message)
    many = traced[0].group("".join(map(chr, range(0x3042, 0x3042 + MOST_QUOTED + 3))), traced[0].groups[0][1])
    with pytest.warns(UserWarning, match="“い”.* and 3 more, so the figure"):
        many.plot()
    system.append(str(font_of("東京の都", "Triangles", tmp_path / "triangles.ttf")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph.plot().png != boxes
        graph.plot(tmp_path / "a.svg")


def test_control_characters_leave_an_svg_that_any_reader_of_xml_opens(traced, tmp_path):
    from xml.dom.minidom import parse

    graph = traced[0].group("a\x1b[31mb\x00\ufffe", traced[0].groups[0][1])
    assert parse(str(graph.plot(tmp_path / "a.svg"))).documentElement.tagName == "svg"


def test_one_is_counted_as_one():
    assert [plural(n, "feature") for n in (0, 1, 2)] == ["0 features", "1 feature", "2 features"]


def test_the_small_print_fits_the_width_of_the_figure():
    from matplotlib.textpath import TextPath

    line = (
        "Less than half is explained by this picture. The boxes carry 32 % of the answer: without them, its lead "
        "over what the others give goes from 12.5 to 8.51 in the replacement model. 2.9 % of the influence starts in "
        "MLP output that the features miss."
    )
    for text in (line, line[:120]):
        assert TextPath((0, 0), text, size=small_print(text)).get_extents().width < 72 * (WIDE - 0.3)


def test_box_ablations_say_what_the_model_does(traced):
    graph, boxes, _ = traced
    levels = [[ids for _, ids in graph.ungroup(graph.groups[0][0]).supernodes(most).groups] for most in (6, 12, 20)]
    # and all together
    sets = {frozenset(ids) for level in levels for ids in (*level, [node for one in level for node in one])}
    assert {frozenset(b["nodes"]) for b in boxes} == sets
    for box in boxes:
        assert box["target"] == graph.info.target_names[0] and box["measured"] != 0
        assert box["top"] and all(0 <= t["before"] <= 1 and 0 <= t["after"] <= 1 for t in box["top"])
    predicted, measured = ([b[k] for b in boxes] for k in ("predicted", "measured"))
    assert sum(p * m > 0 for p, m in zip(predicted, measured, strict=True)) > len(boxes) / 2


def test_the_widget_shares_notes_and_selection_with_python(traced, browser, tmp_path):
    pytest.importorskip("anywidget")
    graph, _, _ = traced
    widget = tlc.Widget(graph)
    assert widget.graph.notes == graph.notes
    widget.groups = []
    widget.pins = [graph.node_ids[0]]
    assert widget.graph.pins == graph.node_ids[:1] and widget.graph.groups == ()
    widget.pins = ["nope"]
    with pytest.raises(ValueError, match="no node 'nope'"):
        _ = widget.graph
    # The widget's own script in a browser, with a stand-in for the notebook's model.
    page = browser.new_page(viewport={"width": 900, "height": 700})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.route("http://notebook.test/*", lambda route: route.fulfill(
        body=widget._esm if route.request.url.endswith(".js") else "<!doctype html><body><div id=cell></div>",
        content_type="text/javascript" if route.request.url.endswith(".js") else "text/html",
    ))  # fmt: skip
    page.goto("http://notebook.test/")
    state = {"_data": widget._data, "groups": [], "pins": [], "names": {}, "text": "", "selection": []}
    page.evaluate(
        """async (state) => {
          const events = {};
          window.model = { get: (k) => state[k], save_changes() {}, off() {},
            set: (k, v) => { state[k] = v; for (const f of events[`change:${k}`] ?? []) f(); },
            on: (k, f) => { (events[k] ??= []).push(f); } };
          const widget = await import("./widget.js");
          await widget.default.render({ model, el: document.getElementById("cell") });
        }""",
        state,
    )
    page.wait_for_selector(".unit.box")
    page.locator(".unit.box").first.click()
    chosen = page.evaluate("model.get('selection')")
    assert chosen and set(chosen) <= set(graph.node_ids)
    page.keyboard.press("p")
    assert page.evaluate("model.get('pins')") == chosen
    page.evaluate("(ids) => model.set('groups', [['from Python', ...ids]])", chosen)
    assert page.locator(".unit.own").count() == 1
    page.evaluate("(ids) => model.set('selection', ids)", [graph.node_ids[1]])
    assert graph.node_ids[1] in page.inner_text(".card") and page.evaluate("model.get('selection')") == [
        graph.node_ids[1]
    ]
    assert not re.search(r"(?<![.\w-])(body|html)\b", widget._css) and problems == []  # the notebook's own look stays
    page.close()
