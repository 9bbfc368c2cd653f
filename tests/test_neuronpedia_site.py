"""Labels, search and uploads, over real connections to a Neuronpedia on this computer."""

import io
import json
import logging
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

import tl_circuits as tlc
from tests.fake_neuronpedia import KEY, running
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.errors import ExportError, NeuronpediaError
from tl_circuits.neuronpedia import client
from tl_circuits.neuronpedia.cache import FeatureCache
from tl_circuits.neuronpedia.client import Client
from tl_circuits.neuronpedia.upload import check_upload

MODEL = {"model": "tiny-model", "source_set": "tiny-set"}
PASSING = ["slow", "reset", "cut", "cut-gzip", "not-json", 429, 500]


@pytest.fixture(scope="module")
def model():
    return tiny_bridge("llama")


@pytest.fixture(scope="module")
def graph(model):
    with tlc.attach(model, transcoders(model)) as replacement:
        return tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    with running() as fake:
        monkeypatch.setenv("TL_CIRCUITS_NEURONPEDIA", fake.url)
        yield fake


def features_of(graph):
    return [(row.layer, row.feature) for row in graph.nodes.itertuples() if row.kind == "feature"]


def fill(site, graph, every=1):
    for layer, feature in features_of(graph)[::every]:
        site.add_feature("tiny-model", layer, feature, f"cities {layer}/{feature}")


def test_labels_come_from_neuronpedia_by_layer_and_index(site, graph):
    fill(site, graph)
    labelled = tlc.add_labels(graph, **MODEL)
    for i, (layer, feature) in enumerate(features_of(graph)):
        label = labelled.labels[i]
        assert label.short == f"cities {layer}/{feature}" and label.origin == "neuronpedia"  # the preferred explanation
        assert label.promotes == (" Austin", " Dallas") and label.examples[0].tokens == ("a", " city", "!")
    assert not graph.labels


def test_the_second_time_and_offline_nobody_is_asked_not_even_for_what_is_missing(site, graph):
    fill(site, graph, every=2)
    first = tlc.add_labels(graph, **MODEL)
    asked = len(site.asked)
    assert tlc.add_labels(graph, **MODEL).labels == first.labels and len(site.asked) == asked
    site.stop()
    assert tlc.add_labels(graph, **MODEL).labels == tlc.labels(graph, offline=True, **MODEL).labels == first.labels
    assert 0 < len(first.labels) < len(features_of(graph))


def test_features_without_a_label_fall_back_to_the_vocabulary(site, graph, model):
    fill(site, graph, every=2)
    with tlc.attach(model, transcoders(model)) as replacement:
        labelled = tlc.add_labels(graph, replacement=replacement, **MODEL)
    origins = [labelled.labels[i].origin for i in range(len(features_of(graph)))]
    assert set(origins) == {"neuronpedia", "vocabulary"} and origins[0] == "neuronpedia"


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_nothing(site, graph, fault):
    fill(site, graph)
    site.faults = [fault, fault]
    assert len(tlc.add_labels(graph, timeout=0.3, **MODEL).labels) == len(features_of(graph))
    assert len(site.asked) == 3


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_costs_labels_but_never_the_call(site, graph, fault, caplog):
    fill(site, graph)
    site.faults = [fault] * 50
    labelled = tlc.add_labels(graph, timeout=0.2, deadline=0.8, **MODEL)
    assert labelled.nodes.equals(graph.nodes) and "stay without a label" in caplog.text


def test_a_question_is_given_up_when_its_time_is_over_however_many_tries_are_left(site):
    site.faults = [500] * 50
    with pytest.raises(NeuronpediaError, match=r"Tried \d times in 0\.\d s"):
        Client(site.url, retries=12, deadline=0.5).get("/api/feature/tiny-model/0-tiny-set/1")
    assert 2 < len(site.asked) < 10  # twelve, each after twice the time, would take more than a minute


@pytest.mark.parametrize("fault", ["drip", "drip-head"])
def test_the_deadline_holds_against_a_server_that_answers_byte_by_byte(site, fault):
    site.faults = [fault] * 5
    began = time.monotonic()
    with pytest.raises(NeuronpediaError, match="no whole answer in time"):
        Client(site.url, deadline=0.6, timeout=0.3).get("/api/feature/tiny-model/0-tiny-set/1")
    assert time.monotonic() - began < 3  # seconds: 0.6, and what a busy machine adds


