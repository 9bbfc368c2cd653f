"""One training step's gradient, sparse products and start, held against autograd, dense products and NumPy, in
float64."""

import numpy as np
import torch

from tl_circuits.dictionaries.training.fit import add_to_equations, no_equations, solve_equations
from tl_circuits.dictionaries.training.layer import LayerTraining, restored
from tl_circuits.dictionaries.training.sparse import decoded, largest, products, sums_by_feature
from tl_circuits.dictionaries.training.start import add_tokens, no_moments, started
from tl_circuits.dictionaries.training.step import Weights, gradient, read, token_weights


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def weights(d=6, width=20):
    return Weights(random(width, d), random(width), random(width, d, seed=1), random(d), random(d, d, seed=2))


def test_the_gradient_is_autograds():
    x, y, w, k = random(11, 6, seed=3), random(11, 6, seed=4), weights(), 9
    counts = torch.rand(11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours = gradient(w, x, read(w, x, y, k), counts)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in w.named().items()}
    pre = x @ leaves["W_enc"].T + leaves["b_enc"]
    top = pre.topk(k, dim=-1)
    assert (top.values < 0).any()  # ReLU's zeros among the k are part of the test
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    out = acts @ leaves["W_dec"] + leaves["b_dec"] + x @ leaves["W_skip"].T
    (counts * (out - y).square().sum(-1)).mean().backward()
    for name, leaf in leaves.items():
        # float64, another order of sums
        assert torch.allclose(getattr(ours, name), leaf.grad, rtol=1e-12, atol=1e-12), name
    assert gradient(w, x, read(w, x, y, k), counts, skip=False).W_skip is None


def test_sparse_products_are_those_of_dense_matrices():
    ids = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:4] for i in range(7)])
    acts, error, rows, W = random(7, 4), random(7, 6, seed=1), random(7, 6, seed=2), random(20, 6)
    dense = torch.zeros(7, 20, dtype=torch.float64).scatter(1, ids, acts)
    assert torch.allclose(decoded(ids, acts, W), dense @ W, atol=1e-12)  # float64, another order of sums
    assert torch.allclose(products(error, W, ids), (error @ W.T).gather(1, ids), atol=1e-12)  # as above
    first, second = sums_by_feature(ids, [(acts, error), (acts, rows)], 20)
    assert torch.allclose(first, dense.T @ error, atol=1e-12)  # as above
    assert torch.allclose(second, dense.T @ rows, atol=1e-12)  # as above


def test_the_largest_are_found_whatever_the_number_of_threads():
    pre, threads = random(33, 50), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(largest(pre, 7).sort(-1).values, pre.topk(7).indices.sort(-1).values)
    finally:
        torch.set_num_threads(threads)


def begun(skip=True, dtype=torch.float32):
    x = random(400, 6, dtype=dtype) * 3 + 1
    y = x @ random(6, 6, seed=1, dtype=dtype) + 0.3 * random(400, 6, seed=5, dtype=dtype) + 2
    parts = (slice(0, 150), slice(150, 400))
    moments = no_moments(x[parts[0]], y[parts[0]])
    for part in parts:
        add_tokens(moments, x[part], y[part], keep=50)
    return x, y, started(moments, 20, skip, torch.Generator().manual_seed(0))


def test_the_skip_connection_starts_as_least_squares():
    x, y, start = begun(dtype=torch.float64)
    ones = np.hstack([x.numpy(), np.ones((400, 1))])
    solved = np.linalg.lstsq(ones, y.numpy(), rcond=None)[0]
    layer = LayerTraining(start, k=2, window=100)
    assert not layer.start.weights.W_dec.any()
    w = layer.folded()
    made = x.float() @ w.W_skip.T + w.b_dec
    assert np.allclose(made.numpy(), ones @ solved, atol=5e-3)  # the ridge is 1e-4 of a variance
    squares = float((y - y.mean(0)).square().sum(1).mean()) / start.y_scale**2
    assert abs(start.variance - squares) < 1e-6 * squares  # sums of squares lose digits to the mean
    assert begun(skip=False)[2].weights.W_skip is None


