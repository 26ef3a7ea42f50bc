"""Penalties and projections against solvers, filters against descent, images, averages."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, optimize
from sklearn.linear_model import Lasso, Ridge
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from coursekit import data, models, train
from coursekit import regularization as reg
from coursekit.curvature import full_hessian
from coursekit.train import fit, generator

F64 = torch.float64
AUGMENTATIONS = {  # name: (a strength, the one that changes nothing)
    "augment_inversion": (0.5, 0.0),
    "augment_scaling": (1.3, 1.0),
    "augment_translation": (0.2, 0.0),
    "augment_rotation": (30.0, 0.0),
    "augment_brightness": (0.3, 0.0),
    "augment_contrast": (2.0, 1.0),
    "augment_noise": (0.2, 0.0),
    "augment_color_shift": (0.3, 0.0),
}


def diabetes():
    """Standardized inputs and centred targets of the training rows, in float64."""
    split = data.load("diabetes").standardized()
    return torch.tensor(split.x_train), torch.tensor(split.y_train - split.y_train.mean())


def normal(*shape, seed=0, dtype=F64, device="cpu"):
    return torch.randn(shape, generator=generator(seed, "test"), dtype=dtype).to(device)


def pictures(n=4, channels=3, height=9, width=9, dtype=torch.float32, device="cpu"):
    x = torch.rand(n, channels, height, width, generator=generator(0, "pictures"))
    return x.to(device, dtype)


def augment(name, images, strength=None, seed=0, **options):
    strength = AUGMENTATIONS[name][0] if strength is None else strength
    return getattr(reg, name)(images, strength, generator=generator(seed, name), **options)


# ---- penalties ----


@pytest.mark.covers("R2", "R3")
def test_penalties_and_their_gradients_by_hand(device, dtype):
    w = torch.tensor([3.0, -4.0, 0.0], dtype=dtype, device=device, requires_grad=True)
    assert reg.l1_penalty(w, 0.5).item() == 3.5
    assert reg.l2_penalty(w, 0.5).item() == 12.5
    (g1,) = torch.autograd.grad(reg.l1_penalty(w, 0.5), w)
    (g2,) = torch.autograd.grad(reg.l2_penalty(w, 0.5), w)
    assert g1.tolist() == [0.5, -0.5, 0.0]
    assert g2.tolist() == [3.0, -4.0, 0.0]


def test_the_gradient_of_the_squared_penalty_passes_gradcheck():
    w = normal(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: reg.l2_penalty(w, 0.3), w)
    assert torch.autograd.gradcheck(lambda w: reg.l1_penalty(w, 0.3), w)  # no entry near zero


def test_a_penalty_of_a_model_is_the_sum_over_its_parameters():
    net = models.mlp([3, 4, 2], generator=generator(0, "init"))
    whole = torch.cat([p.flatten() for p in net.parameters()])
    for penalty in (reg.l1_penalty, reg.l2_penalty):
        assert torch.allclose(penalty(net.parameters(), 0.1), penalty(whole, 0.1))


@pytest.mark.covers("R2")
def test_a_step_shrinks_by_one_minus_two_delta_lambda_without_the_half(dtype):
    """And by 1 - δλ with it, which is what torch calls weight_decay."""
    delta, lam = 0.1, 0.3
    start, gradient = normal(5, dtype=dtype), normal(5, seed=1, dtype=dtype)
    for factor, decay, half in ((1 - 2 * delta * lam, 2 * lam, 1), (1 - delta * lam, lam, 0.5)):
        w = start.clone().requires_grad_()
        (w @ gradient + half * reg.l2_penalty(w, lam)).backward()
        ours = (w - delta * w.grad).detach()
        assert torch.allclose(ours, factor * start - delta * gradient)
        v = start.clone().requires_grad_()
        (v @ gradient).backward()
        torch.optim.SGD([v], lr=delta, weight_decay=decay).step()
        assert torch.allclose(ours, v)


@pytest.mark.covers("R2")
def test_the_stationary_point_is_a_fixed_point_that_one_step_does_not_reach():
    """W = -∇L(W) / (2λ) holds at the minimum; the right side at another W is not the minimum."""
    x, y = diabetes()
    lam = 0.4 * len(x)
    w = torch.zeros(10, dtype=F64, requires_grad=True)

    def loss(w):
        return ((x @ w - y) ** 2).sum()

    minimum = torch.linalg.solve(x.T @ x + lam * torch.eye(10, dtype=F64), x.T @ y)
    sklearn = Ridge(alpha=lam, fit_intercept=False).fit(x.numpy(), y.numpy()).coef_
    assert np.allclose(minimum, sklearn, rtol=1e-9)

    def right_side(w):
        w = w.clone().requires_grad_()
        return -torch.autograd.grad(loss(w), w)[0] / (2 * lam)

    assert torch.allclose(right_side(minimum), minimum, rtol=1e-9)
    assert not torch.allclose(right_side(w), minimum, rtol=0.1)
    sensitive = torch.linalg.eigvalsh(2 * x.T @ x)[-1] / (2 * lam)
    assert sensitive > 1  # so repeating it runs away
    for _ in range(30):
        w = right_side(w.detach())
    assert w.norm() > 1e6 * minimum.norm()


@pytest.mark.usefixtures("unchecked_shapes")
def test_penalties_refuse_a_negative_strength_and_nothing_at_all():
    for name in ("l1_penalty", "l2_penalty"):
        with pytest.raises(ValueError, match=rf"{name}: expected strength in \[0, inf\], got -1"):
            getattr(reg, name)(torch.ones(2), -1)
        with pytest.raises(ValueError, match=rf"{name}: expected at least one tensor in params"):
            getattr(reg, name)([], 1.0)


# ---- soft threshold ----


@pytest.mark.covers("R3")
def test_soft_threshold_is_softshrink(device, dtype):
    w = normal(50, dtype=dtype, device=device)
    ours, theirs = reg.soft_threshold(w, 0.4), nn.functional.softshrink(w, 0.4)
    assert torch.allclose(ours, theirs)
    assert (ours == 0).equal(theirs == 0)


@given(st.floats(-5, 5), st.floats(0, 3))
def test_soft_threshold_minimizes_what_its_docstring_says(w, tau):
    def objective(u):
        return 0.5 * (u - w) ** 2 + tau * abs(u)

    found = reg.soft_threshold(torch.tensor([w], dtype=F64), tau).item()
    for candidate in np.linspace(-6, 6, 241):
        assert objective(found) <= objective(candidate) + 1e-12


@pytest.mark.covers("R3")
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0.01, 1), st.floats(0, 1))
def test_the_clipped_two_half_step_is_soft_thresholding(entries, delta, lam):
    """With the subtrahend δλ that belongs to λ Σ|w|; the 2δλ belongs to 2λ Σ|w|."""
    half = torch.tensor(entries, dtype=F64)

    def clipped(subtrahend):
        down, up = (half - subtrahend).clamp(min=0), (half + subtrahend).clamp(max=0)
        return torch.where(half > 0, down, up)

    assert torch.equal(clipped(delta * lam), reg.soft_threshold(half, delta * lam))
    assert torch.equal(clipped(2 * delta * lam), reg.soft_threshold(half, delta * (2 * lam)))
    if half.abs().max() > 2 * delta * lam > 1e-9:
        assert not torch.equal(clipped(2 * delta * lam), reg.soft_threshold(half, delta * lam))


def test_a_threshold_given_as_a_number_keeps_the_precision_of_the_weights():
    """0.1 in single precision is another number, 1.5e-9 away."""
    assert reg.soft_threshold(torch.tensor([1.0], dtype=F64), 0.1).item() == 0.9


def test_thresholds_may_differ_by_entry():
    w, tau = normal(4, 3), normal(4, 1, seed=1).abs()
    rows = [reg.soft_threshold(row, t.item()) for row, t in zip(w, tau, strict=True)]
    assert torch.equal(reg.soft_threshold(w, tau), torch.stack(rows))
    with pytest.raises(ValueError, match=r"soft_threshold: expected threshold in \[0, inf\], got"):
        reg.soft_threshold(w, -tau)


def lasso(x, y, lam, steps, *, subgradient=False):
    """Minimize |Xw - y|² / (2n) + λ Σ|w| by proximal steps, or by subgradient steps."""
    n = len(x)
    step = n / torch.linalg.matrix_norm(x, 2).item() ** 2
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    for t in range(steps):
        gradient = x.T @ (x @ w - y) / n
        if subgradient:
            w = w - step / math.sqrt(1 + t) * (gradient + lam * w.sign())
        else:
            w = reg.soft_threshold(w - step * gradient, step * lam)
    return w


@pytest.mark.covers("R3")
@pytest.mark.parametrize("lam", [0.5, 3.0, 15.0])
def test_the_lasso_on_diabetes_is_scikit_learns(lam):
    x, y = diabetes()
    ours = lasso(x, y, lam, 4000)
    sklearn = Lasso(lam, fit_intercept=False, tol=1e-14, max_iter=100_000)
    theirs = sklearn.fit(x.numpy(), y.numpy()).coef_
    assert abs(ours.numpy() - theirs).max() < 1e-6
    assert (ours.numpy() == 0).tolist() == (theirs == 0).tolist()
    assert 0 < (ours == 0).sum() < 10


@pytest.mark.covers("R3")
def test_subgradient_steps_leave_no_zero():
    x, y = diabetes()
    proximal, subgradient = lasso(x, y, 3.0, 4000), lasso(x, y, 3.0, 4000, subgradient=True)
    assert (proximal - subgradient).abs().max() < 1  # of 30: it comes near
    assert (proximal == 0).sum() == 4
    assert (subgradient == 0).sum() == 0


# ---- projections ----

VECTORS = st.lists(st.floats(-4, 4), min_size=1, max_size=7)


@pytest.mark.covers("R4")
@given(VECTORS, VECTORS, st.sampled_from([1, 2, math.inf]), st.floats(0.1, 3))
def test_projections_are_feasible_idempotent_and_never_part_two_points(a, b, p, radius):
    size = min(len(a), len(b))
    a, b = torch.tensor(a[:size], dtype=F64), torch.tensor(b[:size], dtype=F64)
    pa, pb = (reg.project_norm_ball_(v.clone(), radius, p) for v in (a, b))
    assert torch.linalg.vector_norm(pa, p) <= radius + 1e-12
    assert torch.allclose(reg.project_norm_ball_(pa.clone(), radius, p), pa, atol=1e-12)
    assert (pa - pb).norm() <= (a - b).norm() + 1e-12
    if torch.linalg.vector_norm(a, p) <= radius:
        assert torch.allclose(pa, a, atol=1e-15)


@pytest.mark.covers("R4")
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_no_feasible_point_is_nearer(p, dtype):
    """Against SciPy's constrained minimizer over w = a - b with a, b not negative."""
    room = {  # not negative inside the ball
        1: lambda z: 1 - z.sum(),
        2: lambda z: 1 - ((z[:4] - z[4:]) ** 2).sum(),
        math.inf: lambda z: 1 - z[:4] - z[4:],
    }[p]
    for seed in range(5):
        v = normal(4, seed=seed, dtype=dtype) * 2
        found = optimize.minimize(
            lambda z, v: ((z[:4] - z[4:] - v) ** 2).sum(),
            np.full(8, 0.05),
            args=(v.double().numpy(),),
            bounds=[(0, None)] * 8,
            constraints={"type": "ineq", "fun": room},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        ours = reg.project_norm_ball_(v, 1.0, p)
        assert np.allclose(found.x[:4] - found.x[4:], ours, atol=1e-5)


@pytest.mark.covers("R4")
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_max_norm_projects_each_unit_alone_and_in_place(p, device, dtype):
    weight = nn.Parameter(normal(5, 3, dtype=dtype, device=device) * 2)
    rows = [reg.project_norm_ball_(row.clone(), 1.0, p) for row in weight.detach()]
    columns = [reg.project_norm_ball_(c.clone(), 1.0, p) for c in weight.detach().T]
    transposed = reg.project_norm_ball_(weight.detach().clone(), 1.0, p, dim=0)
    assert reg.project_norm_ball_(weight, 1.0, p, dim=1) is weight
    assert torch.allclose(weight.detach(), torch.stack(rows))
    assert torch.allclose(transposed, torch.stack(columns, 1))
    assert weight.grad_fn is None
    if p == 2:
        assert torch.allclose(weight.renorm(2, 0, 1.0), weight)  # torch's own, rows here


def test_filters_of_a_convolution_are_projected_through_a_view():
    conv = nn.Conv2d(2, 3, 3)
    before = nn.functional.normalize(conv.weight.detach().flatten(1))
    reg.project_norm_ball_(conv.weight.flatten(1).detach(), 0.1, dim=1)
    assert torch.allclose(conv.weight.detach().flatten(1), 0.1 * before)


@pytest.mark.covers("R4")
def test_training_with_a_projection_stays_in_the_ball():
    net = models.mlp([64, 16, 10], generator=generator(0, "init"))

    def max_norm(model):
        for layer in model[::2]:
            reg.project_norm_ball_(layer.weight, 0.7, dim=1)

    sgd = torch.optim.SGD(net.parameters(), lr=0.3)
    fit(net, data.load("digits"), sgd, 1, 64, generator=generator(0, "data"), after_step=max_norm)
    norms = torch.cat([layer.weight.detach().norm(dim=1) for layer in net[::2]])
    assert norms.max() <= 0.7 + 1e-6
    assert (norms > 0.7 - 1e-6).any()


def test_a_vector_within_rounding_of_huge_is_projected():
    w = torch.tensor([1e30, 1.0])
    assert reg.project_norm_ball_(w.clone(), 1.0, 1).abs().sum() <= 1
    assert reg.project_norm_ball_(torch.zeros(3), 1.0, 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 3), r"expected p to be one of 1, 2, inf, got 3"),
        ((0.0,), r"expected radius positive and finite, got 0\.0"),
        ((-1.0, 1), r"expected radius positive and finite, got -1\.0"),
    ],
)
def test_a_wrong_projection_is_refused_and_the_weights_stay(arguments, message):
    w = torch.full((3,), 7.0)
    with pytest.raises(ValueError, match=f"project_norm_ball_: {message}"):
        reg.project_norm_ball_(w, *arguments)
    assert w.tolist() == [7, 7, 7]
    w[1] = math.nan
    with pytest.raises(ValueError, match="project_norm_ball_: expected w finite, got 1 value"):
        reg.project_norm_ball_(w, 1.0)
    assert w[0] == 7


