"""Hessian-vector products, top eigenvalue, Hutchinson's estimates, gradients of single examples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from coursekit import curvature, data, models, train


def quadratic(matrix):
    """A loss with this Hessian, its parameters split in two tensors of different shape."""
    n = len(matrix)
    w = [torch.ones(2, 1), torch.ones(n - 2)]
    w = [p.to(matrix).requires_grad_() for p in w]
    return lambda: 0.5 * (v := torch.cat([p.flatten() for p in w])) @ matrix @ v, w


def symmetric(seed, n, dtype=torch.float64):
    a = torch.randn(n, n, generator=train.generator(seed, "matrix"), dtype=torch.float64)
    return (a + a.T).to(dtype)


def small_net(device="cpu", dtype=torch.float64):
    """A loss of a small net with three classes, and its parameters."""
    net = models.mlp([4, 5, 3], nn.Tanh, generator=train.generator(0, "init")).to(device, dtype)
    g = train.generator(0, "x")
    x = torch.randn(30, 4, generator=g).to(device, dtype)
    y = torch.randint(3, (30,), generator=g).to(device)
    return net, x, y, lambda: cross_entropy(net(x), y)


def torch_hessian(net, x, y):
    """The Hessian by torch.func, flattened to a matrix."""
    params = {k: p.detach() for k, p in net.named_parameters()}

    def loss(params):
        return cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    blocks = torch.func.hessian(loss)(params)
    rows = [
        torch.cat([blocks[i][j].reshape(params[i].numel(), -1) for j in params], 1) for i in params
    ]
    return torch.cat(rows)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


# ---- Hessian-vector products ----


def test_products_are_those_with_the_hessian_of_torch(device, dtype):
    net, x, y, loss = small_net(device, dtype)
    params = list(net.parameters())
    v = [torch.randn(p.shape, generator=train.generator(1, "v")).to(p) for p in params]
    hessian = torch_hessian(net, x, y)
    tol = 1e-5 if dtype == torch.float32 else 1e-13
    got = curvature.hvp(loss, params, v)
    torch.testing.assert_close(flat(got), hessian @ flat(v), rtol=tol, atol=tol)
    assert [p.shape for p in got] == [p.shape for p in params]
    assert not any(p.requires_grad for p in got)
    torch.testing.assert_close(curvature.full_hessian(loss, params), hessian, rtol=tol, atol=tol)


def test_a_product_computed_by_hand():
    """x²y + y³ at (1, 2) has the Hessian [[4, 2], [2, 12]]."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = lambda: w[0] ** 2 * w[1] + w[1] ** 3
    assert curvature.hvp(loss, [w], [torch.tensor([1.0, -1.0])])[0].tolist() == [2.0, -10.0]
    assert curvature.full_hessian(loss, [w]).tolist() == [[4.0, 2.0], [2.0, 12.0]]


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=20)
def test_products_are_linear_and_symmetric(seed, a, b):
    net, _, _, loss = small_net()
    params, g = list(net.parameters()), train.generator(seed, "v")
    u, v = ([torch.randn(p.shape, generator=g).to(p) for p in params] for _ in "uv")
    hu, hv = curvature.hvp(loss, params, u), curvature.hvp(loss, params, v)
    both = curvature.hvp(loss, params, [a * p + b * q for p, q in zip(u, v, strict=True)])
    torch.testing.assert_close(flat(both), a * flat(hu) + b * flat(hv), rtol=1e-10, atol=1e-10)
    assert (flat(u) @ flat(hv)).item() == pytest.approx((flat(v) @ flat(hu)).item(), abs=1e-11)


def test_parameters_that_are_unused_or_enter_linearly_have_no_curvature():
    a, b, c = (torch.tensor([2.0, 3.0], requires_grad=True) for _ in "abc")
    loss = lambda: (a**2).sum() + 5 * b.sum()
    ones = [torch.ones(2)] * 3
    assert [h.tolist() for h in curvature.hvp(loss, [a, b, c], ones)] == [[2, 2], [0, 0], [0, 0]]
    assert curvature.hvp(lambda: b.sum(), [b], [torch.ones(2)])[0].tolist() == [0, 0]
    assert curvature.top_eigenvalue(lambda: b.sum(), [b], generator=train.generator(0, "v")) == 0


