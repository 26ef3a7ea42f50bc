"""Generalization: interpolators and margins against solvers, sharpness and stability by hand."""

import itertools
import math
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.svm import SVC
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from coursekit import curvature, data, experiment, generalization, models, train
from coursekit.generalization import (
    epsilon_sharpness,
    max_margin_direction,
    min_norm_solution,
    random_features,
    stability_limit,
)

seeds = st.integers(0, 10**6)


def stream(seed=0, name="test"):
    return train.generator(seed, name)


def normal(*shape, seed=0, name="x", dtype=torch.float64):
    return torch.randn(shape, generator=stream(seed, name), dtype=dtype)


# ---- the interpolator of least norm ----


@pytest.mark.covers("R10")
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([(), (1,), (3,)]), seeds)
@settings(max_examples=60)
def test_min_norm_solution_is_the_pseudoinverse_of_numpy(n, features, outputs, seed):
    x, y = normal(n, features, seed=seed), normal(n, *outputs, seed=seed, name="y")
    got = min_norm_solution(x, y, rtol=1e-10)
    want = np.linalg.pinv(x.numpy(), rcond=1e-10) @ y.numpy()
    assert got.shape == (features, *outputs)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-8, atol=1e-8 * (1 + abs(want).max()))


def test_min_norm_solution_of_a_singular_matrix_is_the_pseudoinverse(device, dtype):
    x, y = normal(30, 4) @ normal(4, 20, name="mix"), normal(30, 2, name="y")
    want = np.linalg.pinv(x.numpy(), rcond=1e-10) @ y.numpy()
    got = min_norm_solution(x.to(device, dtype), y.to(device, dtype), rtol=1e-5)
    assert (got.dtype, got.device.type) == (dtype, device.type)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=tolerance, atol=tolerance)


def test_pixels_that_never_vary_have_no_weight():
    x, y, _, _ = data.load("digits").tensors(dtype=torch.float64)
    w = min_norm_solution(x, y.double())
    np.testing.assert_allclose(w, np.linalg.pinv(x.numpy(), rcond=1e-12) @ y.numpy(), atol=1e-8)
    black = (x == 0).all(dim=0)
    assert black.any()
    assert w[black].abs().max() < 1e-12


@given(seeds)
@settings(max_examples=25)
def test_every_other_interpolator_is_longer(seed):
    x, y = normal(5, 12, seed=seed), normal(5, seed=seed, name="y")
    w = min_norm_solution(x, y)
    torch.testing.assert_close(x @ w, y)
    free = normal(12, seed=seed, name="free")
    null = free - min_norm_solution(x, x @ free)
    assert (x @ null).abs().max() < 1e-10
    assert abs(w @ null) < 1e-10
    other = w + null
    assert other.norm() > w.norm()
    assert other.norm() ** 2 == pytest.approx((w.norm() ** 2 + null.norm() ** 2).item())


@pytest.mark.covers("R10")
def test_gradient_descent_from_zero_finds_it_and_from_elsewhere_does_not():
    x, y = normal(8, 20), normal(8, name="y")
    w, step = min_norm_solution(x, y), 1 / torch.linalg.matrix_norm(x, 2) ** 2

    def descend(v):
        for _ in range(20_000):
            v = v - step * x.T @ (x @ v - y)
        return v

    torch.testing.assert_close(descend(torch.zeros(20).double()), w, rtol=1e-9, atol=1e-9)
    start = normal(20, name="start")
    end = descend(start)
    torch.testing.assert_close(x @ end, y)
    assert (end - w).norm() > 1
    torch.testing.assert_close(end, w + start - min_norm_solution(x, x @ start))


def test_the_normal_equations_do_not_give_it():
    x, y = normal(8, 20), normal(8, name="y")
    try:
        wrong = torch.linalg.solve(x.T @ x, x.T @ y)
    except torch.linalg.LinAlgError:
        return
    assert (wrong - min_norm_solution(x, y)).norm() > 0.1