# ---- filters ----


@pytest.mark.covers("R2", "R6")
def test_the_ridge_filter_is_the_closed_form(dtype):
    """(H + αI)⁻¹ H w* = Q f(Λ) Qᵀ w*, on diabetes; α = 2λ for the penalty without the half."""
    x, y = (v.to(dtype) for v in diabetes())
    h = 2 * x.T @ x / len(x)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    values, q = torch.linalg.eigh(h)
    lam = 0.7
    kept = q @ (reg.ridge_filter(values, 2 * lam) * (q.T @ best))
    w = kept.clone().requires_grad_()
    loss = ((x @ w - y) ** 2).mean() + reg.l2_penalty(w, lam)
    (gradient,) = torch.autograd.grad(loss, w)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    assert torch.allclose(
        kept, torch.linalg.solve(h + 2 * lam * torch.eye(10).to(h), h @ best), rtol
    )
    assert gradient.abs().max() < rtol * (x.T @ y).abs().max()
    wrong = q @ (reg.ridge_filter(values, lam) * (q.T @ best))
    assert not torch.allclose(wrong, kept, rtol=0.01)


@pytest.mark.covers("R6")
def test_weight_decay_suppresses_the_directions_that_the_loss_feels_least():
    """A weak penalty moves the minimum of a loss that is no quadratic as the filter says."""
    x, y = diabetes()
    y = (y > 0).double()
    w = torch.zeros(10, dtype=F64, requires_grad=True)

    def newton(w, strength):
        def value():
            data_loss = nn.functional.binary_cross_entropy_with_logits(x @ w, y)
            return data_loss + reg.l2_penalty(w, strength)

        for _ in range(30):
            (gradient,) = torch.autograd.grad(value(), w)
            step = torch.linalg.solve(full_hessian(value, [w]), gradient)
            w = (w - step).detach().requires_grad_()
        return w, full_hessian(value, [w])

    best, h = newton(w, 0.0)
    moved, _ = newton(best, 0.5e-4)
    values, q = torch.linalg.eigh(h)
    kept = (q.T @ moved / (q.T @ best)).detach()
    assert torch.allclose(kept, reg.ridge_filter(values, 1e-4), atol=2e-3)
    assert kept[0] < 0.99 < kept[3:].min()  # the flattest direction loses most


