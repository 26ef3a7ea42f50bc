"""Initializers against torch, measurements against hand and theory, the mean-field map."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from coursekit import data, models
from coursekit import initialization as init
from coursekit.train import fit, generator

RANDOM = {
    "xavier_uniform_": {"gain": 0.7},
    "xavier_normal_": {"gain": 1.3},
    "kaiming_uniform_": {"a": 0.2},
    "kaiming_normal_": {"mode": "fan_out", "nonlinearity": "relu"},
    "orthogonal_": {"gain": 2.0},
}
SHAPES = [(8, 5), (5, 8), (6, 4, 3, 2), (1, 7), (7, 1)]


def draws(name, *shape, seed=0, dtype=torch.float32, device="cpu", **options):
    """A new tensor filled by our initializer of that name."""
    tensor = torch.full(shape, math.nan, dtype=dtype, device=device)
    getattr(init, name)(tensor, **options, generator=generator(seed, name, device))
    return tensor


# ---- fans ----


@pytest.mark.covers("I5")
@given(st.lists(st.integers(1, 7), min_size=2, max_size=5))
def test_fans_are_torchs(shape):
    tensor = torch.empty(shape)
    assert init.fan_in_and_fan_out(tensor) == nn.init._calculate_fan_in_and_fan_out(tensor)


@pytest.mark.covers("I5")
def test_fans_of_a_convolution_are_what_its_positions_see():
    """Counted on a filter of ones: what reaches an output, and what an input reaches."""
    kernel = torch.ones(6, 3, 5, 2)
    x = torch.ones(1, 3, 11, 11, requires_grad=True)
    y = nn.functional.conv2d(x, kernel)
    (reached,) = torch.autograd.grad(y.sum(), x)
    fan_in, fan_out = init.fan_in_and_fan_out(kernel)
    assert (y == fan_in).all()
    assert fan_in == 3 * 5 * 2
    assert reached[0, :, 5, 5].tolist() == [fan_out] * 3
    assert fan_out == 6 * 5 * 2
    assert fan_out != 6  # the slip that forgets the positions


@pytest.mark.parametrize("shape", [(), (3,), (3, 0), (0, 3), (4, 3, 0)])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_tensor_without_fans_is_refused_by_name(shape):
    tensor = torch.zeros(shape)
    message = (
        r"{}: expected tensor of shape \(fan_out, fan_in, \.\.\.\) without a size of zero, got"
    )
    with pytest.raises(ValueError, match=message.format("fan_in_and_fan_out")):
        init.fan_in_and_fan_out(tensor)
    for name in RANDOM:
        with pytest.raises(ValueError, match=message.format(name)):
            getattr(init, name)(tensor, generator=generator(0, "init"))
    assert not tensor.any()


# ---- initializers ----


@pytest.mark.covers("I3", "I4")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RANDOM)
def test_the_draws_are_torchs_to_the_last_bit(name, shape, device, dtype):
    ours = draws(name, *shape, dtype=dtype, device=device, **RANDOM[name])
    theirs = torch.empty(shape, dtype=dtype, device=device)
    getattr(nn.init, name)(theirs, **RANDOM[name], generator=generator(0, name, device))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("nonlinearity", [*init.GAINS, "leaky_relu"])
def test_kaiming_knows_torchs_gains(nonlinearity, mode):
    for name in ("kaiming_uniform_", "kaiming_normal_"):
        options = {"a": 0.3, "mode": mode, "nonlinearity": nonlinearity}
        theirs = getattr(nn.init, name)(torch.empty(4, 6), **options, generator=generator(0, name))
        assert torch.equal(draws(name, 4, 6, **options), theirs)


LAWS = {  # the scale a reader would compute by hand for a weight of shape (120, 80)
    "xavier_uniform_": stats.uniform(-math.sqrt(6 / 200), 2 * math.sqrt(6 / 200)),
    "xavier_normal_": stats.norm(0, math.sqrt(2 / 200)),
    "kaiming_uniform_": stats.uniform(-math.sqrt(6 / 80), 2 * math.sqrt(6 / 80)),
    "kaiming_normal_": stats.norm(0, math.sqrt(2 / 80)),
}


@pytest.mark.covers("I3", "I4")
@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_their_law_and_no_other(name, dtype):
    """Kolmogorov and Smirnov's test; the normal and the uniform law of one variance differ."""
    sample = draws(name, 120, 80, dtype=dtype).flatten().numpy()
    assert stats.kstest(sample, LAWS[name].cdf).pvalue > 0.01
    other = name.replace(*(("normal", "uniform") if "normal" in name else ("uniform", "normal")))
    assert LAWS[name].var() == pytest.approx(LAWS[other].var())
    assert stats.kstest(sample, LAWS[other].cdf).pvalue < 1e-6