@given(st.floats(1e-3, 1e3), st.integers(2, 9), st.integers(2, 9), seeds)
@settings(max_examples=25)
def test_ridge_is_that_of_scikit_learn(ridge, n, features, seed):
    x, y = normal(n, features, seed=seed), normal(n, 2, seed=seed, name="y")
    got = min_norm_solution(x, y, ridge=ridge)
    want = Ridge(alpha=ridge, fit_intercept=False, solver="svd").fit(x.numpy(), y.numpy()).coef_.T
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-8, atol=1e-10)


def test_a_small_ridge_tends_to_the_min_norm_solution():
    x, y = normal(5, 12), normal(5, name="y")
    limit = min_norm_solution(x, y)
    far, near = ((min_norm_solution(x, y, ridge=r) - limit).norm().item() for r in (1e-3, 1e-6))
    assert near == pytest.approx(far / 1000, rel=0.01)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(3), {}, r"expected x of shape \(n, features\), got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(2), {}, r"expected y of shape \(3, \.\.\.\), got \(2,\)"),
        (torch.zeros(0, 2), torch.zeros(0), {}, r"at least one example and feature, got \(0, 2\)"),
        (torch.full((1, 1), math.nan), torch.zeros(1), {}, r"expected x finite, got 1 values"),
        (torch.ones(1, 1), torch.tensor([math.inf]), {}, r"expected y finite, got 1 values"),
        (
            torch.ones(1, 1),
            torch.ones(1),
            {"ridge": -1.0},
            r"ridge not negative .* got -1",
        ),
        (torch.ones(1, 1), torch.ones(1), {"ridge": math.nan}, r"ridge not negative .* got nan"),
    ],
)
def test_min_norm_solution_says_what_is_wrong(x, y, options, message, unchecked_shapes):
    with pytest.raises(ValueError, match=rf"^min_norm_solution: .*{message}"):
        min_norm_solution(x, y, **options)


def test_min_norm_solution_of_a_zero_matrix_is_zero():
    assert (min_norm_solution(torch.zeros(2, 3), torch.ones(2)) == 0).all()


# ---- the largest margin ----


def two_digits(pair=(4, 9), dtype=torch.float64):
    """Two classes of digits with labels ±1, and a column of ones."""
    x, y, _, _ = data.load("digits").tensors(dtype=dtype)
    keep = (y == pair[0]) | (y == pair[1])
    x = x[keep] / x[keep].norm(dim=1).mean()
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return x, torch.where(y[keep] == pair[0], 1.0, -1.0).to(dtype)


def support_vector_machine(x, y):
    """Direction of scikit-learn's hard margin; reflected examples make its intercept zero."""
    both = SVC(kernel="linear", C=1e6, tol=1e-10).fit(torch.cat([x, -x]), torch.cat([y, -y]))
    assert abs(both.intercept_[0]) < 1e-6
    w = torch.tensor(both.coef_[0])
    return w / w.norm()


@pytest.mark.covers("R11")
@pytest.mark.parametrize("pair", [(4, 9), (3, 8), (0, 1)])
def test_max_margin_direction_is_that_of_a_hard_margin_svm(pair):
    x, y = two_digits(pair)
    w = max_margin_direction(x, y)
    assert w.norm() == pytest.approx(1)
    torch.testing.assert_close(w, support_vector_machine(x, y), rtol=0, atol=1e-4)


def test_max_margin_direction_in_both_precisions(device, dtype):
    x, y = two_digits(dtype=dtype)
    w = max_margin_direction(x.to(device), y.to(device))
    assert (w.dtype, w.device.type) == (dtype, device.type)
    torch.testing.assert_close(
        w.double().cpu(), max_margin_direction(*two_digits()), rtol=0, atol=1e-5
    )


