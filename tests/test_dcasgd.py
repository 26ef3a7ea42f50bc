"""Delay compensation: laws of the correction, each switch by hand, the oracle, the optimizer."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from coursekit import curvature, data, models, train
from coursekit.dcasgd import (
    CURVATURES,
    DCASGD,
    compensate,
    curvature_error,
    diagonal_curvature,
)

X, Y, _, _ = data.load("digits").tensors(dtype=torch.float64)


def draw(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=train.generator(seed, "test"))


# ---- what stands in for the Hessian ----


@pytest.mark.covers("C2")
def test_curvature_is_strength_times_the_squared_gradient(device, dtype):
    g = torch.tensor([3.0, -0.5, 0.0], device=device, dtype=dtype)
    got = diagonal_curvature(g, 0.04)
    assert torch.equal(got, 0.04 * g * g)
    assert got.dtype == dtype
    assert torch.allclose(diagonal_curvature(g, 0.04, curvature="absolute"), 0.04 * g.abs())
    assert torch.equal(diagonal_curvature(g, 0.04, curvature="none"), torch.full_like(g, 0.04))


@pytest.mark.covers("C3")
def test_adaptive_strength_is_divided_by_the_root_with_epsilon_inside(dtype):
    """Spec 5.6: λ_t = λ_0 / √(MeanSquare + ε); with ε outside the root the value differs."""
    g, mean_square = torch.tensor([2.0], dtype=dtype), torch.tensor([0.09], dtype=dtype)
    got = diagonal_curvature(g, 2.0, mean_square, epsilon=0.16).item()
    assert got == pytest.approx(2.0 * 4 / 0.5)  # √(0.09 + 0.16) = 0.5
    assert got != pytest.approx(2.0 * 4 / (0.3 + 0.16))


def test_mean_and_permuted_curvature_stay_inside_their_tensor():
    g = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    mean = diagonal_curvature(g, 1.0, curvature="mean", sizes=(3, 2))
    assert torch.allclose(mean, torch.tensor([14 / 3] * 3 + [250.0] * 2))
    permuted = [
        diagonal_curvature(
            g, 1.0, curvature="permuted", sizes=(3, 2), generator=train.generator(seed, "deal")
        )
        for seed in range(8)
    ]
    assert all(sorted(p[:3].tolist()) == [1, 4, 9] for p in permuted)
    assert all(sorted(p[3:].tolist()) == [100, 400] for p in permuted)
    assert len({tuple(p.tolist()) for p in permuted}) > 3
    grid = diagonal_curvature(g[:4].view(2, 2), 1.0, curvature="mean")
    assert torch.equal(grid, torch.full((2, 2), 114 / 4))


def test_an_unknown_curvature_and_a_permutation_from_nowhere_are_refused():
    with pytest.raises(ValueError, match="diagonal_curvature: expected curvature to be one of 'sq"):
        diagonal_curvature(torch.ones(2), 1.0, curvature="hessian")
    with pytest.raises(TypeError, match="diagonal_curvature: expected a generator"):
        diagonal_curvature(torch.ones(2), 1.0, curvature="permuted")


@pytest.mark.parametrize("c", [0.01, 7.0])
def test_adaptive_correction_scales_with_the_gradient_and_the_constant_one_does_not(c):
    """Spec 5.5: with g → c g the displacement stays when lr → lr / c; ε = 0 for the exact law."""
    g, d, before = draw(0, 9), draw(1, 9), draw(2, 9) ** 2

    def relative(g, mean_square):
        step = compensate(g, d, diagonal_curvature(g, 0.3, mean_square, epsilon=0.0), cap=None)
        return (step - g) / g

    assert torch.allclose(relative(c * g, c * c * before), relative(g, before))
    assert torch.allclose(relative(c * g, None), c * relative(g, None))


# ---- the correction ----


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), st.floats(0, 1e6))
def test_correction_is_nothing_where_the_weights_have_not_moved(values, strength):
    """Spec 5.8, bitwise; the gradient may be as large as it likes."""
    g = torch.tensor(values)
    for cap in (1.0, None):
        got = compensate(g, torch.zeros_like(g), strength * g * g, lr=0.1, cap=cap)
        assert torch.equal(got, g)


def test_correction_stays_finite_where_the_square_overflows():
    g = torch.tensor([1e25])  # g² is infinite in float32, and infinity times 0 is NaN
    square = diagonal_curvature(g, 0.04)
    assert square.isinf().all()
    assert torch.equal(compensate(g, torch.zeros(1), square, lr=0.1), g)
    assert compensate(g, torch.zeros(1), square, lr=0.1, cap=None).isnan().all()


@pytest.mark.parametrize(("gain", "left"), [(0.5, 0.5), (1.0, 0.0), (1.6, -0.6), (2.5, -1.5)])
def test_gain_above_one_overshoots_the_backup_and_the_cap_stops_it_there(gain, left):
    """The correction alone moves w to w_bak + (1 − gain)(w − w_bak): spec 1.6."""
    lr, w, backup = 0.25, torch.tensor([3.0]), torch.tensor([1.0])
    curvature = torch.tensor([gain / lr])
    for cap, expected in ((None, left), (1.0, max(left, 0.0))):
        step = compensate(torch.zeros(1), w - backup, curvature, lr=lr, cap=cap)
        assert ((w - lr * step - backup) / (w - backup)).item() == pytest.approx(expected)


def test_cap_is_on_unless_taken_off_and_bounds_each_weight_by_itself():
    c, d = torch.tensor([1.0, 100.0]), torch.ones(2)
    assert compensate(torch.zeros(2), d, c, lr=0.1).tolist() == [1.0, 10.0]
    assert compensate(torch.zeros(2), d, c, lr=0.1, cap=0.5).tolist() == [1.0, 5.0]
    assert compensate(torch.zeros(2), d, c, lr=0.1, cap=None).tolist() == [1.0, 100.0]
    with pytest.raises(ValueError, match="compensate: expected cap positive and finite, got 0.0"):
        compensate(torch.zeros(2), d, c, lr=0.1, cap=0.0)


@pytest.mark.covers("C1")
@pytest.mark.covers("C2")
def test_hessian_product_turns_the_stale_gradient_of_a_quadratic_into_the_fresh_one():
    """Spec 5.4: Taylor's first order is exact where H is constant; so is diag(H) if H is diagonal.

    λ g ⊙ g of the same gradient is not: it knows the size of the slope and nothing of its change.
    """
    half = draw(0, 6, 6)
    for hessian in (half @ half.T - torch.eye(6), torch.diag(draw(1, 6))):  # with saddle points
        old, new = draw(2, 6), draw(3, 6)
        stale, fresh = hessian @ old, hessian @ new
        oracle = compensate(stale, new - old, lambda d, hessian=hessian: hessian @ d)
        assert torch.allclose(oracle, fresh, atol=1e-13)
        assert not torch.allclose(stale, fresh, atol=0.1)
        assert not torch.allclose(compensate(stale, new - old, stale * stale), fresh, atol=0.1)
    diagonal = compensate(stale, new - old, hessian.diagonal(), cap=None)
    assert torch.allclose(diagonal, fresh, atol=1e-14)


def test_hessian_product_of_a_smooth_net_leaves_an_error_of_second_order():
    """Halving the displacement quarters what first-order compensation leaves."""
    net = models.mlp([64, 16, 10], torch.nn.Tanh, generator=train.generator(0, "init")).double()
    params = list(net.parameters())
    loss = lambda: cross_entropy(net(X[:64]), Y[:64])
    flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors]).detach()
    start, stale = flat(params), flat(torch.autograd.grad(loss(), params))
    direction = draw(0, len(start))
    shapes = [p.shape for p in params]

    def pieces(vector):
        parts = vector.split([s.numel() for s in shapes])
        return [part.view(s) for part, s in zip(parts, shapes, strict=True)]

    product = flat(curvature.hvp(loss, params, pieces(direction)))
    left = []
    for size in (2e-2, 1e-2):
        torch.nn.utils.vector_to_parameters(start + size * direction, params)
        fresh = flat(torch.autograd.grad(loss(), params))
        got = compensate(stale, size * direction, lambda d: product * (d / direction).mean())
        left.append((got - fresh).norm().item())
        assert curvature_error(stale, fresh, got - stale).left < 0.2
    assert 3.5 < left[0] / left[1] < 4.5


# ---- how much it explains ----


def test_error_of_a_prediction_by_hand():
    stale, fresh = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 5.0])  # change (3, 4), norm 5
    got = curvature_error(stale, fresh, torch.tensor([1.0, 0.0]))
    assert got.left == pytest.approx(math.sqrt(4 + 16) / 5)
    assert got.cosine == pytest.approx(3 / 5)
    assert got.strength == pytest.approx(3)
    assert got.best == pytest.approx(4 / 5)


def test_no_prediction_leaves_everything_and_the_true_change_nothing():
    stale, fresh = draw(0, 7), draw(1, 7)
    assert curvature_error(stale, fresh, torch.zeros(7, dtype=torch.float64)) == (1, 0, 0, 1)
    exact = curvature_error(stale, fresh, fresh - stale)
    assert exact == pytest.approx((0, 1, 1, 0), abs=1e-7)


@given(st.integers(0, 99), st.floats(-5, 5))
def test_no_strength_leaves_less_than_the_best_one(seed, other):
    stale, fresh, guess = draw(seed, 5), draw(seed + 100, 5), draw(seed + 200, 5)
    found = curvature_error(stale, fresh, guess)
    assert curvature_error(stale, fresh, found.strength * guess).left == pytest.approx(found.best)
    assert curvature_error(stale, fresh, other * guess).left >= found.best - 1e-9


def test_a_gradient_that_has_not_changed_leaves_nothing_to_predict():
    g = draw(0, 3)
    with pytest.raises(ValueError, match="curvature_error: expected a gradient that changed"):
        curvature_error(g, g, g)


@pytest.mark.covers("C2")
def test_outer_product_is_the_hessian_at_the_optimum_per_sample_and_not_of_the_mini_batch():
    """Spec 5.7: logistic regression with labels drawn from the model itself.

    There the mean over samples of g gᵀ estimates the Fisher matrix, which is the Hessian. The
    square of a mini-batch's mean gradient is smaller by 1/b.
    """
    n, size = 40_000, 4
    x, w = draw(0, n, size), torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64)
    p = torch.sigmoid(x @ w)
    y = (torch.rand(n, dtype=torch.float64, generator=train.generator(1, "labels")) < p).double()
    hessian = (x * (p * (1 - p))[:, None]).T @ x / n
    grads = (p - y)[:, None] * x
    outer = grads.T @ grads / n
    assert (outer - hessian).abs().max() < 0.03 * hessian.abs().max()
    for b in (10, 40):
        batch = grads.view(-1, b, size).mean(dim=1)
        share = (batch**2).mean(dim=0) / hessian.diagonal()
        assert torch.allclose(share, torch.full_like(share, 1 / b), rtol=0.1)


# ---- one process with a delay ----


def network(dtype=torch.float64, device="cpu"):
    return models.mlp([64, 12, 10], generator=train.generator(0, "init")).to(device, dtype)


def learn(net, optimizer, steps, first=0):
    p = next(net.parameters())
    for step in range(first, first + steps):
        rows = slice(32 * (step % 40), 32 * (step % 40) + 32)
        optimizer.zero_grad()
        cross_entropy(net(X[rows].to(p)), Y[rows].to(p.device)).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("decay", [None, 0.95])
def test_without_delay_the_optimizer_is_sgd(device, dtype, decay):
    """Spec 5.1 in one process: nothing has moved, so there is nothing to correct."""
    ours, theirs = network(dtype, device), network(dtype, device)
    got = learn(ours, DCASGD(ours.parameters(), lr=0.1, delay=0, strength=9.0, decay=decay), 30)
    sgd = learn(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), 30)
    assert torch.allclose(got, sgd, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


def test_delayed_sgd_on_a_parabola_turns_unstable_at_the_known_step():
    """Spec 5.4: w ← w − lr h w(t − τ) is stable up to lr h = 2 sin(π / (2 (2τ + 1)))."""
    h = torch.tensor([0.99, 1.01], dtype=torch.float64)
    for delay in (0, 1, 2, 7):
        edge = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
        w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        optimizer = DCASGD([w], lr=edge, delay=delay, strength=0.0)
        sizes = []
        for _ in range(1200):
            w.grad = h * w.detach()
            optimizer.step()
            sizes.append(w.detach().abs())
        middle, end = (torch.stack(sizes[k - 100 : k]).amax(dim=0) for k in (600, 1200))
        assert (end > middle).tolist() == [False, True], delay


def test_exact_curvature_makes_the_delayed_parabola_as_stable_as_the_fresh_one():
    """The Hessian of h w²/2 is h: with it, delay 5 at lr h = 1 lands on the minimum like SGD."""
    h, queue, w = 1.0, [], torch.tensor([1.0])
    for _ in range(8):
        queue.append((h * w, w))
        if len(queue) > 5:
            g, backup = queue.pop(0)
            w = w - 1.0 * compensate(g, w - backup, torch.tensor([h]), lr=1.0)
    assert w.item() == 0.0


@pytest.mark.parametrize("curvature", CURVATURES[:-1])
def test_a_saved_optimizer_goes_on_as_if_nothing_had_happened(curvature):
    options = {"lr": 0.1, "delay": 3, "curvature": curvature, "weight_decay": 1e-3}
    whole = network()
    expected = learn(whole, DCASGD(whole.parameters(), **options), 12)
    net = network()
    optimizer = DCASGD(net.parameters(), **options)
    learn(net, optimizer, 6)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    learn(net, optimizer, 2)  # what is saved does not follow
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network()
    again.load_state_dict(saved["net"])
    optimizer = DCASGD(again.parameters(), lr=9.0)
    optimizer.load_state_dict(saved["optimizer"])
    assert torch.equal(learn(again, optimizer, 6, first=6), expected)


def test_the_queue_holds_copies_and_not_the_weights_themselves():
    """An aliased backup follows the weights, and the correction would silently be 0."""
    w = torch.tensor([1.0], requires_grad=True)
    optimizer = DCASGD([w], lr=0.1, delay=2, strength=1.0, decay=None)
    path = []
    for _ in range(5):
        w.grad = torch.ones(1)
        optimizer.step()
        path.append(w.item())
    # g = 1 throughout, so w falls by 0.1 (1 + w − w_bak): w_bak is 1, 1, 1, then what w was
    assert path == pytest.approx([1, 1, 0.9, 0.81, 0.9**3 - (0.9**3 - 0.729)])


def test_a_parameter_without_gradient_is_untouched_and_bad_gradients_are_refused_whole():
    """Spec 5.8 and 5.25."""
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = DCASGD([a, b], lr=0.1, delay=0)
    a.grad = torch.ones(2)
    optimizer.step()
    assert b.tolist() == [1, 1]
    assert b not in optimizer.state
    before = copy.deepcopy(optimizer.state_dict())
    b.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(ValueError, match="DCASGD: expected gradients finite, got 1 values"):
        optimizer.step()
    assert a.tolist() == pytest.approx([0.9, 0.9])
    assert str(before) == str(optimizer.state_dict())


def test_weight_decay_pulls_on_the_present_weights_and_never_enters_the_curvature():
    """Spec 5.8: with gradient 0 only w ← w − lr · wd · w is left, and no mean square."""
    w = torch.tensor([2.0], requires_grad=True)
    optimizer = DCASGD([w], lr=0.5, delay=1, weight_decay=0.1)
    for expected in (2.0, 1.9, 1.805):
        w.grad = torch.zeros(1)
        optimizer.step()
        assert w.item() == pytest.approx(expected)
    assert optimizer.state[w]["mean_square"].item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"expected lr in \[0, inf\], got -1.0"),
        ({"delay": -1}, "expected delay of at least 0, got -1"),
        ({"strength": -2.0}, r"expected strength in \[0, inf\], got -2.0"),
        ({"decay": 1.0}, r"expected decay in \[0, 1\), got 1.0"),
        ({"epsilon": -1e-7}, r"expected epsilon in \[0, inf\]"),
        ({"cap": 0.0}, "expected cap positive and finite, got 0.0"),
        ({"curvature": "permuted"}, "expected curvature to be one of 'squared', 'absolute'"),
        ({"weight_decay": -1.0}, "expected weight_decay in"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"DCASGD: {message}"):
        DCASGD([torch.ones(1, requires_grad=True)], **options)
