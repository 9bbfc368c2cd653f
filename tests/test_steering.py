"""Edit strings, generation, sweeps, faithfulness, and the steer command."""

import json
import math

import pytest
import torch

import tl_circuits as tlc
from tests.tiny import ARCHITECTURES, command, hook_state, own_bridge, prompt, tiny_bridge, tiny_folder, transcoders
from tl_circuits.errors import EditError, PromptError


@pytest.fixture(scope="module")
def replacement():
    model = own_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as attached:
        yield attached


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("L14/F2268@9 = 0", tlc.Ablate(14, 9, 2268)),
        ("L20/F15589@-1 *= -2", tlc.Scale(20, -1, 15589, factor=-2.0)),
        ("L0/F1,F5@2:5 += 1.5", tlc.Add(0, slice(2, 5), (1, 5), value=1.5)),
        ("L1/F3@8: = 30", tlc.Set(1, slice(8, None), 3, value=30.0)),
        ("L1/F3@*=2", tlc.Set(1, None, 3, value=2.0)),
        ("L3/error@2 *= 0", tlc.ErrorEdit(3, 2, 0.0)),
        ("token@4 *= 0.5", tlc.TokenEdit(4, 0.5)),
    ],
)
def test_edits_are_read_from_text(text, edit):
    assert tlc.parse_edit(text) == edit