@given(st.integers(2, 5), st.integers(2, 12), st.floats(0.01, 100), seeds)
@settings(max_examples=40)
def test_no_other_direction_has_a_larger_margin(features, n, scale, seed):
    x, truth = normal(n, features, seed=seed), normal(features, seed=seed, name="truth")
    y = torch.sign(x @ truth)
    w = max_margin_direction(scale * x, y)
    margin = (y * (x @ w)).min()
    others = normal(200, features, seed=seed, name="others")
    others = torch.cat([others, w + 0.01 * others, truth[None]])
    others = others / others.norm(dim=1, keepdim=True)
    assert ((y[:, None] * (x @ others.T)).min(dim=0).values <= margin + 1e-9).all()


def test_it_is_the_shortest_vector_of_a_convex_hull():
    x, y = two_digits()
    w = max_margin_direction(x, y)
    margin = (y * (x @ w)).min().item()
    points = y[:, None] * x
    on_the_margin = points[(points @ w) < margin * (1 + 1e-6)]
    weights = min_norm_solution(on_the_margin.T, w * margin)  # w is a mixture of these alone
    torch.testing.assert_close(on_the_margin.T @ weights, w * margin, rtol=1e-6, atol=1e-8)
    assert weights.sum() == pytest.approx(1)
    assert weights.min() > -1e-6


@pytest.mark.covers("R11")
def test_descent_on_the_logistic_loss_turns_to_it_at_the_rate_one_over_log_t():
    x, y = two_digits()
    points, w_hat = y[:, None] * x, max_margin_direction(x, y)
    w, log_t, angles, times = torch.zeros(65).double(), torch.tensor(-math.inf), [], []
    for step in range(1, 15_001):
        log_pull = torch.nn.functional.logsigmoid(-points @ w)  # of each example on w
        w = w + log_pull.softmax(dim=0) @ points
        # the same step by gradient descent on the mean loss would have this learning rate
        log_t = torch.logaddexp(log_t, math.log(len(x)) - log_pull.logsumexp(dim=0))
        if step in (1500, 3000, 6000, 15_000):
            angles.append(torch.arccos(w @ w_hat / w.norm()).item())
            times.append(log_t.item())
    slope = np.polyfit(np.log(times), np.log(angles), 1)[0]
    assert times[0] > 25
    assert slope == pytest.approx(-1, abs=0.05)
    assert angles[-1] < 0.02


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(2, 1), torch.ones(3), r"expected y of shape \(2,\), got \(3,\)"),
        (torch.ones(2), torch.ones(2), r"expected x of shape \(n, features\), got \(2,\)"),
        (torch.ones(2, 1), torch.tensor([0.0, 1.0]), r"labels -1 and 1, got \[0.0, 1.0\]"),
        (torch.ones(0, 1), torch.ones(0), r"labels -1 and 1, got \[\]"),
        (torch.full((1, 1), math.inf), torch.ones(1), r"expected x finite"),
        (torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, -1.0]), r"separates, got 2 examples"),
        (torch.zeros(1, 2), torch.ones(1), r"separates, got 1 examples"),
    ],
)
def test_max_margin_direction_says_what_is_wrong(x, y, message, unchecked_shapes):
    with pytest.raises(ValueError, match=rf"^max_margin_direction: .*{message}"):
        max_margin_direction(x, y)


def test_classes_that_touch_are_not_separable():
    x = normal(60, 3)
    y = torch.sign(normal(60, name="coin"))
    with pytest.raises(ValueError, match="expected classes that a plane through the origin sep"):
        max_margin_direction(x, y)


# ---- random features ----


def test_random_features_tend_to_the_arc_cosine_kernel():
    x = normal(6, 4)
    z = random_features(4, 400_000, generator=stream())(x)
    norms = x.norm(dim=1)
    angle = torch.arccos((x @ x.T / (norms[:, None] * norms)).clamp(-1, 1))
    kernel = norms[:, None] * norms * (torch.sin(angle) + (math.pi - angle) * torch.cos(angle))
    torch.testing.assert_close(z @ z.T, kernel / (2 * math.pi), rtol=0.02, atol=0.02)