@pytest.mark.covers("R5")
@pytest.mark.parametrize("steps", [0, 1, 7, 200])
def test_descent_from_zero_is_the_filter_to_rounding(steps):
    x, y = diabetes()
    h = x.T @ x / len(x)
    values, q = torch.linalg.eigh(h)
    best = torch.linalg.solve(h, x.T @ y / len(x))
    lr = 1.9 / values[-1].item()  # 1 - ηλ is negative at the top
    w = torch.zeros(10, dtype=F64)
    for _ in range(steps):
        w = w - lr * (h @ w - x.T @ y / len(x))
    filtered = q @ (reg.early_stopping_filter(values, lr, steps) * (q.T @ best))
    assert torch.allclose(w, filtered, rtol=1e-10, atol=1e-9)


@pytest.mark.covers("R5")
@given(st.floats(1e-3, 1e3), st.integers(1, 1000))
def test_the_filters_agree_at_first_order_and_differ_by_less_than_a_third(eigenvalue, steps):
    """For small ηλ and α = 1/(ηt): 1 - e^(-x) is at most 1.2985 x / (1 + x) (Ali et al. 2019)."""
    spectrum = torch.tensor([eigenvalue], dtype=F64)
    lr = 1e-4 / eigenvalue
    stopped = reg.early_stopping_filter(spectrum, lr, steps).item()
    ridge = reg.ridge_filter(spectrum, 1 / (lr * steps)).item()
    assert ridge <= stopped * (1 + 1e-9)
    assert stopped <= 1.2985 * ridge
    assert stopped == pytest.approx(lr * eigenvalue * steps, rel=0.1)


