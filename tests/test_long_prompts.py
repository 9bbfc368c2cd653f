"""Prompts of several query blocks: patterns without zeros, trimmed rows, sweeps that fit."""

import copy
import importlib
import tempfile

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import CONFIGS, checkpoint, prompt, transcoders
from tl_circuits.attention.retrace import retrace
from tl_circuits.attribution.batches import sweep_chunks
from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.rows import trimmed_rows
from tl_circuits.attribution.targets import Targets
from tl_circuits.hooks import AttentionScores, Pattern, record

LENGTH = 300  # several blocks of queries


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def long_model(request):
    config = copy.deepcopy(CONFIGS[request.param])
    config.max_position_embeddings = 512
    if request.param == "gemma3":
        config.sliding_window = 40
    with tempfile.TemporaryDirectory() as folder:
        return TransformerBridge.boot_transformers(checkpoint(config, folder), device=DEVICE).eval()


def test_a_pattern_keeps_everything_but_the_mask(long_model):
    tokens = prompt(LENGTH)
    with torch.no_grad():
        _, cache = long_model.run_with_cache(tokens[None], names_filter=lambda n: n.endswith("hook_pattern"))
    kept = 0
    for layer, pattern in enumerate(record(long_model, tokens, LENGTH - 1).patterns):
        whole = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        assert torch.equal(pattern.dense(), whole)
        kept += sum(block.weights.numel() for block in pattern.blocks) / whole.numel()
    assert kept / len(long_model.blocks) < 0.75


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma2", "qwen3", "neox"])
def test_a_long_prompts_patterns_are_made_again_from_queries_and_keys(arch, monkeypatch):
    config = copy.deepcopy(CONFIGS[arch])
    config.max_position_embeddings, config.sliding_window = 512, 40
    with tempfile.TemporaryDirectory() as folder:
        model = TransformerBridge.boot_transformers(checkpoint(config, folder), device=DEVICE).eval()
    tokens = prompt(LENGTH)
    kept = record(model, tokens, LENGTH - 1).patterns
    with tlc.attach(model, transcoders(model)) as replacement:
        before = tlc.attribute(replacement, tokens, max_nodes=12, progress=False)
        monkeypatch.setattr(importlib.import_module("tl_circuits.hooks.record"), "LONG", 200)
        after = tlc.attribute(replacement, tokens, max_nodes=12, progress=False)
    for ours, whole in zip(record(model, tokens, LENGTH - 1).patterns, kept, strict=True):
        # the bridge does not show GPT-NeoX's rotated queries: there the patterns themselves are kept
        assert len(ours.blocks) > 1 and all(
            isinstance(block.held, torch.Tensor if arch == "neox" else AttentionScores) for block in ours.blocks
        )
        assert (ours.dense() - whole.dense()).abs().max() <= 1e-5  # float32 softmax in another order
    assert after.node_ids == before.node_ids and after.completeness_error() < 1e-4
    # float32 sums over 300 positions of weights that differ by rounding
    assert (after.adjacency() - before.adjacency()).abs().max() <= 1e-4 * before.adjacency().abs().max()


def test_a_pattern_that_queries_and_keys_do_not_give_is_kept():
    q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    scores = (q @ q.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    assert Pattern.recomputed(scores.softmax(-1), q, q, 1.0, None) is not None
    assert Pattern.recomputed(scores.softmax(-1), q, q, 0.9, None) is None
    assert Pattern.recomputed(scores.softmax(-1).bfloat16(), q, q, 1.0, None) is None
    # A model in half precision rounds its scores, also where a pattern happens to be exact, as that of one token.
    one = torch.ones(2, 1, 1)
    assert Pattern.recomputed(one, q[:, :1], q[:, :1], 1.0, None) is not None
    assert Pattern.recomputed(one.bfloat16(), q[:, :1], q[:, :1], 1.0, None) is None


def test_queries_that_attend_to_nothing_keep_their_place():
    pattern = Pattern.cut(torch.zeros(2, LENGTH, LENGTH))
    assert pattern.n_pos == LENGTH
    assert torch.equal(pattern.sums(), torch.zeros(2, LENGTH))


def test_both_engines_agree_over_several_blocks(long_model):
    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        graphs = [
            tlc.attribute(replacement, prompt(LENGTH), max_nodes=12, engine=engine, progress=False)
            for engine in ("linear", "autograd")
        ]
    fast, slow = (graph.adjacency() for graph in graphs)
    assert graphs[0].node_ids == graphs[1].node_ids
    # float32 sums over 300 positions in another order
    assert (fast - slow).abs().max() <= 1e-4 * slow.abs().max()
    assert graphs[0].completeness_error() < 1e-4


def test_trimmed_rows_keep_influence_and_the_pruned_graph(long_model):
    tokens = prompt(256)
    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        whole, trimmed = (
            tlc.attribute(replacement, tokens, max_nodes=200, row_mass=mass, progress=False) for mass in (1.0, 0.999)
        )
    assert len(trimmed.edges) < len(whole.edges)
    assert trimmed.completeness_error() < 1e-5
    assert trimmed.coverage <= whole.coverage
    reach = whole.nodes.set_index("id").influence
    others = trimmed.nodes.set_index("id").influence.reindex(reach.index, fill_value=0.0)
    assert (others - reach).abs().max() <= 1e-3
    kept, others = (set(graph.prune(0.8).node_ids) for graph in (whole, trimmed))
    assert len(kept & others) >= 0.99 * len(kept | others)


@pytest.mark.parametrize(
    ("mass", "limit"), [(0.9, 20_000), (0.99, 20_000), (0.9999, 20_000), (0.999, 5_000), (0.9, 19_000)]
)
@pytest.mark.parametrize("power", [1, 3])
def test_a_trimmed_row_keeps_the_mass_asked_for_or_as_many_of_its_largest_as_may_be(mass, limit, power):
    row = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) ** power - 0.1
    kept = trimmed_rows([row], mass, limit)
    size = kept.values.abs()
    assert len(size) <= limit
    assert size.double().sum() >= mass * row.abs().double().sum() or len(size) == limit
    assert size.min() >= row.abs().sort(descending=True).values[len(size) - 1]  # none that is left out is larger
    # sums in float32 of a thousand
    assert float(kept.mass[0]) == pytest.approx(float(row.abs().double().sum()), rel=1e-6)