def test_random_features_are_the_same_map_for_every_batch_and_seed(device, dtype):
    x = normal(6, 4, dtype=dtype).to(device)
    features = random_features(4, 10, activation=torch.tanh, generator=stream())
    z = features(x)
    assert (z.dtype, z.device.type) == (dtype, device.type)
    torch.testing.assert_close(features(x[2:4]), z[2:4])
    again = random_features(4, 10, activation=torch.tanh, generator=stream())
    torch.testing.assert_close(again(x), z)
    assert (random_features(4, 10, generator=stream(1))(x) != z).any()


def test_random_features_are_positively_homogeneous_with_relu():
    x, features = normal(6, 4), random_features(4, 10, generator=stream())
    torch.testing.assert_close(features(3 * x), 3 * features(x))


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 5), ValueError, "inputs of at least 1, got 0"),
        ((5, 0), ValueError, "width of at least 1, got 0"),
        ((5, 1.5), TypeError, "width as an integer, got 1.5"),
    ],
)
def test_random_features_say_what_is_wrong(sizes, error, message, unchecked_shapes):
    with pytest.raises(error, match=f"^random_features: expected {message}"):
        random_features(*sizes, generator=stream())


def test_random_features_refuse_other_inputs():
    with pytest.raises(ValueError, match=r"^random_features: expected x of shape \(n, 3\), got"):
        random_features(3, 5, generator=stream())(torch.zeros(2, 4))


def test_nothing_moves_the_global_random_state():
    before = torch.get_rng_state()
    w = torch.ones(2, requires_grad=True)
    random_features(3, 5, generator=stream())
    epsilon_sharpness(lambda: w.square().sum(), [w], generator=stream())
    stability_limit(normal(4, 3), 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.covers("R12")
def test_the_test_error_peaks_where_features_equal_examples_and_falls_again():
    n, ratios = 100, (0.3, 0.8, 1.0, 1.25, 4.0, 12.0)
    x, y, x_test, y_test = data.load("digits").standardized().tensors(dtype=torch.float64)
    x, target = x[:n], torch.nn.functional.one_hot(y[:n], 10).double()

    def curve(seed):
        errors, norms = [], []
        for ratio in ratios:
            features = random_features(64, round(n * ratio), generator=stream(seed, f"{ratio}"))
            w = min_norm_solution(features(x), target)
            errors.append(((features(x_test) @ w).argmax(1) != y_test).double().mean().item())
            norms.append(w.norm().item())
        return {"error": errors, "norm": norms}

    got = experiment.run_seeds(curve)
    error, norm = got["error"].mean(axis=0), got["norm"].mean(axis=0)
    assert ratios[error.argmax()] == ratios[norm.argmax()] == 1.0
    assert error[-1] < 0.5 * error[2]
    assert error[-1] < error[0]
    assert (np.diff(error[2:]) < 0).all()


# ---- sharpness ----


def valley(curvatures, at=0.0, dtype=torch.float64):
    """A quadratic bowl, its parameters at a point, and the loss."""
    w = torch.full((len(curvatures),), at, dtype=dtype, requires_grad=True)
    h = torch.tensor(curvatures, dtype=dtype)
    return w, lambda: (h * w.square()).sum() / 2


@pytest.mark.covers("R9")
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.floats(1e-3, 1), st.floats(-2, 2))
@settings(max_examples=40)
def test_epsilon_sharpness_of_a_bowl_is_its_highest_corner(curvatures, epsilon, at):
    w, loss = valley(curvatures, at)
    bottom, half = loss().item(), epsilon * (abs(at) + 1)
    corner = sum(curvatures) * (abs(at) + half) ** 2 / 2
    got = epsilon_sharpness(loss, [w], epsilon, iterations=50, generator=stream())
    assert got <= 100 * (corner - bottom) / (1 + bottom) * (1 + 1e-9)
    if abs(at) > half:  # the slope has one sign in the whole box, so the corner is always found
        assert got == pytest.approx(100 * (corner - bottom) / (1 + bottom), rel=1e-6)