@pytest.mark.covers("I3")
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 10), st.integers(0, 99))
def test_orthogonal_rows_or_columns_are_orthonormal(rows, columns, gain, seed):
    w = draws("orthogonal_", rows, columns, seed=seed, dtype=torch.float64, gain=gain)
    assert torch.linalg.svdvals(w).numpy() == pytest.approx(gain)


def test_orthogonal_flattens_a_filter():
    w = draws("orthogonal_", 4, 3, 2, 2, dtype=torch.float64).flatten(1)
    assert torch.allclose(w @ w.T, torch.eye(4, dtype=torch.float64), atol=1e-14)


def test_orthogonal_is_uniform_over_rotations():
    """Haar's law: the trace of a 3 x 3 matrix has mean 0 and variance 1; plain QR's does not."""
    traces = [draws("orthogonal_", 3, 3, seed=seed).trace().item() for seed in range(600)]
    assert abs(np.mean(traces)) < 3 / math.sqrt(600)
    assert np.var(traces) == pytest.approx(1, abs=0.15)


def test_tensors_that_are_not_contiguous_are_filled_in_place():
    for name in RANDOM:
        whole = torch.zeros(6, 8)
        part = whole.T[::2]  # (4, 6)
        options = {"generator": generator(0, name)}
        assert getattr(init, name)(part, **options).data_ptr() == whole.data_ptr()
        assert (whole[:, ::2] != 0).all()
        assert not whole[:, 1::2].any()


def test_parameters_that_need_gradients_can_be_filled():
    for name in RANDOM:
        layer = nn.Linear(3, 4)
        getattr(init, name)(layer.weight, generator=generator(0, name))
        init.constant_(layer.bias, 0.0)
        assert layer.weight.requires_grad
        assert layer.weight.grad_fn is None
        assert torch.equal(layer.weight, draws(name, 4, 3))


def test_no_draw_moves_the_global_state():
    before = torch.get_rng_state()
    for name in RANDOM:
        draws(name, 5, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "xavier_uniform_",
            {"gain": -1.0},
            ValueError,
            "expected gain positive and finite, got -1",
        ),
        ("xavier_normal_", {"gain": math.inf}, ValueError, "expected gain positive and finite"),
        ("orthogonal_", {"gain": 0.0}, ValueError, "expected gain positive and finite, got 0"),
        (
            "kaiming_uniform_",
            {"mode": "fan_avg"},
            ValueError,
            "expected mode to be one of 'fan_in', 'fan_out', got 'fan_avg'",
        ),
        (
            "kaiming_normal_",
            {"nonlinearity": "softplus"},
            ValueError,
            "expected nonlinearity to be one of .*'tanh'.*'leaky_relu', got 'softplus'",
        ),
        ("kaiming_normal_", {"a": math.nan}, ValueError, "expected gain positive and finite"),
        ("kaiming_uniform_", {"a": math.inf}, ValueError, "expected gain positive and finite"),
        *[(name, {"generator": None}, TypeError, "expected a generator") for name in RANDOM],
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_refusal_leaves_tensor_and_generator_as_they_were(name, options, error, message):
    tensor, stream = torch.arange(6.0).reshape(2, 3), generator(0, "init")
    before = stream.get_state()
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(init, name)(tensor, **{"generator": stream, **options})
    assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3))
    assert torch.equal(before, stream.get_state())


@pytest.mark.parametrize("val", [math.nan, math.inf])
def test_a_constant_is_finite(val):
    tensor = torch.ones(3)
    with pytest.raises(ValueError, match="constant_: expected val finite, got"):
        init.constant_(tensor, val)
    assert tensor.tolist() == [1, 1, 1]


@pytest.mark.parametrize("val", [0.0, -2.5])
def test_constant_is_torchs(val, dtype):
    ours = init.constant_(torch.empty(3, 2, dtype=dtype), val)
    assert torch.equal(ours, nn.init.constant_(torch.empty(3, 2, dtype=dtype), val))


# ---- where a start leads ----