def test_tiny_eigenvalues_keep_their_digits(dtype):
    tiny = torch.tensor([1e-12], dtype=dtype)
    near = pytest.approx(3e-12, rel=1e-5, abs=0)
    assert reg.early_stopping_filter(tiny, 1.0, 3).item() == near
    assert (1 - (1 - tiny) ** 3).item() != near  # the formula as written


def test_filters_by_hand():
    values = torch.tensor([3.0, 1.0, 0.0], dtype=F64)
    assert reg.ridge_filter(values, 1.0).tolist() == [0.75, 0.5, 0.0]
    assert reg.early_stopping_filter(values, 0.5, 3).tolist() == pytest.approx([1.125, 0.875, 0.0])


@pytest.mark.covers("R1")
def test_a_tighter_family_trades_estimation_error_for_modelling_error():
    """Ridge's two errors from its filter, against 4,000 noisy repetitions of the same rows."""
    x, y = diabetes()
    x, truth, noise = x[:60], torch.linspace(-1, 1, 10, dtype=F64), 2.0
    signal, n = x @ truth, 60
    values, q = torch.linalg.eigh(x.T @ x / n)
    targets = signal + noise * normal(4000, n)
    totals = []
    for alpha in (1e-6, 0.1, 1.0, 10.0):
        f = reg.ridge_filter(values, alpha)
        modelling = (values * ((1 - f) * (q.T @ truth)) ** 2).sum()
        estimation = noise**2 * (f**2).sum() / n
        h = x.T @ x / n + alpha * torch.eye(10, dtype=F64)
        fitted = targets @ x / n @ torch.linalg.inv(h) @ x.T
        measured = ((fitted - signal) ** 2).mean()
        assert measured.item() == pytest.approx((modelling + estimation).item(), rel=0.03)
        totals.append((modelling.item(), estimation.item()))
    modelling, estimation = zip(*totals, strict=True)
    assert modelling == tuple(sorted(modelling))
    assert estimation == tuple(sorted(estimation, reverse=True))
    best = np.argmin(np.sum(totals, axis=1))
    assert 0 < best < 3  # neither the whole family nor the smallest