def test_the_fit_is_the_weighted_least_squares_of_a_dense_matrix():
    w, x, y, k = weights(), random(200, 6, seed=3), random(200, 6, seed=4), 5
    w.W_enc[3], w.b_enc[3] = 0.0, -9.0  # a feature that is never among the active ones
    y[::7] *= 40
    equations = no_equations(w)
    for part in (slice(0, 120), slice(120, 200)):
        add_to_equations(equations, w, x[part], y[part], k)
    pre = x @ w.W_enc.T + w.b_enc
    top = pre.topk(k, dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    inputs = torch.cat([acts, x, torch.ones(200, 1, dtype=torch.float64)], dim=1).numpy()
    ridge = 1e-3 * (token_weights(y)[:, None].numpy() * inputs**2).sum(0)
    ridge[:20] = np.maximum(ridge[:20], ridge[:20].mean())
    ridge[-1] = 0
    rows = np.vstack([inputs * token_weights(y).sqrt()[:, None].numpy(), np.diag(np.sqrt(ridge))])
    right = np.vstack([(y * token_weights(y).sqrt()[:, None]).numpy(), np.zeros((27, 6))])
    solved = np.linalg.lstsq(rows, right, rcond=None)[0]
    solve_equations(equations, w)
    for name, tensor, part in (
        ("W_dec", w.W_dec, solved[:20]),
        ("W_skip", w.W_skip.T, solved[20:26]),
        ("b_dec", w.b_dec, solved[26]),
    ):
        assert np.allclose(tensor.numpy(), part, atol=1e-9), name  # float64, another solver
    assert not w.W_dec[3].any()


def test_a_token_with_a_huge_output_counts_for_ten_usual_ones_at_most():
    y = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    usual = 12.5  # the first token's mean square
    counts = token_weights(y, usual)
    assert counts[0] == 1.0 and counts[2] == 1.0
    assert abs(float(counts[1]) * 125_000 - 10 * usual) < 1e-3  # float32


def test_features_learn_ordinary_tokens_beside_huge_ones():
    x = random(1200, 6, dtype=torch.float32)
    y = (x @ random(6, 12, seed=1, dtype=torch.float32) - 2).relu() @ random(12, 6, seed=2, dtype=torch.float32)
    huge = torch.arange(len(x)) % 100 == 0
    y[huge] = random(12, 6, seed=9, dtype=torch.float32) * 900
    moments = no_moments(x, y)
    add_tokens(moments, x, y, keep=1200)
    layer = LayerTraining(started(moments, 40, True, torch.Generator().manual_seed(0)), k=6, window=100)

    def explained():
        wrong = (layer.output(x) - y)[~huge]
        return 1 - float(wrong.square().sum() / (y[~huge] - y[~huge].mean(0)).square().sum())

    before = explained()
    for _ in range(400):
        layer.step(x, y, 3e-3)
    assert before < 0.7 and explained() > before + 0.15, (before, explained())


def test_the_folded_weights_write_what_the_layer_writes():
    x, y, start = begun()
    layer = LayerTraining(start, k=3, window=100)
    for _ in range(5):
        layer.step(x, y, lr=0.05)
    w = layer.folded()
    pre = x @ w.W_enc.T + w.b_enc
    top = pre.topk(3, dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    # float32, values up to 30
    assert torch.allclose(acts @ w.W_dec + w.b_dec + x @ w.W_skip.T, layer.output(x), atol=1e-4)


def test_steps_lower_the_error_and_a_restored_layer_goes_on_the_same():
    x, y, start = begun()
    layer = LayerTraining(start, k=3, window=1000)
    first = layer.step(x, y, lr=0.002)
    for _ in range(40):
        layer.step(x, y, lr=0.002)
    assert layer.step(x, y, lr=0.002).explained_variance > first.explained_variance
    again = restored({name: tensor.clone() for name, tensor in layer.state().items()}, k=3, window=1000)
    for _ in range(6):
        ours, theirs = layer.step(x, y, lr=0.002), again.step(x, y, lr=0.002)
        assert ours == theirs
    assert all(torch.equal(layer.tensors[name], again.tensors[name]) for name in layer.tensors)
    assert 0 < ours.l0 <= 3


def test_features_that_stay_silent_are_counted_as_dead():
    x, y, start = begun()
    start.weights.b_enc[4] = -1e6
    layer = LayerTraining(start, k=3, window=700)
    assert layer.step(x, y, lr=0.0).dead == 0  # 400 tokens only
    assert layer.step(x, y, lr=0.0).dead >= 1 and layer.silent[4] == 800
