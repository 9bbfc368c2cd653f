"""From a prompt to token ids and back: special tokens never twice, graphs as prompts, first positions left out."""

import ast
import json
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.conftest import need
from tests.tiny import CONFIGS, checkpoint, tiny_bridge, tiny_folder, tokenizer, transcoders
from tl_circuits.dictionaries.prompt_rules import GEMMA_3_CHAT, SPECIAL_FIRST
from tl_circuits.errors import ArgumentError, PromptError
from tl_circuits.hooks import MODELS_OWN, first_tokens, left_out, prompt_text, text_to_ids, to_tokens

CAPITAL = "the capital of Texas is"


class Reads:
    """A tokenizer and TransformerLens' settings for it, with the bridge's own ``to_tokens``; no weights."""

    def __init__(self, tokenizer, default_prepend_bos, tokenizer_prepends_bos):
        from types import SimpleNamespace

        from transformer_lens.model_bridge import TransformerBridge

        self.tokenizer = tokenizer
        self.cfg = SimpleNamespace(
            default_prepend_bos=default_prepend_bos, tokenizer_prepends_bos=tokenizer_prepends_bos,
            tokenizer_appends_eos=False, n_ctx=64, d_vocab=101, device=DEVICE,
        )  # fmt: skip
        self.to_tokens = TransformerBridge.to_tokens.__get__(self)


def with_template(template, *special):
    made = tokenizer()
    pairs = [(token, made.convert_tokens_to_ids(token)) for token in special]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return made


@pytest.fixture(scope="module")
def facts():
    with tlc.attach(tlc.load_model("tiny-facts"), "tiny-facts") as replacement:
        yield replacement


# --- never twice ---


@pytest.mark.parametrize("prepend", [True, False], ids=["TransformerLens prepends", "TransformerLens does not"])
@pytest.mark.parametrize("own", ["$A", "<bos> $A", "<bos> $A <eos>"])
@pytest.mark.parametrize("count", [1, 2])
def test_special_tokens_that_a_text_spells_out_are_neither_doubled_nor_taken_away(own, prepend, count):
    model = Reads(with_template(own, "<bos>", "<eos>"), prepend, own.startswith("<bos>"))
    ids = text_to_ids(model, "<bos> " * count + "w1 w2")
    assert ids == [1] * count + [4, 5] + [2] * own.endswith("<eos>"), "as many as the text says"
    assert text_to_ids(model, "w1 w2") == model.to_tokens("w1 w2")[0].tolist(), "other texts keep the model's rule"


def test_a_tokenizer_that_opens_with_several_tokens_puts_none_of_them_twice():
    model = Reads(with_template("<eos> <bos> $A", "<eos>", "<bos>"), True, True)  # as GLM's [gMASK]<sop>
    whole = text_to_ids(model, "w1 w2")
    assert whole == [2, 1, 4, 5] == text_to_ids(model, "<eos> <bos> w1 w2") == text_to_ids(model, "<bos> w1 w2")


def test_a_word_the_vocabulary_lacks_is_no_special_token():
    model = Reads(with_template("$A"), False, False)
    assert text_to_ids(model, "strange w1") == [0, 4]
    assert text_to_ids(model, "strange w1", SPECIAL_FIRST) == [1, 0, 4]
    assert first_tokens(model) == [] and first_tokens(model, SPECIAL_FIRST) == [1]


def test_hooked_transformer_reads_spelled_out_special_tokens_once():
    from transformer_lens import HookedTransformer

    cfg = dict(n_layers=1, d_model=8, n_ctx=16, d_head=4, n_heads=2, d_mlp=16, d_vocab=101, act_fn="relu", seed=0)
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(tiny_folder("llama")))
    assert to_tokens(model, "<bos> w1 w2").tolist() == [1, 4, 5] == to_tokens(model, "w1 w2").tolist()


