"""Edits, freezes, batches and hooks."""

import math

import pytest
import torch

import tl_circuits as tlc
from tests.oracles import removal_gap
from tests.tiny import ARCHITECTURES, cross_layer, hook_state, own_bridge, prompt, tiny_bridge, transcoders
from tl_circuits.errors import ArchitectureError, ArgumentError, EditError
from tl_circuits.hooks import edit_hooks, make_plan

DICTIONARIES = {
    "neurons": lambda m: tlc.mlp_neurons(m),
    "jumprelu": lambda m: transcoders(m),
    "relu_skip": lambda m: transcoders(m, activation="relu", skip=True),
    "topk": lambda m: transcoders(m, activation="topk"),
    "cross_layer": lambda m: cross_layer(m),
    "before_post_norm": lambda m: transcoders(m, skip=True, output_hook="mlp.hook_out", layers=[1, 2]),
}


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_removing_any_node_with_all_else_held_moves_targets_by_minus_the_edge(architecture, kind):
    model = tiny_bridge(architecture)
    before = hook_state(model)
    with tlc.attach(model, DICTIONARIES[kind](model)) as replacement:
        graph = tlc.attribute(replacement, prompt(12), max_nodes=60, progress=False)
        gap, _ = removal_gap(replacement, graph)
    # Float32, and each effect is the difference of two runs of the model.
    assert gap < 1e-3
    assert hook_state(model) == before


@pytest.mark.parametrize("kind", ["neurons", "jumprelu"])
@pytest.mark.parametrize("engine", ["linear", "autograd"])
def test_models_in_double_precision_are_traced_too(engine, kind):
    model = tiny_bridge("llama", torch.float64)
    with tlc.attach(model, DICTIONARIES[kind](model)) as replacement:
        graph = tlc.attribute(replacement, prompt(12), max_nodes=60, engine=engine, progress=False)
        gap, _ = removal_gap(replacement, graph)
    # As above: graphs are made in float32 whatever the model computes in.
    assert gap < 1e-3


@pytest.fixture(scope="module")
def replacement():
    model = own_bridge("gemma3")
    with tlc.attach(model, transcoders(model)) as attached:
        yield attached


def test_an_edit_of_a_cross_layer_feature_acts_at_every_layer_it_writes_to():
    model = tiny_bridge("llama")
    with tlc.attach(model, cross_layer(model)) as attached:
        graph = tlc.attribute(attached, prompt(), max_nodes=30, progress=False)
        row = graph.nodes.query("kind == 'feature' and layer == 0").iloc[0]
        result = tlc.intervene(
            attached, prompt(), tlc.Scale(0, int(row.position), int(row.feature), factor=-2.0), freeze="none"
        )

        def by_hand(acts, hook):
            acts[0, int(row.position), int(row.feature)] *= -2.0
            return acts

        with torch.no_grad():
            site = attached.site(0) + ".hook_sae_acts_post"
            expected = model.run_with_hooks(prompt()[None], fwd_hooks=[(site, by_hand)])[0]
            bare = model(prompt()[None])[0]
    assert torch.allclose(result.logits, expected, atol=1e-4) and not torch.allclose(expected, bare, atol=1e-3)


@pytest.fixture(scope="module")
def active(replacement):
    """Some active features: (layer, position, feature, activation)."""
    graph = tlc.attribute(replacement, prompt(), max_nodes=80, progress=False)
    frame = graph.nodes.query("kind == 'feature'").sort_values("influence", ascending=False)
    return list(frame[["layer", "position", "feature", "activation"]].itertuples(index=False, name=None))


SITE = "blocks.{}.hook_mlp_out.hook_sae_acts_post"


@pytest.mark.parametrize("freeze", ["attention", "none"])
def test_an_edit_is_what_a_hook_on_the_activations_written_by_hand_does(replacement, active, freeze):
    layer, position, feature, value = active[0]
    result = tlc.intervene(replacement, prompt(), tlc.Scale(layer, position, feature, factor=-2.0), freeze=freeze)

    def by_hand(acts, hook):
        acts[0, position, feature] *= -2.0
        return acts

    hooks = [(SITE.format(layer), by_hand)]
    if freeze == "attention":
        hooks += tlc.intervention_hooks(replacement, prompt(), [], freeze="attention")
    with torch.no_grad():
        expected = replacement.model.run_with_hooks(prompt()[None], fwd_hooks=hooks)[0]
    assert torch.allclose(result.logits, expected, atol=1e-4)
    assert (result.logits - result.baseline_logits).abs().max() > 1e-3