@pytest.mark.usefixtures("unchecked_shapes")
def test_filters_refuse_what_is_no_spectrum():
    good, bad = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.25])
    message = r"{}: expected eigenvalues in \[0, inf\], got -0\.25"
    with pytest.raises(ValueError, match=message.format("ridge_filter")):
        reg.ridge_filter(bad, 1.0)
    with pytest.raises(ValueError, match=message.format("early_stopping_filter")):
        reg.early_stopping_filter(bad, 0.1, 1)
    with pytest.raises(ValueError, match="ridge_filter: expected alpha positive and finite, got 0"):
        reg.ridge_filter(good, 0.0)
    with pytest.raises(ValueError, match="early_stopping_filter: expected lr positive"):
        reg.early_stopping_filter(good, 0.0, 1)
    with pytest.raises(ValueError, match="early_stopping_filter: expected steps of at least 0"):
        reg.early_stopping_filter(good, 0.1, -1)
    with pytest.raises(ValueError, match="ridge_filter: expected eigenvalues finite, got 1 value"):
        reg.ridge_filter(torch.tensor([math.nan]), 1.0)


# ---- augmentation ----


@pytest.mark.covers("R7")
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_returns_new_images_in_range(name, device, dtype):
    x = pictures(dtype=dtype, device=device)
    before = x.clone()
    y = augment(name, x)
    assert torch.equal(x, before)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert y.min() >= 0
    assert y.max() <= 1
    assert not torch.equal(x, y)


@pytest.mark.covers("R7")
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_neutral_strength_changes_nothing(name):
    x = pictures()
    assert torch.allclose(augment(name, x, AUGMENTATIONS[name][1]), x, atol=1e-6)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_image_has_its_own_draw_and_the_generator_decides(name):
    x = pictures(1).expand(6, -1, -1, -1)
    y = augment(name, x)
    assert len({tuple(image.flatten().tolist()) for image in y}) > 1
    assert torch.equal(y, augment(name, x))
    assert not torch.equal(y, augment(name, x, seed=1))


def test_no_augmentation_moves_a_global_state():
    state = torch.get_rng_state()
    for name in AUGMENTATIONS:
        augment(name, pictures())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.covers("R7")
def test_inversion_mirrors_or_negates_the_share_that_was_asked_for():
    x = pictures(2000, 1, 2, 3)
    mirrored = augment("augment_inversion", x, 0.3)
    negated = augment("augment_inversion", x, 0.3, kind="negative")
    for y, other in ((mirrored, x.flip(3)), (negated, 1 - x)):
        changed = (y == other).all(dim=(1, 2, 3))
        assert ((y == x).all(dim=(1, 2, 3)) | changed).all()
        assert changed.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(augment("augment_inversion", x, 1.0), x.flip(3))