def test_text_with_bos_explains_what_the_hugging_face_model_says(gemma3):
    text = "<bos>The opposite of small is"
    network = AutoModelForCausalLM.from_pretrained(
        tlc.models.PACKAGED["gemma-3-270m"].folder, dtype=torch.float32
    ).eval()
    ids = gemma3.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        likely = network(ids).logits[0, -1].softmax(-1)
    with tlc.attach(gemma3, tlc.mlp_neurons(gemma3)) as replacement:
        graph = tlc.attribute(replacement, text, max_nodes=5, progress=False)
        free = tlc.intervene(replacement, text, [], freeze="none", layers=())
    assert graph.info.token_ids == tuple(ids[0].tolist()) and graph.info.prompt == text and graph.info.prompt_exact
    assert graph.info.target_names[0] == " large" and graph.info.target_probabilities[0] == pytest.approx(
        0.301, abs=1e-3
    )
    assert graph.info.target_probabilities[0] == pytest.approx(float(likely.max()), abs=1e-5)
    assert free.baseline_logits.shape[0] == ids.shape[1]


def test_text_from_a_chat_template_is_read_as_the_template_tokenises_it(smollm2):
    tokenizer = smollm2.tokenizer
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    before, tokenizer.chat_template = (
        tokenizer.chat_template,
        (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor "
            "%}<|im_start|>assistant\n"
        ),
    )
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        expected = list(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])
    finally:
        tokenizer.chat_template = before
    assert text.startswith(tokenizer.bos_token), "SmolLM2's turns open with its BOS"
    assert to_tokens(smollm2, text).tolist() == expected


# --- a graph is a prompt ---


def test_whatever_takes_a_prompt_takes_the_graph_and_runs_its_token_ids(facts):
    ids = [3, 258, 10, 211, 7]  # without BOS: no text of this model gives them
    graph = tlc.attribute(facts, ids, max_nodes=20, progress=False)
    again = tlc.attribute(facts, graph, max_nodes=20, progress=False)
    assert again.info == graph.info and torch.equal(again.adjacency(), graph.adjacency())
    edit = tlc.edits_of(graph, [i for i in graph.node_ids if "/F" in i][:3])
    expected = tlc.intervene(facts, ids, edit)
    assert torch.equal(tlc.intervene(facts, graph, edit).logits, expected.logits)
    assert torch.equal(tlc.intervene_many(facts, graph, [edit])[0].logits, expected.logits)
    hooked = facts.model.run_with_hooks(torch.tensor([ids]), fwd_hooks=tlc.intervention_hooks(facts, graph, edit))
    torch.testing.assert_close(hooked[0], expected.logits, atol=1e-4, rtol=1e-4)
    assert tlc.generate(facts, graph, max_new_tokens=2) == tlc.generate(facts, ids, max_new_tokens=2)
    layer, feature = edit[0].layer, edit[0].feature
    patched = [tlc.intervene(facts, CAPITAL, tlc.Patch(layer, 2, feature, source=s)).logits for s in (graph, ids)]
    assert torch.equal(*patched)
    frames = [tlc.feature_patching(facts, s, ids[::-1], lambda logits: logits[7], limit=3) for s in (graph, ids)]
    assert frames[0].equals(frames[1])
    assert tlc.dictionary_quality(facts, [graph]).equals(tlc.dictionary_quality(facts, [ids]))


def test_batches_take_graphs(facts, tmp_path):
    graph = tlc.attribute(facts, [3, 258, 10, 211, 7], max_nodes=5, progress=False)
    done = tlc.trace_many(
        facts, [graph, np.array([3, 258]), {"prompt": [torch.tensor(3)]}, [True]], tmp_path, max_nodes=5, progress=False
    )
    assert done.status.tolist() == ["done", "done", "done", "failed"] and "no token ids" in done.error[3]
    assert tlc.load_graph(tmp_path / done.file[0]).info.token_ids == graph.info.token_ids


def test_a_graph_of_many_prompts_is_refused_in_one_sentence(facts):
    graphs = [tlc.attribute(facts, f"the capital of {s} is", max_nodes=20, progress=False) for s in ("Texas", "Ohio")]
    recurring = tlc.aggregate(graphs, align="end").graph()
    assert not recurring.info.prompt_exact and recurring.info.skip_positions is None
    for run in (tlc.attribute, tlc.intervene, tlc.generate):
        with pytest.raises(PromptError, match="no prompt to run the model on"):
            run(facts, recurring, *([[]] if run is tlc.intervene else []))