def test_hooks_given_out_do_what_intervene_does(replacement, active):
    edits = [tlc.Ablate(*active[0][:3]), tlc.Add(*active[1][:3], value=3.0)]
    for freeze in ("all", "attention", "none"):
        result = tlc.intervene(replacement, prompt(), edits, freeze=freeze)
        hooks = tlc.intervention_hooks(replacement, prompt(), edits, freeze=freeze)
        before = hook_state(replacement.model)
        with torch.no_grad():
            logits = replacement.model.run_with_hooks(prompt()[None], fwd_hooks=hooks)[0]
        assert torch.allclose(result.logits, logits, atol=1e-5)
        assert hook_state(replacement.model) == before


def test_set_scale_add_and_ablate_are_the_same_where_they_should_be(replacement, active):
    layer, position, feature, value = active[0]
    place = (layer, position, feature)
    pairs = [
        (tlc.Ablate(*place), tlc.Set(*place, value=0.0)),
        (tlc.Scale(*place, factor=3.0), tlc.Set(*place, value=3 * value)),
        (tlc.Add(*place, value=1.5), tlc.Set(*place, value=value + 1.5)),
        (tlc.Set(*place, value=value), tlc.Scale(*place, factor=1.0)),
    ]
    for one, other in pairs:
        a, b = tlc.intervene_many(replacement, prompt(), [one, other])
        assert torch.allclose(a.final, b.final, atol=1e-4)


def test_many_at_once_are_the_same_as_one_by_one(replacement, active):
    sets = [[tlc.Ablate(*a[:3])] for a in active[:12]] + [[], [tlc.ErrorEdit(1, 3), tlc.TokenEdit(2, 0.5)]]
    many = tlc.intervene_many(replacement, prompt(), sets, layers=None)
    for edits, together in zip(sets, many, strict=True):
        alone = tlc.intervene(replacement, prompt(), edits)
        assert torch.allclose(alone.logits, together.logits, atol=1e-4)
        assert alone.activations.shape == together.activations.shape
    assert torch.allclose(many[12].logits, many[12].baseline_logits, atol=1e-4)


def test_positions_can_be_one_several_a_slice_or_all(replacement, active):
    layer, _, feature, _ = active[0]

    def run(position):
        return tlc.intervene(replacement, prompt(), tlc.Set(layer, position, feature, value=2.0)).final

    assert torch.equal(run(slice(4, None)), run([4, 5, 6, 7, 8]))
    assert torch.equal(run(slice(-3, -1)), run([6, 7]))
    assert torch.equal(run(None), run(slice(None)))
    assert torch.equal(run(-1), run(8))


def test_a_patch_copies_the_other_prompts_activations(replacement, active):
    other = prompt(9, seed=11)
    layer, position = active[0][:2]
    width = replacement.dictionary.width(layer)
    result = tlc.intervene(replacement, prompt(), tlc.Patch(layer, position, range(width), source=other), freeze="none")
    _, cache = replacement.model.run_with_cache(other[None])
    theirs = cache[SITE.format(layer)][0, position]

    def by_hand(acts, hook):
        acts[0, position] = theirs
        return acts

    with torch.no_grad():
        expected = replacement.model.run_with_hooks(prompt()[None], fwd_hooks=[(SITE.format(layer), by_hand)])[0]
    assert torch.allclose(result.logits, expected, atol=1e-4)


def test_constrained_layers_hold_their_mlps(replacement, active):
    first = min(active, key=lambda a: a[0])
    layer = first[0]
    n = replacement.model.cfg.n_layers
    edit = tlc.Set(*first[:3], value=9.0)
    held = tlc.intervene(replacement, prompt(), edit, constrained_layers=range(n))
    direct = tlc.intervene(replacement, prompt(), edit, freeze="all")
    free = tlc.intervene(replacement, prompt(), edit)
    assert torch.allclose(held.final, direct.final, atol=1e-5)
    partly = tlc.intervene(replacement, prompt(), edit, constrained_layers=range(layer, n - 1))
    assert not torch.allclose(partly.final, direct.final, atol=1e-4)
    assert not torch.allclose(partly.final, free.final, atol=1e-4)