def field(height, width, at):
    """An image that is a linear function of position, which bilinear lookup reproduces."""
    y, x = np.mgrid[:height, :width].astype(float)
    centre = (height - 1) / 2, (width - 1) / 2
    return at(y - centre[0], x - centre[1])


@pytest.mark.covers("R7")
@pytest.mark.parametrize("shape", [(15, 15), (11, 17)], ids=str)
def test_rotation_turns_about_the_centre_without_shear(shape):
    """Against SciPy, with the angle read off the draw; also for images that are not square."""
    image = 0.5 + 0.02 * field(*shape, lambda y, x: x + 2 * y)
    x = torch.tensor(image)[None, None]
    turned = augment("augment_rotation", x, 40.0, seed=3)
    u = 2 * torch.rand(1, generator=generator(3, "augment_rotation")).item() - 1
    angle = math.radians(40 * u)
    cos, sin = math.cos(angle), math.sin(angle)
    middle = np.array([(s - 1) / 2 for s in shape])
    matrix = np.array([[cos, sin], [-sin, cos]])  # on (y, x): where each pixel is looked up
    theirs = ndimage.affine_transform(
        image, matrix, offset=middle - matrix @ middle, order=1, cval=np.nan
    )
    inside = ~np.isnan(theirs)
    assert inside.sum() > 80
    assert np.allclose(turned[0, 0].numpy()[inside], theirs[inside], atol=1e-6)
    assert abs(angle) > 0.2
    assert turned[0, 0].numpy()[~inside].min() < 0.2  # black from outside


@pytest.mark.covers("R7")
def test_scaling_zooms_about_the_centre_by_factors_on_either_side_of_one():
    image = 0.5 + 0.02 * field(15, 15, lambda y, x: x + 2 * y)
    x = torch.tensor(image).expand(400, 1, 15, 15)
    y = augment("augment_scaling", x, 1.5)
    centred = (y - 0.5)[:, 0, 6:9, 6:9] / (x - 0.5)[:, 0, 6:9, 6:9]  # 1 / s, at each pixel alike
    shrink = centred[:, 0, 0]
    assert shrink.log().mean().abs() < 0.05
    assert shrink.min() >= 1 / 1.5 - 1e-6
    assert shrink.max() <= 1.5 + 1e-6
    assert shrink.max() > 1.4


@pytest.mark.covers("R7")
def test_translation_moves_by_at_most_the_fraction_and_in_both_directions():
    x = torch.zeros(500, 1, 21, 31)
    x[:, :, 10, 15] = 1.0
    y = augment("augment_translation", x, 0.2)
    assert torch.allclose(y.sum(dim=(1, 2, 3)), torch.ones(500), atol=1e-5)  # nothing got lost
    rows = (y.sum(3)[:, 0] * torch.arange(21)).sum(1) - 10
    columns = (y.sum(2)[:, 0] * torch.arange(31)).sum(1) - 15
    for moved, side in ((rows, 21), (columns, 31)):
        assert moved.abs().max() <= 0.2 * side + 1e-4
        assert moved.min() < -0.15 * side
        assert moved.max() > 0.15 * side
    assert np.corrcoef(rows, columns)[0, 1] == pytest.approx(0, abs=0.15)


@pytest.mark.covers("R7")
def test_brightness_contrast_and_colour_by_their_formulas():
    x = 0.4 + 0.2 * pictures(300)  # far from the bounds, so nothing is clipped
    shift = augment("augment_brightness", x, 0.3) - x
    assert torch.allclose(shift, shift[:, :1, :1, :1].expand_as(x), atol=1e-6)
    assert shift.abs().max() <= 0.3 + 1e-6
    shift = augment("augment_color_shift", x, 0.3) - x
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(x), atol=1e-6)
    assert (shift[:, 0] - shift[:, 1]).abs().max() > 0.3
    y = augment("augment_contrast", x, 2.0)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(y.mean(dim=(1, 2, 3), keepdim=True), mean, atol=1e-5)
    factor = (y - mean).flatten(1).norm(dim=1) / (x - mean).flatten(1).norm(dim=1)
    assert factor.log().abs().max() <= math.log(2) + 1e-4
    assert factor.log().mean().abs() < 0.1


