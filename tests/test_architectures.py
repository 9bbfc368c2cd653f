"""Many architectures against the plain Hugging Face model: right, or refused by name."""

from dataclasses import replace

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import tl_circuits as tlc
from tests import plain, zoo
from tests.accelerator import DEVICE
from tests.against_plain import FACTOR, TARGETS, TOKENS, WHERE, WITHIN, compare, effect_error, relative
from tests.tiny import transcoders
from tl_circuits.attribution.check_sums import require_sums
from tl_circuits.errors import (
    ArchitectureError,
    DictionaryError,
    EditError,
    NotFiniteError,
    TLCircuitsError,
    UnknownHookError,
)

# One of each kind: patterns that ignore hooks; gains of another form, or none; norms inside attention; norms
# behind the blocks; no denominators to see; scaled residuals and logits; one norm for attention and MLP;
# the stream inside the MLP's module; no module for the MLP; a norm behind the sum; norms inside the MLP's branch.
RIGHT = [
    "gptj",
    "gptneo",
    "nemotron",
    "olmo",
    "deepseek3",
    "olmo2",
    "gemma4",
    "granite",
    "phi",
    "bloom",
    "opt",
    "openaigpt",
]
RIGHT += ["gemma4moe", "bitnet"]
REFUSED = {
    "hunyuan": "computes something else than the Hugging Face module",
    "cohere": "computes something else than the Hugging Face module",
    "afmoe": "layer 0 is not linear in the stream that enters it",
    "gemma4perlayer": "layer 0 is not linear in the stream that enters it",
    "jamba": "layer 1 shows no attention pattern",
    "mamba": "layer 0 has no MLP",
    "nanochat": "ln_final.hook_scale' with 2 firings",
}


def bridge(name):
    return TransformerBridge.boot_transformers(zoo.folder(name), device=DEVICE, dtype=torch.float32).eval()