def test_results_say_what_changed(replacement, active):
    layer, position, feature, value = active[0]
    result = tlc.intervene(
        replacement, prompt(), tlc.Set(layer, position, feature, value=value + 8.0), layers=[layer, 3]
    )
    assert set(result.activations.layer) == {layer, 3}
    top = result.top(5)
    assert (top[["before", "after"]].max(axis=1).diff().dropna() <= 1e-6).all()
    assert top.before.max() == pytest.approx(float(result.baseline_logits[-1].softmax(-1).max()), rel=1e-4)
    before, after = result.logit_difference("w1", "w2")
    ids = [4, 5]
    assert before == pytest.approx(
        float(result.baseline_logits[-1, ids[0]] - result.baseline_logits[-1, ids[1]]), abs=1e-4
    )
    assert after == pytest.approx(float(result.logits[-1, ids[0]] - result.logits[-1, ids[1]]), abs=1e-4)
    p, q = (x[-1].log_softmax(-1) for x in (result.baseline_logits, result.logits))
    assert result.kl() == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5) and result.kl() > 0
    assert "<table" in result._repr_html_() and result.__rich__().row_count >= 5


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([tlc.Ablate(9, 1, 1)], r"layer 9 is not in 0\.\.3"),
        ([tlc.Ablate(0, 1, 40)], r"feature 40 is not in 0\.\.39 of layer 0"),
        ([tlc.Ablate(0, 9, 1)], r"there is no position 9: positions are -9\.\.8"),
        ([tlc.Ablate(0, slice(9, None), 1)], "after the prompt"),
        ([tlc.Set(0, 1, 1, value=math.nan)], "finite"),
        ([tlc.Scale(0, 1, 1, factor=math.inf)], "finite"),
        ([tlc.Ablate(0, 1, 1), tlc.Set(0, [1, 2], 1, value=2.0)], "changes the same place"),
        (["L0/F1@2"], "an edit is"),
        ([tlc.Patch(0, 8, 1, source=[1, 2])], "2 tokens"),
    ],
)
def test_bad_edits_are_named_and_the_model_is_left_alone(replacement, edits, message):
    before = hook_state(replacement.model)
    with pytest.raises(EditError, match=message):
        tlc.intervene(replacement, prompt(), edits)
    assert hook_state(replacement.model) == before


@pytest.mark.parametrize(("freeze", "constrained"), [("attention", ()), ("all", ()), ("none", (1,))])
def test_holding_values_of_a_run_that_was_not_made_is_refused(replacement, freeze, constrained):
    plan = make_plan(replacement.model, replacement.dictionary, [[tlc.Ablate(0, 8, 1)]], 9, 9)
    with pytest.raises(EditError, match="clean is None"):
        edit_hooks(replacement, plan, None, freeze, constrained)


