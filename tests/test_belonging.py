"""A graph is only asked about with the model and dictionary that it is of."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from transformer_lens import HookedTransformer

import tl_circuits as tlc
from tests.tiny import (
    CONFIGS,
    checkpoint,
    command,
    cross_layer,
    prompt,
    run_async,
    tiny_bridge,
    tiny_folder,
    transcoders,
)
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.errors import BelongingError, EditError, PromptError, TargetError
from tl_circuits.hooks.identity import first_difference, model_sample, spread
from tl_circuits.view.folder import GraphFolder
from tl_circuits.view.live_model import LiveModel, foreign

PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def own():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        return tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)


@pytest.fixture(scope="module")
def other():
    """The same model, opened again, with other transcoders of the same name, layers and widths."""
    model = tlc.load_model(tiny_folder("llama"))
    with tlc.attach(model, transcoders(model, seed=8)) as replacement:
        yield replacement


USES = {
    "label_features": lambda r, g: tlc.label_features(r, g),
    "labels": lambda r, g: tlc.add_labels(g, "vocabulary", replacement=r),
    "faithfulness": lambda r, g: tlc.faithfulness(r, g, 2),
    "circuit_curve": lambda r, g: tlc.circuit_curve(r, g, lambda logits: logits[5]),
    "box_ablations": lambda r, g: tlc.box_ablations(r, g),
    "edits_of": lambda r, g: tlc.edits_of(g, [0], replacement=r),
    "intervene": lambda r, g: tlc.intervene(r, prompt(), tlc.edits_of(g, [0])),
    "intervene_many": lambda r, g: tlc.intervene_many(r, prompt(), [[], tlc.edits_of(g, ["token@2"])]),
    "intervention_hooks": lambda r, g: tlc.intervention_hooks(r, prompt(), tlc.edits_of(g, ["L1/error@2"])),
    "generate": lambda r, g: tlc.generate(r, prompt(), tlc.edits_of(g, [0], factor=2.0), max_new_tokens=1),
    "qk_attribution": lambda r, g: tlc.qk_attribution(r, g, 1, 0, -1, 2),
    "head_loadings": lambda r, g: tlc.head_loadings(r, g, g.edges.source.iloc[-1], g.edges.target.iloc[-1]),
    "top_head_loadings": lambda r, g: tlc.top_head_loadings(r, g, 2),
    "explain_heads": lambda r, g: tlc.explain_heads(r, g, 1),
}


@pytest.mark.parametrize("use", USES)
def test_every_question_about_another_dictionarys_graph_is_refused_and_names_both(own, other, use):
    with pytest.raises(
        BelongingError,
        match="dictionary 'transcoders' .* but 'transcoders' is attached .*layer 0.*other weights",
    ):
        USES[use](other, own)
    model = tiny_bridge("llama")
    with (
        tlc.attach(model, tlc.mlp_neurons(model)) as neurons,
        pytest.raises(BelongingError, match="'transcoders' on .* but 'mlp neurons' is attached"),
    ):
        USES[use](neurons, own)
    with tlc.attach(model, transcoders(model)) as mine:
        USES[use](mine, own)


def test_the_error_is_one_for_those_who_caught_targets():
    assert issubclass(BelongingError, TargetError)


@pytest.mark.parametrize(
    "changed",
    [
        lambda t: replace(t, W_enc=t.W_enc * 1.1),
        lambda t: replace(t, W_dec=-t.W_dec),
        lambda t: replace(t, b_enc=t.b_enc + 0.5),
        lambda t: replace(t, b_dec=2 * t.b_dec),
        lambda t: replace(t, input_hook="hook_resid_mid"),
    ],
)
def test_one_layer_of_other_weights_or_hooks_tells_two_dictionaries_of_one_name(own, changed):
    model = tiny_bridge("llama")
    given = transcoders(model)
    layers = {layer: changed(given[layer]) if layer == 1 else given[layer] for layer in given.layers}
    with tlc.attach(model, layers) as replacement, pytest.raises(BelongingError, match="layer 1 of the dictionary"):
        tlc.label_features(replacement, own)


def test_some_layers_of_a_dictionary_are_another_one(own):
    model = tiny_bridge("llama")
    with (
        tlc.attach(model, transcoders(model).__class__({1: transcoders(model)[1]})) as part,
        pytest.raises(BelongingError, match="only the graph has layer 0"),
    ):
        tlc.label_features(part, own)


def test_decoders_of_later_layers_alone_do_not_make_a_cross_layer_transcoder_its_encoders():
    model = tiny_bridge("llama")
    with tlc.attach(model, cross_layer(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
        tlc.label_features(replacement, graph)
    with tlc.attach(model, transcoders(model, seed=2)) as encoders, pytest.raises(BelongingError):
        tlc.label_features(encoders, graph)


def test_the_same_weights_under_another_name_dtype_or_place_are_the_same(own):
    model = tiny_bridge("llama")
    for options in ({"name": "mine"}, {"dtype": torch.bfloat16}, {"dtype": torch.float16, "residency": "cpu"}):
        with tlc.attach(model, tlc.load_transcoders(transcoders(model), **options)) as replacement:
            tlc.label_features(replacement, own)
    half = tiny_bridge("llama", torch.bfloat16)
    with tlc.attach(half, transcoders(half)) as replacement:
        tlc.label_features(replacement, own)


def test_a_model_is_known_again_however_transformer_lens_opened_it(tmp_path):
    from transformers import AutoModelForCausalLM

    for architecture in ("llama", "gpt2"):
        folder = checkpoint(CONFIGS[architecture], str(tmp_path / architecture))
        bridge = tlc.load_model(folder)
        folded = tlc.load_model(folder)
        folded.enable_compatibility_mode(disable_warnings=True)
        half = tlc.load_model(folder, dtype=torch.bfloat16)
        finetuned = tlc.load_model(folder)
        with torch.no_grad():
            for parameter in finetuned.parameters():
                parameter += (
                    0.05 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
        samples = [model_sample(model) for model in (bridge, folded, half)]
        assert len(samples[0]) == 4 and all(first_difference(samples[0], sample) is None for sample in samples)
        assert first_difference(samples[0], model_sample(finetuned)) is not None
        if architecture == "gpt2":
            original = AutoModelForCausalLM.from_pretrained(folder)
            cfg = {
                "n_layers": 3,
                "d_model": 32,
                "n_heads": 4,
                "d_head": 8,
                "d_mlp": 128,
                "d_vocab": 101,
                "n_ctx": 32,
                "act_fn": "gelu_new",
                "normalization_type": "LN",
            }
            hooked = HookedTransformer(cfg)
            from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

            hooked.load_and_process_state_dict(
                convert_gpt2_weights(original, hooked.cfg),
                fold_ln=True,
                center_writing_weights=True,
                center_unembed=True,
            )
            assert first_difference(samples[0], model_sample(hooked)) is None


def test_what_is_looked_at_lies_apart_and_another_number_of_numbers_is_a_difference():
    assert [spread(size, count).tolist() for size, count in ((9, 2), (101, 3), (2, 2))] == [
        [3, 6],
        [25, 50, 75],
        [0, 1],
    ]
    assert first_difference((("a", (1.0,)), ("b", (2.0,))), (("b", (2.0, 2.0)), ("a", (1.0,)))) == "b"


def test_another_checkpoint_of_the_same_name_and_shape_is_refused(own, tmp_path):
    second = tlc.load_model(checkpoint(CONFIGS["llama"], str(tmp_path / "second"), seed=5))
    second.cfg.model_name = own.info.model
    with (
        tlc.attach(second, transcoders(second)) as replacement,
        pytest.raises(BelongingError, match="weights of the two models differ"),
    ):
        tlc.faithfulness(replacement, own)


def test_saved_and_exported_graphs_are_known_again_and_keep_their_notes(own, other, tmp_path):
    saved = tlc.load_graph(own.pin("token@1").save(tmp_path / "own.graph.safetensors"))
    exported = tlc.load_graph(own.to_neuronpedia(tmp_path / "own.json", slug="own"))
    for graph in (saved, exported):
        assert graph.info.sample == own.info.sample != ()
        with pytest.raises(BelongingError):
            tlc.label_features(other, graph)
    unsampled = replace(own, info=replace(own.info, sample=()))
    # files of earlier versions keep their notes
    assert saved.pins == ("token@1",) and unsampled.fingerprint == own.fingerprint


def test_graphs_without_numbers_of_weights_are_held_against_what_they_say(own, other):
    def of(**facts):
        return replace(own, info=replace(own.info, sample=(), **facts))

    require_belonging(other, of())  # an earlier version's: name, layers and widths agree
    require_belonging(other, of(model="unknown", engine="circuit-tracer"))
    require_belonging(other, of(model=f"org/{own.info.model.split('/')[-1].upper()}"))
    require_belonging(other, of(engine="circuit-tracer", dictionary=own.info.model))  # names its model only
    for facts, words in (
        ({"dictionary": "gemma"}, "the dictionary 'gemma'.*called differently.*name='gemma'"),
        ({"model": "gemma-2-2b"}, "the model 'gemma-2-2b'.*called differently"),
        ({"n_layers": 26}, "has 26 layers, the other one has 3"),
        ({"engine": "circuit-tracer", "dictionary": "gemmascope-transcoder-16k"}, "called differently"),
        ({"token_ids": (1, 5000)}, "token id 5000, the model's vocabulary 101"),
    ):
        with pytest.raises(BelongingError, match=words):
            require_belonging(other, of(**facts))
    nodes = own._nodes
    wide = replace(nodes, feature=torch.where(nodes.kind == 0, nodes.feature + 1000, nodes.feature))
    with pytest.raises(BelongingError, match="where the dictionary has 40"):
        require_belonging(other, replace(of(), _nodes=wide))


def test_one_published_set_is_known_under_the_names_neuronpedia_and_circuit_tracer_give_it(own):
    pytest.importorskip("sae_lens", reason="its registry says what is what")
    model = tiny_bridge("llama")
    with tlc.attach(
        model, tlc.load_transcoders(transcoders(model), name="mwhanna/gemma-scope-transcoders")
    ) as replacement:
        for name in ("gemma", "gemmascope-transcoder-16k", "gemma-2-2b/gemmascope-transcoder-16k"):
            require_belonging(
                replacement, replace(own, info=replace(own.info, sample=(), engine="circuit-tracer", dictionary=name))
            )


def test_graphs_of_other_weights_are_not_put_together(own, other):
    theirs = tlc.attribute(other, prompt(), max_nodes=30, progress=False)
    with pytest.raises(ValueError, match="other weights under the same names"):
        tlc.aggregate([own, theirs])


def test_asking_whether_a_graph_belongs_costs_a_twentieth_of_a_trace_at_most():
    model = tlc.load_model("tiny-facts")
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        graph = tlc.attribute(replacement, PROMPT, progress=False)
        traced, sampled = [], []
        for _ in range(5):
            began = time.perf_counter()
            tlc.attribute(replacement, PROMPT, progress=False)
            traced.append(time.perf_counter() - began)
            began = time.perf_counter()
            require_belonging(replacement, graph)
            sampled.append(time.perf_counter() - began)
    assert min(sampled) < 0.05 * min(traced)  # weights may be edited while attached, so they are read each time


def test_the_server_says_which_graphs_are_of_another_dictionary_and_answers_nothing_about_them(own, other, tmp_path):
    own.save(tmp_path / "own.graph.safetensors")
    tlc.attribute(other, prompt(), max_nodes=30, progress=False).save(tmp_path / "theirs.graph.safetensors")
    (tmp_path / "foreign.json").write_text("{}")
    folder, live = GraphFolder(tmp_path), LiveModel(other)
    told = foreign(other, folder)
    assert len(told) == 1 and told[0].startswith(
        "own.graph.safetensors can be looked at, not steered or labelled: the graph was made with"
    )
    edge = own.edges.iloc[-1]
    for wish in (
        live.label(own),
        live.steer(own, [own.node_ids[0]], 0.0, lambda: True),
        live.heads(own, edge.source, edge.target, lambda: True),
    ):
        with pytest.raises(BelongingError):
            run_async(wish)


def test_feature_files_of_another_dictionary_label_nothing(own, other, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 20)
    tlc.make_dashboards(other, [text], tmp_path / "theirs", context=8, progress=False)
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "features"):
        with pytest.raises(
            BelongingError, match="the feature files in theirs were made with the dictionary 'transcoders'"
        ):
            tlc.add_labels(own, folder)
    with pytest.raises(BelongingError):
        own.to_neuronpedia(tmp_path / "x.json", "circuit-tracer", slug="x", features=tmp_path / "theirs")
    theirs = tlc.attribute(other, prompt(), max_nodes=30, progress=False)
    assert tlc.add_labels(theirs, tmp_path / "theirs").labels


def test_a_folder_of_results_of_other_weights_under_the_same_name_is_not_continued(own, other, tmp_path):
    prompts = ["w1 w2 w3", "w4 w5"]
    tlc.trace_many(other, prompts, tmp_path, max_nodes=10, progress=False)
    assert set(tlc.trace_many(other, prompts, tmp_path, max_nodes=10, progress=False).status) == {"done"}
    model = tiny_bridge("llama")
    model_name, model.cfg.model_name = model.cfg.model_name, other.model.cfg.model_name
    with (
        tlc.attach(model, transcoders(model)) as replacement,
        pytest.raises(BelongingError, match="of other weights: give another folder, or name="),
    ):
        tlc.trace_many(replacement, prompts, tmp_path, max_nodes=10, progress=False)
    model.cfg.model_name = model_name


def test_scores_of_another_prompt_are_not_measured_on_this_one(own):
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        longer = tlc.attribute(replacement, prompt(12), max_nodes=10, progress=False)
        with pytest.raises(EditError, match="another prompt"):
            tlc.faithfulness(replacement, own, 1, scores=[tlc.qk_attribution(replacement, longer, 1, 0, 10, 2)])


@pytest.fixture(scope="module")
def facts_graph(tmp_path_factory):
    home = tmp_path_factory.mktemp("facts")
    model = tlc.load_model("tiny-facts")
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        return tlc.attribute(replacement, PROMPT, max_nodes=50, progress=False).save(home / "facts.graph.safetensors")


def test_view_takes_the_dictionary_that_the_graphs_name_and_refuses_to_choose(facts_graph, own, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(
        "tl_circuits.view.server.serve",
        lambda path, host, port, token, live, ready, proxies: (
            opened.append(live and live.replacement.dictionary.name),
            ready("http://address", port),
        ),
    )
    result = command("view", str(facts_graph), "--model", "tiny-facts")
    assert result.exit_code == 0 and opened == ["tiny-facts"] and "not steered" not in result.stderr
    assert "Open http://address" in result.stdout and "saved in" in result.stdout and "taken" not in result.stderr
    result = command("view", str(facts_graph))
    assert opened.pop() is None and "Open http://address" in result.stdout and "saved in" not in result.stdout
    result = command("view", str(facts_graph), "--model", "tiny-facts", "--transcoders", "neurons")
    assert (
        opened[1:] == ["mlp neurons"]
        and "facts.graph.safetensors can be looked at, not steered or labelled" in result.stderr
    )
    tlc.load_graph(facts_graph).save(tmp_path / "facts.graph.safetensors")
    own.save(tmp_path / "own.graph.safetensors")
    result = command("view", str(tmp_path), "--model", "tiny-facts")
    assert (
        result.exit_code == 1
        and "several dictionaries ('tiny-facts', 'transcoders'): say which" in result.stderr
        and len(opened) == 2
    )


def test_heads_on_another_dictionary_is_one_clear_line(facts_graph):
    edge = tlc.load_graph(facts_graph).edges.iloc[-1]
    result = command("heads", str(facts_graph), f"{edge.source} > {edge.target}", "--transcoders", "neurons")
    assert (
        result.exit_code == 1
        and result.stderr.strip().split("\n")[-1].startswith("tl-circuits: the graph was made with")
        and "'mlp neurons' is attached" in result.stderr
    )
    right = command("heads", str(facts_graph), f"{edge.source} > {edge.target}", "--json")
    assert right.exit_code == 0 and json.loads(right.stdout)["source"] == edge.source


def test_importing_the_program_stays_quick():
    code = "import sys; from tl_circuits.cli import view, heads, trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def own_facts():
    return tlc.load_transcoders("tiny-facts")


@pytest.fixture(scope="module")
def traced_facts(own_facts):
    with tlc.attach(tlc.load_model("tiny-facts"), own_facts) as replacement:
        return tlc.attribute(replacement, PROMPT, max_nodes=60, progress=False)


def uses(replacement, graph):
    """Everything that runs a graph's prompt again, by name."""
    edge = graph.edges.query("target == 'logit:0'").iloc[0]
    edit = tlc.TokenEdit(7, 0.5)
    return {
        "faithfulness": lambda: tlc.faithfulness(replacement, graph, n=2),
        "intervene": lambda: tlc.intervene(replacement, graph, edit),
        "intervention_hooks": lambda: tlc.intervention_hooks(replacement, graph, edit, freeze="all"),
        "circuit_curve": lambda: tlc.circuit_curve(replacement, graph, lambda logits: logits[5], thresholds=[0.8]),
        "box_ablations": lambda: tlc.box_ablations(replacement, graph, controls=0),
        "head_loadings": lambda: tlc.head_loadings(replacement, graph, edge.source, edge.target),
        "qk_attribution": lambda: tlc.qk_attribution(replacement, graph, 3, 0, 8, 7),
        "generate": lambda: tlc.generate(replacement, graph, max_new_tokens=1),
        "circuit_quality": lambda: tlc.circuit_quality(
            replacement, [graph] * 2, [graph] * 2, ["Austin", "Salem"], sizes=[0]
        ),
    }


