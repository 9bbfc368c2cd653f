"""Feature files: what features do over texts, against a slow count of the same."""

import json
import os
import random
from pathlib import Path

import jsonschema
import pytest
import torch

import tl_circuits as tlc
from tests.conftest import need
from tests.tiny import hook_state, prompt, tiny_bridge, transcoders
from tl_circuits.errors import GraphFileError, OutputError, PromptError
from tl_circuits.feature_labels import dashboards
from tl_circuits.feature_labels.feature_codes import cantor_pair
from tl_circuits.feature_labels.feature_files import FeatureFiles

CONTEXT = 8
SCHEMA = json.loads((Path(__file__).parent / "data/feature-details-schema.json").read_text())


@pytest.fixture(scope="module")
def model():
    return tiny_bridge("llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    paths = [folder / name for name in ("a.txt", "b.txt")]
    for path, n in zip(paths, (120, 77), strict=True):
        path.write_text(" ".join(f"w{rng.randrange(98)}" for _ in range(n)))
    return paths


@pytest.fixture(scope="module")
def made(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    before = hook_state(model)
    with tlc.attach(model, transcoders(model)) as replacement:
        attached = hook_state(model)
        files = tlc.make_dashboards(
            replacement, texts, folder, layers=[0, 2], context=CONTEXT, examples=4, batch=4, progress=False
        )
        assert hook_state(model) == attached
    assert hook_state(model) == before
    return files


def slow_count(model, texts, layer):
    """Every activation of a layer, one piece of text at a time."""
    dictionary = transcoders(model)
    ids = [i for path in texts for i in model.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]]
    rows = []
    for start in range(0, len(ids), CONTEXT):
        piece = ids[start : start + CONTEXT]
        _, cache = model.run_with_cache(torch.tensor([[1, *piece]]), names_filter=dictionary.input_hook(layer))
        x = cache[dictionary.input_hook(layer)][0, 1:]
        rows.append((piece, dictionary.activate(layer, dictionary.pre_activations(layer, x), x).detach()))
    return rows


def test_examples_frequencies_and_histograms_agree_with_a_slow_count(model, texts, made):
    for layer in (0, 2):
        rows = slow_count(model, texts, layer)
        everything = torch.cat([acts for _, acts in rows])
        for feature in range(0, 40, 3):
            record = made.read(layer, feature)
            acts = everything[:, feature]
            if not acts.any():
                assert record is None
                continue
            jsonschema.Draft7Validator(SCHEMA).validate(record)
            assert record["activation_frequency"] == pytest.approx(float((acts > 0).float().mean()))
            assert record["act_max"] == pytest.approx(float(acts.max()), rel=1e-5)
            assert sum(record["histogram"]) == pytest.approx(record["activation_frequency"])
            edges = torch.linspace(0, record["histogram_range"], len(record["histogram"]) + 1)
            counts = torch.histogram(acts[acts > 0], edges)[0] / len(acts)
            assert sum(abs(a - b) for a, b in zip(record["histogram"], counts.tolist(), strict=True)) < 2.5 / len(acts)
            best = sorted(((float(a[:, feature].max()), i) for i, (_, a) in enumerate(rows)), reverse=True)[:4]
            for example, (top, number) in zip(record["examples_quantiles"][0]["examples"], best, strict=False):
                if top > 0:
                    assert max(example["tokens_acts_list"]) == pytest.approx(top, rel=2e-3)  # half precision
                    if [t for t, _ in best].count(top) == 1:  # the same first word gives the same activation
                        assert example["tokens"] == [model.tokenizer.decode([i]) for i in rows[number][0]]
                    assert example["tokens_acts_list"][example["train_token_ind"]] == max(example["tokens_acts_list"])


def test_top_logits_are_what_the_decoder_promotes(model, made):
    dictionary = transcoders(model)
    feature = next(f for f in range(40) if made.read(2, f))
    effect = dictionary.decoder_vectors(2, torch.tensor([feature]), 2)[0] @ model.W_U
    record = made.read(2, feature)
    assert record["top_logits"][0] == model.tokenizer.decode([int(effect.argmax())])
    assert record["bottom_logits"][0] == model.tokenizer.decode([int(effect.argmin())])


def test_an_interrupted_run_goes_on_and_gives_the_same_files(model, texts, made, tmp_path, monkeypatch):
    def some(stop_after):
        taken = []

        def take(self, pieces, original=dashboards._Run.take):
            if len(taken) == stop_after:
                raise KeyboardInterrupt
            taken.append(1)
            original(self, pieces)

        with monkeypatch.context() as patch, tlc.attach(model, transcoders(model)) as replacement:
            patch.setattr(dashboards._Run, "take", take)
            tlc.make_dashboards(
                replacement,
                texts,
                tmp_path,
                layers=[0, 2],
                context=CONTEXT,
                examples=4,
                batch=4,
                save_every=0.0,
                progress=False,
            )
        return len(taken)

    for stop_after in (3, 1):
        with pytest.raises(KeyboardInterrupt):
            some(stop_after)
        assert not (tmp_path / "features/index.json.gz").exists()
    assert some(99) == 7 - 4  # of seven batches, four were done
    names = sorted(os.listdir(made.folder))
    assert names == sorted(os.listdir(tmp_path / "features")) == ["index.json.gz", "layer_0.bin", "layer_2.bin"]
    assert all((made.folder / n).read_bytes() == (tmp_path / "features" / n).read_bytes() for n in names)


def test_a_folder_with_the_beginning_of_another_run_is_refused(model, texts, tmp_path):
    (tmp_path / "features/.unfinished").mkdir(parents=True)
    (tmp_path / "features/.unfinished/settings.json").write_text("{}")
    with tlc.attach(model, transcoders(model)) as replacement:
        with pytest.raises(OutputError, match="another run"):
            tlc.make_dashboards(replacement, texts, tmp_path, progress=False)


def test_texts_that_are_missing_or_empty_say_so(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with tlc.attach(model, transcoders(model)) as replacement:
        with pytest.raises(PromptError, match="no text file"):
            tlc.make_dashboards(replacement, [tmp_path / "none.txt"], tmp_path / "a", progress=False)
        with pytest.raises(PromptError, match="no tokens"):
            tlc.make_dashboards(replacement, [tmp_path / "empty.txt"], tmp_path / "b", progress=False)
        with pytest.raises(ValueError, match="layer 9 has no dictionary"):
            tlc.make_dashboards(replacement, [tmp_path / "empty.txt"], tmp_path / "c", layers=[9], progress=False)


def test_neurons_are_ranked_by_size_whatever_their_sign(model, texts, tmp_path):
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        files = tlc.make_dashboards(
            replacement, texts, tmp_path, layers=[1], context=CONTEXT, max_tokens=80, progress=False
        )
    records = [files.read(1, f) for f in range(48)]
    tops = [
        e["tokens_acts_list"][e["train_token_ind"]] for r in records for e in r["examples_quantiles"][0]["examples"][:1]
    ]
    assert min(tops) < 0 < max(tops) and all(r["activation_frequency"] == 1.0 for r in records)


@pytest.fixture(scope="module")
def graph(model):
    with tlc.attach(model, transcoders(model)) as replacement:
        return tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)


def test_labels_and_cards_work_offline_from_the_files(model, made, graph, tmp_path):
    labelled = tlc.add_labels(graph, made.folder.parent)
    found = list(labelled.labels)
    assert found and {int(graph._nodes.layer[i]) for i in found} == {0, 2}
    label = labelled.labels[found[0]]
    assert label.origin == "feature files" and label.promotes and len(label.examples[0].tokens) == CONTEXT
    assert tlc.load_graph(labelled.save(tmp_path / "g.safetensors")).labels == labelled.labels
    with pytest.raises(GraphFileError, match="no feature files"):
        tlc.add_labels(graph, tmp_path)


def test_a_damaged_record_says_which(made, tmp_path):
    for path in made.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "layer_0.bin").write_bytes(b"\0" * 50)
    feature = next(f for f in range(40) if made.read(0, f))
    with pytest.raises(GraphFileError, match=f"layer_0.bin: feature {feature} is damaged"):
        FeatureFiles(tmp_path).read(0, feature)