def test_ids_may_come_from_numpy_torch_and_frames(facts):
    import pandas as pd

    ids = to_tokens(facts.model, CAPITAL).tolist()
    for given in (
        np.array(ids, dtype=np.uint16),
        [np.int32(i) for i in ids],
        [torch.tensor(i) for i in ids],
        pd.Series(ids, index=range(9, 9 + len(ids))),
        torch.tensor([ids], dtype=torch.int32),
        tuple(ids),
    ):
        assert to_tokens(facts.model, given).tolist() == ids
    with pytest.raises(PromptError, match="empty"):
        to_tokens(facts.model, [])


# --- the text of a graph ---


def test_a_graph_of_ids_has_readable_text_that_tokenises_to_them(facts):
    ids = to_tokens(facts.model, CAPITAL)
    graph = tlc.attribute(facts, ids, max_nodes=5, progress=False)
    assert graph.info.prompt == CAPITAL and graph.info.prompt_exact
    assert facts.model.to_tokens(graph.info.prompt)[0].tolist() == list(graph.info.token_ids)


def test_ids_that_no_text_gives_are_flagged_also_in_the_files(facts, tmp_path):
    graph = tlc.attribute(facts, [3, 258, 10, 211, 7], max_nodes=5, progress=False)
    assert graph.info.prompt == CAPITAL and not graph.info.prompt_exact
    exact = tlc.attribute(facts, CAPITAL, max_nodes=5, progress=False)
    for number, made in enumerate((graph, exact)):
        files = [made.save(tmp_path / f"{number}.graph.safetensors"), made.to_neuronpedia(tmp_path / f"{number}.json")]
        for path in files:
            info = tlc.load_graph(path).info
            assert (info.prompt_exact, info.skip_positions) == (made.info.prompt_exact, made.info.skip_positions)
    assert tlc.load_graph("tests/data/circuit_tracer.json").info.prompt_exact is False, "a file we did not check"


@pytest.mark.parametrize(
    "text", ["The opposite of small is", " a  b\n\tc", "déjà vu 🙂", "<start_of_turn>user\nHi<end_of_turn>\n"]
)
def test_text_of_ids_round_trips_on_a_real_tokenizer(gemma3, text):
    ids = to_tokens(gemma3, text)
    found, exact = prompt_text(gemma3, ids)
    assert (found, exact) == (text, True)
    assert [2, *gemma3.tokenizer(found, add_special_tokens=False).input_ids] == ids.tolist()


def test_text_keeps_special_tokens_that_nothing_puts_back(gemma3):
    ids = [2, 2, 818, 11688]
    found, exact = prompt_text(gemma3, torch.tensor(ids))
    assert exact and found == "<bos><bos>The opposite" and to_tokens(gemma3, found).tolist() == ids
    split = (
        gemma3.tokenizer("op", add_special_tokens=False).input_ids
        + gemma3.tokenizer("posite", add_special_tokens=False).input_ids
    )
    assert not prompt_text(gemma3, torch.tensor([2, *split]))[1], "the tokenizer would join the two"


# --- which positions count ---


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory):
    """A model without a BOS, whose rule puts nothing before a text, as Qwen's; its pad token has id 100."""
    folder = checkpoint(CONFIGS["qwen3"], str(tmp_path_factory.mktemp("qwen3")))
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="w97"
    )
    own.save_pretrained(folder)
    return tlc.load_model(folder, device=DEVICE)


def circuit_tracers_tokens(text, tokenizer, model_name):
    """circuit-tracer's ``ensure_tokenized``, taken out of its file: importing the package needs an older hub
    library."""
    found = find_spec("circuit_tracer")
    need(found is not None, "circuit-tracer (pip install --no-deps circuit-tracer==0.5.0)")
    source = Path(found.submodule_search_locations[0], "replacement_model", "common.py").read_text()
    tree = ast.parse(source)
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "ensure_tokenized")
    names = {"torch": torch, "warnings": warnings}
    exec("from __future__ import annotations\n" + ast.get_source_segment(source, function), names)
    return names["ensure_tokenized"](text, tokenizer, torch.device("cpu"), model_name).tolist()


