"""Names of features, from where they fire and from their weights."""

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.sites import autoencoders
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.cli.trace import show
from tl_circuits.errors import PromptError
from tl_circuits.feature_labels import firing_cache
from tl_circuits.feature_labels.example_text import file_passages, shipped_passages, world_passages
from tl_circuits.feature_labels.family_names import family_name
from tl_circuits.feature_labels.firing import Firing, Pieces, cut, where_features_fire
from tl_circuits.feature_labels.firing_names import Fired, Place, fits, name_from
from tl_circuits.feature_labels.token_space import TokenSpace
from tl_circuits.feature_labels.top_firing import TopFiring
from tl_circuits.graph.box_names import name_boxes
from tl_circuits.graph.nodes import UNCLEAR, Label

FACT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """What fires where is remembered for these tests, and not on the computer that runs them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firing_cache, "cache_dir", lambda: folder)
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(firing_cache, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "firing"


@pytest.fixture(scope="module")
def facts():
    model = tlc.load_model("tiny-facts", device=DEVICE)
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        yield replacement


@pytest.fixture(scope="module")
def graph(facts):
    return tlc.attribute(facts, FACT, max_nodes=60, progress=False)


# Where features fire


def test_the_strongest_places_are_those_of_one_run_after_another(facts):
    pieces = cut(
        facts, ["Dallas is in Texas .", "the capital of Texas is", "Miami is in Florida .", "7 + 5 = 12 ."] * 2, 1000
    )
    found = where_features_fire(facts, pieces, {0: torch.arange(768), 2: torch.tensor([3, 418])})
    for layer, features in ((0, range(768)), (2, (3, 418))):
        best = torch.zeros(len(pieces.ids), 768)
        for number, ids in enumerate(pieces.ids):
            _, cache = facts.model.run_with_cache(torch.tensor([[*pieces.first, *ids]]))
            best[number] = cache[f"blocks.{layer}.hook_mlp_out.hook_sae_acts_post"][0, 1:].amax(0)
        top = found.layers[layer]
        for row, feature in enumerate(features):
            expected = best[:, feature].sort(descending=True).values
            # A batch and a single prompt differ by the order of float32 sums.
            assert torch.allclose(top.strength[0, :, row], expected, atol=1e-4)
            assert not top.strength[1, :, row].any()  # transcoders' features are never negative
    assert found.layers[2].row(418) == 1 and found.layers[2].row(4) is None


def test_neurons_fire_where_the_plain_model_says_on_both_sides_of_zero(smollm2):
    from transformers import AutoModelForCausalLM

    from tl_circuits.models import PACKAGED

    texts = ["The capital of Spain is Madrid.", "def add(a, b):\n    return a + b", "La France est grande et belle"]
    with tlc.attach(smollm2, tlc.mlp_neurons(smollm2)) as replacement:
        pieces = cut(replacement, texts, 1000)
        top = where_features_fire(replacement, pieces, {5: torch.arange(1536)}).layers[5]
    plain, seen = AutoModelForCausalLM.from_pretrained(PACKAGED["smollm2-135m"].folder), []
    plain.model.layers[5].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach()))
    with torch.no_grad():
        for ids in pieces.ids:
            plain(torch.tensor([[*pieces.first, *ids]]))
    values = [acts[len(pieces.first) :] for acts in seen]
    for side, sign in ((0, 1.0), (1, -1.0)):
        best = torch.stack([(v * sign).amax(0).clamp_min(0) for v in values])
        # Batches are padded and sums run in another order: float32 rounding, relative to activations up to 10.
        assert torch.allclose(top.strength[side, :3], best.sort(0, descending=True).values, atol=2e-3)
        number = top.piece[side, 0].long()
        place = torch.tensor([(values[n][:, f] * sign).argmax() for f, n in enumerate(number)])
        assert (top.place[side, 0] == place)[best.amax(0) > 0.05].all()
    counted = torch.cat(values)
    means = torch.tensor([top.mean_and_spread(f) for f in range(1536)])
    assert torch.allclose(means[:, 0], counted.mean(0), atol=1e-3)  # rounding as above
    assert torch.allclose(means[:, 1], counted.std(0, correction=0), atol=1e-3)


def test_features_of_autoencoders_on_head_outputs_fire_where_their_hook_shows(tmp_path):
    model, words = tiny_bridge("llama"), tmp_path / "words.txt"
    words.write_text("\n\n".join(" ".join(f"w{(i * j) % 90}" for j in range(1, 9)) for i in range(1, 30)))
    with tlc.attach(model, autoencoders(model, {1: "attn.hook_z"})) as replacement:
        pieces = cut(replacement, file_passages(words), 1000)
        width = replacement.dictionary.width(1)
        top = where_features_fire(replacement, pieces, {1: torch.arange(width)}).layers[1]
        shown = []
        for ids in pieces.ids:
            _, cache = model.run_with_cache(torch.tensor([[*pieces.first, *ids]]))
            shown.append(cache[f"{replacement.site(1)}.hook_sae_acts_post"][0, 1:].amax(0))
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
        named = tlc.name_features(replacement, graph, words)
    expected = torch.stack(shown).sort(0, descending=True).values[:8]
    assert torch.allclose(top.strength[0], expected, atol=1e-5) and expected.any()  # float32, another order of sums
    assert any(label.examples for label in named.labels.values())


def test_an_examples_activations_stand_on_their_tokens(facts, graph):
    named = tlc.name_features(facts, graph)
    i = named.node_numbers["L0/F308@7"]
    example = named.labels[i].examples[0]
    _, cache = facts.model.run_with_cache(" ".join(example.tokens))
    plain = cache["blocks.0.hook_mlp_out.hook_sae_acts_post"][0, 1:, 308]
    assert len(example.activations) == len(example.tokens) == len(plain)
    # Kept in half precision, to four digits: about one part in a thousand.
    assert torch.allclose(torch.tensor(example.activations), plain, rtol=2e-3, atol=1e-3)
    assert example.tokens[int(plain.argmax())] == "Dallas"


# Names from examples

FILLERS = [f" x{i}" for i in range(300)]
WORDS = [
    " Paris",
    " Berlin",
    " Rome",
    " Madrid",
    " of",
    " capital",
    " The",
    " is",
    " dog",
    " runs",
    " blue",
    " seven",
    " tree",
    " stone",
    " paper",
    " night",
    " paris",
    *FILLERS,
]
ID = {word: i for i, word in enumerate(WORDS)}


def space(sentences):
    """Words with embeddings of their own, the four capitals' close together."""
    vectors = torch.nn.functional.normalize(
        torch.randn(len(WORDS), 64, generator=torch.Generator().manual_seed(1)), dim=1
    )
    vectors[:4] = 0.6 * vectors[:4] + 2 * vectors[0]
    return TokenSpace([[ID[" " + w] for w in s.split()] for s in sentences], vectors, dict(enumerate(WORDS)))