def test_an_answer_without_end_is_refused_and_a_key_that_a_server_repeats_is_not_shown(site, monkeypatch):
    from tl_circuits.neuronpedia import client

    monkeypatch.setattr(client, "LARGEST_ANSWER", 2**20)
    site.faults = ["large", "echo"]
    with pytest.raises(NeuronpediaError, match="more than 1,048,576 bytes"):
        Client(site.url).get("/api/feature/tiny-model/0-tiny-set/1")
    with pytest.raises(NeuronpediaError, match="no such key: … ") as refused:
        Client(site.url, KEY).get("/api/feature/tiny-model/0-tiny-set/1")
    assert KEY not in str(refused.value) and "\x1b" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_server_that_is_gone_costs_labels_but_never_the_call(site, graph, caplog):
    site.stop()
    assert not tlc.add_labels(graph, deadline=0.5, **MODEL).labels and "no connection" in caplog.text


def test_unknown_model_or_source_set_is_said(site, graph, model, caplog):
    fill(site, graph)
    with pytest.raises(NeuronpediaError, match="none of the graph's 30 features in '0-nowhere'.*'tiny-model'"):
        tlc.add_labels(graph, model="tiny-model", source_set="nowhere")
    with pytest.raises(NeuronpediaError, match="'transcoders' is not known. Give model"):
        tlc.add_labels(graph)
    with tlc.attach(model, transcoders(model)) as replacement:
        labelled = tlc.add_labels(graph, model="nowhere", source_set="x", replacement=replacement)
    assert len(labelled.labels) == 30 and "Are model and source set right?" in caplog.text
    with pytest.raises(ValueError, match="give replacement"):
        tlc.add_labels(graph, "vocabulary")


def test_a_damaged_cache_is_put_aside(site, graph, tmp_path, caplog):
    fill(site, graph)
    path = tmp_path / "cache/neuronpedia/features.sqlite"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database" * 100)
    for _ in range(2):
        assert len(tlc.add_labels(graph, **MODEL).labels) == 30
    assert path.with_suffix(".damaged").is_file() and len(site.asked) == 1
    path.unlink()
    path.mkdir()  # a cache that cannot be written at all
    assert len(tlc.add_labels(graph, **MODEL).labels) == 30


def test_what_was_found_is_kept_for_three_months_and_what_was_missing_for_a_week(tmp_path, monkeypatch):
    kept, now = FeatureCache(tmp_path / "features.sqlite"), time.time()
    kept.write("server", "m", {("0-set", 1): {"label": "cities"}, ("0-set", 2): None})
    wanted, day = [("0-set", 1), ("0-set", 2), ("0-set", 3)], 24 * 60 * 60
    for days, known in ((6, {1, 2}), (8, {1}), (89, {1}), (91, set())):
        monkeypatch.setattr(
            "tl_circuits.neuronpedia.cache.time", SimpleNamespace(time=lambda days=days: now + days * day)
        )
        assert {index for _, index in kept.read("server", "m", wanted)} == known, days
        assert {index for _, index in kept.read("server", "m", wanted, any_age=True)} == {1, 2}
    assert kept.read("another", "m", wanted, any_age=True) == {}


def test_search_reads_all_pages(site):
    for index in range(45):
        site.add_feature("tiny-model", index % 3, index, f"names of cities {index}")
    found = tlc.search_features("cities", "tiny-model", "tiny-set", layers=range(3), limit=50)
    assert len(found) == 45 and list(found.columns) == ["layer", "feature", "label", "similarity"]
    assert sorted(found.feature) == list(range(45)) and set(found.layer) == {0, 1, 2}
    assert len(tlc.search_features("cities", "tiny-model", "tiny-set", layers=range(3), limit=20)) == 20
    with pytest.raises(ValueError, match="at least three letters"):
        tlc.search_features("ci", "tiny-model", "tiny-set", layers=[0])
    with pytest.raises(ValueError, match="how many layers 'tiny-model'"):
        tlc.search_features("cities", "tiny-model", "tiny-set")


def test_an_uploaded_graph_is_there_and_its_address_is_returned(site, graph, tmp_path):
    fill(site, graph)
    url = graph.upload("my-graph", key=KEY, description="d", **MODEL)
    assert url == "https://www.neuronpedia.org/tiny-model/graph?slug=my-graph"
    stored = site.graphs["tiny-model", "my-graph"]
    assert len(stored["nodes"]) == len(graph) and stored["metadata"]["info"]["neuronpedia_source_set"] == "tiny-set"
    assert [path.split("?")[0] for _, path in site.asked][1:] == [
        "/api/graph/signed-put",
        "/bucket/put0",
        "/api/graph/save-to-db",
    ]