def hugging_face(name):
    return AutoModelForCausalLM.from_pretrained(
        zoo.folder(name), attn_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("name", RIGHT)
def test_effects_and_held_interventions_are_the_plain_models(name):
    found = compare(zoo.folder(name))
    assert found.held is not None and found.held < WITHIN, found
    assert "autograd" in found.effects and max(found.effects.values()) < WITHIN, found


def halved(model, freeze):
    with tlc.attach(model, transcoders(model)) as replacement:
        return tlc.intervene(replacement, TOKENS, tlc.TokenEdit(WHERE, FACTOR), freeze=freeze).logits


def hooks_on(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {name: [len(getattr(m, kind)) for kind in kinds] for name, m in module.named_modules()}


def layers_model(name, change):
    """A bridge and the plain model, with a module of each block changed before TransformerLens opened it."""
    models = [hugging_face(name), hugging_face(name)]
    for model in models:
        torch.manual_seed(3)
        for block in plain.layers_of(model):
            change(block)
    opened = TransformerBridge.boot_transformers(zoo.folder(name), hf_model=models[0].to(DEVICE), device=DEVICE)
    return opened.eval(), models[1].eval()


class NormedExperts(torch.nn.Module):
    """Experts that norm what is routed to them."""

    def __init__(self, experts, each):
        super().__init__()
        self.experts, self.each = experts, each
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(32) for _ in range(4 if each else 1))

    def forward(self, x, index, weights):
        if not self.each:  # one norm, over the rows that each expert gets, expert by expert
            order = index[:, 0].argsort(stable=True)
            return self.experts(self.norms[0](x[order])[order.argsort()], index, weights)
        out = torch.zeros_like(x)
        for expert, norm in enumerate(self.norms):
            rows = (index == expert).any(-1).nonzero()[:, 0]
            if rows.numel():
                own = weights[rows] * (index[rows] == expert)
                out[rows] += self.experts(norm(x[rows]), index[rows], own)
        return out


@pytest.mark.parametrize("freeze", ["all", "none"])
@pytest.mark.parametrize("name", ["gemma4moe", "bitnet"])
def test_norms_inside_mlps_are_the_plain_models_however_much_is_held(name, freeze):
    reference = hugging_face(name)
    theirs = plain.edited_token(reference, TOKENS, WHERE, FACTOR, freeze)
    with torch.no_grad():
        before = reference(TOKENS[None], use_cache=False).logits[0]
    assert (halved(bridge(name), freeze) - theirs).abs().max() < WITHIN * (theirs - before).abs().max()


@pytest.mark.parametrize("name", ["gemma4moe", "bitnet"])
def test_no_hook_on_a_norm_inside_an_mlp_outlives_its_attachment(name):
    model = bridge(name)
    with torch.no_grad():
        model(TOKENS[None])  # TransformerLens puts hooks of its own on a model that runs for the first time
    before, points = hooks_on(model), set(model.hook_dict)
    halved(model, "attention")
    assert hooks_on(model) == before and set(model.hook_dict) == points
    with pytest.raises(UnknownHookError):
        tlc.attach(model, transcoders(model, input_hook="ln2.hook_nothing"))
    with tlc.attach(model, transcoders(model)) as replacement, pytest.raises(EditError):
        tlc.intervene(replacement, TOKENS, tlc.TokenEdit(99), freeze="attention")
    assert hooks_on(model) == before and set(model.hook_dict) == points


def test_a_norm_that_ignores_what_holds_it_is_refused():
    model = bridge("gemma4moe")

    def own_output(module, args, output):  # put on first, so that it has what the norm itself computed
        computed.append(output)

    def undone(module, args, output):
        return computed.pop()

    computed = []
    norm = model.blocks[1].router.original_component.norm
    norm.register_forward_hook(own_output)
    with tlc.attach(model, transcoders(model)) as replacement:
        norm.register_forward_hook(undone)
        with pytest.raises(ArchitectureError, match="blocks.1.router.norm does not keep its denominator"):
            tlc.intervene(replacement, TOKENS, tlc.TokenEdit(WHERE, FACTOR), freeze="attention")


@pytest.mark.parametrize("each", [True, False])
def test_norms_of_what_is_routed_to_an_expert_are_refused_where_they_would_have_to_be_held(each):
    def change(block):
        block.mlp.experts = NormedExperts(block.mlp.experts, each)

    model, reference = layers_model("qwen3moe", change)
    with pytest.raises(EditError, match="blocks.0.*freeze='attention' cannot.*use freeze='all'.*or freeze='none'"):
        halved(model, "attention")
    with torch.no_grad():
        before = reference(TOKENS[None], use_cache=False).logits[0]
    for freeze in ("all", "none"):
        theirs = plain.edited_token(reference, TOKENS, WHERE, FACTOR, freeze)
        assert (halved(model, freeze) - theirs).abs().max() < WITHIN * (theirs - before).abs().max()
    for engine in ("linear", "autograd"):
        assert effect_error(model, reference, engine) < WITHIN


def test_a_norm_between_an_mlps_matrices_is_held_wherever_it_was_put():
    def change(block):
        norm = torch.nn.LayerNorm(48)
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        block.mlp.act_fn = torch.nn.Sequential(block.mlp.act_fn, norm)

    model, reference = layers_model("llama", change)
    theirs = plain.edited_token(reference, TOKENS, WHERE, FACTOR)
    with torch.no_grad():
        before = reference(TOKENS[None], use_cache=False).logits[0]
    assert (halved(model, "attention") - theirs).abs().max() < WITHIN * (theirs - before).abs().max()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(name):
    found = compare(zoo.folder(name))
    assert not found.effects and found.held is None, found
    assert set(found.refused) == {"linear", "autograd", "held"}
    assert all(REFUSED[name] in reason for reason in found.refused.values()), found


@pytest.mark.parametrize("name", ["gptj", "bloom", "nemotron"])
def test_an_edited_pattern_is_the_plain_models_with_all_else_held(name):
    layer, head, query, key, value = 1, 2, 5, 3, 0.9
    reference = hugging_face(name)
    with torch.no_grad(), plain.Held() as clean:
        reference(TOKENS[None], use_cache=False)
    squares = [i for i, v in enumerate(clean.values) if v.ndim == 4 and v.shape[-1] == v.shape[-2]]
    values = list(clean.values)
    edited = values[squares[layer]].clone()
    edited[0, head, query, key] = value
    values[squares[layer]] = edited
    with torch.no_grad(), plain.Held(values):
        theirs = reference(TOKENS[None], use_cache=False).logits[0]
    with tlc.attach(bridge(name), transcoders(bridge(name))) as replacement:
        edit = tlc.PatternEdit(layer, head, query, key, value)
        result = tlc.intervene(replacement, TOKENS, edit, freeze="attention")
    assert relative(result.logits, theirs) < WITHIN
    assert (result.logits[query] - result.baseline_logits[query]).abs().max() > 1e-3


def test_edits_of_patterns_that_a_model_ignores_are_refused_where_nothing_is_held():
    model = bridge("gptj")
    with tlc.attach(model, transcoders(model)) as replacement:
        for edit in (tlc.PatternEdit(1, 0, 5, 3, 0.9), tlc.ScoreEdit(1, 0, 5, 3, 2.0)):
            with pytest.raises(EditError, match="ignores (patterns|scores) that a hook returns.*freeze='attention'"):
                tlc.intervene(replacement, TOKENS, edit, freeze="none")
            assert tlc.intervene(replacement, TOKENS, edit, freeze="attention").kl() > 1e-6


@pytest.mark.parametrize("name", ["gptj", "gptneo"])
def test_a_first_prompt_of_one_token_proves_nothing_about_the_next(name):
    model = bridge(name)
    with tlc.attach(model, transcoders(model)) as replacement:
        tlc.attribute(replacement, TOKENS[:1], targets=[5], skip_positions=[], progress=False)
        assert tlc.intervene(replacement, TOKENS, tlc.PatternEdit(1, 2, 5, 4, 0.9)).kl() > 1e-6


def test_a_dictionary_on_the_stream_itself_is_proved_like_any_other():
    model = bridge("gptj")
    with tlc.attach(model, transcoders(model, input_hook="hook_resid_pre")) as replacement:
        graphs = [
            tlc.attribute(replacement, TOKENS, targets=[5], engine=e, progress=False) for e in ("linear", "autograd")
        ]
        assert tlc.intervene(replacement, TOKENS, tlc.PatternEdit(1, 2, 5, 4, 0.9)).kl() > 1e-6
    assert relative(graphs[1].adjacency(), graphs[0].adjacency()) < WITHIN


def test_weights_processed_after_a_first_trace_are_read_anew():
    model, seen = bridge("llama"), []
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        tlc.attribute(replacement, TOKENS, targets=[5], max_nodes=5, progress=False)
        before = replacement.mean_unembedding[0]
        model.process_weights(fold_ln=False)
        seen.append(replacement.mean_unembedding[0])
    assert not torch.equal(before, seen[0])
    assert torch.allclose(seen[0], model.W_U.float().mean(1), atol=1e-6)  # the same sum


def test_sets_that_read_behind_the_mlp_they_replace_are_refused():
    model = bridge("olmo2")
    for hook in ("ln2.hook_out", "ln2.hook_normalized"):
        with pytest.raises(UnknownHookError, match="a transcoder can read"):
            tlc.attach(model, transcoders(model, input_hook=hook))


def test_a_set_that_reads_a_norm_laid_flat_is_refused_in_our_words():
    model = bridge("opt")
    with tlc.attach(model, transcoders(model, input_hook="ln2.hook_normalized")) as replacement:
        with pytest.raises(TLCircuitsError):
            tlc.attribute(replacement, TOKENS, progress=False)


@pytest.mark.parametrize("option", ["use_split_qkv_input", "use_attn_in"])
def test_options_that_fork_the_stream_are_refused_and_right_again_without(option):
    model = tlc.load_model("tiny-facts")
    prompt, edit = "the capital of the state containing Dallas is", tlc.Scale(0, 7, 308, factor=-4.0)
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        before = tlc.intervene(replacement, prompt, edit).kl()
        getattr(model, f"set_{option}")(True)
        for engine in ("linear", "autograd"):
            with pytest.raises(ArchitectureError, match=rf"{option} is on.*set_{option}\(False\)"):
                tlc.attribute(replacement, prompt, engine=engine, progress=False)
        with pytest.raises(ArchitectureError, match=f"{option} is on"):
            tlc.intervene(replacement, prompt, edit)
        getattr(model, f"set_{option}")(False)
        assert tlc.intervene(replacement, prompt, edit).kl() == pytest.approx(before)


def test_a_site_that_holds_the_residual_stream_is_refused():
    model = bridge("bloom")
    with tlc.attach(model, transcoders(model, output_hook="mlp.hook_out")) as replacement:
        for engine in ("linear", "autograd"):
            with pytest.raises(ArchitectureError, match="mlp.hook_out is not this model's MLP output.*hook_mlp_out"):
                tlc.attribute(replacement, TOKENS, engine=engine, progress=False)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "opt", "nemotron"])