def fired(*places):
    return [
        Fired(tuple(ID[" " + w] for w in text.split()), tuple(" " + w for w in text.split()), z) for text, z in places
    ]


NOISE = [f"x{i} x{i + 1} x{(7 * i) % 300} x{(11 * i) % 300} x{i + 2}" for i in range(0, 298, 2)]
NOISE += [
    "dog runs blue seven tree",
    "stone paper night dog runs",
    "seven tree blue stone is",
    "night paper of dog The",
]
CAPITALS = ["The capital of Paris", "paris", "dog Berlin runs", "blue Rome", "seven Madrid stone"]


def test_one_token_and_tokens_that_are_alike_name_a_feature():
    known = space(NOISE + CAPITALS)
    same = name_from(
        fired(("dog runs Paris", 9.0), ("blue Paris", 8.0), ("tree paris", 7.0), ("stone Paris", 6.0)), known
    )
    alike = name_from(
        fired(("blue Paris", 9.0), ("dog Rome", 9.0), ("stone Berlin", 9.0), ("seven Madrid", 9.0)), known
    )
    assert same.text == "on “ Paris”" and same.sharpness == pytest.approx(7.5)  # the mean of four
    assert alike.text.startswith("on “ ") and set(alike.rule[0]) == {0, 1, 2, 3}


def test_different_tokens_and_few_examples_name_nothing():
    known = space(NOISE + CAPITALS)
    assert (
        name_from(
            fired(("blue dog", 9.0), ("dog seven", 9.0), ("stone night", 9.0), ("seven tree", 9.0), ("is paper", 9.0)),
            known,
        )
        is None
    )
    assert name_from(fired(("blue Paris", 9.0), ("dog Paris", 9.0)), known) is None
    # the same words again
    assert name_from(fired(("blue Paris", 9.0), ("blue Paris", 9.0), ("blue Paris", 8.0)), known) is None
    assert name_from([], known) is None