def test_the_key_goes_to_the_server_alone_and_is_never_shown(site, graph, caplog, monkeypatch, capsys, tmp_path):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    site.faults = [500]
    graph.upload("s", model="tiny-model")
    keys = dict(site.keys_seen)
    assert keys["/api/graph/save-to-db"] == KEY and keys["/bucket/put0?signature=x"] is None
    with pytest.raises(NeuronpediaError) as refused:
        graph.upload("s", model="unknown")
    shown = caplog.text + "".join(capsys.readouterr()) + str(refused.value) + repr(Client(site.url, KEY))
    assert KEY not in shown and not any(
        KEY in p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()
    )
    with pytest.raises(NeuronpediaError, match="must start with https"):
        Client("http://example.com", KEY)


def test_the_keyring_is_asked_last(site, monkeypatch):
    import sys
    import types

    from tl_circuits.neuronpedia.client import find_key

    fake = types.ModuleType("keyring")
    fake.get_password = lambda service, user: f"{service}/{user}"
    fake.errors = types.ModuleType("keyring.errors")
    fake.errors.KeyringError = type("KeyringError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "keyring", fake)
    monkeypatch.setitem(sys.modules, "keyring.errors", fake.errors)
    assert find_key(None) == "neuronpedia/api-key" and find_key("mine") == "mine"
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "environment")
    assert find_key(None) == "environment"


@pytest.mark.parametrize(
    ("options", "words", "sent"),
    [
        ({"key": None}, "needs a key", 0),
        ({"slug": "a/b c"}, r"holds ' ' '/'", 0),
        ({"model": "a/b"}, "model id 'a/b' holds '/'", 0),
        ({"source_set": "nowhere"}, "no feature .* in '0-nowhere'", 1),
        ({"key": "wrong"}, "401.*key", 1),
        ({"model": "gpt-9"}, "no model 'gpt-9'. Give its name", 3),
        ({"slug": "taken"}, "created by another user", 3),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_it_is_sent(site, graph, options, words, sent):
    site.owners["tiny-model", "taken"] = "another"
    asked = {"slug": "s", "key": KEY, "model": "tiny-model"} | options
    with pytest.raises((ExportError, NeuronpediaError), match=words):
        graph.upload(**asked)
    assert len(site.asked) == sent and not site.graphs


def test_files_over_the_limit_or_against_the_schema_are_refused():
    with pytest.raises(ExportError, match="101 MB, Neuronpedia takes 100 MB. Keep less"):
        check_upload(b" " * (101 * 2**20))
    with pytest.raises(ExportError, match="does not fit Neuronpedia's schema.*slug"):
        check_upload(
            json.dumps(
                {"metadata": {"scan": "m", "prompt": "", "prompt_tokens": []}, "qParams": {}, "nodes": [], "links": []}
            ).encode()
        )


def test_a_tiny_graph_can_be_uploaded_though_the_site_fails_on_tiny_files(site, graph, monkeypatch):
    monkeypatch.setattr("tl_circuits.neuronpedia.upload.compressed", lambda data: b"\x1f\x8b" + b"x" * 10)
    graph.upload("tiny", key=KEY, model="tiny-model")
    assert ("tiny-model", "tiny") in site.graphs


@pytest.mark.parametrize("fault", PASSING)
def test_an_upload_survives_a_fault_that_passes(site, graph, fault, monkeypatch):
    for place in (0, 2) if fault == "not-json" else range(3):  # the answer to a put is not read
        site.faults = [None] * place + [fault]
        graph.upload(f"s{place}", key=KEY, model="tiny-model")
        assert ("tiny-model", f"s{place}") in site.graphs


def test_neuronpedias_own_package_uploads_and_finds_our_file(site, graph, tmp_path, monkeypatch):
    request = pytest.importorskip("neuronpedia.requests.graph_request")
    monkeypatch.setattr(request.GraphRequest, "BASE_URL", f"{site.url}/api")
    path = graph.to_neuronpedia(tmp_path / "theirs.json", scan="tiny-model")
    with redirect_stdout(io.StringIO()):
        found = request.GraphRequest(KEY).upload_file(str(path))
    assert (found.model_id, found.slug, found.prompt) == ("tiny-model", "theirs", graph.info.prompt)
