"""Sets with four bits a number: the arithmetic, the folder, and the sets in this package that open by name."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_circuits as tlc
from tests import published
from tests.oracles import removal_gap
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.dictionaries.formats import four_bit_files
from tl_circuits.dictionaries.formats.four_bit import FourBit, dequantised, fitted_levels, quantised, rounded
from tl_circuits.dictionaries.formats.four_bit_files import write_four_bit
from tl_circuits.dictionaries.residency import choose_residency
from tl_circuits.errors import DictionaryError, NotFiniteError, OutputError

STEPS = torch.arange(-8.0, 8.0)
LAYER = "layer_01.four_bit.safetensors"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CIRCUITS_CACHE", str(tmp_path / "cache"))


def gaussian(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).mul(6).exp() / 100


def plain_rounded(matrix, levels, refit=True):
    """Number by number, in float64."""
    made = torch.empty(matrix.shape, dtype=torch.float64)
    for r, row in enumerate(matrix.double().tolist()):
        size = (sum(w * w for w in row) / len(row)) ** 0.5
        near = [min(levels.double().tolist(), key=lambda level: abs(level - w / (size or 1))) for w in row]
        squares = sum(level * level for level in near)
        scale = sum(w * level for w, level in zip(row, near, strict=True)) / squares if refit and squares else size
        half = float(torch.tensor(scale).half())
        scale = half if abs(half - scale) <= abs(scale) / 2048 else float(torch.tensor(scale).float())
        made[r] = torch.tensor([scale * level for level in near])
    return made


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("columns", [64, 7, 1])
def test_numbers_are_those_of_a_plain_loop(columns, refit):
    matrix = gaussian(30, columns)
    matrix[3] = 0.0
    matrix[4] *= 1e-9  # a scale that float16 cannot hold
    kept = quantised(matrix, refit=refit)
    assert kept.codes.dtype == torch.uint8 and kept.codes.shape == (30, (columns + 1) // 2)
    expected = plain_rounded(matrix, kept.levels, refit)
    assert torch.allclose(dequantised(kept).double(), expected, rtol=1e-6, atol=0)  # float32
    assert dequantised(kept).equal(rounded(matrix, kept.levels, refit=refit))


def test_codes_by_hand():
    """The low four bits are the even column; a byte 0x2F is codes 15 and 2; the third column's byte has no partner."""
    kept = FourBit(torch.tensor([[0x2F, 0x08], [0x80, 0x01]], dtype=torch.uint8), torch.tensor([2.0, 0.5]), STEPS, 3)
    assert dequantised(kept).tolist() == [[14.0, -12.0, 0.0], [-4.0, 0.0, -3.5]]
    row = torch.tensor([[7.0, -6.0, 0.0]])
    again = quantised(row / row.square().mean().sqrt() * 3, STEPS / row.square().mean().sqrt())
    assert again.codes.tolist() == [[0x2F, 0x08]] and abs(again.scale.item() - 3) < 2e-3


def test_a_gaussian_loses_one_part_in_a_hundred_of_its_variance():
    """The least possible with sixteen levels is 0.009497 of the variance (Max 1960, table I)."""
    matrix = gaussian(1024, 576)
    error = dequantised(quantised(matrix, refit=False)) - matrix
    lost = (error.square().mean(1) / matrix.square().mean(1)).mean().item()
    assert 0.0092 < lost < 0.0098
    fitted = dequantised(quantised(matrix)) - matrix
    # but for the scale's own rounding to float16
    assert fitted.square().sum(1).le(error.square().sum(1) * (1 + 1e-3)).all()