@pytest.mark.covers("I2")
def test_units_that_start_equal_stay_equal_in_training():
    """Equal gradients at every step: after two epochs of digits all hidden units are one unit."""
    digits = data.load("digits")
    net = models.mlp([64, 8, 10], nn.Tanh, generator=generator(0, "init")).double()
    for layer in (net[0], net[2]):
        init.constant_(layer.weight, 0.02)
        init.constant_(layer.bias, 0.0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    fit(net, digits, sgd, 2, 64, generator=generator(0, "data"))
    rows, columns = net[0].weight.detach(), net[2].weight.detach().T
    assert (rows - 0.02).abs().max() > 0.01  # it did learn
    assert (columns[0] - columns[0].mean()).abs().max() > 0.01  # and tell classes apart
    assert (rows - rows[0]).abs().max() < 1e-10
    assert (columns - columns[0]).abs().max() < 1e-10


@pytest.mark.covers("I1")
@pytest.mark.parametrize(
    ("start", "end", "curvatures"),
    [
        ((1.0, 0.5), "both positive", (0, 1)),  # a minimum: a valley's floor, and its wall
        ((-0.5, -1.0), "both negative", (0, 1)),  # another one
        ((0.5, -0.5), "zero", (-1, 1)),  # a saddle, stationary as well
    ],
)
def test_the_start_decides_which_stationary_point_is_reached(start, end, curvatures):
    """Gradient descent on (w v - 1)², a linear network of two weights."""
    loss = lambda p: (p[0] * p[1] - 1) ** 2
    p = torch.tensor(start, dtype=torch.float64)
    for _ in range(1000):
        p = p - 0.05 * torch.func.grad(loss)(p)
    assert torch.func.grad(loss)(p).norm() < 1e-8
    sides = {"both positive": (p > 0.5), "both negative": (p < -0.5), "zero": p.abs() < 1e-8}
    assert sides[end].all()
    values = torch.linalg.eigvalsh(torch.func.jacrev(torch.func.grad(loss))(p))
    assert tuple((values.abs() > 1e-6).mul(values.sign()).tolist()) == curvatures


# ---- measuring a network ----


def deep(activation, depth, width, weight_variance, seed, inputs=64, outputs=None):
    """A perceptron without biases whose weights have variance σ_w² / fan_in."""
    sizes = [inputs, *[width] * depth] + [outputs] * (outputs is not None)
    net = models.mlp(sizes, activation, bias=False, generator=generator(seed, "any"))
    for i, layer in enumerate(m for m in net if isinstance(m, nn.Linear)):
        layer.weight.data.normal_(
            0, math.sqrt(weight_variance / layer.in_features), generator=generator(seed, f"w{i}")
        )
    return net


def test_layer_statistics_are_those_of_the_values(dtype, device):
    net = models.mlp([5, 4, 3], nn.Tanh, generator=generator(0, "init")).to(device, dtype)
    x = torch.randn(7, 5, dtype=dtype, generator=generator(0, "x")).to(device)
    z = nn.functional.linear(x, net[0].weight, net[0].bias)
    got = init.layer_statistics(net, x)
    assert got.names == ("0", "2")
    assert got.mean.tolist() == pytest.approx([z.mean().item(), net(x).mean().item()], rel=1e-5)
    assert got.variance[0].item() == pytest.approx(z.var(correction=0).item(), rel=1e-5)
    after = init.layer_statistics(net, x, kind=nn.Tanh)
    assert after.names == ("1",)
    assert after.mean.item() == pytest.approx(z.tanh().mean().item(), rel=1e-5)
    assert not got.mean.requires_grad


def test_gradient_norms_are_those_of_autograd(dtype, device):
    net = models.mlp([5, 4, 3], generator=generator(0, "init")).to(device, dtype)
    x = torch.randn(7, 5, dtype=dtype, generator=generator(0, "x")).to(device)
    y = torch.arange(7, device=device) % 3
    got = init.gradient_norms(net, x, y)
    z = net[0](x).detach().requires_grad_()
    nn.functional.cross_entropy(net[2](net[1](z)), y).backward()
    assert got.output[0].item() == pytest.approx(z.grad.norm().item(), rel=1e-5)
    assert net[0].weight.grad is None  # ours left none
    nn.functional.cross_entropy(net(x), y).backward()
    assert got.weight[0].item() == pytest.approx(net[0].weight.grad.norm().item(), rel=1e-5)


def test_a_measurement_sees_what_a_layer_puts_out_before_work_in_place():
    """An in-place ReLU overwrites what the layer gave; the record is kept apart from it."""
    x = torch.tensor([[1.0], [-1.0]])
    norms, stats_ = [], []
    for inplace in (False, True):
        net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(inplace=inplace))
        init.constant_(net[0].weight, 2.0)
        norms.append(init.gradient_norms(net, x, x, loss=lambda z, _: z.sum()))
        stats_.append(init.layer_statistics(net, x))
    assert norms[0] == norms[1]
    assert norms[1].output.item() == 1.0  # √2 would be the gradient after the ReLU
    assert stats_[1].mean.item() == 0.0