def published(model, folder, name="Qwen/Qwen3-0.6B", **options):
    from tests.published import circuit_tracer

    made = transcoders(model, activation="relu")
    layers = [{n: getattr(made[i], n) for n in ("W_enc", "W_dec", "b_enc", "b_dec")} for i in made.layers]
    circuit_tracer(folder, layers, hooks=("mlp.hook_in", "hook_mlp_out"), model=name)
    return tlc.load_transcoders(folder, **options)


def test_a_published_set_prepends_and_leaves_out_what_circuit_tracer_does(no_bos, tmp_path):
    plain = AutoTokenizer.from_pretrained(no_bos.tokenizer.name_or_path)  # as it is without TransformerLens
    dictionary = published(no_bos, tmp_path)
    for text in ("w1 w2 w3", "<eos> w1 w2"):
        with tlc.attach(no_bos, dictionary) as replacement:
            graph = tlc.attribute(replacement, text, max_nodes=50, progress=False)
        assert list(graph.info.token_ids) == circuit_tracers_tokens(text, plain, "Qwen/Qwen3-0.6B")
        assert graph.info.skip_positions == (0,) and graph.nodes.query("kind == 'feature'").position.min() == 1
    assert graph.info.prepended == "" and graph.info.prompt == text, "the text brought one"


def test_what_was_prepended_is_said_and_in_the_text(no_bos, tmp_path):
    with tlc.attach(no_bos, published(no_bos, tmp_path)) as replacement:
        graph = tlc.attribute(replacement, "w1 w2 w3", max_nodes=50, progress=False)
        assert graph.info.prepended == "w97" == graph.info.tokens[0] and graph.info.prompt_exact
        assert to_tokens(no_bos, graph.info.prompt).tolist() == list(graph.info.token_ids), "by the model's rule alone"
        same = tlc.intervene(replacement, graph.info.prompt, []).baseline_logits
        assert torch.equal(same, tlc.intervene(replacement, "w1 w2 w3", []).baseline_logits)
        assert torch.equal(same, no_bos(torch.tensor([graph.info.token_ids]))[0].float())
        feature = graph.nodes.query("kind == 'feature'").iloc[0]
        patches = [
            tlc.Patch(int(feature.layer), 2, int(feature.feature), source=s) for s in ("w7 w8 w9", [100, 10, 11, 12])
        ]
        assert torch.equal(*(tlc.intervene(replacement, "w1 w2 w3", patch).logits for patch in patches))
        written = [tlc.generate(replacement, p, max_new_tokens=4) for p in ("w1 w2 w3", [100, 4, 5, 6])]
        assert written[0].removeprefix("w1 w2 w3") == written[1].removeprefix("w1 w2 w3")


def test_prepending_and_positions_can_be_chosen(no_bos, tmp_path):
    with tlc.attach(no_bos, published(no_bos, tmp_path / "set")) as replacement:
        bare = tlc.attribute(
            replacement, "w1 w2 w3", prepend_special=False, skip_positions=[], max_nodes=50, progress=False
        )
        assert bare.info.token_ids == (4, 5, 6) and bare.info.skip_positions == ()
        numbers = tlc.attribute(
            replacement, "w1 w2 w3", skip_positions=[np.int64(0), torch.tensor(-1)], max_nodes=50, progress=False
        )
        assert numbers.info.skip_positions == (0, 3)
        with pytest.raises(ArgumentError, match="whole number"):
            tlc.attribute(replacement, "w1 w2 w3", skip_positions=[0.5], progress=False)
        with pytest.raises(PromptError, match="prepend_special"):
            tlc.attribute(replacement, [4, 5], prepend_special=True, progress=False)
    plain = transcoders(no_bos)
    assert plain.prompt_rule == MODELS_OWN == tlc.mlp_neurons(no_bos).prompt_rule
    for rule in (tlc.PromptRule(prepend=True, skip_first=np.int64(2)), MODELS_OWN):
        assert tlc.load_transcoders(plain, prompt_rule=rule).prompt_rule == rule
        assert (
            published(no_bos, tmp_path / str(rule.prepend), prompt_rule=rule).to(torch.device("cpu")).prompt_rule
            == rule
        )
    assert plain.prompt_rule == MODELS_OWN, "the one given is not changed"
    with tlc.attach(no_bos, plain.with_prompt_rule(tlc.PromptRule(prepend=True, skip_first=2))) as replacement:
        graph = tlc.attribute(replacement, "w1 w2 w3", max_nodes=50, progress=False)
        assert graph.info.token_ids == (100, 4, 5, 6) and graph.info.skip_positions == (0, 1)