def test_the_same_words_before_name_a_feature_unless_they_always_stand_there():
    elsewhere = ["dog is tree", "seven is dog", "blue is stone", "night is paper"] * 15
    known = space(
        [*NOISE, *elsewhere, "The capital of Paris is blue", "The capital of Rome is seven", "capital of Berlin is"]
    )
    places = [(f"The capital of {word} is", 9.0) for word in ("Paris", "Rome", "Berlin", "dog", "blue")]
    assert (
        name_from(fired(*[(p.removeprefix("The "), z) for p, z in places]), known).text == "after “ capital of … ▸is”"
    )
    always = space(NOISE + ["The capital of Paris is blue", "The capital of Rome is seven"] * 5)
    assert (
        name_from(fired(*[("The capital of " + w, 9.0) for w in ("Paris", "Rome", "dog", "seven")]), always).text
        == "after “ The capital of”"
    )
    # "is" stands behind nothing else here, so the words before it add nothing.
    assert (
        name_from(
            fired(*places),
            space(
                [x for x in NOISE if "is" not in x.split()] + ["The capital of Paris is", "The capital of Rome is"] * 5
            ),
        ).text
        == "on “ is”"
    )


def test_a_name_that_fits_many_places_is_not_sharp():
    known = space([f"Paris x{i}" for i in range(300)])  # every second token
    name = name_from(fired(("blue Paris", 30.0), ("dog Paris", 30.0), ("Paris", 30.0)), known)
    assert name.sharpness == pytest.approx(1.0)  # √((1 - ½) / ½)
    rare = name_from(
        fired(("blue Paris", 99.0), ("dog Paris", 99.0), ("tree Paris", 99.0)), space([*NOISE, "dog Paris"])
    )
    tokens = sum(len(sentence.split()) for sentence in NOISE) + 2
    assert rare.sharpness == pytest.approx(math.sqrt(tokens - 1))  # one place of all


def test_the_start_of_a_text_is_a_name_only_at_the_start():
    known = space(NOISE + CAPITALS)
    name = name_from(fired(("dog", 9.0), ("blue", 9.0), ("The", 8.0), ("seven", 8.0)), known)
    assert name.text == "at the start of a text"
    assert fits(name, Place((ID[" is"],)), known) and not fits(name, Place((ID[" The"], ID[" is"])), known)


def test_a_name_is_used_only_where_it_is_true_of_the_node():
    known = space(NOISE + CAPITALS)
    name = name_from(fired(("blue Paris", 9.0), ("dog Rome", 9.0), ("stone Berlin", 9.0)), known)
    assert fits(name, Place((ID[" dog"], ID[" Madrid"])), known)  # not among the examples, but like them
    assert not fits(name, Place((ID[" Paris"], ID[" is"])), known)


# Names from weights


def planted_name(direction):
    """The name of a feature of a small model that writes ``direction``."""
    model = tiny_bridge("llama")
    made = transcoders(model)
    layers = {layer: made[layer] for layer in made.layers}
    with tlc.attach(model, layers) as replacement:
        nodes = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False).nodes
    node = nodes[(nodes.kind == "feature") & (nodes.layer == 2)].iloc[0]
    W_dec = made[2].W_dec.clone()
    W_dec[node.feature] = direction(model)  # what a feature writes does not change whether it is active
    with tlc.attach(model, layers | {2: replace(made[2], W_dec=W_dec)}) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=500, progress=False)
        return tlc.name_features(replacement, graph).nodes.set_index("id").label[node.id]


def test_what_a_feature_writes_is_said_or_suppressed():
    def raising(model):  # the direction that raises the logit of w39, and no other
        return torch.linalg.pinv(model.W_U.detach().T)[:, 42] * 100

    assert planted_name(raising).startswith("say “w39”")
    assert planted_name(lambda model: -raising(model)).startswith("suppresses “w39”")


def test_random_weights_have_no_clear_name():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        named = tlc.name_features(replacement, graph)
    found = [label.short for label in named.labels.values()]
    assert set(named.labels) == set(graph.is_kind("feature").nonzero()[:, 0].tolist())
    assert sum(short == UNCLEAR for short in found) > 0.8 * len(found)
    assert all(label.promotes and label.suppresses and label.reads for label in named.labels.values())


def test_a_neuron_that_holds_french_down_is_called_so(smollm2):
    from transformers import AutoModelForCausalLM

    from tl_circuits.models import PACKAGED

    with tlc.attach(smollm2, tlc.mlp_neurons(smollm2)) as replacement:
        graph = tlc.attribute(replacement, "The capital of France is", max_nodes=300, progress=False)
        named = tlc.name_features(replacement, graph, examples=False).nodes.set_index("id")
    row = named.loc["L29/F864@5"]
    assert row.activation > 0 and row.label.startswith("suppresses “French”, “ France”")
    plain = AutoModelForCausalLM.from_pretrained(PACKAGED["smollm2-135m"].folder)
    weights = plain.model.norm.weight * plain.model.layers[29].mlp.down_proj.weight[:, 864]
    effect = (plain.lm_head.weight @ weights).detach()
    french = [smollm2.tokenizer.encode(t, add_special_tokens=False) for t in ("French", " French", " France")]
    assert all(len(ids) == 1 and float((effect[ids[0]] - effect.mean()) / effect.std()) < -6 for ids in french)
    assert {label.split()[0] for label in named.label[named.kind == "feature"]} >= {"sees", "say", "suppresses", "no"}