def test_neurons_are_the_modules_own_whatever_the_config_calls_them(name):
    model = bridge(name)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, TOKENS, targets=TARGETS, skip_positions=[], max_nodes=5, progress=False)
    tokens, _, _ = plain.effects(hugging_face(name), TOKENS, TARGETS)
    row = graph.adjacency()[-len(TARGETS)]
    assert relative(row[graph.is_kind("embedding")], tokens[0]) < WITHIN


@pytest.mark.parametrize("fold", ["enable_compatibility_mode", "process_weights"])
def test_a_folded_bridge_is_refused_for_sets_that_want_the_gain_and_takes_neurons(fold):
    model = tlc.load_model("tiny-facts")
    prompt = "the capital of the state containing Dallas is"
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        tlc.attribute(replacement, prompt, max_nodes=5, progress=False)
        getattr(model, fold)()
        with pytest.raises(DictionaryError, match="folded into its weights"):
            tlc.attribute(replacement, prompt, max_nodes=5, progress=False)
    with pytest.raises(DictionaryError, match="norm's gain applied.*folded into its weights"):
        tlc.attach(model, tlc.load_transcoders("tiny-facts"))
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        assert tlc.attribute(replacement, prompt, max_nodes=20, progress=False).completeness_error() < 1e-4


def test_a_bridge_whose_weights_were_processed_with_the_gains_kept_takes_sets_that_want_them():
    model = tlc.load_model("tiny-facts")
    model.process_weights(fold_ln=False)
    with tlc.attach(model, tlc.load_transcoders("tiny-facts")) as replacement:
        graph = tlc.attribute(replacement, "the capital of Texas is", max_nodes=20, progress=False)
    assert graph.completeness_error() < 1e-4