def test_tensors_and_neurons_leave_out_a_bos_only(no_bos):
    with tlc.attach(no_bos, tlc.mlp_neurons(no_bos)) as replacement:
        graph = tlc.attribute(replacement, "w1 w2 w3", max_nodes=5, progress=False)
    assert graph.info.token_ids == (4, 5, 6) and graph.info.skip_positions == ()
    llama = tiny_bridge("llama")
    with tlc.attach(llama, transcoders(llama)) as replacement:
        graph = tlc.attribute(replacement, "w1 w2 w3", max_nodes=5, progress=False)
    assert graph.info.token_ids == (1, 4, 5, 6) and graph.info.skip_positions == (0,)


def test_instruction_tuned_gemma_3_leaves_out_the_opening_of_a_turn():
    from tl_circuits.dictionaries.references import SHORT_NAMES

    rule = SHORT_NAMES["gemma-3-1b-it"].prompt_rule
    assert rule == GEMMA_3_CHAT and SHORT_NAMES["gemma-3-1b-pt"].prompt_rule == SPECIAL_FIRST
    model = Reads(tokenizer(), True, False)
    for ids, expected in (([2, 105, 2364, 107, 9], (0, 1, 2, 3)), ([2, 105, 2364, 106, 9], (0,)), ([2, 105], (0,))):
        assert left_out(model, torch.tensor(ids), rule) == expected


def test_an_instruction_tuned_set_knows_its_rule_from_its_config(tmp_path):
    model = tiny_bridge("gemma3")
    assert published(model, tmp_path, name="google/gemma-3-1b-it").prompt_rule == GEMMA_3_CHAT


@pytest.mark.parametrize("skip", [(), (0, 1), (2,)])
def test_what_runs_the_prompt_again_leaves_out_the_same_positions(no_bos, tmp_path, skip):
    dictionary = published(no_bos, tmp_path / "set")
    with tlc.attach(no_bos, dictionary) as replacement:
        graph = tlc.attribute(replacement, "w1 w2 w3 w9", skip_positions=skip, max_nodes=500, progress=False)
        graph = tlc.load_graph(graph.save(tmp_path / "a.graph.safetensors"))
        assert graph.info.skip_positions == skip
        held = tlc.faithfulness(replacement, graph, n=1000, freezes=["all"]).effects
        assert (held.predicted - held.measured).abs().max() < 1e-3 * held.measured.abs().max()
        removed = {int(name.rsplit("@", 1)[1]) for name in held.source if "/" in name}
        assert removed == set(range(5)) - set(skip)
        edge = next(e for e in graph.edges.itertuples() if "/F" in e.source and e.target == "logit:0")
        loads = tlc.head_loadings(replacement, graph, edge.source, edge.target)
        assert loads.loading.sum() == pytest.approx(edge.weight, rel=1e-3, abs=1e-5)
        scores = tlc.qk_attribution(replacement, graph, layer=2, head=0, query=4, key=1)
        places = {
            int(name.rsplit("@", 1)[1]) for name in {*scores.by_query.source, *scores.by_key.source} if "/" in name
        }
        assert not places & set(skip)
        curve = tlc.circuit_curve(replacement, graph, lambda logits: logits[7], thresholds=[1.0], random_sets=1)
        assert curve.kept[0] == pytest.approx(1, abs=0.02), "features at positions left out stay as they are"
        boxes = tlc.box_ablations(replacement, graph)
        assert boxes and all(box["freeze"] == "attention" and box["measured"] != 0 for box in boxes)


