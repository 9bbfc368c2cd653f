"""Several dictionaries in one layer, as in sparse feature circuits: sums, engines, brute force, and the plain model."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import tl_circuits as tlc
from tests.browser import tab, wait_until
from tests.oracles import removal_gap
from tests.sites import autoencoders, plain_effects, several
from tests.tiny import hook_state, prompt, tiny_bridge, tiny_folder, transcoders
from tl_circuits.errors import BelongingError, DictionaryError, EditError, ExportError, NeuronpediaError, TargetError
from tl_circuits.interventions.faithfulness import predicted_effects
from tl_circuits.view.story import story_of

# float32 sums over a few hundred terms and a handful of layers: a few units in the last place.
SUMS, AGREE, MEASURED = 1e-4, 1e-4, 1e-3
MODELS = ("gpt2", "llama", "gemma2", "neox")
FEATURE_CIRCUITS = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")  # those of Marks et al. 2025
EVERYWHERE = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
WHERE = {
    "stream, attention and MLP": lambda model: several(model, *FEATURE_CIRCUITS),
    "every site": lambda model: several(model, *EVERYWHERE),
    "heads, transcoder and stream": lambda model: tlc.load_dictionary(
        [several(model, {1: "attn.hook_z"}, {1: "hook_resid_pre"}), transcoders(model, layers=[1], skip=True)]
    ),
    "heads and what they add": lambda model: several(model, "attn.hook_z", "hook_attn_out"),
    "a mix over layers": lambda model: tlc.load_dictionary(
        [
            several(model, {0: "hook_mlp_out", 2: "attn.hook_z"}, {0: "hook_attn_out"}),
            tlc.mlp_neurons(model, layers=[2]),
        ]
    ),
}


def both(replacement, max_nodes=40, **options):
    return [
        tlc.attribute(replacement, prompt(), max_nodes=max_nodes, engine=e, progress=False, **options)
        for e in ("linear", "autograd")
    ]


def assert_agree(linear, autograd):
    assert linear.info.engine == "linear" and autograd.info.engine == "autograd"
    assert linear.completeness_error() < SUMS and autograd.completeness_error() < SUMS
    assert linear.node_ids == autograd.node_ids
    ours, reference = linear.adjacency(), autograd.adjacency()
    # Relative to the largest edge into the same target: entries near zero are differences of large ones.
    assert ((ours - reference).abs() / reference.abs().amax(1, keepdim=True).clamp_min(1e-12)).max() < AGREE
    total = reference.new_tensor(autograd.nodes.total_effect)
    assert (total - ours.new_tensor(linear.nodes.total_effect)).abs().max() < AGREE * total.abs().max()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("architecture", MODELS)
def test_edges_add_up_engines_agree_and_every_removal_is_minus_its_edges(architecture, where):
    model = tiny_bridge(architecture)
    with tlc.attach(model, WHERE[where](model)) as replacement:
        linear, autograd = both(replacement)
        assert_agree(linear, autograd)
        gap, count = removal_gap(replacement, linear)  # brute force: the model itself, everything held
    assert gap < MEASURED and count > 20
    own = linear.nodes[linear.nodes.kind.isin(["feature", "error"])]
    assert {*zip(own.layer, own.site, strict=True)} <= {
        (place.layer, place.site) for place in replacement.dictionary.places
    }
    assert {*own.site} - {""} <= {*linear.info.sites} and len({*own.site}) > 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["stream, attention and MLP", "every site", "heads and what they add"])
def test_edges_are_those_of_the_plain_model_differentiated_with_the_same_things_held(architecture, where):
    """The reference shares no code with the package: Hugging Face modules, PyTorch's autograd, formulas of the
    tests."""
    model = tiny_bridge(architecture)
    reference = (
        AutoModelForCausalLM.from_pretrained(tiny_folder(architecture), attn_implementation="eager").float().eval()
    )
    dictionary = WHERE[where](model)
    with tlc.attach(model, dictionary) as replacement:
        graph = tlc.attribute(replacement, prompt(), [5, 17], max_nodes=400, progress=False)
    rows, frame = graph.adjacency(), graph.nodes

    def named(row):
        return {
            "embedding": ("token", row.position),
            "error": ("error", (row.layer, row.site), row.position),
            "logit": "a logit",
            "feature": ((row.layer, row.site), row.position, row.feature),
        }[row.kind]

    names = [named(row) for row in frame.itertuples()]
    deep = [frame[(frame.kind == "feature") & (frame.site == site)].index[-1] for site in graph.info.sites]
    places = [*frame[frame.kind == "logit"].index, *deep]
    found = plain_effects(reference, dictionary, prompt(), [("logit", 5), ("logit", 17), *(names[i] for i in deep)])
    for row, (effects, value) in zip(places, found, strict=True):
        assert abs(frame.value[row] - value) < 1e-4 * max(1.0, abs(value))  # another order of float32 sums
        expected = torch.tensor([effects.get(name, 0.0) for name in names])
        assert (rows[row] - expected).abs().max() < AGREE * expected.abs().max()
        assert expected.abs().sum() > 0


def test_attention_output_reads_what_the_heads_features_and_errors_write():
    """Where both are rebuilt, a feature of what attention adds has edges from its own layer's heads and from nothing
    else."""
    model = tiny_bridge("llama")
    with tlc.attach(model, several(model, "attn.hook_z", "hook_attn_out")) as replacement:
        graph, _ = both(replacement)
    out = graph.nodes[(graph.nodes.kind == "feature") & (graph.nodes.site == "attn_out")]
    rows = graph.edges[graph.edges.target.isin(out.id)]
    sources = graph.nodes.set_index("id").loc[rows.source]
    assert len(rows) and set(sources.site) == {"attn.z"}
    assert (sources.layer.to_numpy() == out.set_index("id").layer.loc[rows.target].to_numpy()).all()


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_contrast_graphs_add_up_and_engines_agree(architecture):
    model = tiny_bridge(architecture)
    with tlc.attach(model, several(model, *FEATURE_CIRCUITS)) as replacement:
        linear, autograd = both(replacement, baseline=[prompt(seed=5), prompt(seed=6)], skip_positions=[0])
        texts = tlc.make_baseline(replacement, [prompt(seed=7).tolist(), prompt(seed=8).tolist()])
        against_texts = both(replacement, baseline=texts)
    assert_agree(linear, autograd)
    assert_agree(*against_texts)
    assert (linear.nodes.baseline != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", WHERE)
def test_half_precision_models_add_up(where, dtype):
    model = tiny_bridge("llama", dtype)
    with tlc.attach(model, WHERE[where](model)) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, engine="linear", progress=False)
    assert graph.completeness_error() < SUMS


@pytest.mark.parametrize("architecture", ["llama", "neox"])
def test_the_model_computes_the_same_bits_when_nobody_listens_and_is_given_back(architecture):
    model = tiny_bridge(architecture)
    before = hook_state(model)
    with torch.no_grad():
        bare = model(prompt()[None])
        with tlc.attach(model, several(model, *EVERYWHERE)) as replacement:
            assert torch.equal(model(prompt()[None]), bare)
            names = [
                f"{replacement.site(1, site)}.hook_sae_acts_post" for site in ("resid_pre", "attn.hook_z", "mlp_out")
            ]
            logits, cache = model.run_with_cache(prompt()[None], names_filter=names)
            assert torch.equal(logits, bare)  # listening alone changes nothing
            assert all((cache[name] > 0).any() for name in names)
    assert hook_state(model) == before


def test_where_each_layer_has_one_dictionary_nothing_names_sites():
    model = tiny_bridge("llama")
    apart = tlc.load_dictionary([autoencoders(model, {0: "hook_resid_post"}), autoencoders(model, {2: "hook_mlp_out"})])
    with tlc.attach(model, apart) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=20, progress=False)
    assert graph.info.sites == () and graph._nodes.site is None and "site" not in graph.nodes
    assert all("." not in name for name in graph.node_ids)


# ---- what one does with such graphs
# ---------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "neox"])
def traced(request):
    model = tiny_bridge(request.param)
    with tlc.attach(model, several(model, *FEATURE_CIRCUITS)) as replacement:
        yield replacement, tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)


def test_a_site_is_named_where_the_layer_has_several(traced):
    replacement, graph = traced
    feature = graph.nodes[(graph.nodes.site == "attn_out") & (graph.nodes.kind == "feature")].iloc[-1]
    layer, position, number = int(feature.layer), int(feature.position), int(feature.feature)
    assert feature.id == f"L{layer}.attn_out/F{number}@{position}"
    edits = tlc.edits_of(graph, [feature.id])
    assert edits == [tlc.Ablate(layer, position, number, site="attn_out")] == [tlc.parse_edit(f"{feature.id} = 0")]
    assert repr(edits[0]) == f"Ablate(layer={layer}, position={position}, feature={number}, site='attn_out')"
    short, hook, whole = (
        tlc.intervene(replacement, prompt(), tlc.Ablate(layer, position, number, site=site)).logits
        for site in ("attn_out", "hook_attn_out", f"blocks.{layer}.hook_attn_out")
    )
    assert short.equal(hook) and short.equal(whole)
    lists = "'attn_out', 'mlp_out', 'resid_post'"
    with pytest.raises(
        EditError, match=f"layer {layer} has several dictionaries; say which one with site=, one of {lists}"
    ):
        tlc.intervene(replacement, prompt(), tlc.Ablate(layer, position, number))
    with pytest.raises(EditError, match=f"no dictionary at site='resid_pre'; it has {lists}"):
        tlc.intervene(replacement, prompt(), tlc.ErrorEdit(layer, position, site="resid_pre"))
    with pytest.raises(
        EditError, match=f"layer {layer} has no dictionary at site='blocks.9.hook_attn_out'; it has {lists}"
    ):
        tlc.intervene(replacement, prompt(), tlc.ErrorEdit(layer, position, site="blocks.9.hook_attn_out"))
    with pytest.raises(DictionaryError, match=lists):
        replacement.site(layer)
    with pytest.raises(DictionaryError, match="this works only for layers with one"):
        replacement.dictionary.decoder_vectors(layer, torch.tensor([0]), layer)
    with pytest.raises(TargetError, match=lists):
        tlc.attribute(replacement, prompt(), tlc.FeatureTarget(layer, position, number), progress=False)
    with pytest.raises(TargetError, match="attn_out"):  # the graph suggests ids that it has
        graph.node(f"L{layer}/F{number}@{position}")
    again = tlc.attribute(
        replacement, prompt(), tlc.FeatureTarget(layer, position, number, "attn_out"), max_nodes=9, progress=False
    )
    row = dict(graph.edges[graph.edges.target == feature.id][["source", "weight"]].itertuples(index=False))
    same = {r.source: r.weight for r in again.edges[again.edges.target == feature.id].itertuples() if r.source in row}
    assert same and all(abs(row[name] - weight) < 1e-5 for name, weight in same.items())  # float32


def test_an_ablation_takes_out_what_the_feature_of_that_site_writes(traced):
    replacement, graph = traced
    model, nodes = replacement.model, graph.nodes[graph.nodes.kind == "feature"]
    for site in graph.info.sites:
        node = nodes[nodes.site == site].iloc[0]
        layer, position, feature = int(node.layer), int(node.position), int(node.feature)
        part = next(p for at, p in replacement.dictionary.owned if at == layer and site in p.output_hook(layer))
        step = node.activation * part[layer].W_dec[feature]

        def by_hand(tensor, hook, position=position, step=step):
            changed = tensor.clone()
            changed[0, position] -= step
            return changed

        result = tlc.intervene(replacement, prompt(), tlc.Ablate(layer, position, feature, site=site), freeze="none")
        with torch.no_grad():
            expected = model.run_with_hooks(prompt()[None], fwd_hooks=[(part.output_hook(layer), by_hand)])[0]
        assert torch.allclose(result.logits, expected, atol=1e-5)  # float32, another order of sums
        assert (result.logits - result.baseline_logits).abs().max() > 1e-5
        after = result.activations.query(
            "layer == @layer and site == @site and position == @position and feature == @feature"
        )
        assert abs(float(after.before.iloc[0]) - node.activation) < 1e-5


def test_predictions_hold_exactly_when_all_is_held_and_head_loadings_are_the_edges(traced):
    replacement, graph = traced
    qk = tlc.qk_attribution(replacement, graph, layer=2, head=1, query=8, key=2)
    assert abs(qk.total - qk.score) < 1e-4 and qk.terms.query_source.str.contains("L1.resid_post/").any()
    report = tlc.faithfulness(replacement, graph, n=12, seed=0, scores=[qk])
    held = report.effects[report.effects.freeze.isin(["all", "score"])]
    assert len(held) > 20 and (held.predicted - held.measured).abs().max() < 1e-4 * held.measured.abs().max()  # float32
    loads = tlc.top_head_loadings(replacement, graph, edges=200)
    # Between two rebuilt streams there is one attention, so no path has several heads: what is left over is rounding.
    assert loads[loads.kind == "rest"].loading.abs().max() < 1e-5
    assert (loads.kind == "head").any() and tlc.explain_heads(replacement, graph).head_stories


def test_changes_run_on_through_the_sites_of_a_layer_in_order(traced):
    """A removal changes the answer by the sum over all paths, here added up one length of path after the other."""
    _, graph = traced
    rows, nodes = graph.adjacency().double(), graph._nodes
    active = graph.is_kind("feature") & (nodes.activation != 0)
    removed = graph.node_numbers[
        graph.nodes.id[(graph.nodes.site == "attn_out") & (graph.nodes.kind == "feature")].iloc[0]
    ]
    step = -rows[:, removed]
    total = torch.zeros_like(step)
    for _ in range(4 * graph.info.n_layers):  # no path has more features
        total = total + step
        step = rows @ torch.where(active & (torch.arange(len(graph)) != removed), step / nodes.activation.double(), 0.0)
    assert step.abs().max() == 0
    predicted = predicted_effects(graph, [[removed]], direct=False)[0].double()
    scale = total.abs().max()
    assert (predicted - total)[torch.arange(len(graph)) != removed].abs().max() < 1e-5 * scale  # float32
    first = int(nodes.weight.argmax())
    assert abs(graph.carried([removed]).by + float(total[first])) < 1e-5 * scale


def test_generation_curves_patching_and_boxes_run(traced):
    replacement, graph = traced
    edits = tlc.edits_of(graph, graph.nodes.id[graph.nodes.site == "resid_post"].tolist()[:3])
    text, ids = tlc.generate(replacement, prompt(), edits, max_new_tokens=2), prompt().tolist()
    for _ in range(2):
        ids.append(int(tlc.intervene(replacement, ids, edits, freeze="none").logits[-1].argmax()))
    assert text.split()[-2:] == replacement.model.tokenizer.decode(ids[-2:]).split()
    whole = tlc.circuit_curve(replacement, graph, lambda logits: logits[5], thresholds=[1.0], random_sets=1)
    assert whole.features.iloc[0] == graph.is_kind("feature").sum()
    patched = tlc.feature_patching(replacement, prompt(seed=4), prompt(), lambda logits: logits[5], limit=10)
    assert set(patched.site) <= {"attn_out", "mlp_out", "resid_post"} and len(patched) == 10
    first = patched.iloc[0]
    alone = tlc.Set(int(first.layer), int(first.position), int(first.feature), value=first.clean, site=first.site)
    result = tlc.intervene(replacement, prompt(), alone, freeze="none")
    assert abs(float(result.last_logits[5]) - first.metric) < 1e-4  # a batch of another size
    quality = tlc.circuit_quality(replacement, graph, [prompt(), prompt(seed=4)], answers=[5, 6])
    assert quality.n_nodes > 20
    removed = tlc.box_ablations(replacement, graph, controls=10)
    assert removed and all(one["measured"] == one["measured"] for one in removed)  # no NaN


def test_labels_and_names_are_of_the_features_own_site(traced):
    replacement, graph = traced
    labelled = tlc.label_features(replacement, graph)
    for layer, part in replacement.dictionary.owned:
        site = part.output_hook(layer).split("hook_")[1]
        here = graph.nodes[(graph.nodes.kind == "feature") & (graph.nodes.layer == layer) & (graph.nodes.site == site)]
        for row in here.itertuples():
            best = int((part[layer].W_dec[row.feature] @ replacement.model.W_U).argmax())
            assert labelled.labels[row.Index].promotes[0] == replacement.model.tokenizer.decode([best])
    named = tlc.name_features(replacement, graph, examples=False)
    assert len(named.labels) == graph.is_kind("feature").sum()


def test_what_heads_features_write_goes_through_their_own_layers_output_matrix():
    model = tiny_bridge("llama")
    with tlc.attach(model, several(model, "hook_resid_pre", "attn.hook_z")) as replacement:
        graph = tlc.attribute(replacement, prompt(), max_nodes=60, progress=False)
        labelled, compared = tlc.label_features(replacement, graph), 0
        for layer, part in replacement.dictionary.owned:
            if not part.output_hook(layer).endswith("hook_z"):
                continue
            for row in graph.nodes[
                (graph.nodes.layer == layer) & (graph.nodes.site == "attn.z") & (graph.nodes.kind == "feature")
            ].itertuples():
                written = part[layer].W_dec[row.feature] @ model.blocks[layer].attn.W_O.flatten(0, 1)
                best = model.tokenizer.decode([int((written @ model.W_U).argmax())])
                assert labelled.labels[row.Index].promotes[0] == best
                compared += 1
    assert compared > 3


def test_files_pages_and_pictures_hold_them(traced, tmp_path):
    replacement, graph = traced
    again = tlc.load_graph(graph.save(tmp_path / "graph.safetensors"))
    assert again == graph and again.node_ids == graph.node_ids and list(again.nodes.site) == list(graph.nodes.site)
    small = graph.prune()
    assert small.node_ids and set(small.node_ids) <= set(graph.node_ids)
    assert small.scores(small.node_ids[:3]).replacement <= 1.0
    page = small.to_html(tmp_path / "page.html").read_text()
    assert len(page) > 10_000
    small.plot(tmp_path / "picture.svg")
    assert tlc.load_graph(tmp_path / "graph.safetensors").to_networkx().number_of_nodes() == len(graph)


def test_the_page_has_the_same_ids_scores_and_meter(browser, traced, tmp_path):
    _, graph = traced
    with tab(browser, graph.to_html(tmp_path / "page.html").as_uri()) as page:
        assert page.evaluate("() => tlc.graph.ids") == list(graph.node_ids)
        pins = graph.nodes.id[graph.nodes.kind == "feature"].tolist()[::3]
        page.evaluate("(ids) => tlc.book.togglePins(ids)", pins)
        shown = [float(number) for number in re.findall(r"([\d.]+) %", page.inner_text(".pinned-scores"))]
        found = graph.scores(pins)
        assert shown == pytest.approx([100 * found.replacement, 100 * found.completeness], abs=0.6)
        page.get_by_role("button", name="All nodes").click()
        wait_until(page, "tlc.nodesView.painted")
        rows = page.evaluate("() => tlc.nodesView.rows.map((r) => tlc.nodesView.rowNames.get(r))")
        assert rows[:4] == ["tokens", "L0 attn_out", "L0 mlp_out", "L0 resid_post"] and rows[-1] == "output"
    with tab(browser, graph.to_html(tmp_path / "again.html").as_uri()) as page:
        meter = [float(text.split()[0]) for text in page.locator(".influence .key").all_inner_texts()]
        told = story_of(graph).meter
        assert meter[0] == pytest.approx(100 * told.shown, abs=0.6) and meter[1] == pytest.approx(
            100 * told.error, abs=0.6
        )


def test_what_tells_features_apart_by_layer_alone_refuses_them(traced, tmp_path):
    replacement, graph = traced
    with pytest.raises(ExportError, match="several dictionaries, at attn_out, mlp_out, resid_post"):
        graph.to_neuronpedia(tmp_path, slug="x")
    with pytest.raises(ExportError, match="several dictionaries"):
        graph.pin(graph.node_ids[0]).neuronpedia_url("gemma-2-2b", "x")
    with pytest.raises(ValueError, match="aggregate tells features apart by layer and number"):
        tlc.aggregate([graph, graph])
    with pytest.raises(NeuronpediaError, match="several dictionaries"):
        tlc.add_labels(graph, "neuronpedia", model="gemma-2-2b", source_set="x", offline=True)
    (tmp_path / "texts.txt").write_text("w5 w6 w7\n")
    with pytest.raises(DictionaryError, match="feature files are written layer by layer"):
        tlc.make_dashboards(replacement, [tmp_path / "texts.txt"], tmp_path, progress=False)
    with pytest.raises(DictionaryError, match="dictionary_quality measures layer by layer"):
        tlc.dictionary_quality(replacement, [prompt()])


def test_a_graph_belongs_to_its_own_sites(traced):
    replacement, graph = traced
    model = replacement.model
    replacement.detach()
    swapped = several(model, "hook_mlp_out", "hook_attn_out", "hook_resid_post")  # the same numbers at other sites
    with tlc.attach(model, swapped) as other:
        with pytest.raises(BelongingError, match="has other weights"):
            tlc.faithfulness(other, graph, n=3)
    with tlc.attach(model, autoencoders(model, {0: "hook_attn_out"}, seed=1)) as other:
        with pytest.raises(
            BelongingError, match=r"only the other dictionary has layer 0 of the dictionary \(hook_attn_out to"
        ):
            tlc.faithfulness(other, graph, n=3)


# ---- refusals
# --------------------------------------------------------------------------------------------------------------


def test_dictionaries_that_stand_at_one_place_are_refused():
    model = tiny_bridge("llama")
    stream, behind = (autoencoders(model, {1: site}) for site in ("hook_resid_post", "hook_mlp_out"))
    with pytest.raises(DictionaryError, match="two dictionaries are at one site, blocks.1.hook_resid_post"):
        tlc.load_dictionary([stream, autoencoders(model, {1: "hook_resid_post"}, seed=4)])
    with pytest.raises(DictionaryError, match="layer 1 would have two dictionaries of its MLP"):
        tlc.load_dictionary([behind, transcoders(model, layers=[1])])
    with pytest.raises(DictionaryError, match="layer 1 would have two dictionaries of its MLP"):
        tlc.load_dictionary([stream, tlc.mlp_neurons(model, layers=[1]), transcoders(model, layers=[1])])
    with pytest.raises(DictionaryError, match="layers= cannot be honoured"):
        tlc.load_dictionary([stream, autoencoders(model, {0: "hook_resid_post", 1: "hook_attn_out"})], layers=[1])
    with pytest.raises(
        DictionaryError, match='mlps="error" is for transcoders, and layer 0 has an autoencoder of hook_attn_out'
    ):
        tlc.attach(model, several(model, *FEATURE_CIRCUITS), mlps="error")