@pytest.mark.parametrize("name", ["granite", "gemma2"])
def test_target_values_are_the_plain_models_centred_logits(name):
    model = bridge(name)
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, TOKENS, targets=TARGETS, skip_positions=[], max_nodes=5, progress=False)
    *_, logits = plain.effects(hugging_face(name), TOKENS, TARGETS)
    values = graph._nodes.value[graph.is_kind("logit")]
    assert torch.allclose(values, logits[TARGETS], atol=1e-4, rtol=1e-4)  # float32 sums over three layers


def hooked(**changes):
    settings = dict(
        n_layers=2,
        d_model=32,
        n_ctx=64,
        d_head=8,
        n_heads=4,
        d_vocab=320,
        d_mlp=48,
        act_fn="gelu_new",
        seed=0,
        device=DEVICE,
    )
    model = HookedTransformer(HookedTransformerConfig(**settings | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("changes", [{"normalization_type": None}, {"positional_embedding_type": "alibi"}])
def test_hooked_transformers_of_other_forms_are_held_to_their_own_gradients(changes):
    model, leaves = hooked(**changes), {}

    def leaf(name):
        def hook(module, args, out):
            leaves[name] = out.detach().clone().requires_grad_()
            return leaves[name].clone()

        return hook

    points = {"tokens": model.blocks[0].hook_resid_pre} | {i: b.hook_mlp_out for i, b in enumerate(model.blocks)}
    handles = [point.register_forward_hook(leaf(name)) for name, point in points.items()]
    with plain.Held(), torch.enable_grad():
        logits = model(TOKENS[None])[0, -1]
        gradient = torch.autograd.grad(logits[5] - logits.mean(), leaves["tokens"])[0]
    for handle in handles:
        handle.remove()
    theirs = (gradient * leaves["tokens"])[0].sum(-1).detach()
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        for engine in ("linear", "autograd"):
            graph = tlc.attribute(
                replacement, TOKENS, targets=[5], engine=engine, skip_positions=[], max_nodes=5, progress=False
            )
            row = graph.adjacency()[-1]
            assert relative(row[graph.is_kind("embedding")], theirs) < WITHIN, engine


def test_the_norm_inside_a_hooked_transformers_mlp_is_held():
    model = hooked(act_fn="solu_ln")

    def halve(module, args, out):
        out = out.clone()
        out[:, WHERE] *= FACTOR
        return out

    with torch.no_grad(), plain.Held() as clean:
        before = model(TOKENS[None])[0]
    handle = model.blocks[0].hook_resid_pre.register_forward_hook(halve)
    with torch.no_grad(), plain.Held(clean.values):
        theirs = model(TOKENS[None])[0]
    handle.remove()
    assert (halved(model, "attention") - theirs).abs().max() < WITHIN * (theirs - before).abs().max()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_dir": "bidirectional"}, "layer 0 attends to later positions"),
        ({"attn_only": True, "act_fn": None, "d_mlp": None}, "layer 0 has no MLP"),
        ({"act_fn": "solu_ln"}, "activation 'solu_ln' is not one of"),
        ({"use_split_qkv_input": True}, "use_split_qkv_input is on"),
    ],
)
def test_hooked_transformers_that_cannot_be_explained_say_why(changes, reason):
    model = hooked(**changes)
    for engine in ("linear", "autograd"):
        with pytest.raises(ArchitectureError, match=reason):
            with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
                tlc.attribute(replacement, TOKENS, engine=engine, progress=False)