@pytest.mark.parametrize(
    "text", ["", "L1F3@2=0", "L1/F3=0", "L1/F3@2 = x", "L1/F3@a = 1", "L1/error@2 = 1", "token@1 += 2", "L1/F3@2 -= 1"]
)
def test_unreadable_edits_show_the_grammar(text):
    with pytest.raises(EditError, match="PLACE OPERATOR NUMBER"):
        tlc.parse_edit(text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_no_token(architecture, temperature):
    model = tiny_bridge(architecture)
    before = hook_state(model)
    with tlc.attach(model, transcoders(model)) as replacement:
        edits = [tlc.Set(1, slice(4, None), 3, value=20.0), tlc.Add(0, 2, 7, value=-5.0)]
        options = {"max_new_tokens": 12, "temperature": temperature, "seed": 4}
        with_cache, without, plain = (
            tlc.generate(replacement, prompt(), e, use_past_kv_cache=cached, **options)
            for e, cached in ((edits, True), (edits, False), ([], True))
        )
    assert with_cache == without and with_cache != plain
    assert hook_state(model) == before


def test_positions_from_the_end_mean_the_prompts_end_while_writing(replacement):
    options = {"max_new_tokens": 6}
    last, named, none = (
        tlc.generate(
            replacement,
            prompt(),
            [tlc.Set(layer, at, 3, value=30.0) for layer in (1, 2) for at in positions],
            **options,
        )
        for positions in ((-1,), (8,), ())
    )
    assert last == named != none


def test_generation_streams_and_repeats_with_a_seed(replacement):
    seen = []
    options = {"max_new_tokens": 6, "temperature": 1.5}
    one = tlc.generate(replacement, "w1 w2", seed=1, on_token=seen.append, **options)
    assert one == tlc.generate(replacement, "w1 w2", seed=1, **options)
    assert one != tlc.generate(replacement, "w1 w2", seed=2, **options)
    assert one.startswith("w1 w2") and len(seen) == 6 and all(token in one for token in seen)
    assert tlc.generate(replacement, "w1 w2", max_new_tokens=0) == "w1 w2"


@pytest.mark.parametrize("cached", [True, False])
def test_an_end_of_sequence_token_ends_the_text_and_is_not_written(replacement, cached, monkeypatch):
    def written():
        seen = []
        tlc.generate(
            replacement,
            "w1 w2",
            max_new_tokens=6,
            temperature=2.0,
            seed=1,
            use_past_kv_cache=cached,
            on_token=seen.append,
        )
        return seen

    whole, tokenizer = written(), replacement.model.tokenizer
    end = tokenizer.convert_tokens_to_ids(whole[3].strip())
    monkeypatch.setattr(type(tokenizer), "eos_token_id", property(lambda self: end), raising=False)
    assert len(whole) == 6 and written() == whole[: whole.index(whole[3])]


def test_generation_beyond_the_context_or_into_nonsense_is_refused(replacement):
    with pytest.raises(PromptError, match="context of 32"):
        tlc.generate(replacement, prompt(), max_new_tokens=100)
    with pytest.raises(ValueError, match="temperature"):
        tlc.generate(replacement, prompt(), temperature=-1.0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        tlc.generate(replacement, prompt(), max_new_tokens=-1)


@pytest.mark.parametrize("kind", ["transcoders", "neurons"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox"])
def test_predictions_hold_to_rounding_when_all_else_is_held(architecture, kind):
    model = tiny_bridge(architecture)
    dictionary = transcoders(model) if kind == "transcoders" else tlc.mlp_neurons(model)
    with tlc.attach(model, dictionary) as replacement:
        graph = tlc.attribute(replacement, prompt(12), max_nodes=80, progress=False)
        some = graph.nodes.query("kind == 'feature'").id.tolist()[:4]
        report = tlc.faithfulness(replacement, graph, n=25, groups={"four": some})
    facts = report.summary().set_index("freeze")
    assert list(facts.index) == ["all", "attention", "none"]
    assert facts.loc["all", "correlation"] > 0.99999 and facts.loc["all", "explained_variance"] > 0.9999
    assert facts.loc["all", "sign_agreement"] == 1.0
    largest = report.effects.predicted.abs().max()
    part = report.effects.query("freeze == 'all'")
    assert (part.predicted - part.measured).abs().max() < 1e-3 * largest
    assert "four" in set(report.effects.source)
    assert facts.loc["attention", "correlation"] >= facts.loc["none", "correlation"] - 0.2
    assert math.isfinite(facts.loc["none", "explained_variance"])
    assert len(report.worst(7)) == 7


def test_indirect_predictions_follow_paths_through_features():
    """With patterns, denominators and errors fixed and no feature crossing its threshold, they are exact."""
    model = tiny_bridge("llama")
    made = transcoders(model, activation="relu")
    # Every feature far above zero: the replacement model is then linear.
    shifted = {i: tlc.Transcoder(made[i].W_enc, made[i].W_dec, made[i].b_enc + 30, made[i].b_dec) for i in made.layers}
    with tlc.attach(model, shifted) as replacement:
        graph = tlc.attribute(replacement, prompt(5), max_nodes=10_000, progress=False)
        from tl_circuits.interventions.faithfulness import predicted_effects

        token = graph.node_ids.index("token@3")
        predicted = predicted_effects(graph, [[token]], direct=False)[0]
        direct = predicted_effects(graph, [[token]], direct=True)[0]
    assert not torch.allclose(predicted, direct)
    # With the MLPs replaced by their features, removing a token acts along every path: recompute densely.
    adjacency, activation = graph.adjacency().double(), graph._nodes.activation.double()
    scaled = adjacency.clone()
    features = graph.is_kind("feature")
    step = torch.where(features, 1 / activation.where(features, torch.ones(())), 0.0)
    total = torch.linalg.solve(torch.eye(len(graph), dtype=torch.float64) - scaled * step[None], -adjacency[:, token])
    assert torch.allclose(predicted.double(), total, atol=1e-4)


def test_the_report_draws_itself(replacement, tmp_path):
    pytest.importorskip("matplotlib")
    graph = tlc.attribute(replacement, prompt(), max_nodes=40, progress=False)
    report = tlc.faithfulness(replacement, graph, n=10)
    assert b"<svg" in report.plot(tmp_path / "check.svg").read_bytes()


def test_feature_patching_agrees_with_a_patch_by_hand(replacement):
    clean, corrupted = prompt(9, seed=3), prompt(9, seed=8)

    def metric(logits):
        return logits[5] - logits[6]

    frame = tlc.feature_patching(replacement, clean, corrupted, metric, layers=[1, 2], limit=40)
    assert len(frame) == 40 and set(frame.layer) <= {1, 2}
    assert frame.change.abs().is_monotonic_decreasing
    best = frame.iloc[0]
    site = replacement.site(int(best.layer)) + ".hook_sae_acts_post"

    def patch(acts, hook):
        acts[0, int(best.position), int(best.feature)] = best.clean
        return acts

    with torch.no_grad():
        logits = replacement.model.run_with_hooks(corrupted[None], fwd_hooks=[(site, patch)])[0, -1]
    assert float(metric(logits)) == pytest.approx(best.metric, abs=1e-4)
    with pytest.raises(PromptError, match="same number of tokens"):
        tlc.feature_patching(replacement, prompt(9), prompt(8), metric)


def test_keeping_everything_keeps_everything_and_keeping_less_does_not():
    model = tiny_bridge("llama")
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), [5], max_nodes=10_000, progress=False)
        for others in ("zero", "mean"):
            curve = tlc.circuit_curve(
                replacement, graph, lambda logits: logits[5] - logits.mean(), thresholds=(0.7, 1.0), others=others
            )
            assert curve.features.is_monotonic_increasing
            assert curve.kept.iloc[-1] == pytest.approx(1.0, abs=0.05)
            assert abs(curve.kept.iloc[0] - 1) > 0.01


def test_steer_prints_before_and_after():
    def run(*arguments):
        return command("steer", "w1 w2 w3", "--model", tiny_folder("gemma3"), *arguments)

    done = run("--edit", "L1/F3@1 = 25", "--edit", "L2/F5@2: *= -2", "--tokens", "4", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["kl"] > 0 and facts["before"].startswith("w1 w2 w3") and facts["top"][0]["token"]
    plain = run("--edit", "L1/F3@1 = 25", "--tokens", "3")
    assert plain.exit_code == 0 and "before" in plain.stdout and "with the edits" in plain.stdout
    bad = run("--edit", "L1/F3 = 25")
    lines = bad.stderr.strip().splitlines()
    assert bad.exit_code == 1 and "PLACE OPERATOR NUMBER" in lines[0] and len(lines) > 5  # the grammar keeps its lines
    assert "names no position" in lines[-1] and "Traceback" not in bad.stderr