def test_rows_that_do_not_fit_are_trimmed_and_say_so(long_model, monkeypatch):
    for most in ("ROW_FLOATS", "ROW_FLOATS_OF_A_GPU"):
        monkeypatch.setattr(f"tl_circuits.attribution.expand.{most}", 2000)
    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        whole = tlc.attribute(replacement, prompt(40), max_nodes=20, row_mass=1.0, progress=False)
        small = tlc.attribute(replacement, prompt(40), max_nodes=20, progress=False)
    assert len(small.edges) < len(whole.edges) and small.coverage < whole.coverage
    assert small.completeness_error() < 1e-5


def test_the_number_of_targets_in_a_sweep_does_not_change_the_graph(long_model):
    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        graphs = [
            tlc.attribute(replacement, prompt(140), max_nodes=60, batch_size=size, progress=False)
            for size in ("auto", 7)
        ]
    assert graphs[0].node_ids == graphs[1].node_ids
    # the same sums in matrix products of other shapes
    gap = (graphs[0].adjacency() - graphs[1].adjacency()).abs().max()
    assert gap <= 1e-5 * graphs[0].adjacency().abs().max()


def test_sweeps_take_at_most_half_of_the_free_memory(long_model, monkeypatch):
    sizes = []
    rows = LinearEngine.rows
    monkeypatch.setattr(LinearEngine, "rows", lambda self, targets: sizes.append(len(targets)) or rows(self, targets))
    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        whole = tlc.attribute(replacement, prompt(30), max_nodes=30, progress=False)
        roomy = max(sizes)
        sizes.clear()
        # one target takes about 5 * 30 * 32 numbers of gradients and a row of a few hundred
        monkeypatch.setattr("tl_circuits.attribution.batches.free_memory", lambda device: 8 * 20_000)
        tight = tlc.attribute(replacement, prompt(30), max_nodes=30, progress=False)
    assert max(sizes) <= 4 < roomy
    assert torch.allclose(whole.adjacency(), tight.adjacency(), atol=1e-5)  # products of other shapes


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU takes larger sweeps")
def test_far_positions_are_swept_apart_and_near_ones_together(long_model):
    def swept(positions):
        n = len(positions)
        targets = Targets(torch.zeros(n).long(), torch.tensor(positions), torch.zeros(n, 32), torch.zeros(n))
        return [sorted(targets.position[chunk].tolist()) for chunk in sweep_chunks(targets, "auto", sources)]

    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        graph = tlc.attribute(replacement, prompt(140), max_nodes=1, progress=False)
        sources = retrace(replacement, graph).sources
    assert swept([139, 0] * 12) == [[0] * 12, [139] * 12]
    assert swept([130, 139] * 12) == [[130] * 12 + [139] * 12]


def _fits(limit):
    rows = LinearEngine.rows

    def guarded(self, targets):
        if len(targets) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return rows(self, targets)

    return guarded


def test_a_sweep_that_runs_out_of_memory_is_halved(long_model, monkeypatch):
    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        whole = tlc.attribute(replacement, prompt(30), max_nodes=30, progress=False)
        monkeypatch.setattr(LinearEngine, "rows", _fits(3))
        halved = tlc.attribute(replacement, prompt(30), max_nodes=30, progress=False)
    assert whole.node_ids == halved.node_ids
    assert torch.allclose(whole.adjacency(), halved.adjacency(), atol=1e-5)  # products of other shapes


def test_one_target_that_does_not_fit_says_what_to_lower(long_model, monkeypatch):
    monkeypatch.setattr(LinearEngine, "rows", _fits(0))
    with tlc.attach(long_model, transcoders(long_model)) as replacement:
        with pytest.raises(MemoryError, match="shorter prompt"):
            tlc.attribute(replacement, prompt(30), max_nodes=30, progress=False)
        with pytest.raises(ValueError, match="row_mass"):
            tlc.attribute(replacement, prompt(30), row_mass=0.0, progress=False)