def test_targets_without_any_probability_are_explained_all_the_same():
    model = hooked(normalization_type=None)
    with torch.no_grad():
        model.unembed.W_U.mul_(1e4)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, TOKENS, targets=TARGETS, max_nodes=5, progress=False)
    assert set(graph.info.target_probabilities) == {0.0}
    assert int(graph.is_kind("feature").sum()) == 5


def test_a_huge_first_position_hides_no_error_at_another():
    model = hooked(positional_embedding_type="rotary", rotary_dim=8)
    with torch.no_grad():
        model.embed.W_E[int(TOKENS[0])] *= 1e4
        model.blocks[1].attn.b_O.zero_()

    def off_at_another(out, hook):
        out = out.clone()
        out[:, 3] *= 1.05
        return out

    model.add_hook("blocks.1.hook_attn_out", off_at_another)
    with (
        tlc.attach(model, tlc.mlp_neurons(model)) as replacement,
        pytest.raises(ArchitectureError, match="attention of layer 1"),
    ):
        tlc.attribute(replacement, TOKENS, engine="linear", progress=False)


def test_a_users_hook_on_attention_is_no_fault_of_transformer_lens():
    model = bridge("llama")
    model.add_hook("blocks.1.hook_attn_out", lambda out, hook: 2.0 * out)
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, TOKENS, max_nodes=5, progress=False)
    assert graph.info.engine == "autograd" and graph.completeness_error() < 1e-4


@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_out", "attn", "attn.o"])
@pytest.mark.parametrize("name", ["hunyuan", "cohere2"])
def test_a_hook_that_only_looks_does_not_switch_off_the_comparison_with_hugging_face(name, point):
    model = bridge(name)
    for block in model.blocks:
        module = block.get_submodule(point)
        if "hook_" in point:
            module.add_hook(lambda tensor, hook: None)
        else:
            module.register_forward_hook(lambda module, args, output: None)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement, pytest.raises(ArchitectureError, match="off by"):
        tlc.attribute(replacement, TOKENS, progress=False)


@pytest.mark.parametrize("options", [{}, {"fold_ln": False}])
@pytest.mark.parametrize("name", ["gpt2", "neox", "falconalibi", "mpt", "phi3"])
def test_bridges_with_one_matrix_for_attention_are_right_once_their_weights_are_processed(name, options):
    model, reference = bridge(name), hugging_face(name)
    model.enable_compatibility_mode(disable_warnings=True, **options)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, TOKENS, targets=TARGETS, skip_positions=[], max_nodes=20, progress=False)
    expected, _, _ = plain.effects(reference, TOKENS, TARGETS)
    nodes, rows = graph.nodes, graph.adjacency()
    tokens = nodes.kind.eq("embedding").to_numpy()
    for target, right in zip(TARGETS, expected, strict=True):
        row = rows[int((nodes.kind.eq("logit") & nodes.feature.eq(target)).to_numpy().argmax())]
        assert relative(row[torch.tensor(tokens)], right) < WITHIN


