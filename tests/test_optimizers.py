"""Every method against torch.optim and against its usual slips; Newton, coordinates, schedules."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from coursekit import curvature, data, experiment, models, optimizers, train

X, Y, _, _ = data.load("digits").tensors()


def grid(**choices):
    """Every combination of options."""
    return [
        dict(zip(choices, picked, strict=True)) for picked in itertools.product(*choices.values())
    ]


def legal(options):
    return not options["nesterov"] or (options["momentum"] and not options["dampening"])


BOTH = (False, True)
SGD = grid(
    momentum=(0.0, 0.9),
    dampening=(0.0, 0.3),
    nesterov=BOTH,
    weight_decay=(0.0, 0.02),
    maximize=BOTH,
)
ADAM = [
    a | b
    for a in grid(amsgrad=BOTH, weight_decay=(0.0, 0.02), maximize=BOTH)
    for b in ({}, {"betas": (0.5, 0.9), "eps": 1e-3})
]
ADAGRAD = {"lr_decay": (0.0, 0.05), "initial_accumulator_value": (0.0, 0.1)}
RMSPROP = {"centered": BOTH, "momentum": (0.0, 0.9)}
OPTIONS = {  # learning rate, combinations of all the other options
    "SGD": (0.05, list(filter(legal, SGD))),
    "Adagrad": (0.01, grid(**ADAGRAD, weight_decay=(0.0, 0.02), maximize=BOTH)),
    "RMSprop": (1e-3, grid(**RMSPROP, weight_decay=(0.0, 0.02), maximize=BOTH)),
    "Adam": (1e-3, ADAM),
    "AdamW": (1e-3, ADAM),
}
SHARED = [(name, lr, options) for name, (lr, every) in OPTIONS.items() for options in every]
ONE_EACH = [  # one rich combination a method, for what does not depend on the options
    ("SGD", 0.05, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    ("Adagrad", 0.01, {"lr_decay": 0.05, "initial_accumulator_value": 0.1}),
    ("RMSprop", 1e-3, {"centered": True, "momentum": 0.9, "weight_decay": 0.02}),
    ("Adam", 1e-3, {"amsgrad": True, "weight_decay": 0.02}),
    ("AdamW", 1e-3, {}),
]
methods = pytest.mark.parametrize(("name", "lr", "options"), ONE_EACH, ids=lambda v: str(v)[:7])
UPDATES = {name: getattr(optimizers, f"{name.lower()}_update") for name in OPTIONS}


def network(device="cpu", dtype=torch.float64):
    return models.mlp([64, 32, 10], generator=train.generator(0, "init")).to(device, dtype)


def learn(net, optimizer, steps, *, first=0, scheduler=None):
    """Take steps on batches of 64 digits; the same step has the same batch in every call.

    Who maximizes is given minus the loss: otherwise the weights, and rounding with them, explode.
    """
    p, sign = next(net.parameters()), -1 if optimizer.defaults["maximize"] else 1
    for step in range(first, first + steps):
        rows = slice(64 * (step % 20), 64 * (step % 20) + 64)
        optimizer.zero_grad()
        (sign * cross_entropy(net(X[rows].to(p)), Y[rows].to(p.device))).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return net


def difference(net, other):
    """The largest difference of any weight."""
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def tolerance(dtype):
    return 1e-6 if dtype == torch.float32 else 1e-12


# ---- parity with torch.optim ----


@pytest.mark.covers("O1")
@pytest.mark.covers("O3")
@pytest.mark.covers("O5")
@pytest.mark.parametrize(("name", "lr", "options"), SHARED, ids=str)
def test_fifty_steps_are_those_of_torch(name, lr, options, device, dtype):
    nets = []
    for module in (optimizers, torch.optim):
        net = network(device, dtype)
        nets.append(learn(net, getattr(module, name)(net.parameters(), lr=lr, **options), 50))
    assert difference(*nets) < tolerance(dtype)
    assert difference(nets[0], network(device, dtype)) > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_defaults_are_those_of_torch(name):
    w = [torch.zeros(1, requires_grad=True)]
    ours, theirs = (
        getattr(module, name)(w).param_groups[0] for module in (optimizers, torch.optim)
    )
    assert {key: theirs[key] for key in ours} == ours


@methods
def test_groups_have_options_of_their_own(name, lr, options):
    nets = []
    for module in (optimizers, torch.optim):
        net = network()
        groups = [{"params": net[0].parameters(), "weight_decay": 0.1}]
        groups += [{"params": net[2].parameters(), "lr": lr / 3, "maximize": True}]
        nets.append(learn(net, getattr(module, name)(groups, lr=lr, **options), 20))
    assert difference(*nets) < 1e-12
    alone = network()
    learn(alone, getattr(optimizers, name)(alone.parameters(), lr=lr, **options), 20)
    assert difference(alone, nets[0]) > 1e-3


@pytest.mark.covers("O7")
@methods
def test_a_scheduler_sets_the_rate(name, lr, options):
    nets = []
    for module in (optimizers, torch.optim):
        net = network()
        optimizer = getattr(module, name)(net.parameters(), lr=lr, **options)
        factor = optimizers.warmup(5, then=optimizers.cosine(10, final=0.1))
        schedule = lr_scheduler.LambdaLR(optimizer, factor)
        nets.append(learn(net, optimizer, 20, scheduler=schedule))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * lr)
    assert difference(*nets) < 1e-12
    net = network()
    learn(net, getattr(optimizers, name)(net.parameters(), lr=lr, **options), 20)
    assert difference(net, nets[0]) > 1e-4


@pytest.mark.usefixtures("unchecked_shapes")  # torch's defaults are integers here and there
@methods
@pytest.mark.parametrize("swap", ["none", "from torch", "to torch"])
def test_a_stored_state_continues_the_run(name, lr, options, swap):
    """Ours to the last bit; across the two libraries to rounding."""
    kinds = {"ours": getattr(optimizers, name), "torch": getattr(torch.optim, name)}
    first, second = {
        "none": ("ours", "ours"),
        "from torch": ("torch", "ours"),
        "to torch": ("ours", "torch"),
    }[swap]
    net = network()
    optimizer = kinds[first](net.parameters(), lr=lr, **options)
    learn(net, optimizer, 10)
    other = copy.deepcopy(net)
    loaded = kinds[second](other.parameters(), lr=1.0)  # options come with the state
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(net, optimizer, 10, first=10)
    learn(other, loaded, 10, first=10)
    assert difference(net, other) <= (0 if swap == "none" else 1e-12)


@methods
def test_a_state_lost_on_the_way_shows(name, lr, options):
    """Otherwise the test above would say nothing."""
    net = network()
    learn(net, getattr(optimizers, name)(net.parameters(), lr=lr, **options), 10)
    other = copy.deepcopy(net)
    optimizer = getattr(optimizers, name)(other.parameters(), lr=lr, **options)
    learn(other, optimizer, 10, first=10)
    whole = network()
    learn(whole, getattr(optimizers, name)(whole.parameters(), lr=lr, **options), 20)
    assert difference(whole, other) > 1e-4


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    w, calls = torch.ones(2, requires_grad=True), []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = (w**2).sum()
        loss.backward()
        return loss

    optimizer = optimizers.SGD([w, torch.ones(1, requires_grad=True)], lr=0.25)
    with torch.no_grad():
        assert optimizer.step(closure).item() == 2
    assert calls == [True]
    assert w.tolist() == [0.5, 0.5]
    assert optimizer.step() is None


def test_a_parameter_without_gradient_stays():
    w, idle = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = optimizers.AdamW([w, idle], lr=0.1)
    w.sum().backward()
    optimizer.step()
    assert idle.tolist() == [1, 1]
    assert idle not in optimizer.state
    assert w[0] < 0.95


# ---- the pure functions ----


def gradients(shape=(3, 2), steps=8, device="cpu", dtype=torch.float64):
    """Small ones that lean one way, so that slips in eps, correction and sums are seen."""
    g = torch.randn(steps, *shape, generator=train.generator(0, "grad"), dtype=torch.float64)
    return list(((g + 0.5) * 1e-2).to(device, dtype))


def walk(update, grads, lr=0.1, **options):
    """Apply an update by hand, and return the last weights."""
    w, state = torch.ones_like(grads[0]), {}
    for grad in grads:
        direction, state = update(w, grad, state, **options)
        w = w - lr * direction
    return w


def torch_walk(name, grads, lr=0.1, **options):
    """Let torch apply the same gradients."""
    w = torch.ones_like(grads[0], requires_grad=True)
    optimizer = getattr(torch.optim, name)([w], lr=lr, **options)
    for w.grad in grads:
        optimizer.step()
    return w.detach()


def probed(update):
    """AdaHessian's update, with some diagonal, as a function of the others' form."""
    return lambda w, grad, state, **options: update(w, grad, state, 0.5 * grad + 1, **options)


pure = pytest.mark.parametrize(
    ("update", "options"),
    [(UPDATES[name], options) for name, _, options in ONE_EACH]
    + [(optimizers.sgd_update, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1})]
    + [(probed(optimizers.adahessian_update), {"weight_decay": 0.1, "hessian_power": 0.5})],
)


@pure
def test_an_update_changes_nothing_that_it_is_given(update, options):
    w, state = torch.ones(3, 2, dtype=torch.float64), {}
    for grad in gradients():
        before = copy.deepcopy((w, grad, state))
        direction, new = update(w, grad, state, **options)
        torch.testing.assert_close((w, grad, state), before, rtol=0, atol=0)
        assert new.keys() >= state.keys()
        assert all(new[key] is not state[key] for key in state if key != "step")
        w, state = w - 0.1 * direction, new


@pure
def test_in_place_gives_the_same_numbers(update, options):
    assert torch.equal(
        walk(update, gradients(), **options), walk(update, gradients(), inplace=True, **options)
    )


def test_in_place_keeps_the_state_s_own_memory():
    state, seen = {}, set()
    for grad in gradients(dtype=torch.float32):
        _, new = optimizers.adam_update(torch.ones(3, 2), grad, state, inplace=True)
        assert new is state
        seen.add(tuple(state[key].data_ptr() for key in ("exp_avg", "exp_avg_sq")))
    assert len(seen) == 1


@pytest.mark.parametrize(("name", "lr", "options"), SHARED[::3], ids=str)
def test_an_update_applied_by_hand_is_torch_s(name, lr, options, device, dtype):
    grads = gradients(device=device, dtype=dtype)
    signed = [-g for g in grads] if options.get("maximize") else grads
    given = {k: v for k, v in options.items() if k != "maximize"}
    got = walk(UPDATES[name], signed, lr=lr, **given)
    wanted = torch_walk(name, grads, lr=lr, **options)
    assert (got - wanted).abs().max() < tolerance(dtype)


# Each method written out plainly, with one place to slip. Without a slip it must be torch's.


def plain_sgd(grads, slip):
    w, b = torch.ones_like(grads[0]), None
    for i, grad in enumerate(grads):
        g = grad + 0.1 * w if slip != "no decay" else grad
        kept = 0.9 * b if b is not None and slip != "overwritten buffer" else 0
        share = 0.7 if i or slip == "dampened at the first step" else 1
        b = kept + share * g
        w = w - 0.1 * b
    return w


def plain_nesterov(grads, slip):
    w, b = torch.ones_like(grads[0]), 0
    for g in grads:
        old, b = b, 0.9 * b + g
        w = w - 0.1 * (b if slip == "heavy ball" else g + 0.9 * (old if slip == "late" else b))
    return w


def plain_adagrad(grads, slip):
    w, r = torch.ones_like(grads[0]), 0
    for i, g in enumerate(grads):
        r = r + g**2 if slip != "mean instead of sum" else (i * r + g**2) / (i + 1)
        root = (r + 1e-3).sqrt() if slip == "eps inside the root" else r.sqrt() + 1e-3
        w = w - 0.1 / (1 + (i + (slip == "decay counts from one")) * 0.05) * g / root
    return w


def plain_rmsprop(grads, slip):
    w, s, a, b = torch.ones_like(grads[0]), 0, 0, 0
    for g in grads:
        s = 0.9 * s + 0.1 * g**2
        a = 0.9 * a + 0.1 * g if slip != "not centered" else 0
        root = (s - a**2 + 1e-3).sqrt() if slip == "eps inside the root" else 1e-3
        root = root if slip == "eps inside the root" else (s - a**2).sqrt() + root
        b = 0.5 * b + (g / root if slip != "momentum before the root" else g)
        w = w - 0.1 * (b if slip != "momentum before the root" else b / root)
    return w


def plain_adam(grads, slip):
    w, m, v, u = torch.ones_like(grads[0]), 0, 0, torch.zeros_like(grads[0])
    for step, g in enumerate(grads, start=1):
        g = g + 0.1 * w if slip == "coupled decay" else g
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g**2
        corrected = v if slip == "no bias correction" else v / (1 - 0.9**step)
        if slip == "maximum after the correction":
            u = torch.maximum(u, corrected)
        else:
            u = torch.maximum(u, v)
            corrected = u if slip == "no bias correction" else u / (1 - 0.9**step)
        corrected = u if slip == "maximum after the correction" else corrected
        m_hat = m if slip == "no bias correction" else m / (1 - 0.9**step)
        root = (corrected + 1e-3).sqrt() if slip == "eps inside the root" else None
        root = corrected.sqrt() + 1e-3 if root is None else root
        w = w - 0.1 * m_hat / root - (0.01 * w if slip != "coupled decay" else 0)
    return w


SLIPS = [
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, plain_sgd, slip)
    for slip in (None, "overwritten buffer", "dampened at the first step", "no decay")
]
SLIPS += [
    ("SGD", {"momentum": 0.9, "nesterov": True}, plain_nesterov, slip)
    for slip in (None, "heavy ball", "late")
]
SLIPS += [
    ("Adagrad", {"lr_decay": 0.05, "eps": 1e-3}, plain_adagrad, slip)
    for slip in (None, "mean instead of sum", "eps inside the root", "decay counts from one")
]
SLIPS += [
    ("RMSprop", {"alpha": 0.9, "eps": 1e-3, "centered": True, "momentum": 0.5}, plain_rmsprop, slip)
    for slip in (None, "eps inside the root", "not centered", "momentum before the root")
]
ADAMW = {"betas": (0.9, 0.9), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True}
SLIPS += [("AdamW", ADAMW, plain_adam, slip) for slip in (None, "eps inside the root")]
SLIPS += [
    ("AdamW", ADAMW, plain_adam, slip)
    for slip in ("no bias correction", "coupled decay", "maximum after the correction")
]


@pytest.mark.covers("O5")
@pytest.mark.parametrize(
    ("name", "options", "plain", "slip"), SLIPS, ids=lambda v: getattr(v, "__name__", str(v))[:40]
)
def test_a_slip_differs_from_torch_by_far_more_than_the_tolerance(name, options, plain, slip):
    grads = gradients()
    wrong = (plain(grads, slip) - torch_walk(name, grads, **options)).abs().max()
    ours = (walk(UPDATES[name], grads, **options) - plain(grads, None)).abs().max()
    assert ours < 1e-14
    assert wrong < 1e-14 if slip is None else wrong > 1e-4


@pytest.mark.covers("O3")
def test_the_buffer_is_the_lecture_s_velocity_until_the_rate_changes():
    """v ← α v − η g is −lr · b for a constant lr; after a drop b follows at once, v does not."""
    v, state = 0, {}
    for step, grad in enumerate(gradients()):
        lr = 0.1 if step < 5 else 0.01
        v = 0.9 * v - lr * grad
        b, state = optimizers.sgd_update(grad, grad, state, momentum=0.9)
        same = torch.allclose(v, -lr * b, rtol=1e-12)
        assert same == (step < 5)


@pytest.mark.covers("O3")
def test_the_heavy_ball_passes_a_local_minimum_in_which_descent_stops():
    """f(w) = w⁴ − 2w² + w/2 has its lower valley at −1.06, and a shallow one at 0.93."""
    ends = {}
    for momentum in (0.0, 0.9):
        w = torch.tensor([2.0], requires_grad=True)
        optimizer = optimizers.SGD([w], lr=0.01, momentum=momentum)
        for _ in range(500):
            optimizer.zero_grad()
            (w**4 - 2 * w**2 + w / 2).sum().backward()
            optimizer.step()
        ends[momentum] = w.item()
    assert ends[0] == pytest.approx(0.93, abs=0.01)
    assert ends[0.9] == pytest.approx(-1.06, abs=0.01)


@pytest.mark.covers("O6")
def test_adam_finds_the_worst_point_of_a_convex_problem_and_amsgrad_the_best():
    """Reddi et al. 2018, theorem 1: slopes 3, −1, −1 in turn on [−1, 1], so −1 is best."""
    ends = {}
    for amsgrad in BOTH:
        w = torch.zeros(1, requires_grad=True)
        optimizer = optimizers.Adam([w], lr=0.5, betas=(0.0, 1 / (1 + 3**2)), amsgrad=amsgrad)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -0.5)
        for step in range(1500):
            w.grad = torch.tensor([3.0 if step % 3 == 0 else -1.0])
            optimizer.step()
            schedule.step()
            w.data.clamp_(-1, 1)
        ends[amsgrad] = w.item()
    assert ends[False] == pytest.approx(1, abs=0.05)
    assert ends[True] == pytest.approx(-1, abs=0.05)


@pytest.mark.covers("O1")
def test_mini_batch_gradients_are_right_in_the_mean_and_their_variance_falls_as_one_over_b():
    """Over all 6^B batches drawn with replacement, so nothing is left to chance."""
    net, x, y = network(), X[:6].double(), Y[:6]
    parts = curvature.per_sample_grads(net, cross_entropy, x, y)
    rows = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
    full, noise = rows.mean(0), optimizers.gradient_noise_scale(parts)
    for size in (1, 2, 3):
        batches = torch.tensor(list(itertools.product(range(6), repeat=size)))
        means = rows[batches].mean(1)
        torch.testing.assert_close(means.mean(0), full)
        variance = (means - full).square().sum(1).mean()
        torch.testing.assert_close(variance, noise * full.square().sum() / size)


# ---- what is refused ----


def four_parameters(dtype=torch.float32):
    """Parameters of two groups, with gradients."""
    w = [torch.ones(2, 3, dtype=dtype, requires_grad=True) for _ in range(4)]
    for p in w:
        p.grad = torch.full_like(p, 0.5)
    return w, [{"params": w[:2]}, {"params": w[2:]}]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [1, 3])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(name, bad, where):
    w, groups = four_parameters()
    optimizer = getattr(optimizers, name)(groups, lr=0.1)
    optimizer.step()
    before = copy.deepcopy((w, optimizer.state_dict()))
    w[where].grad[1, 2] = bad
    message = (
        rf"^{name}: expected finite gradients, got 1 values that are not in parameter {where} "
        r"of shape \(2, 3\); nothing was changed$"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    torch.testing.assert_close((w, optimizer.state_dict()), before, rtol=0, atol=0)


def test_opposite_infinities_do_not_hide_each_other():
    w, groups = four_parameters()
    w[0].grad[0, 0], w[3].grad[0, 0] = math.inf, -math.inf
    with pytest.raises(ValueError, match="^SGD: expected finite gradients, got 1 values"):
        optimizers.SGD(groups, lr=0.1).step()


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64])
def test_a_group_of_mixed_precision_is_checked_and_moved(other):
    w = [torch.ones(2, dtype=dtype, requires_grad=True) for dtype in (torch.float32, other)]
    for p in w:
        p.grad = torch.full_like(p, 0.5)
    optimizer = optimizers.SGD(w, lr=0.5, momentum=0.9)
    optimizer.step()
    assert [p.tolist() for p in w] == [[0.75, 0.75]] * 2
    w[1].grad[0] = math.nan
    with pytest.raises(ValueError, match="in parameter 1 of"):
        optimizer.step()
    assert [p.tolist() for p in w] == [[0.75, 0.75]] * 2


def test_finite_gradients_whose_sum_overflows_are_accepted():
    w, groups = four_parameters()
    for p in w:
        p.grad.fill_(3e38)
    optimizers.SGD(groups, lr=1e-38).step()
    assert w[0][0, 0].item() == pytest.approx(1 - 3)


REFUSED = [
    ("SGD", {"lr": -0.1}, r"lr in \[0, inf\], got -0.1"),
    ("SGD", {"lr": math.nan}, r"lr in \[0, inf\], got nan"),
    ("SGD", {"momentum": -0.9}, r"momentum in \[0, inf\], got -0.9"),
    ("SGD", {"weight_decay": -1}, r"weight_decay in \[0, inf\], got -1"),
    ("SGD", {"nesterov": True}, r"momentum above 0 and no dampening for nesterov, got 0.0 and 0.0"),
    (
        "SGD",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        r"momentum above 0 and no dampening for nesterov, got 0.9 and 0.1",
    ),
    ("Adagrad", {"lr_decay": -1}, r"lr_decay in \[0, inf\], got -1"),
    ("Adagrad", {"eps": -1e-8}, r"eps in \[0, inf\], got -1e-08"),
    ("Adagrad", {"initial_accumulator_value": -1}, r"initial_accumulator_value in \[0, inf\], got"),
    ("RMSprop", {"alpha": -1}, r"alpha in \[0, inf\], got -1"),
    ("RMSprop", {"momentum": -1}, r"momentum in \[0, inf\], got -1"),
    ("Adam", {"eps": -1}, r"eps in \[0, inf\], got -1"),
    ("Adam", {"betas": (1.0, 0.9)}, r"betas\[0\] in \[0, 1\), got 1.0"),
    ("AdamW", {"betas": (0.9, -0.1)}, r"betas\[1\] in \[0, 1\), got -0.1"),
    ("AdamW", {"weight_decay": -1}, r"weight_decay in \[0, inf\], got -1"),
    ("AdaHessian", {"hessian_power": 0}, r"hessian_power in \(0, 1\], got 0"),
    ("AdaHessian", {"hessian_power": 1.5}, r"hessian_power in \(0, 1\], got 1.5"),
    ("AdaHessian", {"betas": (0.9, 1)}, r"betas\[1\] in \[0, 1\), got 1"),
    ("AdaHessian", {"lr": -1}, r"lr in \[0, inf\], got -1"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=lambda v: str(v)[:45])
def test_an_option_outside_its_range_is_refused(name, options, message):
    if name == "AdaHessian":
        options = options | {"generator": torch.Generator()}
    with pytest.raises(ValueError, match=rf"^{name}: expected {message}"):
        getattr(optimizers, name)([torch.zeros(1, requires_grad=True)], **options)


# ---- AdaHessian ----


def dominant(n=4, dtype=torch.float64):
    """A symmetric matrix whose diagonal outweighs the rest of each row."""
    a = torch.rand(n, n, generator=train.generator(0, "matrix"), dtype=torch.float64) - 0.5
    return ((a + a.T) / 2 + torch.diag(torch.arange(2.0, 2 + n))).to(dtype)


def ada_hessian(params, **options):
    return optimizers.AdaHessian(params, generator=train.generator(0, "probes"), **options)


@pytest.mark.covers("O9")
def test_adahessian_s_first_step_ends_at_the_minimum_of_a_diagonal_quadratic(device, dtype):
    """It divides every curvature out, where SGD at the same rate would leave or crawl."""
    h = torch.tensor([1e-2, 1.0, 300.0], device=device, dtype=dtype)
    w = torch.tensor([5.0, -3.0, 2.0], device=device, dtype=dtype, requires_grad=True)
    loss = ada_hessian([w], lr=1.0, eps=0.0).step(lambda: 0.5 * (h * (w - 1) ** 2).sum())
    assert loss.item() == pytest.approx(0.5 * (0.16 + 16 + 300))
    assert not loss.requires_grad
    torch.testing.assert_close(w.detach(), torch.ones_like(w), rtol=0, atol=20 * tolerance(dtype))


@pytest.mark.covers("O9")
def test_the_probed_diagonal_is_the_hessian_s_in_the_mean():
    """Off-diagonal entries are noise of mean 0; in the mean square they stay, as row norms."""
    h, w = dominant(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = ada_hessian([w], lr=0.0, betas=(0.0, 0.0))
    squares = torch.zeros(1000, 4, dtype=torch.float64)
    for row in squares:
        optimizer.step(lambda: 0.5 * w @ h @ w)
        row += optimizer.state[w]["exp_hessian_diag_sq"]
    draws = squares.sqrt()  # all positive, since the diagonal dominates
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - h.diagonal()).abs() < 4 * error).all()
    error = squares.std(0) / len(squares) ** 0.5
    assert ((squares.mean(0) - h.square().sum(0)).abs() < 4 * error).all()
    assert (error < 0.2).all()


@pytest.mark.covers("O9")
def test_filters_share_the_mean_size_of_their_diagonal():
    found = {}
    for average in BOTH:
        conv = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        for p in conv.parameters():
            p.data.uniform_(-1, 1, generator=train.generator(0, "init"))
        x = torch.randn(4, 2, 6, 6, generator=train.generator(0, "x"), dtype=torch.float64)
        optimizer = ada_hessian(conv.parameters(), spatial_average=average)
        optimizer.step(lambda conv=conv, x=x: conv(x).tanh().square().mean())
        squares = [optimizer.state[p]["exp_hessian_diag_sq"] for p in conv.parameters()]
        found[average] = [(s / (1 - 0.999)).sqrt() for s in squares]
    means = found[False][0].mean(dim=(2, 3), keepdim=True).expand(3, 2, 3, 3)
    torch.testing.assert_close(found[True][0], means)
    torch.testing.assert_close(found[True][1], found[False][1])  # a bias has no positions
    assert (found[False][0] - means).abs().max() > 1e-4


@pytest.mark.covers("O9")
def test_adahessian_with_the_gradient_for_a_diagonal_is_adam(device, dtype):
    grads = gradients(device=device, dtype=dtype)
    options = {"betas": (0.8, 0.9), "eps": 1e-4}
    own = lambda w, g, state: optimizers.adahessian_update(w, g, state, g, **options)
    assert torch.equal(walk(own, grads), walk(optimizers.adam_update, grads, **options))
    own = lambda w, g, state: optimizers.adahessian_update(
        w, g, state, g, **options, weight_decay=0.1
    )
    decayed = torch_walk("AdamW", grads, **options, weight_decay=0.1)
    assert (walk(own, grads) - decayed).abs().max() < tolerance(dtype)


def test_hessian_power_says_how_much_curvature_is_divided_out():
    g, d = torch.tensor([2.0, 2.0]), torch.tensor([4.0, 16.0])
    for power, expected in ((1.0, [0.5, 0.125]), (0.5, [1.0, 0.5])):
        got, _ = optimizers.adahessian_update(g, g, {}, d, eps=0.0, hessian_power=power)
        assert got.tolist() == pytest.approx(expected)


@pytest.mark.covers("O9")
def test_fit_hands_the_loss_to_an_optimizer_that_needs_it():
    """The same to the last bit as a loop by hand; `backward` is not called besides."""
    wine = data.load("wine").standardized()
    nets = [models.mlp([13, 8, 3], generator=train.generator(0, "init")) for _ in range(2)]
    options = {"batch_size": 32, "generator": train.generator(0, "data"), "device": "cpu"}
    history = train.fit(nets[0], wine, ada_hessian(nets[0].parameters(), lr=0.1), 4, **options)
    optimizer, order, losses = (
        ada_hessian(nets[1].parameters(), lr=0.1),
        train.generator(0, "data"),
        [],
    )
    x, y, _, _ = wine.tensors()
    for _ in range(4):
        for x_batch, y_batch in train.batches(x, y, 32, generator=order):
            closure = lambda x=x_batch, y=y_batch: cross_entropy(nets[1](x), y)
            losses.append(optimizer.step(closure).item())
    assert history.step_loss == losses
    assert difference(*nets) == 0
    assert history.train[-1].loss < 0.5 * losses[0]


def test_adahessian_asks_for_the_loss():
    w = torch.ones(1, requires_grad=True)
    message = r"^AdaHessian: expected step\(closure\) where closure returns the loss$"
    with pytest.raises(TypeError, match=message):
        ada_hessian([w]).step()


@pytest.mark.parametrize("bad", ["gradients", "curvatures"])
def test_adahessian_refuses_what_is_not_finite_and_changes_nothing(bad):
    w = [torch.ones(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    optimizer = ada_hessian([{"params": w[:1]}, {"params": w[1:]}])
    optimizer.step(lambda: sum(p.square().sum() for p in w))
    w[1].data.zero_()
    before = copy.deepcopy((w, optimizer.state_dict()))
    power = 0.5 if bad == "gradients" else 1.5  # slope or curvature of |w|^power is infinite at 0
    message = rf"^AdaHessian: expected finite {bad}, got 3 .* in parameter 1 of shape \(3,\)"
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: w[0].square().sum() + w[1].pow(power).sum())
    torch.testing.assert_close((w, optimizer.state_dict()), before, rtol=0, atol=0)


def test_adahessian_leaves_what_is_frozen_and_bears_what_is_unused_or_straight():
    """A frozen weight has no gradient, one that is unused or used linearly no curvature."""
    names = ("bent", "straight", "unused", "frozen")
    w = {name: torch.ones(2, requires_grad=name != "frozen") for name in names}
    optimizer = ada_hessian(w.values(), lr=0.1)
    optimizer.step(lambda: (w["bent"] ** 2 * w["frozen"] + w["straight"]).sum())
    assert w["frozen"].tolist() == w["unused"].tolist() == [1, 1]
    assert w["bent"].tolist() == pytest.approx([0.9, 0.9], abs=1e-4)
    assert (w["straight"] < 0).all()  # no curvature: a long step, of lr / eps


# ---- Newton ----


@pytest.mark.covers("O4")
@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=20)
def test_one_newton_step_ends_at_the_stationary_point_of_a_quadratic(seed, n):
    g = train.generator(seed, "matrix")
    a, w, star = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, n), (n,), (n,)))
    h = a @ a.T + torch.eye(n, dtype=torch.float64)
    step = optimizers.newton_step(h @ (w - star), h)
    torch.testing.assert_close(w + step, star, rtol=1e-9, atol=1e-9)


@pytest.mark.covers("O4")
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_newton_s_step_is_scipy_s_solution(damping, device, dtype):
    h = dominant(5, dtype).to(device)
    g = gradients((5,), device=device, dtype=dtype)[0]
    got = optimizers.newton_step(g, h, damping=damping)
    damped = h.cpu().numpy() + damping * np.eye(5, dtype=h.cpu().numpy().dtype)
    wanted = scipy.linalg.solve(damped, -g.cpu().numpy())
    np.testing.assert_allclose(got.cpu(), wanted, rtol=100 * tolerance(dtype))


@pytest.mark.covers("O4")
def test_newton_climbs_to_a_saddle_and_damping_turns_the_step_downhill():
    h, g = torch.diag(torch.tensor([2.0, -1.0])), torch.tensor([2.0, -1.0])
    assert optimizers.newton_step(g, h).tolist() == [-1, -1]
    assert (
        g @ optimizers.newton_step(g, h)
        < 0
        < (g * torch.tensor([0.0, 1.0])) @ (optimizers.newton_step(g, h))
    )
    assert optimizers.newton_step(g, h, damping=2.0).tolist() == [-0.5, 1]
    far = optimizers.newton_step(g, h, damping=1e6)
    torch.testing.assert_close(far, -g / 1e6, rtol=1e-5, atol=0)


def test_damped_newton_takes_a_share_of_the_way_each_time():
    h, w = dominant(), torch.ones(4, dtype=torch.float64)
    for step in range(1, 6):
        w = w + 0.5 * optimizers.newton_step(h @ w, h)
        torch.testing.assert_close(w, torch.full_like(w, 0.5**step))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("grad", "hessian", "damping", "message"),
    [
        ([1.0], [[0.0]], 0.0, r"an invertible hessian, got a singular one with damping 0.0; a"),
        ([1.0, 1.0], [[1.0, 0.0], [0.0, -2.0]], 2.0, r"an invertible hessian, got a singular one"),
        ([1.0, 1.0], [[1.0]], 0.0, r"hessian of shape \(2, 2\), got \(1, 1\)"),
        ([[1.0]], [[1.0]], 0.0, r"grad of shape \(n,\), got \(1, 1\)"),
        ([1.0], [[1.0]], -1.0, r"damping in \[0, inf\], got -1.0"),
        ([math.nan], [[1.0]], 0.0, r"grad finite, got 1 values that are not"),
        ([1.0], [[math.inf]], 0.0, r"hessian finite, got 1 values that are not"),
    ],
)
def test_newton_step_refuses(grad, hessian, damping, message):
    with pytest.raises(ValueError, match=f"^newton_step: expected {message}"):
        optimizers.newton_step(torch.tensor(grad), torch.tensor(hessian), damping=damping)


# ---- random coordinate descent ----


@pytest.mark.covers("O2")
def test_coordinate_descent_solves_a_linear_system(device, dtype):
    h = dominant(5, dtype).to(device)
    b = gradients((5,), device=device, dtype=dtype)[0]
    w = torch.ones(5, device=device, dtype=dtype)
    got = optimizers.random_coordinate_descent(
        lambda w, i: h[i] @ w - b[i], w, h.diagonal(), steps=300, generator=train.generator(0, "i")
    )
    torch.testing.assert_close(
        got, torch.linalg.solve(h, b), rtol=100 * tolerance(dtype), atol=tolerance(dtype)
    )
    assert (w == 1).all()


@pytest.mark.covers("O2")
def test_coordinates_come_in_proportion_to_their_curvature():
    h, seen = torch.tensor([1.0, 2.0, 5.0]), []
    optimizers.random_coordinate_descent(
        lambda w, i: seen.append(i) or h[i] * w[i],
        *(torch.ones(3), h),
        steps=4000,
        generator=train.generator(0, "i"),
    )
    shares = np.bincount(seen, minlength=3) / 4000
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)  # four standard deviations


@pytest.mark.covers("O2")
@pytest.mark.parametrize("shape", ["dense", "diagonal"])
def test_a_step_contracts_the_excess_as_the_theorem_says(shape):
    """In the mean by at most 1 − λ_min / tr H; exactly so along a diagonal's flattest axis."""
    h = dominant() if shape == "dense" else torch.diag(torch.tensor([1.0, 2.0, 5.0]).double())
    values, vectors = torch.linalg.eigh(h)
    w = vectors[:, 0]
    ratios = torch.zeros(400, dtype=torch.float64)
    for seed in range(400):
        end = optimizers.random_coordinate_descent(
            lambda w, i: h[i] @ w, w, h.diagonal(), steps=1, generator=train.generator(seed, "i")
        )
        ratios[seed] = (end @ h @ end) / (w @ h @ w)
    bound = 1 - values[0] / h.trace()
    error = 4 * ratios.std() / 20
    assert ratios.mean() <= bound + error
    if shape == "diagonal":
        assert abs(ratios.mean() - bound) <= error
    assert error < 0.1


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("lipschitz", "steps", "message"),
    [
        ([1.0], 5, r"lipschitz of shape \(2,\), got \(1,\)"),
        ([1.0, 0.0], 5, r"lipschitz positive and finite, got 0.0"),
        ([1.0, 1.0], 0, r"steps of at least 1, got 0"),
    ],
)
def test_coordinate_descent_refuses(lipschitz, steps, message):
    with pytest.raises(ValueError, match=f"^random_coordinate_descent: expected {message}"):
        optimizers.random_coordinate_descent(
            *(lambda w, i: w[i], torch.ones(2), torch.tensor(lipschitz)),
            steps=steps,
            generator=torch.Generator(),
        )