def test_a_feature_that_is_silent_here_is_labelled_by_the_side_it_has_in_the_baseline(facts):
    graph = tlc.attribute(
        facts, "Dallas is in", baseline=["Miami is in", "Boulder is in"], max_nodes=60, progress=False
    )
    silent = [i for i in graph.is_kind("feature").nonzero()[:, 0].tolist() if float(graph._nodes.activation[i]) == 0]
    labelled = tlc.label_features(facts, graph)
    for i in silent:
        layer, feature = int(graph._nodes.layer[i]), int(graph._nodes.feature[i])
        effect = facts.dictionary[layer].W_dec[feature] @ facts.model.W_U
        assert labelled.labels[i].promotes[0] == facts.model.tokenizer.decode([int(effect.argmax())])
    assert silent


# The whole


def test_features_of_the_built_in_model_are_named_by_where_they_fire(facts, graph):
    named = tlc.name_features(facts, graph)
    label = {graph.node_ids[i]: named.labels[i] for i in named.labels}
    assert label["L0/F71@7"].short == "on “Dallas”" and label["L0/F71@7"].origin == "examples"
    assert label["L1/F605@7"].short == "on “Houston, Amarillo, Waco”"  # Dallas, which it fires on here, is like them
    assert not graph.labels
    bare = tlc.name_features(facts, graph, examples=False)
    assert all(x.origin == "vocabulary" and not x.examples for x in bare.labels.values())
    few = tlc.name_features(facts, graph, features=3)
    assert sum(bool(x.examples) for x in few.labels.values()) == 3


def test_a_text_runs_once_for_a_model_and_dictionary(facts, graph, own_cache, monkeypatch):
    first = tlc.name_features(facts, graph)
    (stored,) = own_cache.iterdir()
    runs = []
    monkeypatch.setattr(firing_cache, "where_features_fire", lambda *args: runs.append(1) or where_features_fire(*args))
    assert tlc.name_features(facts, graph).labels == first.labels and not runs
    stored.write_bytes(stored.read_bytes()[:1000])
    # damaged: run again, and stored again
    assert tlc.name_features(facts, graph).labels == first.labels and len(runs) == 1
    assert tlc.name_features(facts, graph).labels == first.labels and len(runs) == 1
    tlc.name_features(facts, graph, max_tokens=500)  # another text
    with tlc.attach(tiny := tlc.load_model("tiny-facts", device=DEVICE), tlc.mlp_neurons(tiny)) as other:
        tlc.name_features(other, tlc.attribute(other, FACT, max_nodes=10, progress=False))
    assert len(runs) == 3 and len(list(own_cache.iterdir())) == 3


def test_a_dictionary_too_wide_to_remember_gives_the_same_names(facts, graph, own_cache, monkeypatch):
    expected = tlc.name_features(facts, graph).labels
    for file in own_cache.iterdir():
        file.unlink()
    monkeypatch.setattr(firing_cache, "_MOST_BYTES", 1000)
    assert tlc.name_features(facts, graph).labels == expected and not list(own_cache.iterdir())


def test_in_a_contrast_graph_the_family_is_where_features_fire(facts):
    cities = ("Miami", "Boulder", "Chicago", "Boise", "Nashville", "Casper", "Tucson")
    graph = tlc.attribute(
        facts, "Dallas is in", baseline=[f"{city} is in" for city in cities], max_nodes=80, progress=False
    )
    named = tlc.name_features(facts, graph)
    by_family = [label.short for label in named.labels.values() if label.origin == "family"]
    assert "for “Dallas” (1 of 8 prompts)" in by_family
    shown = [label.examples for i, label in named.labels.items() if label.origin == "family"]
    assert all(examples[0].tokens[-2:] == ("is", "in") for examples in shown)


def test_feature_files_name_features_too(facts, graph, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(world_passages()[:400]))
    tlc.make_dashboards(facts, [tmp_path / "corpus.txt"], tmp_path, layers=[0, 1], progress=False, context=32)
    named = tlc.name_features(facts, graph, tmp_path)
    texts = [x for x in named.labels.values() if x.origin == "examples"]
    assert texts and all(x.short.startswith(("on “", "after “", "at ")) and x.examples for x in texts)
    with_files = {graph.node_ids[i] for i, x in named.labels.items() if x.examples}
    assert with_files and all(node.startswith(("L0/", "L1/")) for node in with_files)