def test_nothing_is_left_behind_and_the_loss_is_computed_once():
    net, _, _, loss = small_net()
    params, before = list(net.parameters()), flat(net.parameters()).clone()
    calls = []
    g = train.generator(0, "v")

    def counted():
        calls.append(1)
        return loss()

    with torch.no_grad():  # as in a callback of train.fit
        curvature.top_eigenvalue(counted, params, generator=g)
    curvature.hutchinson_trace(counted, params, samples=3, generator=g)
    curvature.hutchinson_diagonal(counted, params, samples=3, generator=g)
    assert len(calls) == 3
    assert all(p.grad is None for p in params)
    assert torch.equal(flat(params), before)


# ---- the top eigenvalue ----


@pytest.mark.covers("N1")
@pytest.mark.parametrize("steps", [0, 100])
def test_the_top_eigenvalue_of_a_digits_net_is_that_of_its_full_hessian(steps):
    x, y, _, _ = data.load("digits").tensors("cpu", torch.float64)
    net = models.mlp([64, 8, 10], generator=train.generator(0, "init")).double()
    params, loss = list(net.parameters()), lambda: cross_entropy(net(x), y)
    sgd = torch.optim.SGD(params, lr=0.5)
    for _ in range(steps):
        sgd.zero_grad()
        loss().backward()
        sgd.step()
    exact = torch.linalg.eigvalsh(curvature.full_hessian(loss, params))
    for seed in range(5):
        g = train.generator(seed, "power")
        got = curvature.top_eigenvalue(loss, params, tol=1e-3, generator=g)
        assert got == pytest.approx(exact[-1].item(), rel=1e-3)
    lowest = -curvature.top_eigenvalue(lambda: -loss(), params, generator=g)
    assert lowest == pytest.approx(exact[0].item(), rel=1e-3)


@given(st.integers(0, 10**6), st.integers(3, 40))
def test_it_is_the_largest_of_any_symmetric_matrix(seed, n):
    matrix = symmetric(seed, n)
    got = curvature.top_eigenvalue(*quadratic(matrix), tol=1e-8, generator=train.generator(1, "v"))
    assert got == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-6, abs=1e-9)


def test_it_follows_dtype_and_device(device, dtype):
    matrix = symmetric(3, 20, dtype).to(device)
    got = curvature.top_eigenvalue(*quadratic(matrix), generator=train.generator(1, "v"))
    assert got == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-3)


def test_a_larger_negative_eigenvalue_does_not_take_its_place():
    """Plain power iteration finds the largest magnitude, here -5, which says nothing of 2/λ_max."""
    matrix = torch.diag(torch.tensor([2.0, -5.0, 1.0, 0.5], dtype=torch.float64))
    loss, w = quadratic(matrix)
    v = torch.ones(4, dtype=torch.float64)
    for _ in range(100):
        v = matrix @ v / (matrix @ v).norm()
    assert (v @ matrix @ v).item() == pytest.approx(-5)
    got = curvature.top_eigenvalue(loss, w, tol=1e-9, generator=train.generator(0, "v"))
    assert got == pytest.approx(2)


@pytest.mark.parametrize(
    "eigenvalues", [[3, 3, 3, 3], [0, 0, 0, 0], [-1, -2, -3, -4], [1e-9, 0, -1, -1], [1e6, 1, 1, 1]]
)
def test_repeated_zero_and_negative_spectra_are_found(eigenvalues):
    loss, w = quadratic(torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)))
    got = curvature.top_eigenvalue(loss, w, generator=train.generator(0, "v"))
    assert got == pytest.approx(max(eigenvalues), rel=1e-3, abs=1e-12)


def test_a_search_that_does_not_converge_says_so():
    """Ten products cannot resolve the upper edge of a dense spectrum to nine digits."""
    loss, w = quadratic(torch.diag(torch.linspace(0, 1, 300, dtype=torch.float64)))
    with pytest.raises(
        RuntimeError,
        match=r"^top_eigenvalue: expected a relative residual of 1e-09 within 10 products, "
        r"got 0\.\d+ at 0\.\d+; raise max_iter or tol$",
    ):
        curvature.top_eigenvalue(loss, w, tol=1e-9, max_iter=10, generator=train.generator(0, "v"))