# ---- schedules ----


def rates(make, steps=12):
    """Learning rates that a scheduler sets, from 0.4 on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule, got = make(optimizer), []
    for _ in range(steps):
        got.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return got


@pytest.mark.covers("O7")
@pytest.mark.parametrize(
    ("factor", "theirs"),
    [
        (optimizers.step_decay(3, 0.5), lambda o: lr_scheduler.StepLR(o, 3, 0.5)),
        (optimizers.step_decay(4), lambda o: lr_scheduler.StepLR(o, 4)),
        (optimizers.exponential_decay(0.8), lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
        (optimizers.cosine(11), lambda o: lr_scheduler.CosineAnnealingLR(o, 11)),
        (optimizers.cosine(20, 0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, 20, 0.04)),
        (optimizers.warmup(5), lambda o: lr_scheduler.LinearLR(o, 1 / 5, total_iters=4)),
        (optimizers.warmup(1), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    ],
)
def test_schedules_are_those_of_torch(factor, theirs):
    ours = rates(lambda o: lr_scheduler.LambdaLR(o, factor))
    assert ours == pytest.approx(rates(theirs), rel=1e-12, abs=1e-15)


@pytest.mark.covers("O7")
def test_after_the_warm_up_the_next_schedule_begins_at_its_start():
    factor = optimizers.warmup(4, then=optimizers.cosine(8))
    assert [factor(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [factor(s + 4) for s in range(12)] == [optimizers.cosine(8)(s) for s in range(12)]


def test_a_cosine_stays_at_its_end():
    """Torch's would climb again."""
    assert [optimizers.cosine(4, 0.25)(s) for s in (4, 5, 8, 100)] == [0.25] * 4