def test_skip_connections_at_positions_left_out_stay_constant_when_held(no_bos):
    dictionary = transcoders(no_bos, skip=True).with_prompt_rule(tlc.PromptRule(skip_first=2))
    with tlc.attach(no_bos, dictionary) as replacement:
        graph = tlc.attribute(replacement, "w1 w2 w3 w9", max_nodes=500, progress=False)
        other = tlc.attribute(replacement, "w1 w2 w3 w9", skip_positions=[3], max_nodes=500, progress=False)
        assert graph.info.skip_positions == (0, 1)
        for made in (graph, other):
            held = tlc.faithfulness(replacement, made, n=1000, freezes=["all"]).effects
            assert (held.predicted - held.measured).abs().max() < 1e-3 * held.measured.abs().max()
        edit = tlc.TokenEdit(1)
        runs = [tlc.intervene(replacement, p, edit, freeze="all").logits for p in (graph, "w1 w2 w3 w9", other)]
        assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_files_that_do_not_say_leave_out_no_position_with_features(facts, tmp_path):
    graph = tlc.attribute(facts, CAPITAL, max_nodes=20, progress=False)
    path = graph.save(tmp_path / "a.graph.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    content = json.loads(header["__metadata__"]["tl_circuits.graph"])
    for name in ("prompt_exact", "skip_positions", "prepended"):
        del content["info"][name]
    header["__metadata__"]["tl_circuits.graph"] = json.dumps(content)
    old = json.dumps(header).encode()
    path.write_bytes(len(old).to_bytes(8, "little") + old + raw[8 + length :])
    before = tlc.load_graph(path)
    assert (
        before.info.skip_positions is None and not before.info.prompt_exact and before.fingerprint == graph.fingerprint
    )
    assert before.skipped_positions((0,)) == (0,)
    place = int(before.nodes.query("kind == 'feature'").position.iloc[0])
    assert before.skipped_positions((0, place)) == (0,)
    everywhere = replace(graph, info=replace(graph.info, skip_positions=()))
    assert everywhere.skipped_positions((0,)) == ()


def test_circuit_tracers_files_say_what_it_left_out():
    graph = tlc.load_graph("tests/data/circuit_tracer.pt")
    assert graph.info.skip_positions == (0,)
    assert graph.nodes.query("kind == 'feature'").position.min() > 0


def test_quality_and_dashboards_count_what_the_set_was_trained_on(no_bos, tmp_path):
    dictionary = published(no_bos, tmp_path / "set")
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8\n")
    with tlc.attach(no_bos, dictionary) as replacement:
        measured = tlc.dictionary_quality(replacement, ["w1 w2 w3 w4"])
        _, cache = no_bos.run_with_cache(torch.tensor([[100, 4, 5, 6, 7]]))
        acts = dictionary.pre_activations(0, cache["blocks.0.mlp.hook_in"][0]).relu()
        assert measured.l0[0] == pytest.approx(float((acts[1:] != 0).sum()) / 4)
        files = tlc.make_dashboards(replacement, [text], tmp_path / "out", layers=[0], context=4, progress=False)
        _, cache = no_bos.run_with_cache(torch.tensor([[100, 8, 9, 10, 11]]))
        later = dictionary.pre_activations(0, cache["blocks.0.mlp.hook_in"][0]).relu()
        largest = torch.cat([acts[1:], later[1:]]).amax(0)
        for feature in range(dictionary.width(0)):
            record = files.read(0, feature)
            assert (record["act_max"] if record else 0) == pytest.approx(float(largest[feature]), rel=1e-2)


def test_the_command_line_says_what_is_prepended_and_left_out(tmp_path):
    from tests.tiny import command

    run = ["trace", "w1 w2 w3", "--model", checkpoint(CONFIGS["llama"], str(tmp_path / "model")), "--max-nodes", "5"]
    shown = command(*run, "--out", tmp_path / "a")
    assert shown.exit_code == 0 and "left out, without features and errors: position 0 “<bos>”" in shown.stdout
    facts = json.loads(
        command(*run, "--skip-position", 1, "--skip-position", 2, "--json", "--out", tmp_path / "b").stdout
    )
    assert facts["skip_positions"] == [1, 2] and facts["prepended"] == ""
    sets = {row["name"]: row for row in json.loads(command("models", "--json").stdout)["transcoders"]}
    assert sets["qwen3-4b"]["prompt_rule"] == "special token first; position 0 left out"
    assert sets["gemma-3-4b-it"]["prompt_rule"].endswith("4 of a prompt that begins [2, 105, 2364, 107]")