def test_each_level_is_the_mean_of_the_numbers_nearest_to_it():
    matrix = gaussian(200, 96, seed=1).pow(3)  # heavy tails
    levels = fitted_levels(matrix)
    values = (matrix / matrix.square().mean(1, keepdim=True).sqrt()).flatten().double()
    nearest = (values[:, None] - levels.double()).abs().argmin(1)
    means = torch.stack([values[nearest == i].mean() for i in range(16)])
    assert torch.allclose(means, levels.double(), atol=1e-4)
    assert levels.equal(fitted_levels(matrix.clone())) and bool((levels.diff() > 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_what_was_rounded_once_is_rounded_to_itself(seed):
    matrix = gaussian(64, 96, seed)
    levels = fitted_levels(matrix)
    once = rounded(matrix, levels)
    assert rounded(once, levels).equal(once)


def test_a_matrix_with_few_different_numbers_is_kept_as_it_is():
    matrix = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.5, 0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert dequantised(quantised(matrix)).tolist() == matrix.tolist()


def test_large_and_small_numbers_stay_finite():
    matrix = torch.tensor([[1e38, -2e38, 3e38], [1e-30, 2e-30, -3e-30]])
    assert torch.allclose(dequantised(quantised(matrix)), matrix, rtol=0.02)


def test_rounding_leaves_no_trace_in_gradients():
    w = gaussian(5, 8).requires_grad_()
    (w + (rounded(w, STEPS / 4) - w).detach()).sum().backward()
    assert w.grad.equal(torch.ones_like(w))


@pytest.mark.parametrize(
    ("matrix", "levels", "error", "words"),
    [
        (torch.ones(0, 4), None, DictionaryError, r"expected a matrix .* the shape \(0, 4\)"),
        (torch.tensor([[1.0, float("nan")]]), None, NotFiniteError, "holds NaN or infinity"),
        (torch.ones(2, 2), STEPS.flip(0), DictionaryError, "ascending order: sort them"),
        (torch.ones(2, 2), STEPS * float("inf"), NotFiniteError, "levels hold NaN"),
    ],
)  # fmt: skip
def test_what_cannot_be_rounded_is_refused(matrix, levels, error, words):
    with pytest.raises(error, match=words):
        quantised(matrix, levels)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_set_is_written_and_opened_again(activation, skip, tmp_path):
    made = transcoders(tiny_bridge("llama"), activation, skip=skip, output_hook="mlp.hook_out", width=41)
    folder = write_four_bit(made, tmp_path / "small", model="mine", licence="MIT", training_tokens=5)
    found = tlc.load_transcoders(folder)
    assert found.layers == made.layers and found.made_for == "mine" and found.name == str(folder)
    for layer in made.layers:
        ours, theirs = found[layer], made[layer]
        for name in ("activation", "k", "clamp", "input_hook", "output_hook"):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in ("W_enc", "W_dec", *(["W_skip"] if skip else [])):
            whole = getattr(theirs, name)
            assert getattr(ours, name).equal(dequantised(quantised(whole)))
            assert (getattr(ours, name) - whole).square().mean() < 0.012 * whole.square().mean()
        assert (ours.W_skip is None) != skip
        for name in ("b_enc", "b_dec"):
            assert getattr(ours, name).dtype == torch.float16 and torch.allclose(
                getattr(ours, name).float(), getattr(theirs, name), rtol=1e-3
            )
        if activation == "jumprelu":
            assert ours.threshold.equal(theirs.threshold)


def test_levels_that_a_set_was_trained_with_are_taken(tmp_path):
    made = transcoders(tiny_bridge("llama"), skip=True)
    levels = {0: dict.fromkeys(("W_enc", "W_dec", "W_skip"), STEPS / 3), 2: {"W_dec": STEPS / 4}}
    found = tlc.load_transcoders(write_four_bit(made, tmp_path / "small", levels=levels))
    for layer in made.layers:
        for name in ("W_enc", "W_dec", "W_skip"):
            whole = getattr(made[layer], name)
            assert getattr(found[layer], name).equal(
                rounded(whole, levels.get(layer, {}).get(name, fitted_levels(whole)))
            )


def test_biases_that_float16_cannot_hold_are_kept_in_float32(tmp_path):
    made = transcoders(tiny_bridge("llama"))
    large = {
        layer: replace(made[layer], b_enc=made[layer].b_enc * 1e6, b_dec=made[layer].b_dec * 1e-6)
        for layer in made.layers
    }
    found = tlc.load_transcoders(write_four_bit(tlc.load_transcoders(large), tmp_path / "small"))
    assert found[1].b_enc.equal(large[1].b_enc) and found[1].b_dec.equal(large[1].b_dec)


@pytest.mark.parametrize("residency", ["disk", "cpu", "device", "auto"])
def test_layers_dtype_and_residency_asked_for_are_taken(residency, tmp_path):
    whole = published.four_bit(tmp_path / "set", published.random_layers(4), skip=True, activation="topk", k=2)
    found = tlc.load_transcoders(
        tmp_path / "set", residency=residency, layers=[1, 2], dtype=torch.bfloat16, device="cpu", name="mine"
    )
    assert found.layers == (1, 2) and found.name == "mine"
    assert (found[1].forget_pages is not None) == (residency == "disk")
    for layer in found.layers:
        for name in ("W_enc", "W_dec", "W_skip", "b_enc"):
            assert getattr(found[layer], name).equal(whole[layer][name].bfloat16())
    hooks = tlc.load_transcoders(tmp_path / "set", input_hook="hook_resid_mid", output_hook="hook_mlp_out")
    assert (hooks.input_hook(3), hooks.output_hook(3)) == ("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out")


def test_a_set_on_disk_is_converted_once(tmp_path, monkeypatch):
    published.four_bit(tmp_path / "set", published.random_layers(2))
    first = tlc.load_transcoders(tmp_path / "set", residency="disk")
    monkeypatch.setattr(four_bit_files, "dequantised", lambda kept: pytest.fail("converted again"))
    again = tlc.load_transcoders(tmp_path / "set", residency="disk")
    assert again[1].W_enc.equal(first[1].W_enc) and len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_auto_counts_the_memory_of_the_numbers_not_of_the_codes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "tl_circuits.dictionaries.load.choose_residency", lambda *a: asked.append(a[2]) or choose_residency(*a)
    )
    published.four_bit(tmp_path / "set", published.random_layers(2))
    tlc.load_transcoders(tmp_path / "set")
    assert asked == [8 * sum(file.stat().st_size for file in (tmp_path / "set").iterdir())]


def test_a_graph_is_that_of_the_same_set_given_as_tensors(tmp_path):
    model = tiny_bridge("llama")
    made = transcoders(model, "topk", skip=True, output_hook="mlp.hook_out")
    folder, plain = write_four_bit(made, tmp_path / "small"), {}
    for layer in made.layers:
        file = load_file(folder / f"layer_{layer:02d}.four_bit.safetensors")
        tensors = {name: file[name].float() for name in ("b_enc", "b_dec")}
        for name in ("W_enc", "W_dec", "W_skip"):
            codes, scale, levels = (file[f"{name}.{part}"] for part in ("codes", "scale", "levels"))
            numbers = [
                [levels[b // 16**half] if half else levels[b % 16] for b in row for half in (0, 1)]
                for row in codes.tolist()
            ]
            tensors[name] = torch.tensor(numbers) * scale.float()[:, None]
        plain[layer] = tlc.Transcoder(**tensors, activation="topk", k=5, output_hook="mlp.hook_out")
    graphs = []
    rule = tlc.PromptRule()
    for given in (
        tlc.load_transcoders(folder, prompt_rule=rule, name="same"),
        tlc.load_transcoders(plain, prompt_rule=rule, name="same"),
    ):
        with tlc.attach(model, given) as replacement:
            graphs.append(tlc.attribute(replacement, prompt(), max_nodes=60, progress=False))
            assert removal_gap(replacement, graphs[-1])[0] < 1e-3
    assert graphs[0].completeness_error() < 1e-4  # float32 sums
    assert graphs[0].node_ids == graphs[1].node_ids and graphs[0].adjacency().equal(graphs[1].adjacency())
    assert (graphs[0].nodes.kind == "feature").sum() > 20


def test_only_what_the_format_can_say_is_written(tmp_path):
    model = tiny_bridge("llama")
    made = transcoders(model)
    one = transcoders(model, input_hook="hook_mlp_out", layers=[0])[0]
    for given, words in (
        (tlc.mlp_neurons(model), "only per-layer transcoders can"),
        (tlc.load_transcoders({0: replace(one, normalize="layer_norm"), 1: one}), "layer 0 has normalize='layer_norm'"),
        (
            tlc.load_transcoders({0: made[0], 1: replace(made[1], input_hook="hook_resid_mid")}),
            "input_hook is 'mlp.hook_in' at layer 0 and",
        ),
        (
            tlc.load_transcoders({0: made[0], 1: replace(made[1], activation="topk", k=2)}),
            "activation is 'jumprelu' at layer 0 and 'topk'",
        ),
    ):
        with pytest.raises(DictionaryError, match=words):
            write_four_bit(given, tmp_path / "small")
        assert not list(tmp_path.iterdir())


def test_a_folder_is_written_whole_or_not_at_all_and_replaces_only_its_like(tmp_path, monkeypatch):
    made = transcoders(tiny_bridge("llama"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"model exists already. Choose another name\."):
        write_four_bit(made, tmp_path / "model", overwrite=True)
    folder = write_four_bit(made, tmp_path / "small")
    with pytest.raises(OutputError, match="overwrite=True"):
        write_four_bit(made, folder)
    before = (folder / LAYER).read_bytes()
    monkeypatch.setattr(
        four_bit_files, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OutputError, match="cannot write .*small: No space left"):
        write_four_bit(made, folder, overwrite=True)
    monkeypatch.undo()
    assert (folder / LAYER).read_bytes() == before and {p.name for p in tmp_path.iterdir()} - {"cache"} == {
        "model",
        "small",
    }
    write_four_bit(tlc.load_transcoders(made, layers=[0]), folder, overwrite=True)
    assert tlc.load_transcoders(folder).layers == (0,) and not (folder / LAYER).exists()
    with pytest.raises(OutputError, match="cannot write"):
        write_four_bit(made, tmp_path / "no/where")


def changed(**fields):
    def change(folder):
        path = folder / "config.json"
        said = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in said.items() if value != "remove"}))

    return change


def with_tensors(**tensors):
    def change(folder):
        file = load_file(folder / LAYER)
        for name, make in tensors.items():
            name = name.replace("__", ".")
            made = make(file.pop(name, None))
            if made is not None:
                file[name] = made.contiguous()
        save_file(file, folder / LAYER)

    return change


def cut(folder):
    (folder / LAYER).write_bytes((folder / LAYER).read_bytes()[:-7])


def pickled(folder):
    (folder / LAYER).write_bytes(b"\x80\x04" + struct.pack("<Q", 9))


def spoilt(value):
    def make(tensor):
        tensor.view(-1)[2] = value
        return tensor

    return make


NAN, INF = float("nan"), float("inf")
DAMAGE = [
    (cut, r"layer_01\.four_bit\.safetensors is not a whole safetensors file .* cut off"),
    (pickled, "is a Python pickle"),
    (lambda folder: (folder / "config.json").unlink(), r"there is no file .*config\.json"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
    (lambda folder: (folder / LAYER).unlink(), "is missing the layers 1"),
    (
        lambda folder: (folder / LAYER.replace("1", "2")).unlink(),
        r"differ: only one of them has the layers \[2\]. Was a file lost",
    ),
    (lambda folder: (folder / "layer_1.four_bit.safetensors").write_bytes(b""), "2 dictionaries for layer 1"),
    (changed(layers=[0, 1, 1, 2]), "one of them has a layer twice"),
    (changed(layers=[0, "1"]), "layers holds 1, expected whole numbers"),
    (changed(layers=[0, None]), "layers holds None, expected whole numbers"),
    (changed(layers=[0, [1]]), "layers holds a list of 1, expected"),
    (changed(layers=3), "layers is 3, expected a list of layers"),
    (changed(format="theirs"), "format is 'theirs', expected 'tl_circuits four bits'"),
    (changed(format="remove"), "format is missing, expected"),
    (changed(version=2), r"version is 2, and this tl_circuits reads version 1\. Update"),
    (changed(version=True), "version is True, and"),
    (changed(normalise="layer_norm"), "'normalise' is a field that this version does not know"),
    (changed(features=8), r"W_enc.codes has shape \(7, 2\), expected \(8, 2\)"),
    (changed(d_in=6), r"W_enc.codes has shape \(7, 2\), expected \(7, 3\)"),
    (changed(d_out=2), r"W_dec.codes has shape \(7, 2\), expected \(7, 1\)"),
    (changed(d_in=0), "d_in is 0, expected a whole number from 1"),
    (changed(d_in="remove"), "d_in is None, expected a whole number from 1"),
    (changed(activation="gelu"), "activation is 'gelu', expected relu, jumprelu or topk"),
    (changed(activation="topk"), "k is None, expected a whole number from 1 to features, 7"),
    (changed(activation="topk", k=8), "k is 8, expected a whole number from 1 to features, 7"),
    (changed(activation="jumprelu"), "jumprelu transcoder needs a threshold"),
    (changed(clamp=1), "clamp is 1, expected true or false"),
    (changed(clamp="remove"), "clamp is missing, expected true or false"),
    (changed(model=3), "model is 3, expected text or null"),
    (changed(training_tokens=-1), "training_tokens is -1, expected a whole number"),
    (
        changed(input_hook="blocks.0.mlp.hook_in"),
        "input_hook is 'blocks.0.mlp.hook_in', expected a hook's name within a block",
    ),
    (changed(skip=False), "says no skip connection, and the file has one"),
    (
        with_tensors(W_skip__codes=lambda t: None, W_skip__scale=lambda t: None, W_skip__levels=lambda t: None),
        "says a skip connection, and the file has none",
    ),
    (with_tensors(W_enc__codes=lambda t: None), "the tensor 'W_enc.codes' is missing"),
    (with_tensors(W_dec__levels=lambda t: None), "the tensor 'W_dec.levels' is missing"),
    (with_tensors(b_dec=lambda t: None), "the tensor 'b_dec' is missing"),
    (with_tensors(W_gate=lambda t: torch.ones(2)), "'W_gate', which this version does not know"),
    (with_tensors(W_enc__codes=lambda t: t[:, :1]), r"W_enc.codes has shape \(7, 1\), expected \(7, 2\)"),
    (with_tensors(W_enc__codes=lambda t: t.to(torch.int8)), "W_enc.codes has dtype torch.int8, expected torch.uint8"),
    (with_tensors(W_enc__scale=lambda t: t[:6]), r"W_enc.scale has shape \(6,\), expected \(7\)"),
    (with_tensors(W_enc__scale=lambda t: t.int()), "W_enc.scale has dtype torch.int32, expected floating"),
    (with_tensors(W_skip__levels=lambda t: t[:15]), r"W_skip.levels has shape \(15,\), expected \(16\)"),
    (with_tensors(b_enc=lambda t: t[:6]), r"b_enc has shape \(6,\), expected \(7\)"),
]


@pytest.mark.parametrize("residency", ["device", "disk"])
@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_folders_are_refused_and_say_why(damage, words, residency, tmp_path):
    published.four_bit(tmp_path / "set", published.random_layers(3), skip=True)
    damage(tmp_path / "set")
    with pytest.raises(DictionaryError, match=words):
        tlc.load_transcoders(tmp_path / "set", residency=residency)


@pytest.mark.parametrize("residency", ["device", "disk"])
@pytest.mark.parametrize("name", ["W_enc.scale", "W_dec.levels", "W_skip.scale", "b_enc", "b_dec"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_numbers_that_are_not_finite_are_named(name, value, residency, tmp_path):
    published.four_bit(tmp_path / "set", published.random_layers(3), skip=True)
    with_tensors(**{name.replace(".", "__"): spoilt(value)})(tmp_path / "set")
    with pytest.raises(NotFiniteError, match=rf"{LAYER}: {name} holds NaN or infinity"):
        tlc.load_transcoders(tmp_path / "set", residency=residency)


@pytest.mark.parametrize("residency", ["device", "disk"])
def test_products_beyond_floating_point_are_found(residency, tmp_path):
    published.four_bit(tmp_path / "set", published.random_layers(3))
    with_tensors(W_dec__scale=lambda t: torch.full((7,), 1e38), W_dec__levels=lambda t: t * 1e38)(tmp_path / "set")
    with pytest.raises(NotFiniteError, match="layer 1: W_dec"):
        found = tlc.load_transcoders(tmp_path / "set", residency=residency)
        found.decode(1, {1: torch.ones(2, 7)}, torch.ones(2, 4))