def test_circuit_tracers_page_reads_the_files(graph, made, tmp_path, browser):
    """Both layouts: the store through a byte range, as from a hub, and loose files beside a graph."""
    from tests.test_neuronpedia_export import D3, PEER

    need(PEER is not None, "the files of circuit-tracer (pip install --no-deps circuit-tracer==0.5.0)")
    assets = Path(PEER.origin).parent / "frontend/assets"
    path = graph.to_neuronpedia(tmp_path, "circuit-tracer", slug="g", features=made.folder.parent)
    scan = json.loads(path.read_text())["metadata"]["scan"]
    assert scan == "./graph_data/features/g"
    row = next(r for r in graph.nodes.itertuples() if r.kind == "feature" and r.layer == 2)
    code = cantor_pair(row.layer, row.feature)
    asked = []

    def serve(route):
        url = route.request.url
        asked.append(url)
        if "/graph_data/" in url:  # as circuit-tracer's local server maps it
            return route.fulfill(
                body=(tmp_path / url.split("/graph_data/")[1]).read_bytes(), content_type="application/json"
            )
        if "huggingface.co" in url:
            name = url.split("/features/")[1]
            data = (made.folder / name).read_bytes()
            span = route.request.headers.get("range")
            if span:
                start, stop = map(int, span.removeprefix("bytes=").split("-"))
                data = data[start : stop + 1]
            if name.endswith(".gz"):
                import gzip

                data = gzip.decompress(data)  # stands in for the page's own inflating
            return route.fulfill(
                body=data, headers={"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "*"}
            )
        return route.fulfill(body="<body></body>", content_type="text/html")

    inflate = """window.pako = {inflate: () => { throw 'unused' }}
      util.getFile = (get => async (path, cache, type, range) => {
        if (path.endsWith('index.json.gz')) return (await fetch(path)).json()
        if (type != 'bin') return get(path, cache, type, range)
        const bytes = new Uint8Array(await (await fetch(path, {headers: {Range: range}})).arrayBuffer())
        const length = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24
        const stream = new Blob([bytes.slice(4, 4 + length)]).stream().pipeThrough(new DecompressionStream('deflate'))
        return new Response(stream).json()
      })(util.getFile); true"""
    page = browser.new_page()
    page.route("**/*", serve)
    page.goto("http://localhost/")
    page.evaluate(D3)
    page.evaluate("""d3.interpolateOranges = x => x
      d3.scaleSequential = () => { const s = {domain: () => s, clamp: () => s}; return s }
      d3.select = () => ({html: () => d3.select(), append: () => d3.select()})
      window.initFeatureExamplesLogits = window.initFeatureExamplesList = () => 0; window.isLocalServing = true""")
    page.add_script_tag(path=assets / "util.js")
    page.evaluate(inflate)
    page.add_script_tag(path=assets / "feature_examples/init-feature-examples.js")
    read = [
        page.evaluate(
            "async ([scan, code]) => { const f = await initFeatureExamples({containerSel: "
            "d3.select()}).loadFeature(scan, code); delete f.colorScale; return f }",
            [scan, code],
        )
        for scan in (scan, "someone/transcoders")
    ]
    page.close()
    record = made.read(row.layer, row.feature)
    assert all(found | record == found for found in read)
    assert any("layer_2.bin" in url for url in asked)