def test_noise_has_a_standard_deviation_that_differs_between_images():
    x = torch.full((300, 1, 20, 20), 0.5)
    std = (augment("augment_noise", x, 0.1) - x).std(dim=(1, 2, 3))
    assert std.max() < 0.12
    assert std.mean().item() == pytest.approx(0.05, rel=0.15)
    assert std.min() < 0.01


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_images_that_are_none_are_refused_by_name(name):
    strength = AUGMENTATIONS[name][0]
    with pytest.raises(ValueError, match=rf"{name}: expected images of shape \(n, channels, heig"):
        augment(name, torch.rand(3, 8, 8, generator=torch.Generator()))
    outside = rf"{name}: expected real images in \[0, 1\], got torch.float32 from -1 to 2"
    with pytest.raises(ValueError, match=outside):
        augment(name, torch.tensor([[[[-1.0, 2.0]]]]))
    with pytest.raises(ValueError, match=rf"{name}: expected real images.*uint8 from 0 to 1;"):
        augment(name, torch.tensor([[[[0, 1]]]], dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"{name}: expected real images.*nan"):
        augment(name, torch.tensor([[[[math.nan, 1.0]]]]))
    with pytest.raises(ValueError, match=rf"{name}: expected \w+ in \[[01], \d+\], got -3"):
        augment(name, pictures(), -3)
    with pytest.raises(TypeError, match=f"{name}: expected a generator to draw from, got None"):
        getattr(reg, name)(pictures(), strength, generator=None)


def test_inversion_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="augment_inversion: expected kind to be one of 'mirror'"):
        augment("augment_inversion", pictures(), 0.5, kind="upside down")


# ---- early stopping ----


def history_of(*losses):
    return train.History(test=[train.Score(loss, None) for loss in losses])


@pytest.mark.covers("R5")
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4))
def test_early_stopping_against_a_count_by_hand(losses, patience):
    model, stop = nn.Linear(1, 1), reg.EarlyStopping(patience)
    for epoch in range(len(losses)):
        nn.init.constant_(model.weight, float(epoch))
        ended = stop(model, history_of(*map(float, losses[: epoch + 1])))
        best = losses.index(min(losses[: epoch + 1]))  # the first of equals
        assert stop.best_epoch == best
        assert stop.best_loss == losses[best]
        assert ended == (epoch - best >= patience)
        if ended:
            break
    stop.restore_(model)
    assert model.weight.item() == stop.best_epoch