@pytest.mark.covers("O1")
def test_the_discounted_step_has_a_bounded_way():
    """With factors γ^s a constant slope leads at most lr / (1 − γ) far."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = optimizers.SGD([w], lr=0.1)
    schedule = lr_scheduler.LambdaLR(optimizer, optimizers.exponential_decay(0.9))
    for _ in range(400):
        w.grad = -torch.ones_like(w)
        optimizer.step()
        schedule.step()
    assert w.item() == pytest.approx(0.1 / (1 - 0.9), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.step_decay(0), "step_decay: expected every of at least 1, got 0"),
        (lambda: optimizers.step_decay(2, 1.5), r"step_decay: expected gamma in \[0, 1\], got 1.5"),
        (
            lambda: optimizers.exponential_decay(-1.0),
            r"exponential_decay: expected gamma in \[0, 1",
        ),
        (lambda: optimizers.cosine(0), "cosine: expected steps of at least 1, got 0"),
        (lambda: optimizers.cosine(5, 2.0), r"cosine: expected final in \[0, 1\], got 2.0"),
        (lambda: optimizers.warmup(0), "warmup: expected steps of at least 1, got 0"),
    ],
)
def test_schedules_refuse(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


# ---- the gradient noise scale ----


@pytest.mark.covers("O8")
def test_the_noise_scale_computed_by_hand():
    """Means 2 and (0, 4); variances 1 and (4, 1): 6 over 20."""
    grads = [torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0, 5.0], [-2.0, 3.0]])]
    assert optimizers.gradient_noise_scale(grads) == pytest.approx(6 / 20)
    assert optimizers.gradient_noise_scale(iter(grads)) == pytest.approx(6 / 20)
    assert optimizers.gradient_noise_scale([torch.tensor([[1.0], [-1.0]])]) == math.inf
    assert optimizers.gradient_noise_scale([torch.ones(3, 2)]) == 0


@pytest.mark.covers("O8")
def test_the_noise_scale_is_that_of_numpy_s_covariance_matrix(device, dtype):
    net = network(device, dtype)
    grads = curvature.per_sample_grads(
        net, cross_entropy, X[:100].to(device, dtype), Y[:100].to(device)
    )
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1).double().cpu().numpy()
    wanted = rows.var(axis=0).sum() / (rows.mean(axis=0) ** 2).sum()
    assert wanted > 1
    got = optimizers.gradient_noise_scale(grads)
    assert got == pytest.approx(wanted, rel=100 * tolerance(dtype))


@pytest.mark.covers("O8")
@given(st.floats(-100, 100).filter(lambda c: abs(c) > 0.01))
@settings(max_examples=20)
def test_the_noise_scale_does_not_depend_on_the_units_of_the_loss(factor):
    grads = gradients((7, 3), steps=2)
    assert optimizers.gradient_noise_scale([factor * g for g in grads]) == pytest.approx(
        optimizers.gradient_noise_scale(grads)
    )


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.ones(1, 3)], "number of examples of at least 2, got 1"),
        ([], "number of examples of at least 2, got 0"),
        ([torch.ones(4, 3), torch.ones(5, 3)], r"grads of shape \(4, \.\.\.\), got \(5, 3\)"),
    ],
)
def test_the_noise_scale_refuses(grads, message):
    with pytest.raises(ValueError, match=f"^gradient_noise_scale: expected {message}"):
        optimizers.gradient_noise_scale(grads)


# ---- stored records ----

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.covers("O5")
def test_the_stored_benchmark_keeps_the_promised_ratios():
    record = json.loads((ROOT / "benchmarks/results/optimizers.json").read_text())
    assert len(record["steps"]) == 11
    for name, of in record["steps"].items():
        assert of["ratio"] == pytest.approx(of["ours"] / of["torch"])
        assert of["ratio"] <= 1.1, name
    top = record["top_eigenvalue"]
    assert top["parameters"] == 64 * 32 + 32 + 32 * 10 + 10
    assert top["relative_error"] < 0.01
    assert top["full_over_top"] >= 20
    assert top["torch_over_top"] >= 20


@pytest.mark.covers("O9")
def test_each_second_order_method_ran_at_the_setting_that_the_rule_chooses():
    record = experiment.stored("optimizers/second_order")
    assert not set(record.seeds) & set(record.config["tuning_seeds"])
    for name, chosen in record.config["settings"].items():
        sweep = record.config["sweeps"][name]
        best = min(sweep, key=lambda one: (sum(one["train_loss"]), one["lr"]))
        for key in ("lr", "damping"):
            assert best[key] == chosen[key], name
            tried = {one[key] for one in sweep}
            assert chosen[key] is None or min(tried) < chosen[key] < max(tried), name
        assert np.shape(record.values[f"{name}/train_loss"]) == (5, record.config["epochs"])


# ---- what holds for all ----


def test_no_global_random_state_moves():
    before = torch.get_rng_state()
    np_before = np.random.get_state()[1].tolist()  # noqa: NPY002
    for name, lr, options in ONE_EACH:
        net = network()
        learn(net, getattr(optimizers, name)(net.parameters(), lr=lr, **options), 2)
    w = torch.ones(3, requires_grad=True)
    ada_hessian([w]).step(lambda: (w**2).sum())
    optimizers.random_coordinate_descent(
        *(lambda w, i: w[i], torch.ones(3), torch.ones(3)), steps=3, generator=torch.Generator()
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == np_before  # noqa: NPY002
