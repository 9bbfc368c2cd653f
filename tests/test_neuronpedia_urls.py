"""Graph URLs: read whatever the site writes, write what it reads."""

from urllib.parse import parse_qs, urlsplit

import pytest

import tl_circuits as tlc
from tests.tiny import own_bridge, prompt, transcoders
from tl_circuits.errors import ExportError, NeuronpediaError
from tl_circuits.feature_labels.feature_codes import cantor_pair
from tl_circuits.neuronpedia.ids import Place

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
    model = own_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        yield tlc.attribute(replacement, prompt(), max_nodes=20, progress=False), replacement


LABEL = 'a & b # c %25 + "d" / é'


def test_our_urls_are_read_back_whole_and_their_edits_run(traced):
    graph, replacement = traced
    ids = graph.node_ids
    noted = (
        graph.group(LABEL, ids[2:4])
        .group("token", ["token@3"])
        .pin(ids[5], "logit:0", "L1/error@2")
        .rename(ids[6], LABEL)
    )
    url = noted.neuronpedia_url("tiny-model", "my-graph")
    assert urlsplit(url).fragment == "" and parse_qs(urlsplit(url).query)["slug"] == ["my-graph"]
    found = tlc.from_neuronpedia_url(url, n_layers=3)
    row = graph.nodes.set_index("id")
    assert [(p.layer, p.feature, p.position) for p in found.groups[LABEL]] == [
        tuple(row.loc[i, ["layer", "feature", "position"]]) for i in ids[2:4]
    ]
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
        ("https://example.com/gemma-2-2b/graph?slug=x", "not an address of"),
        ("https://www.neuronpedia.org.evil.com/gemma-2-2b/graph", "not an address of"),
        ("ftp://www.neuronpedia.org/gemma-2-2b/graph", "not an address of"),
        ("gemma-2-2b/graph?slug=x", "not an address of"),
        ("https://www.neuronpedia.org/gemma-2-2b/0-res/5", "is not the address of a graph"),
        (AUSTIN[: AUSTIN.index("Texas")], "supernodes is not JSON.*cut off"),
        (AUSTIN.replace("%5B", "%255B").replace("%22", "%2522"), "encoded twice"),
        ("https://www.neuronpedia.org/m/graph?supernodes=[1]", "expected a list of lists"),
        ("https://www.neuronpedia.org/m/graph?pinnedIds=14_2268", "pinnedIds holds '14_2268'"),
        ("https://www.neuronpedia.org/m/graph?pruningThreshold=much", "pruningThreshold is 'much'"),
    ],
)
def test_other_addresses_and_damaged_ones_say_what_is_wrong(url, words):
    with pytest.raises(NeuronpediaError, match=words):
        tlc.from_neuronpedia_url(url)


def address(model, *pins, groups=()):
    rows = "%2C".join(f"%5B%22{label}%22%2C{'%2C'.join(f'%22{i}%22' for i in ids)}%5D" for label, ids in groups)
    return f"https://www.neuronpedia.org/{model}/graph?slug=s&pinnedIds={'%2C'.join(pins)}" + (
        f"&supernodes=%5B{rows}%5D" if rows else ""
    )


NODES = ("37_1234_9", "35_888_9", "E_26865_4", "3_-1_2", "4_error_mlp_2")
EDITS = [tlc.Ablate(35, 9, 888), tlc.TokenEdit(4, 0.0), tlc.ErrorEdit(3, 2, 0.0), tlc.ErrorEdit(4, 2, 0.0)]


@pytest.mark.parametrize("model", ["qwen3-8b", "qwen3-4b"])
def test_outputs_tokens_and_errors_of_known_models_are_recognised(model):
    found = tlc.from_neuronpedia_url(address(model, *NODES))
    assert [p.kind for p in found.pins] == ["logit", "feature", "embedding", "error", "error"]
    assert found.edits() == EDITS