@pytest.mark.covers("R5")
def test_fit_ends_and_the_best_epoch_comes_back():
    split = data.load("diabetes").standardized()
    split = type(split)(
        split.x_train[:40], split.y_train[:40] / 100, split.x_test, split.y_test / 100,
        name="diabetes", tier="full", task="regression",
    )  # fmt: skip
    net = models.mlp([10, 64, 1], generator=generator(0, "init"))
    sgd, stop = torch.optim.SGD(net.parameters(), lr=0.05), reg.EarlyStopping(patience=5)
    mse = nn.functional.mse_loss
    history = fit(
        net, split, sgd, 200, 10, generator=generator(0, "data"), loss=mse, callbacks=[stop]
    )
    tests = [score.loss for score in history.test]
    assert len(tests) == stop.best_epoch + 6 < 200
    assert stop.best_loss == min(tests) < tests[-1]
    stop.restore_(net)
    _, _, x, y = split.tensors()
    assert train.evaluate(net, x, y, loss=mse).loss == pytest.approx(stop.best_loss)
    assert not stop(net, history_of(9.0))  # a new run, though worse, starts afresh
    assert (stop.best_epoch, stop.best_loss) == (0, 9.0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_early_stopping_refuses_no_patience_and_nothing_to_restore():
    with pytest.raises(ValueError, match="EarlyStopping: expected patience of at least 1, got 0"):
        reg.EarlyStopping(0)
    with pytest.raises(
        TypeError, match=r"EarlyStopping: expected patience as an integer, got 1\.5"
    ):
        reg.EarlyStopping(1.5)
    with pytest.raises(RuntimeError, match=r"EarlyStopping\.restore_: expected an epoch to go"):
        reg.EarlyStopping(1).restore_(nn.Linear(1, 1))


# ---- averages ----


def walk(model, steps, dtype=torch.float32):
    """Random weights, one set after the other."""
    for step in range(steps):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(normal(*p.shape, seed=100 * step + i, dtype=dtype))
        yield [p.detach().clone() for p in model.parameters()]


@pytest.mark.covers("R8")
def test_the_uniform_mean_is_torchs_averaged_model(device, dtype):
    model = models.mlp([3, 4, 2], generator=generator(0, "init")).to(device, dtype)
    average, theirs = reg.WeightAverage(), AveragedModel(model)
    for weights in walk(model, 7, dtype):
        last = weights
        average.update(model)
        theirs.update_parameters(model)
    ours = copy.deepcopy(model)
    average.copy_to_(ours)
    for p, q, r in zip(ours.parameters(), theirs.module.parameters(), last, strict=True):
        assert torch.allclose(p, q, atol=1e-6)
        assert not torch.allclose(p, r, atol=0.1)
    assert average.count == 7


@pytest.mark.covers("R8")
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_exponential_mean_weighs_by_age_and_torchs_counts_the_first_too_much(decay, dtype):
    model = models.mlp([3, 2], generator=generator(0, "init")).to(dtype)
    average, seen = reg.WeightAverage(decay), []
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for weights in walk(model, 6, dtype):
        seen.append(weights[0])
        average.update(model)
        theirs.update_parameters(model)
    average.copy_to_(model)
    shares = torch.tensor([decay ** (5 - i) for i in range(6)], dtype=dtype)
    by_hand = torch.einsum("i,i...->...", shares / shares.sum(), torch.stack(seen))
    ours = model[0].weight.detach()
    assert torch.allclose(ours, by_hand, atol=1e-5)
    torchs = (1 - decay**6) * ours + decay**6 * seen[0]
    assert torch.allclose(theirs.module[0].weight, torchs, atol=1e-5)
    if decay:
        assert not torch.allclose(theirs.module[0].weight, ours, atol=1e-3)


@pytest.mark.covers("R8")
def test_batch_norm_gets_the_statistics_of_the_averaged_weights():
    """Torch's update_bn gives the same; without it the averaged net is wrong, and we refuse."""
    x = normal(90, 5, dtype=torch.float32) * 3 + 1
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    for p in net.parameters():
        nn.init.normal_(p, generator=generator(0, "init"))
    average, theirs = reg.WeightAverage(), AveragedModel(net)
    for _ in walk(net, 3):
        net(x)  # moves the running statistics
        average.update(net)
        theirs.update_parameters(net)
    with pytest.raises(ValueError, match=r"copy_to_: expected x to refresh batch norm, got None"):
        average.copy_to_(net)
    net[2].eval()
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    average.copy_to_(net, x, batch_size=30)
    assert torch.equal(torch.get_rng_state(), state)  # dropout was not drawn
    assert [module.training for module in net.modules()] == modes
    assert net[1].momentum == 0.1
    update_bn(x.split(30), theirs)
    assert torch.allclose(net[1].running_mean, theirs.module[1].running_mean, atol=1e-5)
    assert torch.allclose(net[1].running_var, theirs.module[1].running_var, atol=1e-5)


@pytest.mark.covers("R8")
def test_averages_in_fit_per_step_and_per_epoch():
    net = models.mlp([64, 10], generator=generator(0, "init"))
    steps, epochs, seen = reg.WeightAverage(0.9), reg.WeightAverage(), []
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    fit(
        *(net, data.load("digits"), sgd, 3, 100),
        generator=generator(0, "data"),
        after_step=steps.update,
        callbacks=[epochs.update, lambda m, h: seen.append(m[0].weight.detach().clone())],
    )
    assert (steps.count, epochs.count) == (45, 3)
    epochs.copy_to_(net)
    assert torch.allclose(net[0].weight, torch.stack(seen).mean(0), atol=1e-6)


def test_an_average_of_a_quadratics_noisy_iterates_is_nearer_the_minimum():
    """Polyak's point, over 20 runs: with a constant step the mean beats the last iterate."""
    last, mean = [], []
    for seed in range(20):
        point, average = nn.Linear(4, 1, bias=False), reg.WeightAverage()
        nn.init.zeros_(point.weight)
        noise = normal(400, 1, 4, seed=seed, dtype=torch.float32)
        for kick in noise:
            with torch.no_grad():
                point.weight -= 0.3 * (point.weight + kick)
            average.update(point)
        last.append(point.weight.norm().item() ** 2)
        average.copy_to_(point)
        mean.append(point.weight.norm().item() ** 2)
    assert np.mean(mean) < 0.1 * np.mean(last)


def test_an_average_refuses_what_it_cannot_take_and_stays_as_it_was():
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"WeightAverage: expected decay in \[0, 1\) or None"):
            reg.WeightAverage(decay)
    average, model = reg.WeightAverage(), nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match=r"copy_to_: expected an update before, got none"):
        average.copy_to_(model)
    nn.init.ones_(model.weight)
    average.update(model)
    with pytest.raises(ValueError, match=r"update: expected the weights of shape \(3,\), got \(4,"):
        average.update(nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"copy_to_: expected the weights of shape \(3,\), got"):
        average.copy_to_(nn.Linear(3, 1))
    nn.init.constant_(model.weight, math.inf)
    with pytest.raises(ValueError, match=r"update: expected the weights finite, got 2 values"):
        average.update(model)
    assert average.count == 1
    average.copy_to_(model)
    assert model.weight.tolist() == [[1, 1]]