def test_measuring_leaves_everything_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = torch.ones(6, 4), torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        norms = init.gradient_norms(net, x, y)
    init.layer_statistics(net, x)
    assert norms.names == ("0", "3")  # the norm's weight has one dimension
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert not net[0].weight.requires_grad
    assert net.training


def test_hooks_go_when_a_model_fails():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        init.layer_statistics(net, torch.ones(2, 4))
    assert not any(m._forward_hooks for m in net.modules())


def test_a_model_without_layers_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="layer_statistics: expected a model that runs such"):
        init.layer_statistics(nn.ReLU(), x)
    with pytest.raises(ValueError, match="gradient_norms: expected a model that runs such"):
        init.gradient_norms(nn.BatchNorm1d(3), x, torch.zeros(2, dtype=torch.int64))


def test_a_layer_that_runs_twice_is_measured_twice():
    layer = nn.Linear(1, 1, bias=False)
    init.constant_(layer.weight, 3.0)
    net = nn.Sequential(layer, layer)
    assert init.layer_statistics(net, torch.ones(1, 1)).mean.tolist() == [3, 9]
    norms = init.gradient_norms(net, torch.ones(1, 1), torch.ones(1), loss=lambda z, _: z.sum())
    assert norms.weight.tolist() == [6, 6]  # d w²/dw


@pytest.mark.covers("I6")
def test_sigmoids_lose_the_gradient_that_residual_blocks_keep():
    class Block(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.inner, self.outer = deep(nn.Identity, 2, 32, 2.0, seed, inputs=32)[::2]

        def forward(self, a):  # a^{l+2} = h(a^l + W^{l+1} h(W^l a^l))
            return torch.relu(a + self.outer(torch.relu(self.inner(a))))

    x = torch.rand(16, 32, generator=generator(0, "x"))
    y = torch.arange(16)
    sigmoid = deep(nn.Sigmoid, 20, 32, 1.0, 0, inputs=32)
    residual = nn.Sequential(*[Block(seed) for seed in range(10)])
    lost = init.gradient_norms(sigmoid, x, y).weight
    kept = init.gradient_norms(residual, x, y).weight
    assert len(lost) == len(kept) == 20
    assert lost[0] < 1e-8 * lost[-1]
    assert kept[0] > kept[-1] / 10


# ---- theory ----


def test_relu_halves_the_variance_and_he_doubles_it_back(dtype):
    got = init.variance_map(torch.relu, torch.tensor([1.0, 2.0], dtype=dtype), depth=3)
    assert got.q.shape == (4, 2)
    assert got.q[:, 0].tolist() == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])
    assert got.q[:, 1].tolist() == pytest.approx([1, 1, 1, 1])
    assert got.chi[:, 0].tolist() == pytest.approx([1 / 2] * 4)
    assert got.q.dtype == torch.float64


@pytest.mark.parametrize("c", [-0.9, 0.0, 0.4, 0.99])
def test_relu_correlation_is_the_arc_cosine_kernel(c):
    """Closed form: Y. Cho and L. Saul, Kernel Methods for Deep Learning, 2009, eq. 6."""
    exact = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
    for points in (32, 128):
        got = init.variance_map(torch.relu, 2.0, q=3.0, c=c, points=points).c[1].item()
        assert abs(got - exact) < 1 / (3 * points)


def test_identity_keeps_the_correlation_and_a_bias_raises_it():
    got = init.variance_map(lambda z: z, 1.0, 1.0, q=1.0, c=0.0, depth=2)
    assert got.q.tolist() == pytest.approx([1, 2, 3])
    assert got.c.tolist() == pytest.approx([0, 1 / 2, 2 / 3])
    assert got.chi.tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_smooth_activations_agree_with_scipys_quadrature(activation):
    f = {"tanh": np.tanh, "sigmoid": lambda z: 1 / (1 + np.exp(-z))}[activation]
    df = {"tanh": lambda z: 1 - np.tanh(z) ** 2, "sigmoid": lambda z: f(z) * (1 - f(z))}[activation]

    def mean(g):
        return integrate.quad(lambda z: g(z) * stats.norm.pdf(z), -12, 12, epsabs=1e-12)[0]

    got = init.variance_map(getattr(torch, activation), 1.7, 0.1, q=0.8)
    scale = math.sqrt(0.8)
    assert got.q[1].item() == pytest.approx(1.7 * mean(lambda z: f(scale * z) ** 2) + 0.1, 1e-8)
    assert got.chi[0].item() == pytest.approx(1.7 * mean(lambda z: df(scale * z) ** 2), 1e-6)