@pytest.mark.parametrize("point", ["attn.hook_z", "attn.q.hook_out", "attn.o.hook_in", "attn.v.hook_out"])
@pytest.mark.parametrize("name", ["llama", "neox", "gptoss", "gpt2"])
def test_a_linear_hook_within_attention_is_no_fault_of_transformer_lens(name, point):
    model = bridge(name)
    model.add_hook(f"blocks.1.{point}", lambda x, hook: 0.5 * x)
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, TOKENS, max_nodes=20, progress=False)
    assert graph.completeness_error() < 1e-4


def test_processed_weights_that_hugging_faces_matrix_cannot_hold_are_refused_by_name():
    model = bridge("falcon")
    model.enable_compatibility_mode(disable_warnings=True)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement, pytest.raises(ArchitectureError) as raised:
        tlc.attribute(replacement, TOKENS, progress=False)
    assert "without enable_compatibility_mode()" in str(raised.value)


def test_processed_attention_that_differs_from_hugging_faces_is_still_refused():
    model = bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    attention = model.blocks[1].attn
    whole = attention.forward
    attention.forward = lambda *args, **kwargs: tuple(
        1.1 * x if i == 0 else x for i, x in enumerate(whole(*args, **kwargs))
    )
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement, pytest.raises(ArchitectureError, match="off by 9"):
        tlc.attribute(replacement, TOKENS, progress=False)


def test_logits_that_the_unembedding_does_not_make_are_refused():
    model = bridge("llama")
    model.add_hook("unembed.hook_out", lambda logits, hook: logits + 0.1 * logits.roll(1, -1))
    with tlc.attach(model, transcoders(model)) as replacement:
        for engine in ("linear", "autograd"):
            with pytest.raises(ArchitectureError, match="W_U and b_U make other logits than the model's own"):
                tlc.attribute(replacement, TOKENS, engine=engine, progress=False)


def test_logits_beyond_floating_point_are_named():
    model = hooked(normalization_type=None)
    with torch.no_grad():
        model.embed.W_E.mul_(1e3)
        model.unembed.W_U.mul_(1e38)
    with (
        tlc.attach(model, tlc.mlp_neurons(model)) as replacement,
        pytest.raises(NotFiniteError, match="logits hold NaN or infinity"),
    ):
        tlc.attribute(replacement, TOKENS, targets=TARGETS, progress=False)


def test_neurons_that_do_not_make_the_mlps_output_are_refused():
    model = bridge("llama")
    model.add_hook("blocks.1.hook_mlp_out", lambda out, hook: 1.5 * out)
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        for engine in ("linear", "autograd"):
            with pytest.raises(ArchitectureError, match="layer 1: the neurons rebuild the MLP's output only to 33.3%"):
                tlc.attribute(replacement, TOKENS, engine=engine, progress=False)


def test_a_graph_that_does_not_add_up_is_not_returned():
    model = bridge("llama")
    with tlc.attach(model, transcoders(model)) as replacement:
        graph = tlc.attribute(replacement, TOKENS, max_nodes=20, progress=False)
    require_sums(graph, torch.float32)
    wrong = graph._nodes.bias.clone()
    wrong[3] += 0.01 * graph._nodes.value[3].abs() + 0.01
    with pytest.raises(ArchitectureError, match=f"does not add up: edges and bias of {graph.node_ids[3]} sum to"):
        require_sums(replace(graph, _nodes=replace(graph._nodes, bias=wrong)), torch.float32)


def test_halving_a_token_is_what_the_plain_model_does_with_nothing_held():
    name = "gptneo"
    model, reference = bridge(name), hugging_face(name)

    def before(module, args, kwargs):
        x = args[0].clone()
        x[:, WHERE] *= FACTOR
        return (x, *args[1:]), kwargs

    handle = plain.layers_of(reference)[0].register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        theirs = reference(TOKENS[None], use_cache=False).logits[0]
    handle.remove()
    with tlc.attach(model, transcoders(model)) as replacement:
        ours = tlc.intervene(replacement, TOKENS, tlc.TokenEdit(WHERE, FACTOR), freeze="none").logits
    assert relative(ours, theirs) < WITHIN