# ---- Hutchinson ----


def test_trace_and_diagonal_of_a_diagonal_matrix_are_exact():
    """With signs, v_i² = 1: one draw is enough. With normal numbers it would not be."""
    matrix = torch.diag(torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64))
    loss, w = quadratic(matrix)
    trace = curvature.hutchinson_trace(loss, w, samples=1, generator=train.generator(0, "v"))
    assert trace.mean == pytest.approx(6, abs=1e-12)
    assert math.isnan(trace.standard_error)
    diagonal = curvature.hutchinson_diagonal(loss, w, samples=1, generator=train.generator(0, "v"))
    torch.testing.assert_close(flat(diagonal), matrix.diag())
    assert [d.shape for d in diagonal] == [p.shape for p in w]


def test_the_trace_has_the_variance_of_hutchinson():
    """2 Σ_{i≠j} H_ij²; normal vectors would add 2 Σ_i H_ii²."""
    matrix = symmetric(0, 12)
    off = matrix - torch.diag(matrix.diag())
    loss, w = quadratic(matrix)
    got = curvature.hutchinson_trace(loss, w, samples=1000, generator=train.generator(0, "v"))
    assert abs(got.mean - matrix.trace().item()) < 4 * got.standard_error
    expected = math.sqrt(2 * (off**2).sum().item() / 1000)
    assert got.standard_error == pytest.approx(expected, rel=0.1)


def test_the_diagonal_has_its_variance_and_is_not_its_absolute_value():
    matrix = symmetric(0, 12)
    loss, w = quadratic(matrix)
    got = curvature.hutchinson_diagonal(loss, w, samples=1000, generator=train.generator(0, "v"))
    error = (flat(got) - matrix.diag()) / ((matrix**2).sum(1) - matrix.diag() ** 2).sqrt()
    assert abs(error).max() < 4 / math.sqrt(1000)
    assert 0.5 < error.norm() * math.sqrt(1000 / 12) < 1.6
    assert flat(got).min() < -1


def test_estimates_of_a_net_agree_with_its_hessian(device, dtype):
    net, _, _, loss = small_net(device, dtype)
    params = list(net.parameters())
    hessian = curvature.full_hessian(loss, params)
    g = train.generator(0, "v")
    trace = curvature.hutchinson_trace(loss, params, samples=500, generator=g)
    assert abs(trace.mean - hessian.trace().item()) < 4 * trace.standard_error
    diagonal = curvature.hutchinson_diagonal(loss, params, samples=500, generator=g)
    assert torch.corrcoef(torch.stack([flat(diagonal), hessian.diag()]))[0, 1] > 0.95


# ---- gradients of single examples ----


def test_gradients_of_single_examples_are_those_of_a_loop(device, dtype):
    net, x, y, _ = small_net(device, dtype)
    got = curvature.per_sample_grads(net, cross_entropy, x, y)
    tol = 1e-6 if dtype == torch.float32 else 1e-14
    for i in range(len(x)):
        one = torch.autograd.grad(cross_entropy(net(x[i : i + 1]), y[i : i + 1]), net.parameters())
        for name, expected in zip(got, one, strict=True):
            torch.testing.assert_close(got[name][i], expected, rtol=tol, atol=tol)


def test_their_mean_is_the_gradient_of_the_mean_loss_and_grad_is_untouched():
    net, x, y, loss = small_net()
    got = curvature.per_sample_grads(net, cross_entropy, x, y)
    mean = torch.autograd.grad(loss(), net.parameters())
    for name, expected in zip(dict(net.named_parameters()), mean, strict=True):
        torch.testing.assert_close(got[name].mean(0), expected)
    assert all(p.grad is None for p in net.parameters())


def test_gradients_of_a_line_by_hand():
    """Of (wx - y)² at w = 2: 2 (2x - y) x."""
    line = nn.Linear(1, 1, bias=False)
    line.weight.data.fill_(2)
    x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]])
    got = curvature.per_sample_grads(line, mse_loss, x, y)
    assert got["weight"].flatten().tolist() == [2, 30]