def test_at_the_bottom_the_search_still_leaves_the_point(dtype):
    w, loss = valley([1.0, 4.0], dtype=dtype)
    got = epsilon_sharpness(loss, [w], 0.1, generator=stream())
    assert got == pytest.approx(100 * 5 * 0.1**2 / 2, rel=1e-4)


def small_net():
    """A trained classifier of digits, its parameters and its loss, in float64."""
    split = data.load("digits").standardized()
    x, y, _, _ = split.tensors(dtype=torch.float64)
    x, y = x[:300], y[:300]
    net = models.mlp([64, 10, 10], generator=stream(0, "init")).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, x, lambda: cross_entropy(net(x), y)


def test_epsilon_sharpness_agrees_with_projected_ascent_and_grows_with_the_box():
    net, _, loss = small_net()
    params = list(net.parameters())
    before, bottom = [p.detach().clone() for p in params], loss().item()
    small, large = (
        epsilon_sharpness(loss, params, e, iterations=30, generator=stream()) for e in (1e-3, 1e-2)
    )
    assert large > small > 0
    halves = [1e-2 * (p.abs() + 1) for p in before]
    for _ in range(30):  # ascent to the corner that the sign of the gradient points to
        corner = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            for p, old, g, half in zip(params, before, corner, halves, strict=True):
                p.copy_(old + half * g.sign())
    highest = loss().item()
    assert 0.85 < large / (100 * (highest - bottom) / (1 + bottom)) < 1.1


def test_parameters_come_back_also_after_an_error():
    w, loss = valley([1.0, 2.0], at=1.5)
    epsilon_sharpness(loss, [w], 0.5, generator=stream())
    assert (w == 1.5).all()

    def falls_off():
        return loss() if (w == 1.5).all() else loss() * math.nan

    with pytest.raises(ValueError, match="epsilon_sharpness: expected the loss finite"):
        epsilon_sharpness(falls_off, [w], 0.5, generator=stream())
    assert (w == 1.5).all()


@pytest.mark.covers("R9")
def test_rescaling_moves_every_measure_and_not_the_function():
    net, x, loss = small_net()
    params = list(net.parameters())
    outputs, alpha = net(x).detach(), 10.0
    sharpness = {"box": lambda: epsilon_sharpness(loss, params, 1e-3, generator=stream())}
    sharpness["top"] = lambda: curvature.top_eigenvalue(loss, params, generator=stream())
    before = {name: measure() for name, measure in sharpness.items()}
    diagonal = curvature.full_hessian(loss, params).diagonal()
    first = params[0].numel() + params[1].numel()
    last_bias = params[3].numel()
    with torch.no_grad():
        net[0].weight *= alpha
        net[0].bias *= alpha
        net[2].weight /= alpha
    torch.testing.assert_close(net(x), outputs, rtol=1e-12, atol=1e-12)
    for name, measure in sharpness.items():
        assert abs(math.log(measure() / before[name])) > 0.5, name
    want = diagonal[:first].sum() / alpha**2 + diagonal[first:-last_bias].sum() * alpha**2
    want += diagonal[-last_bias:].sum()
    trace = curvature.full_hessian(loss, params).trace()
    torch.testing.assert_close(trace, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "expected epsilon positive and finite, got 0.0"),
        ({"epsilon": -0.1}, "expected epsilon positive and finite, got -0.1"),
        ({"epsilon": math.nan}, "expected epsilon positive and finite, got nan"),
        ({"iterations": 0}, "expected iterations of at least 1, got 0"),
        ({"params": []}, "expected params that all require a gradient"),
        ({"params": [torch.ones(2)]}, "expected params that all require a gradient"),
        (
            {"loss": lambda: torch.ones(2, requires_grad=True)},
            r"expected the loss of shape \(\), got \(2,\)",
        ),
    ],
)
def test_epsilon_sharpness_says_what_is_wrong(options, message, unchecked_shapes):
    w, loss = valley([1.0])
    given = {"loss": loss, "params": [w], "epsilon": 1e-3, "iterations": 3} | options
    with pytest.raises(ValueError, match=f"^epsilon_sharpness: {message}"):
        epsilon_sharpness(**given, generator=stream())