# What the few numbers taken from the weights do not see: other matrices, gains, one layer's sign, a user's own hook.
CHANGES = {
    "attention's outputs": lambda model: [p.mul_(-1) for k, p in model.named_parameters() if "o_proj" in k],
    "gains of norms": lambda model: [p.mul_(0.5) for k, p in model.named_parameters() if "norm" in k],
    "an MLP's inputs": lambda model: [p.mul_(-1) for k, p in model.named_parameters() if "up_proj" in k],
    "the unembedding": lambda model: [model.unembed.weight.neg_()],
    "a hook": lambda model: model.add_hook("blocks.0.hook_mlp_out", lambda out, hook: 0.5 * out),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_is_refused_where_its_model_computes_something_else_now(traced_facts, own_facts, change):
    model = tlc.load_model("tiny-facts")
    with torch.no_grad():
        CHANGES[change](model)
    accepted = []
    with tlc.attach(model, own_facts) as replacement:
        for name, use in uses(replacement, traced_facts).items():
            try:
                use()
                accepted.append(name)
            except TargetError as error:  # the edges of head_loadings are computed again, and compared
                assert "on the attached model it is" in str(error) or "comes out differently" in str(error)
    # A layer's scores are read without running what comes after it.
    assert accepted == (["qk_attribution"] if change == "the unembedding" else [])


def test_weights_edited_while_attached_are_seen_also_when_written_to_through_data(own_facts):
    model = tlc.load_model("tiny-facts")
    with tlc.attach(model, own_facts) as replacement:
        before = tlc.attribute(replacement, PROMPT, max_nodes=20, progress=False)
        model.unembed.weight.data *= 2
        logit = tlc.attribute(replacement, PROMPT, ["Austin"], max_nodes=20, progress=False).nodes.activation.iloc[-1]
        logits = model(replacement.model.to_tokens(PROMPT))[0, -1].detach()
        austin = model.tokenizer.convert_tokens_to_ids("Austin")
        assert logit == pytest.approx(float(logits[austin] - logits.mean()), abs=1e-3)  # float32 sums of 256 numbers
        with pytest.raises(BelongingError):
            tlc.faithfulness(replacement, before, n=2)
        model.embed.weight.data.neg_()
        after = tlc.attribute(replacement, PROMPT, max_nodes=20, progress=False)
        tlc.faithfulness(replacement, after, n=2)
    assert before.info.sample != after.info.sample


def test_a_dictionary_edited_while_attached_is_another_one():
    model, edited = tiny_bridge("llama"), transcoders(tiny_bridge("llama"))
    with tlc.attach(model, edited) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=30, progress=False)
        for layer in edited.layers:
            edited[layer].W_dec.mul_(-1)
        with pytest.raises(BelongingError, match="has other weights"):
            tlc.faithfulness(replacement, graph, n=2)