def test_batch_norm_has_single_gradients_in_evaluation_mode_only():
    net, x, y, _ = small_net()
    net = nn.Sequential(net[0], nn.BatchNorm1d(5).double(), *net[1:])
    message = "^per_sample_grads: expected examples that do not meet, got BatchNorm1d in training"
    with pytest.raises(ValueError, match=message):
        curvature.per_sample_grads(net, cross_entropy, x, y)
    got = curvature.per_sample_grads(net.eval(), cross_entropy, x, y)
    assert got["1.weight"].shape == (30, 5)


# ---- what is refused ----

ONE = torch.ones(2, requires_grad=True)
WRONG = [
    (lambda: ONE**2, [ONE], r"expected the loss of shape \(\), got \(2,\)"),
    (lambda: torch.tensor(1.0), [ONE], "expected a loss with a graph that leads to params"),
    (lambda: ONE.sum() / 0, [ONE], "expected the loss finite, got 1 values that are not"),
    (lambda: ONE.sum(), [ONE.detach()], "expected params that all require a gradient"),
    (lambda: ONE.sum(), [], "expected params that all require a gradient"),
    (
        lambda: (ONE - 1).abs().pow(1.5).sum(),  # slope 0 and infinite curvature at 1
        [ONE],
        "expected the Hessian-vector product finite, got 2 values that are not",
    ),
]
CALLS = {
    "hvp": lambda loss, w: curvature.hvp(loss, w, [torch.ones(2)] * len(w)),
    "full_hessian": curvature.full_hessian,
    "top_eigenvalue": lambda loss, w: curvature.top_eigenvalue(
        loss, w, generator=train.generator(0, "v")
    ),
    "hutchinson_trace": lambda loss, w: curvature.hutchinson_trace(
        loss, w, samples=2, generator=train.generator(0, "v")
    ),
    "hutchinson_diagonal": lambda loss, w: curvature.hutchinson_diagonal(
        loss, w, samples=2, generator=train.generator(0, "v")
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("loss", "params", "message"), WRONG)
def test_a_loss_that_has_no_hessian_is_refused(name, loss, params, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        CALLS[name](loss, params)


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_shapes_and_settings_are_refused():
    loss, g = lambda: (ONE**2).sum(), train.generator(0, "v")
    with pytest.raises(ValueError, match=r"^hvp: expected vectors\[0\] of shape \(2,\), got"):
        curvature.hvp(loss, [ONE], [torch.ones(3)])
    with pytest.raises(ValueError, match="^hvp: expected 1 vectors, got 2$"):
        curvature.hvp(loss, [ONE], [torch.ones(2)] * 2)
    with pytest.raises(ValueError, match="^top_eigenvalue: expected tol positive"):
        curvature.top_eigenvalue(loss, [ONE], tol=0, generator=g)
    with pytest.raises(ValueError, match="^top_eigenvalue: expected max_iter of at least 1, got 0"):
        curvature.top_eigenvalue(loss, [ONE], max_iter=0, generator=g)
    with pytest.raises(ValueError, match="^hutchinson_trace: expected samples of at least 1"):
        curvature.hutchinson_trace(loss, [ONE], samples=0, generator=g)
    with pytest.raises(ValueError, match=r"^per_sample_grads: expected y of shape \(3, ...\)"):
        curvature.per_sample_grads(nn.Linear(2, 1), mse_loss, torch.ones(3, 2), torch.ones(2, 1))


def test_draws_come_from_the_generator_alone():
    loss, w = quadratic(symmetric(0, 9))
    before = torch.get_rng_state()
    calls = [
        lambda g: curvature.hutchinson_trace(loss, w, samples=2, generator=g).mean,
        lambda g: flat(curvature.hutchinson_diagonal(loss, w, samples=2, generator=g)).tolist(),
        lambda g: curvature.top_eigenvalue(loss, w, tol=0.1, generator=g),
    ]
    for call in calls:
        assert call(train.generator(0, "v")) == call(train.generator(0, "v"))
        assert call(train.generator(0, "v")) != call(train.generator(1, "v"))
    assert torch.equal(torch.get_rng_state(), before)