# ---- stability ----


def growth_of_second_moments(g, lr, batch_size):
    """Spectral radius of Σ -> E[(I - η H_B) Σ (I - η H_B)], by listing every batch."""
    eye, batches = torch.eye(g.shape[1]).double(), itertools.combinations(range(len(g)), batch_size)
    steps = [eye - lr * g[list(rows)].T @ g[list(rows)] / batch_size for rows in batches]
    mean = torch.stack([torch.kron(a, a) for a in steps]).mean(dim=0)
    return torch.linalg.eigvalsh(mean).abs().max().item()


@pytest.mark.covers("R13")
@given(st.integers(2, 5), st.integers(1, 4), st.data(), seeds)
@settings(max_examples=30)
def test_second_moments_grow_above_the_limit_and_not_below(n, features, draw, seed):
    batch_size = draw.draw(st.integers(1, n))
    g = normal(n, features, seed=seed) * normal(features, seed=seed, name="scale").abs()
    limit = stability_limit(g, batch_size)
    assert growth_of_second_moments(g, 0.99 * limit, batch_size) <= 1 + 1e-9
    assert growth_of_second_moments(g, 1.01 * limit, batch_size) > 1 + 1e-9


@pytest.mark.covers("R13")
@given(st.integers(2, 8), st.integers(1, 8), seeds)
@settings(max_examples=40)
def test_the_limit_lies_between_the_bounds_of_the_chapter(n, features, seed):
    g = normal(n, features, seed=seed)
    squares = g.square().sum(dim=1)
    limits = [stability_limit(g, size) for size in range(1, n + 1)]
    assert (np.diff(limits) >= -1e-5 * limits[0]).all()  # larger batches, larger steps
    fourth = (2 * squares.mean() / squares.square().mean()).item()
    assert 2 / squares.max().item() <= limits[0] * (1 + 1e-5)
    assert limits[0] <= fourth * (1 + 1e-5) <= 2 / squares.mean().item() * (1 + 2e-5)
    top = torch.linalg.eigvalsh(g.T @ g / n)[-1].item()
    assert limits[-1] == pytest.approx(2 / top)


@given(st.integers(2, 6), st.floats(0.1, 10), seeds)
@settings(max_examples=20)
def test_for_gradients_of_one_length_the_trace_bound_is_exact(n, length, seed):
    g = normal(n, 4, seed=seed)
    g = length * g / g.norm(dim=1, keepdim=True)
    assert stability_limit(g, 1) == pytest.approx(2 / length**2, rel=1e-4)


def test_the_limit_by_hand(dtype):
    g = torch.diag(torch.tensor([1.0, 2.0], dtype=dtype))  # H = diag(1, 4) / 2
    assert stability_limit(g) == pytest.approx(1)  # 2 / 2
    assert stability_limit(g, 1) == pytest.approx(0.5, rel=1e-5)  # 2 / 4, and 2 / tr H = 0.8
    assert stability_limit(torch.zeros(3, 2)) == math.inf


@pytest.mark.covers("R13")
def test_sgd_stays_below_the_limit_and_leaves_above_it():
    g, lr = normal(20, 40), {}
    limit = stability_limit(g, 1)
    for name, factor in (("below", 0.8), ("above", 1.6)):
        e, order = normal(40, name="start"), stream()
        for i in torch.randint(20, (6000,), generator=order):
            e = e - factor * limit * (g[i] @ e) * g[i]
        lr[name] = (g @ e).norm().item()
    assert lr["below"] < 1e-6
    assert lr["above"] > 1e3