def test_boxes_are_named_by_members_with_a_clear_name(graph):
    ids = {"L0/F308@7": Label("on “Dallas”", origin="examples"), "L0/F71@7": Label(UNCLEAR)}
    labelled = replace(graph, labels={graph.node_numbers[i]: label for i, label in ids.items()})
    box = tuple(graph.node_numbers[i] for i in ids)
    assert name_boxes(labelled, [box, box[1:]], {})[0][0] == "on “Dallas”"
    assert dict(name_boxes(labelled, [box[1:]], {})).keys() == {"at “Dallas”, layer 0"}
    held = replace(graph, labels={box[0]: Label("suppresses “x”", ("a",), ("x", "y"), ("b",))})
    assert dict(name_boxes(held, [box], {})).keys() == {"suppresses “x”, “y”"}


# Texts


def test_the_shipped_texts_are_readable_and_mixed():
    text = shipped_passages()
    assert len(text) > 180 and len(set(text)) == len(text)
    tenth = "\n".join(text[: len(text) // 10])
    assert all(kind in tenth for kind in ("Paris", "def ", ":", " est ", " = "))  # facts, code, dialogue, French, sums
    assert all("�" not in passage for passage in text)


def test_passages_end_at_empty_lines_whatever_the_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n\n\nthree\n \nfour", encoding="utf-8-sig")
    assert list(file_passages(path)) == ["one\ntwo", "three", "four"]
    path.write_text("déjà\n\nvu", encoding="utf-16")
    assert list(file_passages(path)) == ["déjà", "vu"]
    path.write_text("x" * 9000)
    assert [len(p) for p in file_passages(path)] == [4000, 4000, 1000]


def test_a_text_that_cannot_be_used_is_refused_in_words(facts, graph, tmp_path):
    path = tmp_path / "text.txt"
    for content, words in (
        ("café, garçon".encode("latin-1"), "not in UTF-8"),
        (b"", "0 tokens"),
        (b" \n\n \n", "0 tokens"),
        (b"Dallas", "1 tokens"),
        (b"Completely different words that nobody taught this model", "does not know"),
    ):
        path.write_bytes(content)
        with pytest.raises(PromptError, match=words):
            tlc.name_features(facts, graph, path)
    with pytest.raises(PromptError, match="no text file"):
        tlc.name_features(facts, graph, tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="max_tokens"):
        tlc.name_features(facts, graph, max_tokens=1)


def test_names_with_markup_are_shown_as_they_are(graph):
    marked = "on “[bold]<b onclick=alert(1)>&amp;[/bold]”"
    label = Label(marked, origin="examples", examples=())
    labelled = replace(graph, labels=dict.fromkeys(graph.is_kind("feature").nonzero()[:, 0].tolist(), label))
    out = StringIO()
    show(labelled, {"graph": Path("g"), "page": Path("p")}, Console(file=out, width=500))
    assert marked in out.getvalue()


def test_pieces_are_as_long_as_the_model_takes():
    model = tiny_bridge("llama")  # 32 positions
    with tlc.attach(model, transcoders(model)) as replacement:
        pieces = cut(replacement, [" ".join(["w1", "w2"] * 50)], 1000)
        assert max(map(len, pieces.ids)) + len(pieces.first) <= 32 and pieces.n_tokens == 100
        assert where_features_fire(replacement, pieces, {0: torch.arange(4)}).pieces == pieces
        assert where_features_fire(replacement, Pieces(()), {0: torch.arange(4)}).layers[0].strength.sum() == 0


@pytest.mark.parametrize(("strong", "name"), [(2, "for “ a, b” (2 of 5 prompts)"), (3, None), (0, None)])
def test_a_feature_is_named_by_the_prompts_it_fires_for_unless_these_are_more_than_half(strong, name):
    top = TopFiring.empty(torch.tensor([7]))
    top.strength[0, :strong, 0] = 1.0
    top.strength[0, strong:5, 0] = 0.4 * (strong > 0)  # under half of the strongest
    top.piece[0, :5, 0] = torch.arange(5)
    firing = Firing(Pieces(tuple((9, token) for token in range(5))), {3: top})
    texts = {9: "The", 0: " a", 1: " b", 2: " c", 3: " d", 4: " e"}
    assert family_name(firing, 3, 0, 0, texts) == name
