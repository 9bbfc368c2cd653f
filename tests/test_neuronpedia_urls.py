"""Graph URLs: read whatever the site writes, write what it reads."""

from urllib.parse import parse_qs, urlsplit

import pytest

import tl_circuits as tlc
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.errors import ExportError, NeuronpediaError
from tl_circuits.neuronpedia.ids import Place, cantor_pair

# As Neuronpedia's own first-steps page links to it, shortened.
AUSTIN = (
    "https://www.neuronpedia.org/gemma-2-2b/graph?slug=gemma-fact-dallas-austin&pruningThreshold=0.6&pinnedIds="
    "27_22605_10%2C20_15589_10%2CE_26865_9%2C14_2268_9%2C20_15589_9%2C15_4494_4%2C6_4662_4&supernodes=%5B%5B%22capital%22%2C"
    "%2215_4494_4%22%2C%226_4662_4%22%5D%2C%5B%22Texas%22%2C%2220_15589_9%22%2C%2214_2268_9%22%5D%2C%5B%22capital+cities+%2F+"
    "say+a+capital+city%22%2C%22E_26865_9%22%5D%5D&densityThreshold=0.99&clerps=%5B%5B%2223_2312237_10%22%2C%22Cities+and+"
    "states+names+%28say+Austin%29%22%5D%5D"
)


def test_a_published_url_gives_its_groups_pins_names_and_thresholds():
    found = tlc.from_neuronpedia_url(AUSTIN)
    assert (found.model, found.slug) == ("gemma-2-2b", "gemma-fact-dallas-austin")
    assert found.groups["Texas"] == (Place("feature", 20, 15589, 9), Place("feature", 14, 2268, 9))
    assert found.groups["capital cities / say a capital city"] == (Place("embedding", -1, 26865, 9),)
    assert found.pins == (Place("logit", 26, 22605, 10), Place("feature", 20, 15589, 10))
    assert found.names == {Place("feature", 23, 12237, 10): "Cities and states names (say Austin)"}
    assert (found.pruning_threshold, found.density_threshold) == (0.6, 0.99)


def test_its_groups_become_edits():
    found = tlc.from_neuronpedia_url(AUSTIN)
    assert found.edits("Texas") == [tlc.Ablate(20, 9, 15589), tlc.Ablate(14, 9, 2268)]
    assert found.edits("Texas", factor=-2.0)[0] == tlc.Scale(20, 9, 15589, factor=-2.0)
    assert found.edits("capital cities / say a capital city") == [tlc.TokenEdit(9, 0.0)]
    assert len(found.edits()) == 6  # all but the output
    with pytest.raises(KeyError, match="capital"):
        found.edits("nothing")


@pytest.fixture(scope="module")
def traced():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        yield tlc.attribute(replacement, prompt(), max_nodes=20, progress=False), replacement


LABEL = 'a & b # c %25 + "d" / é'


def test_our_urls_are_read_back_whole_and_their_edits_run(traced):
    graph, replacement = traced
    ids = graph.node_ids
    noted = graph.group(LABEL, ids[2:4]).group("token", ["token@3"]).pin(ids[5], "logit:0", "L1/error@2").rename(ids[6], LABEL)
    url = noted.neuronpedia_url("tiny-model", "my-graph")
    assert urlsplit(url).fragment == "" and parse_qs(urlsplit(url).query)["slug"] == ["my-graph"]
    found = tlc.from_neuronpedia_url(url, n_layers=3)
    row = graph.nodes.set_index("id")
    assert [(p.layer, p.feature, p.position) for p in found.groups[LABEL]] == [tuple(row.loc[i, ["layer", "feature", "position"]]) for i in ids[2:4]]
    assert [p.kind for p in found.pins] == ["feature", "logit", "error"]
    assert list(found.names.values()) == [LABEL]
    by_url = tlc.intervene(replacement, prompt(), found.edits(LABEL))
    by_ids = tlc.intervene(replacement, prompt(), tlc.edits_of(graph, ids[2:4]))
    assert by_url.logits.equal(by_ids.logits) and by_url.kl() > 0


def test_both_encodings_of_names_are_read():
    for code in (cantor_pair(23, 12237), 2312237):
        url = f"https://neuronpedia.org/gemma-2-2b/graph?slug=s&clerps=[[%2223_{code}_10%22,%22x%22]]"
        assert tlc.from_neuronpedia_url(url).names == {Place("feature", 23, 12237, 10): "x"}


def test_a_url_too_long_for_servers_is_refused(traced):
    graph, _ = traced
    with pytest.raises(ExportError, match="characters long"):
        graph.group("x" * 7000, graph.node_ids[:1]).neuronpedia_url("m", "s")
    with pytest.raises(ExportError, match="slug 'a b' holds ' '"):
        graph.neuronpedia_url("m", "a b")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/gemma-2-2b/graph?slug=x", "no address of"),
        ("https://www.neuronpedia.org.evil.com/gemma-2-2b/graph", "no address of"),
        ("ftp://www.neuronpedia.org/gemma-2-2b/graph", "no address of"),
        ("gemma-2-2b/graph?slug=x", "no address of"),
        ("https://www.neuronpedia.org/gemma-2-2b/0-res/5", "is no graph"),
        (AUSTIN[: AUSTIN.index("Texas")], "supernodes is no JSON.*cut off"),
        (AUSTIN.replace("%5B", "%255B").replace("%22", "%2522"), "encoded twice"),
        ("https://www.neuronpedia.org/m/graph?supernodes=[1]", "expected a list of lists"),
        ("https://www.neuronpedia.org/m/graph?pinnedIds=14_2268", "pinnedIds holds '14_2268'"),
        ("https://www.neuronpedia.org/m/graph?pruningThreshold=much", "pruningThreshold is 'much'"),
    ],
)
def test_other_addresses_and_damaged_ones_say_what_is_wrong(url, words):
    with pytest.raises(NeuronpediaError, match=words):
        tlc.from_neuronpedia_url(url)