@pytest.mark.covers("I7")
@pytest.mark.parametrize("weight_variance", [0.7, 1.5, 3.0])
def test_chi_is_the_slope_of_the_correlation_map_at_one(weight_variance):
    """The identity behind the name: at the fixed point of q, dc'/dc at c = 1 is χ."""
    q = init.variance_map(torch.tanh, weight_variance, 0.05, depth=300).q[-1]
    near = init.variance_map(torch.tanh, weight_variance, 0.05, q=q, c=1 - 1e-5)
    slope = (1 - near.c[1]) / 1e-5
    assert slope.item() == pytest.approx(near.chi[0].item(), rel=1e-3)


@pytest.mark.covers("I7")
def test_tanh_is_ordered_below_weight_variance_one_and_chaotic_above():
    weight_variance = torch.tensor([0.9, 1.1, 2.0])
    got = init.variance_map(torch.tanh, weight_variance, c=0.5, depth=300)
    assert (got.chi[-1, 0] < 1) & (got.chi[-1, 1] > 1) & (got.chi[-1, 2] > got.chi[-1, 1])
    with_bias = init.variance_map(torch.tanh, weight_variance, 0.1, c=0.5, depth=300)
    assert with_bias.c[-1, 0].item() == pytest.approx(1)  # order: inputs become alike
    assert with_bias.c[-1, 2] < 0.99  # chaos: they do not
    assert with_bias.chi[-1, 1] < 1  # a bias moves the critical line to larger weights


def test_a_signal_that_underflows_keeps_a_correlation():
    got = init.variance_map(torch.relu, 1e-30, c=0.5, depth=20)
    assert got.q[-1] == 0
    assert got.c.isfinite().all()


@pytest.mark.covers("I3", "I4")
@pytest.mark.parametrize(
    ("kind", "activation", "weight_variance"),
    [
        (nn.Identity, lambda z: z, 1.0),
        (nn.Tanh, torch.tanh, 1.5),
        (nn.Sigmoid, torch.sigmoid, 4.0),
        (nn.ReLU, torch.relu, 2.0),
    ],
    ids=["identity", "tanh", "sigmoid", "relu"],
)
def test_measured_variance_ratios_follow_the_map(kind, activation, weight_variance):
    """Forward and backward, over seeds; a He net with Xavier's variance would be 50 % off."""
    x = torch.rand(32, 64, generator=generator(0, "x"))
    forward, backward = [], []
    for seed in range(40):
        net = deep(kind, 5, 256, weight_variance, seed, outputs=10)
        at = init.layer_statistics(net, x)
        target = torch.randn(32, 10, generator=generator(seed, "target"))
        norms = init.gradient_norms(net, x, target, loss=lambda z, t: (z * t).sum())
        forward.append((at.variance + at.mean**2)[:5])
        backward.append(norms.output[:5] ** 2)
    q, delta = torch.stack(forward).mean(0), torch.stack(backward).mean(0)
    theory = init.variance_map(activation, weight_variance, q=q[0].item(), depth=4)
    assert (q[1:] / q[:-1]).numpy() == pytest.approx(
        (theory.q[1:] / theory.q[:-1]).numpy(), rel=0.05
    )
    assert (delta[:-1] / delta[1:]).numpy() == pytest.approx(theory.chi[:-1].numpy(), rel=0.05)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"weight_variance": 0.0}, "expected weight_variance positive and finite, got 0"),
        ({"weight_variance": -1.0}, "expected weight_variance positive and finite, got -1"),
        ({"q": 0.0}, "expected q positive and finite, got 0"),
        ({"q": torch.tensor([1.0, math.inf])}, "expected q finite, got 1 values"),
        ({"bias_variance": -0.1}, r"expected bias_variance in \[0, inf\], got -0.1"),
        ({"c": 1.5}, r"expected \|c\| in \[0, 1\], got 1.5"),
        ({"c": math.nan}, "expected c finite"),
        ({"depth": -1}, "expected depth of at least 0, got -1"),
        ({"points": 1}, "expected points of at least 2, got 1"),
    ],
)
def test_a_map_of_impossible_numbers_is_refused(given_, message):
    with pytest.raises(ValueError, match=f"variance_map: {message}"):
        init.variance_map(torch.tanh, **{"weight_variance": 1.0, **given_})


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_depth_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="variance_map: expected depth as an integer, got 1.5"):
        init.variance_map(torch.tanh, 1.0, depth=1.5)