def test_gradient_descent_trains_at_the_edge_of_stability():
    split = data.load("digits").standardized()
    x, y, _, _ = split.tensors()
    x, y, lr = x[:150], torch.nn.functional.one_hot(y[:150], 10), 0.5
    net = models.mlp([64, 24, 24, 10], torch.nn.Tanh, generator=stream(0, "init"))
    params = list(net.parameters())

    def loss():
        return (net(x) - y).square().sum(dim=1).mean() / 2

    def ratio():
        return curvature.top_eigenvalue(loss, params, tol=1e-2, generator=stream()) * lr / 2

    assert ratio() < 0.9
    for _ in range(800):
        gradient = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            torch._foreach_add_(params, gradient, alpha=-lr)
    assert ratio() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("gradients", "size", "message"),
    [
        (torch.ones(3), None, r"gradients of shape \(n, parameters\), got \(3,\)"),
        (torch.full((2, 2), math.nan), None, "gradients finite, got 4 values"),
        (torch.ones(2, 2), 0, "batch_size of at least 1, got 0"),
        (torch.ones(2, 2), 3, "batch_size of at most n = 2, got 3"),
    ],
)
def test_stability_limit_says_what_is_wrong(gradients, size, message, unchecked_shapes):
    with pytest.raises(ValueError, match=f"^stability_limit: expected {message}"):
        stability_limit(gradients, size)


def test_every_public_name_of_the_room_is_tested_here():
    public = [n for n in vars(generalization) if not n.startswith("_")]
    functions = [
        n
        for n in public
        if getattr(vars(generalization)[n], "__module__", "") == generalization.__name__
    ]
    assert set(functions) <= set(globals())


# ---- the studies ----


def script(name):
    """Everything that a study of this chapter defines."""
    return runpy.run_path(str(ROOT / "experiments" / "generalization" / f"{name}.py"))


def test_the_rates_of_the_study_of_sharpness_are_those_of_its_rule():
    record = experiment.stored("generalization/sharpness")
    assert len(record.seeds) >= 5
    for size, chosen in record.config["learning_rates"].items():
        rates = [r for r in record.config["grid"][size] if f"grid/{size}/{r}/top" in record.values]
        left_out = [r for r in record.config["grid"][size] if r not in rates]
        assert [[int(size), r] for r in left_out] == [
            pair for pair in record.config["unfinished"] if pair[0] == int(size)
        ]
        epochs = {r: np.mean(record.values[f"grid/{size}/{r}/epochs"]) for r in rates}
        assert chosen == min(rates, key=epochs.get)
        for r in rates:
            assert max(record.values[f"grid/{size}/{r}/loss"]) <= record.config["target_loss"]


def test_the_step_of_the_study_of_sgd_is_that_of_automatic_differentiation():
    study = script("sharpness")
    hidden = study["SGD"]["hidden"]
    w, x, y = normal(3, 66 * hidden + 1), normal(3, 64, name="x"), normal(3, name="y")
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    slope = vmap(grad(lambda w, x, y: (study["output"](w, x) - y).square() / 2))(w, x, y)
    want = w - lr[:, None] * slope
    study["sgd_step_"](w, x, y, lr)
    torch.testing.assert_close(w, want, rtol=1e-12, atol=1e-12)


def test_a_stored_error_of_the_random_features_comes_out_again():
    record = experiment.stored("generalization/double_descent")
    width = record.config["feature_widths"][4]
    again = script("double_descent")["features_at"](width, 1, 0.2)
    for key, value in again.items():
        stored = record.values[f"features/0.2/{key}"][1][4]
        assert value == pytest.approx(stored, abs=0.01 * (1 + abs(stored))), key