def test_a_graph_whose_token_ids_are_other_words_here_is_no_prompt(own, own_facts):
    with tlc.attach(tlc.load_model("tiny-facts"), own_facts) as replacement:
        for use in (
            lambda: tlc.attribute(replacement, own, max_nodes=5, progress=False),
            lambda: tlc.attribute(replacement, PROMPT, baseline=own, align="end", max_nodes=5, progress=False),
            lambda: tlc.intervene(replacement, PROMPT, tlc.Patch(0, 2, [1, 2], source=own)),
        ):
            with pytest.raises(PromptError, match=r"on this model it is .*graph\.info\.prompt"):
                use()
        other_program = tlc.load_graph("tests/data/circuit_tracer.json")
        with pytest.raises(PromptError, match="on this model it is"):
            tlc.attribute(replacement, other_program, max_nodes=5, progress=False)
        tokenizer, replacement.model.tokenizer = replacement.model.tokenizer, None
        ids = tokenizer(PROMPT)["input_ids"]
        without = tlc.attribute(replacement, ids, max_nodes=5, progress=False)
        replacement.model.tokenizer = tokenizer
        assert tlc.attribute(replacement, without, max_nodes=5, progress=False).info.token_ids == tuple(ids)
        neurons = tlc.mlp_neurons(replacement.model)
    # A graph of another dictionary on the same model is a prompt: the words are the same.
    with tlc.attach(tlc.load_model("tiny-facts"), neurons) as replacement:
        graph = tlc.attribute(replacement, PROMPT, max_nodes=5, progress=False)
    with tlc.attach(tlc.load_model("tiny-facts"), own_facts) as replacement:
        assert tlc.attribute(replacement, graph, max_nodes=5, progress=False).info.token_ids == graph.info.token_ids
