"""Batch, layer, group, instance and RMS norm, the six backward formulas, the condition number."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from coursekit import curvature, data, train
from coursekit import normalization as norm

SHAPES = [(8, 6), (8, 6, 5), (8, 6, 4, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d")


def draw(shape, device="cpu", dtype=torch.float64, name="x", scale=3.0, shift=5.0):
    """Numbers far from standardized, the same for every device and dtype."""
    x = torch.randn(shape, generator=train.generator(0, name), dtype=torch.float64)
    return (x * scale + shift).to(device, dtype)


def close(got, expected, dtype):
    """Equal up to the rounding of sums in another order."""
    tol = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


def randomize_(module):
    """Give weight and bias values at which a swap or an omission shows."""
    for name, p in module.named_parameters():
        p.data.copy_(draw(p.shape, name=name, scale=1.0, shift=0.5))
    return module


def agrees_with_torch(ours, theirs, shape, device, dtype):
    """Compare output, all gradients and all buffers over three batches."""
    ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
    randomize_(theirs)
    ours.load_state_dict(theirs.state_dict())
    for i in range(3):
        x = [draw(shape, device, dtype, name=f"x{i}").requires_grad_() for _ in range(2)]
        u = draw(shape, device, dtype, name=f"u{i}", shift=0.0)
        y = [module(part) for module, part in zip((ours, theirs), x, strict=True)]
        close(*y, dtype)
        wanted = [(part, *module.parameters()) for part, module in zip(x, (ours, theirs))]  # noqa: B905
        pairs = zip(*(torch.autograd.grad(y[k], wanted[k], u) for k in (0, 1)), strict=True)
        for got, expected in pairs:
            close(got, expected, dtype)
    for (name, got), (other, expected) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other
        close(got, expected, dtype)


# ---- parity with torch ----


@shapes
@pytest.mark.covers("N3")
@pytest.mark.parametrize("mode", ["training", "evaluation", "without statistics", "average of all"])
def test_batch_norm_is_that_of_torch(shape, mode, device, dtype):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    options = {"eps": 1e-3, "momentum": None if mode == "average of all" else 0.3}
    options["track_running_stats"] = mode != "without statistics"
    ours, theirs = norm.BatchNorm(6, **options), kind(6, **options)
    if mode == "evaluation":
        for name in ("running_mean", "running_var"):
            getattr(theirs, name).copy_(draw((6,), name=name).abs())
    if mode in ("evaluation", "without statistics"):
        ours.eval(), theirs.eval()
    agrees_with_torch(ours, theirs, shape, device, dtype)


@shapes
@pytest.mark.parametrize("training", [True, False])
def test_the_function_batch_norm_takes_the_arguments_of_torch(shape, training, device, dtype):
    x = draw(shape, device, dtype)
    mean, var, weight, bias = (draw((6,), device, dtype, name=n).abs() for n in "mvwb")
    got = norm.batch_norm(x, mean, var, weight, bias, training, 0.2, 1e-4)
    kept = mean.clone(), var.clone()
    expected = F.batch_norm(x, *kept, weight, bias, training, 0.2, 1e-4)  # writes into kept
    for ours, theirs in zip(got, (expected, *kept), strict=True):
        close(ours, theirs, dtype)


@shapes
@pytest.mark.covers("N5")
@pytest.mark.parametrize(
    ("ours", "theirs", "dims"),
    [
        (norm.LayerNorm, nn.LayerNorm, 1),
        (norm.LayerNorm, nn.LayerNorm, 2),
        (lambda s: norm.LayerNorm(s, bias=False), lambda s: nn.LayerNorm(s, bias=False), 1),
        (norm.RMSNorm, nn.RMSNorm, 1),
        (lambda s: norm.RMSNorm(s, eps=0.1), lambda s: nn.RMSNorm(s, eps=0.1), 2),
    ],
    ids=["layer", "layer over two", "layer without bias", "rms", "rms with eps over two"],
)
def test_layer_and_rms_norm_are_those_of_torch(ours, theirs, dims, shape, device, dtype):
    size = list(shape[-min(dims, len(shape) - 1) :])
    agrees_with_torch(ours(size), theirs(size), shape, device, dtype)
    one, other = ours(size).eval().to(device, dtype), theirs(size).to(device, dtype)
    close(one(draw(shape, device, dtype)), other(draw(shape, device, dtype)), dtype)


@shapes
@pytest.mark.covers("N5")
@pytest.mark.parametrize("groups", [1, 2, 3, 6, "instance"])
def test_group_and_instance_norm_are_those_of_torch(shape, groups, device, dtype):
    if groups in (3, 6, "instance") and len(shape) == 2:
        pytest.skip("of two values or one, the gradient is zero but for rounding")
    x = [draw(shape, device, dtype).requires_grad_() for _ in range(2)]
    affine = [draw((6,), device, dtype, name=n).requires_grad_() for n in "wb"]
    if groups == "instance":
        y = [norm.instance_norm(x[0], *affine), F.instance_norm(x[1], None, None, *affine)]
    else:
        y = [f(part, groups, *affine) for f, part in zip((norm.group_norm, F.group_norm), x)]  # noqa: B905
    close(*y, dtype)
    u = draw(shape, device, dtype, name="u", shift=0.0)
    grads = [torch.autograd.grad(y[k], (x[k], *affine), u) for k in (0, 1)]
    for got, expected in zip(*grads, strict=True):
        close(got, expected, dtype)


def test_a_checkpoint_of_torch_is_read_and_the_reverse():
    ours, theirs = norm.BatchNorm(6), nn.BatchNorm2d(6)
    theirs(draw((8, 6, 4, 3), dtype=torch.float32))
    ours.load_state_dict(theirs.state_dict())
    assert ours.num_batches_tracked == 1
    nn.BatchNorm1d(6).load_state_dict(ours.state_dict())
    assert not norm.BatchNorm(6, affine=False).state_dict().keys() & {"weight", "bias"}


# ---- the backward pass by hand ----


@shapes
@pytest.mark.covers("N4")
@pytest.mark.parametrize("affine", [True, False])
def test_each_of_the_six_formulas_is_what_autograd_finds(shape, affine, device, dtype):
    x = draw(shape, device, dtype).requires_grad_()
    u = draw(shape, device, dtype, name="u")
    weight, bias = (draw((6,), device, dtype, name=n).requires_grad_() for n in "wb")
    view, dims = (1, -1, *[1] * (len(shape) - 2)), (0, *range(2, len(shape)))
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    x_hat = (x - mean) / (var + 1e-3).sqrt()
    y = weight.view(view) * x_hat + bias.view(view) if affine else x_hat + bias.view(view)
    got = norm.batch_norm_backward(u, x.detach(), weight.detach() if affine else None, eps=1e-3)
    wanted = {"x_hat": x_hat, "var": var, "mean": mean, "x": x, "bias": bias}
    wanted |= {"weight": weight} if affine else {}
    for name, variable in wanted.items():
        (expected,) = torch.autograd.grad(y, variable, u, retain_graph=True)
        close(getattr(got, name), expected.view_as(getattr(got, name)), dtype)


def test_a_backward_pass_computed_by_hand():
    """One channel, x = (-1, 1), so μ = 0 and σ = 1: a batch of two always comes out as ∓1."""
    x, u = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    got = norm.batch_norm_backward(u, x, torch.tensor([2.0]), eps=0.0)
    assert got.x_hat.flatten().tolist() == [0, 2]
    assert (got.var.item(), got.mean.item()) == (-1, -2)
    assert got.x.flatten().tolist() == [0, 0]
    assert (got.weight.item(), got.bias.item()) == (1, 1)


def test_statistics_held_constant_would_give_a_wrong_gradient():
    """Formulas 2 and 3 are most of the story: without them the gradient is not even close."""
    x, u = draw((8, 6)).requires_grad_(), draw((8, 6), name="u")
    (expected,) = torch.autograd.grad(norm.batch_norm(x, training=True).output, x, u)
    frozen = u / (x.var(0, unbiased=False) + 1e-5).sqrt()
    assert (frozen - expected).norm() > 0.5 * expected.norm()


@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-5, 5))
def test_what_batch_norm_ignores_has_no_gradient(seed, scale, shift):
    """Shift and scale of a channel change nothing, so the gradient is orthogonal to 1 and to x."""
    g = train.generator(seed, "x")
    x = torch.randn(7, 3, generator=g, dtype=torch.float64) * scale + shift
    u = torch.randn(7, 3, generator=g, dtype=torch.float64)
    got = norm.batch_norm_backward(u, x, eps=0.0).x
    assert abs(got.sum(0)).max() < 1e-12 / scale * 10
    assert abs((got * x).sum(0)).max() < 1e-11 * (1 + abs(shift) / scale)


# ---- what normalization means ----


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-100, 100))
def test_outputs_have_mean_zero_and_variance_one(seed, scale, shift):
    x = torch.randn(6, 4, 5, generator=train.generator(seed, "x"), dtype=torch.float64)
    x = x * scale + shift
    for y, dims in (
        (norm.batch_norm(x, training=True, eps=0.0).output, (0, 2)),
        (norm.layer_norm(x, 5, eps=0.0), (2,)),
        (norm.layer_norm(x, (4, 5), eps=0.0), (1, 2)),
        (norm.group_norm(x, 2, eps=0.0).view(6, 2, 10), (2,)),
        (norm.instance_norm(x, eps=0.0), (2,)),
    ):
        assert abs(y.mean(dims)).max() < 1e-8
        assert abs(y.var(dims, unbiased=False) - 1).max() < 1e-8
    assert abs(norm.rms_norm(x, 5, eps=0.0).square().mean(2) - 1).max() < 1e-10


def test_norms_on_three_numbers_computed_by_hand():
    """1, 2, 6: mean 3, variance (4 + 1 + 9)/3, mean square 41/3."""
    x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    expected = (x - 3) / math.sqrt(14 / 3)
    close(norm.layer_norm(x, 3, eps=0.0), expected, torch.float64)
    close(norm.rms_norm(x, 3, eps=0.0), x / math.sqrt(41 / 3), torch.float64)
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    y, mean, var = norm.batch_norm(x[:, None], zero, one, training=True, eps=0.0)
    close(y[:, 0], expected, torch.float64)
    assert mean.item() == pytest.approx(0.1 * 3)
    assert var.item() == pytest.approx(0.9 * 1 + 0.1 * 7)  # unbiased: 14/2; biased: 14/3


def test_group_norm_lies_between_layer_and_instance_norm():
    x = draw((8, 6, 4, 3))
    close(norm.group_norm(x, 6), norm.instance_norm(x), torch.float64)
    close(norm.group_norm(x, 1), norm.layer_norm(x, (6, 4, 3)), torch.float64)
    close(norm.instance_norm(x), norm.layer_norm(x, (4, 3)), torch.float64)


def test_rms_norm_is_layer_norm_where_the_mean_is_zero_and_nowhere_else():
    x = draw((8, 6), shift=0.0)
    centred = x - x.mean(1, keepdim=True)
    close(norm.rms_norm(centred, 6, eps=1e-5), norm.layer_norm(x, 6), torch.float64)
    assert (norm.rms_norm(x, 6, eps=1e-5) - norm.layer_norm(x, 6)).abs().max() > 0.1


@pytest.mark.covers("N5")
def test_an_example_is_normalized_without_its_neighbours_except_by_batch_norm():
    x = draw((8, 6, 4))
    for apply in (
        lambda x: norm.layer_norm(x, 4),
        lambda x: norm.rms_norm(x, 4),
        lambda x: norm.group_norm(x, 3),
        norm.instance_norm,
    ):
        close(apply(x)[:1], apply(x[:1]), torch.float64)
    together, alone = (norm.batch_norm(part, training=True).output for part in (x, x[:1]))
    assert (together[:1] - alone).abs().max() > 0.1


@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_a_layer_before_batch_norm_may_be_scaled_and_shifted(scale, shift):
    x, w = draw((16, 5)), draw((5, 3), name="w", shift=0.0)
    before = norm.batch_norm(x @ w, training=True, eps=0.0).output
    after = norm.batch_norm(x @ (scale * w) + shift, training=True, eps=0.0).output
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.covers("N6")
@given(st.floats(0.1, 10))
def test_the_gradient_of_a_scale_invariant_loss_is_orthogonal_and_shrinks_with_the_weights(c):
    x, target = draw((16, 5)), draw((16, 3), name="target")

    def gradient(w):
        w = w.clone().requires_grad_()
        y = norm.batch_norm(x @ w, training=True, eps=0.0).output
        return torch.autograd.grad((y * target).mean(), w)[0]

    w = draw((5, 3), name="w", shift=0.0)
    close(gradient(c * w), gradient(w) / c, torch.float64)
    assert abs((gradient(w) * w).sum()) < 1e-12


# ---- stability ----


@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_a_large_mean_does_not_swallow_the_variance(mean, device):
    """E[x²] - E[x]² in float32 has an error of about 1e8 · 1e-7: nothing of a variance of 1."""
    x = draw((64, 6), scale=1.0, shift=mean)
    single = x.to(device, torch.float32)
    naive = single.square().mean(0) - single.mean(0) ** 2
    exact = x.var(0, unbiased=False)
    assert abs(naive.cpu() - exact).max() > 0.5
    one = torch.ones(6, device=device)
    y, _, var = norm.batch_norm(single, one, one, training=True, momentum=1.0)
    torch.testing.assert_close(var.cpu().double(), exact * 64 / 63, rtol=1e-3, atol=0)
    expected = norm.batch_norm(single.double(), training=True).output
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=5e-3)
    for got, same in (
        (norm.layer_norm(single, 6), norm.layer_norm(single.double(), 6)),
        (norm.group_norm(single, 2), norm.group_norm(single.double(), 2)),
    ):
        torch.testing.assert_close(got.double(), same, rtol=0, atol=5e-3)


def test_running_statistics_do_not_hold_the_graph():
    layer = norm.BatchNorm(6)
    x = draw((8, 6), dtype=torch.float32).requires_grad_()
    layer(x)
    assert not layer.running_mean.requires_grad
    assert not layer.running_var.requires_grad
    zeros = torch.zeros(6)
    result = norm.batch_norm(x, zeros, zeros + 1, training=True)
    assert result.output.requires_grad
    assert result.running_mean.grad_fn is result.running_var.grad_fn is None
    assert zeros.sum() == 0  # the given ones are not written


def test_an_untracked_layer_has_no_statistics_to_move():
    layer = norm.BatchNorm(6, track_running_stats=False).double()
    y = layer.eval()(draw((8, 6)))
    assert abs(y.mean(0)).max() < 1e-12
    assert layer.running_mean is None


def test_evaluation_moves_nothing_and_does_not_depend_on_the_batch():
    layer = norm.BatchNorm(6).double()
    layer(draw((8, 6)))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = draw((8, 6), name="other")
    close(layer.eval()(x)[:1], layer(x[:1]), torch.float64)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


def test_gradients_of_single_examples_are_refused_in_training_only():
    net = nn.Sequential(nn.Linear(4, 6), norm.BatchNorm(6))
    x, y = draw((8, 4), dtype=torch.float32), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected examples that do not meet, got BatchNorm"):
        curvature.per_sample_grads(net, F.cross_entropy, x, y)
    assert len(curvature.per_sample_grads(net.eval(), F.cross_entropy, x, y)["1.bias"]) == 8


# ---- the condition number ----


@pytest.mark.covers("N2")
def test_standardization_mends_the_condition_of_real_data():
    """The Gram matrix of the features, which is the Hessian of least squares, squares the ratio."""
    raw = data.load("breast_cancer")
    x, better = (torch.from_numpy(d.x_train).double() for d in (raw, raw.standardized()))
    gram = lambda a: torch.linalg.cond(a.T @ a).item()
    assert norm.condition_number(better) ** 2 == pytest.approx(gram(better), rel=1e-6)
    assert norm.condition_number(x) ** 2 > 1e6 * norm.condition_number(better) ** 2


def test_the_condition_number_is_that_of_torch(device, dtype):
    a = draw((9, 4), device, dtype)
    expected = torch.linalg.cond(a.double()).item()
    assert norm.condition_number(a) == pytest.approx(expected, rel=1e-9)
    assert norm.condition_number(a.T) == pytest.approx(expected, rel=1e-9)


@given(st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_it_is_one_for_rotations_and_blind_to_scale(scale, seed):
    a = torch.randn(5, 5, generator=train.generator(seed, "a"), dtype=torch.float64)
    q, _ = torch.linalg.qr(a)
    assert norm.condition_number(q * scale) == pytest.approx(1)
    assert norm.condition_number(q @ torch.diag(torch.arange(1.0, 6).double())) == pytest.approx(5)


def test_zero_singular_values_are_left_out_on_request_only():
    a = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    with pytest.raises(ValueError, match="^condition_number: expected rank 3, got 2$"):
        norm.condition_number(a)
    assert norm.condition_number(a, nonzero=True) == 2


# ---- what is refused ----

X = torch.ones(8, 12, 4)
V = torch.ones(16)
NAN = torch.full((2, 3), math.nan)
REFUSED = [
    (
        lambda: norm.batch_norm(X, V, V),
        r"batch_norm: expected x of shape \(batch, 16, ...\), got \(8, 12, 4\)",
    ),
    (
        lambda: norm.batch_norm(X, torch.ones(12), V),
        r"batch_norm: expected running_var of shape \(12,\), got \(16,\)",
    ),
    (
        lambda: norm.batch_norm(torch.ones(3), training=True),
        r"batch_norm: expected x of shape \(batch, channels, ...\), got \(3,\)",
    ),
    (
        lambda: norm.batch_norm(torch.ones(1, 16), V, V, training=True),
        r"batch_norm: expected two or more values to average over, got 1 in x of shape \(1, 16\)",
    ),
    (
        lambda: norm.batch_norm(torch.ones(1, 16, 1, 1), training=True),
        "batch_norm: expected two or more values to average over, got 1",
    ),
    (
        lambda: norm.batch_norm(torch.ones(0, 16), training=True),
        "batch_norm: expected two or more values to average over, got 0",
    ),
    (lambda: norm.batch_norm(X), "batch_norm: expected running_mean and running_var, or in tr"),
    (
        lambda: norm.batch_norm(X, torch.ones(12), training=True),
        "batch_norm: expected running_mean and running_var, or in training neither",
    ),
    (
        lambda: norm.batch_norm(X, training=True, eps=-1.0),
        r"batch_norm: expected eps in \[0, inf\], got -1.0",
    ),
    (
        lambda: norm.batch_norm(torch.ones(4, 16), V, V, training=True, momentum=1.5),
        r"batch_norm: expected momentum in \[0, 1\], got 1.5",
    ),
    (
        lambda: norm.batch_norm(NAN, V[:3], V[:3], training=True),
        "batch_norm: expected the statistics of x finite, got 6 values that are not",
    ),
    (
        lambda: norm.batch_norm_backward(X[1:], X),
        r"batch_norm_backward: expected grad_output of shape \(8, 12, 4\), got \(7, 12, 4\)",
    ),
    (
        lambda: norm.batch_norm_backward(V[None], V[None]),
        "batch_norm_backward: expected two or more values",
    ),
    (
        lambda: norm.layer_norm(X, 5),
        r"layer_norm: expected x of shape \(..., 5\), got \(8, 12, 4\)",
    ),
    (
        lambda: norm.layer_norm(X, 4, V),
        r"layer_norm: expected weight of shape \(4,\), got \(16,\)",
    ),
    (lambda: norm.layer_norm(X, ()), "layer_norm: expected normalized_shape of positive sizes"),
    (lambda: norm.layer_norm(X, 4, eps=math.nan), r"layer_norm: expected eps in \[0, inf\]"),
    (lambda: norm.rms_norm(X, (12, 5)), r"rms_norm: expected x of shape \(..., 12, 5\), got"),
    (lambda: norm.rms_norm(X, 4, eps=-1e-8), r"rms_norm: expected eps in \[0, inf\], got -1e-08"),
    (
        lambda: norm.group_norm(X, 5),
        "group_norm: expected num_groups that divides 12 channels, got 5",
    ),
    (lambda: norm.group_norm(X, 0), "group_norm: expected num_groups of at least 1, got 0"),
    (lambda: norm.group_norm(X, 3, V), r"group_norm: expected x of shape \(batch, 16, ...\)"),
    (
        lambda: norm.instance_norm(torch.ones(8, 12)),
        r"instance_norm: expected two or more values to average over, got 1 in x",
    ),
    (lambda: norm.BatchNorm(0), "BatchNorm: expected num_features of at least 1, got 0"),
    (lambda: norm.BatchNorm(3, eps=-1), r"BatchNorm: expected eps in \[0, inf\], got -1"),
    (lambda: norm.BatchNorm(3, momentum=2), r"BatchNorm: expected momentum in \[0, 1\], got 2"),
    (
        lambda: norm.condition_number(NAN),
        "condition_number: expected a finite, got 6 values that are not",
    ),
    (
        lambda: norm.condition_number(torch.ones(3, 0)),
        r"condition_number: expected entries, got shape \(3, 0\)",
    ),
    (
        lambda: norm.condition_number(torch.zeros(3, 2), nonzero=True),
        "condition_number: expected rank 2, got 0",
    ),
    (lambda: norm.condition_number(V), r"condition_number: expected a of shape \(m, n\), got"),
]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:60] for _, m in REFUSED])
def test_what_cannot_be_normalized_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "x", [torch.ones(1, 6), torch.ones(8, 5), torch.full((8, 6), math.inf), NAN.view(1, 6)]
)
def test_a_refusal_leaves_the_running_statistics_as_they_were(x):
    layer = norm.BatchNorm(6)
    layer(draw((8, 6), dtype=torch.float32))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="^batch_norm: expected"):
        layer(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