def test_layers_without_a_dictionary_and_unknown_modes_are_refused():
    model = tiny_bridge("llama")
    with tlc.attach(model, transcoders(model, layers=[1])) as partly:
        with pytest.raises(EditError, match="layer 0 has no dictionary"):
            tlc.intervene(partly, prompt(), tlc.Ablate(0, 1, 1))
        with pytest.raises(EditError, match="freeze must be one of"):
            tlc.intervene(partly, prompt(), [], freeze="everything")
        with pytest.raises(EditError, match="constrained layer 7"):
            tlc.intervene(partly, prompt(), [], constrained_layers=[7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_of_half_precision_models_do_what_they_do_in_float32(dtype):
    changes = []
    for model in (tiny_bridge("llama", dtype), tiny_bridge("llama")):
        with tlc.attach(model, transcoders(model)) as replacement:
            result = tlc.intervene(replacement, prompt(), tlc.Set(1, 4, 3, value=20.0))
        changes.append((result.logits - result.baseline_logits).float())
    half, whole = changes
    assert (half - whole).abs().max() < 0.1 * whole.abs().max()  # eight bits through three layers
    assert result.kl() > 0


def test_a_run_that_fails_leaves_no_hook(replacement, monkeypatch):
    before = hook_state(replacement.model)
    monkeypatch.setattr(replacement.dictionary, "activations_at", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tlc.intervene(replacement, prompt(), tlc.Ablate(0, 1, 1))
    assert hook_state(replacement.model) == before


def at_position_seven(tensor, hook):
    moved = tensor.clone()
    moved[0, 7] += 1.0  # of the first row of a batch, as prompts are usually run
    return moved


def test_hooks_of_the_users_own_may_name_positions_and_rows(own_hooks):
    replacement, text = own_hooks
    replacement.model.add_hook("blocks.1.hook_mlp_out", at_position_seven)
    edits = [tlc.TokenEdit(7, 0.5), tlc.TokenEdit(4, 0.5)]
    one_by_one = [tlc.intervene(replacement, text, edit, freeze="attention") for edit in edits]
    together = tlc.intervene_many(replacement, text, [[edit] for edit in edits], freeze="attention")
    for alone, of_many in zip(one_by_one, together, strict=True):
        assert torch.equal(alone.logits, of_many.logits)
    tokens = tlc.hooks.to_tokens(replacement.model, text)
    hooks = [("hook_embed", lambda x, hook: torch.cat([x[:, :7], 0.5 * x[:, 7:8], x[:, 8:]], 1))]
    plain = replacement.model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]
    ours = tlc.intervene(replacement, text, edits[0], freeze="none").logits
    assert torch.allclose(ours, plain, atol=1e-4)  # float32, another order of sums
    assert tlc.attribute(replacement, text, max_nodes=20, progress=False).completeness_error() < 1e-4


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (lambda x, hook: x.clamp(-0.1, 0.1), "is not linear"),
        (lambda x, hook: x[:, :5], "a test run of three copies of the prompt failed"),
    ],
)
def test_hooks_that_cannot_be_held_are_named_also_if_they_come_later(own_hooks, hook, reason):
    replacement, text = own_hooks
    tlc.attribute(replacement, text, max_nodes=5, progress=False)
    replacement.model.add_hook("blocks.1.hook_attn_out", hook)
    for engine in ("linear", "autograd"):
        with pytest.raises(ArchitectureError, match=rf"{reason}.*blocks\.1\.(hook_attn_out|attn\.hook_out)"):
            tlc.attribute(replacement, text, max_nodes=5, engine=engine, progress=False)
    replacement.model.reset_hooks()
    tlc.attribute(replacement, text, max_nodes=5, progress=False)


def test_a_hook_that_is_put_back_is_proved_anew(own_hooks):
    replacement, text = own_hooks
    most = [1e9]

    def clamp(x, hook):
        return x.clamp(-most[0], most[0])

    replacement.model.add_hook("blocks.1.hook_attn_out", clamp)
    tlc.attribute(replacement, text, max_nodes=5, progress=False)
    replacement.model.reset_hooks()
    most[0] = 0.1
    replacement.model.add_hook("blocks.1.hook_attn_out", clamp)
    with pytest.raises(ArchitectureError, match="is not linear"):
        tlc.attribute(replacement, text, max_nodes=5, progress=False)


@pytest.fixture
def own_hooks():
    model = tlc.load_model("tiny-facts")
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        yield replacement, "the capital of the state containing Dallas is"
    model.reset_hooks()


@pytest.mark.parametrize("given", [None, tlc.Ablate, "L1/F2@3 = 0", 5])
def test_what_is_no_edit_is_refused_in_one_line(own_hooks, given):
    replacement, text = own_hooks
    for use in (tlc.intervene, tlc.generate, tlc.intervention_hooks):
        with pytest.raises(ArgumentError, match=r"edits are an edit, such as .* got "):
            use(replacement, text, given)


@pytest.mark.parametrize(
    "edit", [tlc.Ablate(0, 7, []), tlc.Ablate(0, [], 1), tlc.Set(0, 7, torch.tensor([]).long(), 1.0)]
)
def test_an_edit_that_names_nothing_is_refused(own_hooks, edit):
    with pytest.raises(EditError, match="names no (feature|position)"):
        tlc.intervene(*own_hooks, edit)


def test_a_compiled_model_is_refused_by_name():
    model = tlc.load_model("tiny-facts")
    with pytest.raises(ArgumentError, match="torch.compile wrapped"):
        tlc.attach(torch.compile(model), tlc.mlp_neurons(model))