def test_outputs_of_models_we_have_not_heard_of_are_recognised_once_the_layers_are_known(traced):
    found = tlc.from_neuronpedia_url(
        address("grown-lately", *NODES, groups=[("mid", ["12_5_3"]), ("last", ["37_8_9", "12_6_3"])])
    )
    assert found.edits("mid") == [tlc.Ablate(12, 3, 5)]  # below the last layer of the address there are no outputs
    with pytest.raises(NeuronpediaError, match="37_8_9 may be a feature or an output.*'grown-lately'.*n_layers="):
        found.edits("last")
    assert found.edits("last", n_layers=36) == [tlc.Ablate(12, 3, 6)]
    assert found.edits("last", n_layers=38) == [tlc.Ablate(37, 9, 8), tlc.Ablate(12, 3, 6)]
    assert tlc.from_neuronpedia_url(address("grown-lately", *NODES), n_layers=36).edits() == EDITS
    graph, replacement = traced
    url = graph.pin("logit:0", "token@2", "L1/error@2").neuronpedia_url("tiny-model", "s")
    with pytest.raises(NeuronpediaError, match="may be a feature or an output"):
        tlc.from_neuronpedia_url(url).edits()
    edits = tlc.from_neuronpedia_url(url).edits(replacement=replacement)
    assert edits == [tlc.TokenEdit(2, 0.0), tlc.ErrorEdit(1, 2, 0.0)]
    assert tlc.intervene(replacement, prompt(), edits).kl() > 0


def test_places_beyond_the_model_are_refused_not_taken_for_outputs():
    with pytest.raises(NeuronpediaError, match="40_1_9 is at layer 40; the model has 36 layers"):
        tlc.from_neuronpedia_url(address("qwen3-8b", "40_1_9"))
    found = tlc.from_neuronpedia_url(address("grown-lately", "30_1_9", "20_-1_2"))
    with pytest.raises(NeuronpediaError, match="30_1_9 is at layer 30; the model has 12 layers"):
        found.edits(n_layers=12)
    with pytest.raises(NeuronpediaError, match="at least 1"):
        tlc.from_neuronpedia_url(AUSTIN, n_layers=0)


def test_an_id_that_circuit_tracer_gives_to_two_nodes_is_not_guessed():
    found = tlc.from_neuronpedia_url(address("qwen3-8b", "0_5_3", groups=[("sure", ["0_36_3", "1_5_3"])]))
    with pytest.raises(
        NeuronpediaError,
        match=r"feature 5 of layer 0 and of the error of layer 5.*tlc\.Ablate\(0, 3, 5\) or tlc\.ErrorEdit\(5, 3\)",
    ):
        found.edits()
    assert found.edits("sure") == [tlc.Ablate(0, 3, 36), tlc.Ablate(1, 3, 5)]


@pytest.mark.parametrize(
    "start",
    [
        "http://localhost:8032/index.html",
        "http://localhost:8032/",
        "http://gpu-box:8046/index.html",
        "http://127.0.0.1:8032/index.html",
    ],
)
def test_addresses_of_circuit_tracers_own_page_are_read_as_its_own_function_reads_them(start):
    query = (
        "slug=dallas&pinnedIds=14_2268_9%2CE_26865_9"
        "&supernodes=%5B%5B%22Texas%22%2C%2220_15589_10%22%5D%2C%5B%22Texas%22%2C%223_5_1%22%5D%5D"
    )
    shown = tlc.from_neuronpedia_url(f"{start}?{query}", n_layers=26)
    assert (shown.model, shown.slug) == ("unknown", "dallas")
    # By hand from circuit-tracer's documentation of its function: ids are layer_feature_position, doubled names get
    # numbers.
    place = {label: [(p.layer, p.position, p.feature) for p in places] for label, places in shown.groups.items()}
    assert place == {"Texas": [(20, 10, 15589)], "Texas (2)": [(3, 1, 5)]}
    assert [(p.kind, p.layer, p.position, p.feature) for p in shown.pins] == [
        ("feature", 14, 9, 2268),
        ("embedding", -1, 9, 26865),
    ]
    assert shown.edits("Texas") == [tlc.Ablate(20, 10, 15589)]
    with pytest.raises(tlc.errors.NeuronpediaError, match="may be a feature or an output"):
        tlc.from_neuronpedia_url(f"{start}?{query}").edits("Texas")


def test_other_pages_are_not_taken_for_circuit_tracers():
    for url in ("http://localhost:8032/scan?slug=a", "http://example.org/index.html", "http://example.org/?slug=a"):
        with pytest.raises(tlc.errors.NeuronpediaError, match="not an address|not the address"):
            tlc.from_neuronpedia_url(url)
