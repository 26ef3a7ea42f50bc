"""Dropout: its law, the ensemble it averages, and what it is on a linear model."""

import copy
import itertools
import math
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import data, dropout, experiment, models, train

probabilities = st.floats(0, 0.9)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3)
BAD_P = [-0.1, 1.0, 1.5, math.nan, math.inf]


def stream(seed=0, name="dropout"):
    return train.generator(seed, name)


def normal(*shape, seed=0, name="x", dtype=torch.float64):
    return torch.randn(shape, generator=train.generator(seed, name), dtype=dtype)


def two_layer_net(p, *, seed=0, hidden=4):
    """Dropout before each of two linear layers; small enough for all its thinned networks."""
    first, relu, last = models.mlp([hidden, hidden, 3], generator=train.generator(seed, "init"))
    masks = stream(seed)
    net = nn.Sequential(
        *(dropout.Dropout(p, generator=masks), first, relu),
        *(dropout.Dropout(p, generator=masks), last),
    )
    return net.double()


def thinned_outputs(net, x, p):
    """Outputs and probability of every thinned network of `two_layer_net`."""
    _, first, relu, _, last = net
    masks = dropout.all_masks(x.shape[1])
    pairs = list(itertools.product(masks, masks))
    outputs = [last(relu(first(x * a / (1 - p))) * b / (1 - p)) for a, b in pairs]
    likely = dropout.mask_probabilities(torch.stack([torch.cat(pair) for pair in pairs]), p)
    return torch.stack(outputs).detach(), likely


# ---- the law of one mask ----


@pytest.mark.covers("D1")
@given(probabilities, shapes, st.integers(0, 10**6))
@settings(max_examples=40)
def test_dropout_keeps_the_mean_and_divides_the_second_moment_by_the_share_kept(p, shape, seed):
    x, draws = 1 + normal(*shape, seed=seed).abs(), 4000
    got = dropout.dropout(x.expand(draws, *shape), p, generator=stream(seed))
    error_of_mean = x * math.sqrt(p / (1 - p) / draws)
    error_of_square = x**2 * math.sqrt(p / (1 - p) ** 3 / draws)
    assert ((got.mean(0) - x).abs() <= 6 * error_of_mean + 1e-12).all()
    assert (((got**2).mean(0) - x**2 / (1 - p)).abs() <= 6 * error_of_square + 1e-12).all()


@given(probabilities, st.integers(1, 6))
@settings(max_examples=30)
def test_both_moments_are_exact_over_all_masks(p, n):
    x, masks = normal(n), dropout.all_masks(n)
    likely, thinned = dropout.mask_probabilities(masks, p), x * masks / (1 - p)
    torch.testing.assert_close(likely @ thinned, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(likely @ thinned**2, x**2 / (1 - p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "factor"), [("no scale", 1.0), ("share kept", 0.75), ("share dropped", 1 / 0.25)]
)
def test_another_scale_does_not_keep_the_mean(name, factor):
    kept = dropout.dropout(torch.ones(40_000), 0.25, generator=stream()) != 0
    assert abs((kept * factor).mean(dtype=torch.float64) - 1) > 0.2, name
    assert abs((kept / 0.75).mean(dtype=torch.float64) - 1) < 0.02


def test_an_entry_is_dropped_or_scaled_and_nothing_else(device, dtype):
    x = normal(50, 40, dtype=dtype).to(device)
    got = dropout.dropout(x, 0.3, generator=stream())
    dropped = got == 0
    assert got.dtype == dtype
    assert got.device == x.device
    torch.testing.assert_close(got[~dropped], x[~dropped] / 0.7)
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_scale_and_law_are_those_of_torch(device, dtype, p):
    n = 40_000
    x = torch.ones(n, dtype=dtype, device=device, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = nn.functional.dropout(x, p)
    ours = dropout.dropout(x, p, generator=stream())
    torch.testing.assert_close(ours.unique(), theirs.unique())
    counts = [[(y == 0).sum().item(), (y != 0).sum().item()] for y in (ours, theirs)]
    assert stats.chi2_contingency(counts).pvalue > 1e-4
    for y in (ours, theirs):
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(slope, y)  # with x = 1 the mask and its scale are the derivative


def test_each_example_and_each_unit_has_a_bit_of_its_own():
    kept = (dropout.dropout(torch.ones(4000, 10), 0.5, generator=stream()) != 0).double()
    for axis, other in ((0, 1), (1, 0)):
        n = kept.shape[axis]
        variance = kept.sum(axis).var().item()  # n p (1 - p) if bits are independent
        error = 0.25 * n * math.sqrt(2 / (kept.shape[other] - 1))
        assert variance == pytest.approx(0.25 * n, abs=5 * error)
    correlation = torch.corrcoef(kept.T) - torch.eye(10)
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_the_gradient_goes_through_the_same_mask(dtype):
    x = normal(6, 5, dtype=dtype).requires_grad_()
    upstream = normal(6, 5, name="upstream", dtype=dtype)
    y = dropout.dropout(x, 0.4, generator=stream())
    (got,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(got, upstream * (y.detach() != 0) / 0.6)


def test_finite_differences_agree_when_the_mask_is_drawn_again_from_the_same_state():
    x = normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout.dropout(x, 0.5, generator=stream()).exp(), x)


def test_one_generator_gives_one_mask_in_both_precisions_and_a_new_one_at_the_next_call():
    x, g = torch.ones(200), stream()
    first, second = (dropout.dropout(x, 0.5, generator=g) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, dropout.dropout(x, 0.5, generator=stream()))
    assert torch.equal(first, dropout.dropout(x.double(), 0.5, generator=stream()).float())


def test_no_global_random_state_moves():
    before = torch.get_rng_state()
    net = two_layer_net(0.5)
    net(normal(2, 4))
    dropout.mc_predict(net, normal(2, 4), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_with_p_zero_nothing_is_drawn_and_nothing_changes():
    x, g = normal(3), stream()
    state = g.get_state()
    assert dropout.dropout(x, 0.0, generator=g) is x
    assert torch.equal(state, g.get_state())


def test_an_empty_batch_stays_empty():
    assert dropout.dropout(torch.empty(0, 3), 0.5, generator=stream()).shape == (0, 3)


@pytest.mark.parametrize("p", BAD_P)
def test_p_outside_its_range_is_refused_by_every_function(p):
    x, w, masks = normal(4, 3), normal(3), dropout.all_masks(3)
    calls = {
        "dropout": lambda: dropout.dropout(x, p, generator=stream()),
        "Dropout": lambda: dropout.Dropout(p, generator=stream()),
        "mask_probabilities": lambda: dropout.mask_probabilities(masks, p),
        "linear_dropout_penalty": lambda: dropout.linear_dropout_penalty(x, w, p),
        "linear_dropout_minimizer": lambda: dropout.linear_dropout_minimizer(x, x[:, 0], p),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected p in \[0, 1\), got {p}$"):
            call()


@pytest.mark.usefixtures("unchecked_shapes")
def test_integers_are_refused():
    expected = r"^dropout: expected x in floating point, got torch.int64$"
    with pytest.raises(TypeError, match=expected):
        dropout.dropout(torch.arange(3), 0.5, generator=stream())


# ---- the layer ----


def test_the_layer_drops_in_training_and_does_nothing_in_evaluation():
    layer, x = dropout.Dropout(0.5, generator=stream()), normal(100)
    assert torch.equal(layer(x), dropout.dropout(x, 0.5, generator=stream()))
    assert layer.eval()(x) is x
    assert (layer.train()(x) == 0).any()


def test_the_layer_has_no_state_to_save_and_says_its_p():
    layer = dropout.Dropout(0.25, generator=stream())
    assert repr(layer) == "Dropout(p=0.25)"
    assert not layer.state_dict()
    assert dropout.Dropout(generator=stream()).p == nn.Dropout().p


def test_a_copy_of_the_layer_draws_the_same_masks_without_moving_the_original():
    layer, x = dropout.Dropout(0.5, generator=stream()), torch.ones(50)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.covers("D1")
def test_evaluation_is_the_exact_mean_of_the_next_layer_over_all_masks():
    p, (w, b), x = 0.3, (normal(2, 6, name="w"), normal(2, name="b")), normal(5, 6)
    masks = dropout.all_masks(6)
    outputs = (x * masks[:, None] / (1 - p)) @ w.T + b  # (masks, batch, outputs)
    mean = torch.einsum("m,mbo->bo", dropout.mask_probabilities(masks, p), outputs)
    torch.testing.assert_close(mean, x @ w.T + b, rtol=1e-12, atol=1e-12)
    unscaled = torch.einsum("m,mbo->bo", dropout.mask_probabilities(masks, p), (1 - p) * outputs)
    assert (unscaled - x @ w.T - b).abs().max() > 0.1  # scaling in neither place


def test_weight_scaling_and_inverted_dropout_are_one_network_at_two_learning_rates():
    """Weights u = w / (1 - p) under unscaled masks, and a step of η (1 - p)² against η."""
    p, lr, x, y = 0.4, 0.1, normal(8, 5), torch.arange(8) % 3
    start, masks = normal(3, 5, name="w"), stream()
    inverted, plain = start.clone().requires_grad_(), (start / (1 - p)).requires_grad_()
    for _ in range(5):
        scaled = dropout.dropout(x, p, generator=masks)
        masked = x * (scaled != 0)
        for w, seen, step in ((inverted, scaled, (1 - p) ** 2 * lr), (plain, masked, lr)):
            (slope,) = torch.autograd.grad(cross_entropy(seen @ w.T, y), w)
            with torch.no_grad():
                w -= step * slope
    torch.testing.assert_close(inverted, (1 - p) * plain)


# ---- all thinned networks ----


def test_all_masks_are_all_subsets_in_the_order_of_binary_numbers():
    masks = dropout.all_masks(5)
    expected = [bits[::-1] for bits in itertools.product([False, True], repeat=5)]
    assert [tuple(row) for row in masks.tolist()] == expected
    assert masks.dtype == torch.bool
    assert dropout.all_masks(1).tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, r"all_masks: expected n of at least 1, got 0"),
        (21, ValueError, r"all_masks: expected n of at most 20, as it makes 2\^n masks, got 21"),
        (2.0, TypeError, r"all_masks: expected n as an integer, got 2.0"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_number_of_units_that_cannot_be_enumerated_is_refused(n, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        dropout.all_masks(n)


@given(probabilities, st.integers(1, 10))
@settings(max_examples=30)
def test_mask_probabilities_are_binomial_in_the_number_kept(p, n):
    masks = dropout.all_masks(n)
    likely = dropout.mask_probabilities(masks, p)
    assert likely.sum().item() == pytest.approx(1, abs=1e-12)
    by_count = torch.zeros(n + 1, dtype=torch.float64).index_add(0, masks.sum(1), likely)
    np.testing.assert_allclose(by_count, stats.binom.pmf(range(n + 1), n, 1 - p), atol=1e-12)


def test_mask_probabilities_are_the_frequencies_of_dropout():
    n, draws, p = 3, 40_000, 0.3
    kept = dropout.dropout(torch.ones(draws, n), p, generator=stream()) != 0
    counts = (kept * 2 ** torch.arange(n)).sum(1).bincount(minlength=2**n)
    expected = draws * dropout.mask_probabilities(dropout.all_masks(n), p)
    assert stats.chisquare(counts, expected).pvalue > 1e-4


# ---- the geometric mean ----


@pytest.mark.covers("D2")
@given(probabilities, st.integers(0, 10**6), st.floats(0.1, 5))
@settings(max_examples=30)
def test_weight_scaling_is_the_geometric_mean_of_all_1024_softmax_layers(p, seed, size):
    w, b = size * normal(4, 10, seed=seed, name="w"), normal(4, seed=seed, name="b")
    x, masks = normal(3, 10, seed=seed), dropout.all_masks(10)
    likely = dropout.mask_probabilities(masks, p)
    outputs = (x * masks[:, None]) @ w.T + b  # the paper's: no scale while training
    ensemble = dropout.geometric_mean_probabilities(outputs, likely)
    closed_form = (x @ ((1 - p) * w).T + b).softmax(dim=1)
    torch.testing.assert_close(ensemble, closed_form, rtol=0, atol=1e-10)


def test_neither_the_arithmetic_mean_nor_unscaled_weights_are_the_geometric_mean():
    w, b, x = normal(4, 10, name="w"), normal(4, name="b"), normal(3, 10)
    masks = dropout.all_masks(10)
    outputs = (x * masks[:, None]) @ w.T + b
    geometric = dropout.geometric_mean_probabilities(outputs)
    assert (outputs.softmax(-1).mean(0) - geometric).abs().max() > 0.01
    assert ((x @ w.T + b).softmax(-1) - geometric).abs().max() > 0.01
    scaled_bias = (x @ w.T / 2 + b / 2).softmax(-1)  # a bias is never dropped: it keeps its size
    assert (scaled_bias - geometric).abs().max() > 0.01


@pytest.mark.covers("D2")
def test_in_a_deeper_net_weight_scaling_is_only_near():
    p, x = 0.5, 2 * normal(8, 4)
    net = two_layer_net(p, seed=1)
    outputs, likely = thinned_outputs(net, x, p)
    gap = dropout.geometric_mean_probabilities(outputs, likely) - net.eval()(x).softmax(1)
    assert 1e-3 < gap.abs().max() < 0.2


def test_the_geometric_mean_is_that_of_scipy(dtype):
    logits, weights = normal(6, 4, 3, dtype=dtype), torch.arange(1.0, 7) / 21
    each = logits.softmax(-1).numpy()
    mean = stats.gmean(each, weights=np.broadcast_to(weights[:, None, None], each.shape), axis=0)
    got = dropout.geometric_mean_probabilities(logits, weights)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, mean / mean.sum(1, keepdims=True), rtol=1e-5)


def test_a_geometric_mean_computed_by_hand():
    """√(0.9 · 0.5) is to √(0.1 · 0.5) as 3 to 1."""
    probabilities = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]], dtype=torch.float64)
    got = dropout.geometric_mean_probabilities(probabilities.log())
    torch.testing.assert_close(got, torch.tensor([[0.75, 0.25]], dtype=torch.float64))


def test_the_geometric_mean_does_not_see_a_shift_of_a_members_outputs_and_survives_large_ones():
    logits = 300 * normal(5, 4, 3)
    got = dropout.geometric_mean_probabilities(logits)
    shifted = dropout.geometric_mean_probabilities(logits + normal(5, 4, 1, name="shift"))
    torch.testing.assert_close(got, shifted)
    torch.testing.assert_close(got.sum(1), torch.ones(4).double())
    torch.testing.assert_close(
        dropout.geometric_mean_probabilities(logits[:1]), logits[0].softmax(-1)
    )


@pytest.mark.parametrize(
    ("shape", "weights", "message"),
    [
        ((2, 3), None, r"expected logits of shape \(members, batch, classes\), got \(2, 3\)"),
        ((0, 3, 2), None, "expected at least one member, got none"),
        ((2, 3, 2), [1.0], r"expected weights of shape \(2,\), got \(1,\)"),
        ((2, 3, 2), [0.5, 0.6], "expected weights not negative with sum 1, got sum 1.1"),
        ((2, 3, 2), [1.5, -0.5], "expected weights not negative with sum 1, got sum 1"),
        ((2, 3, 2), [math.nan, 1.0], "expected weights not negative with sum 1, got sum nan"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_no_ensemble_is_refused(shape, weights, message):
    weights = None if weights is None else torch.tensor(weights)
    with pytest.raises(ValueError, match=f"^geometric_mean_probabilities: {message}$"):
        dropout.geometric_mean_probabilities(torch.zeros(shape), weights)


# ---- training thinned networks ----


@pytest.mark.covers("D2")
def test_backpropagation_trains_the_thinned_network_that_was_drawn_and_leaves_the_rest():
    p, x, y = 0.5, normal(1, 4), torch.tensor([2])
    net = two_layer_net(p)
    _, first, relu, _, last = net
    masks = stream()  # the stream of the net, from its start
    a, b = (dropout.dropout(torch.ones(4), p, generator=masks) != 0 for _ in range(2))
    assert 0 < a.sum() < 4
    assert 0 < b.sum() < 4
    cross_entropy(net(x), y).backward()
    w1 = first.weight.detach()[b][:, a].clone().requires_grad_()
    w2 = last.weight.detach()[:, b].clone().requires_grad_()
    hidden = relu(x[:, a] / (1 - p) @ w1.T + first.bias.detach()[b])
    cross_entropy(hidden / (1 - p) @ w2.T + last.bias.detach(), y).backward()
    for whole, part, rows, columns in (
        (first.weight.grad, w1.grad, b, a),
        (last.weight.grad, w2.grad, torch.ones(3, dtype=torch.bool), b),
    ):
        inside = rows[:, None] & columns
        torch.testing.assert_close(whole[inside], part.flatten())
        assert (whole[~inside] == 0).all()


def test_the_gradient_of_a_batch_is_the_mean_over_its_examples_own_networks():
    p, x, y = 0.5, normal(6, 4), torch.arange(6) % 3
    net = two_layer_net(p)
    cross_entropy(net(x), y).backward()
    got = net[1].weight.grad.clone()
    _, first, relu, _, last = net
    masks = stream()
    a, b = (dropout.dropout(torch.ones(6, 4).double(), p, generator=masks) for _ in range(2))
    net.zero_grad()
    for i in range(6):
        out = last(relu(first(x[i : i + 1] * a[i])) * b[i])
        (cross_entropy(out, y[i : i + 1]) / 6).backward()
    torch.testing.assert_close(net[1].weight.grad, got)


# ---- Monte Carlo ----


@pytest.mark.covers("D2")
def test_the_monte_carlo_average_tends_to_the_exact_one_like_one_over_the_root():
    p, x = 0.5, 2 * normal(6, 4)
    net = two_layer_net(p, seed=1)
    outputs, likely = thinned_outputs(net, x, p)
    each = outputs.softmax(-1)
    exact = torch.einsum("m,mbc->bc", likely, each)
    sd = (torch.einsum("m,mbc->bc", likely, each**2) - exact**2).sqrt()
    sampled = dropout.mc_predict(net, x, 10_000).softmax(-1)
    assert ((sampled.mean(0) - exact).abs() < 5 * sd / math.sqrt(10_000)).all()
    groups = sampled.reshape(100, 100, *exact.shape).mean(1)
    measured = (groups - exact).square().mean(0).sqrt()
    torch.testing.assert_close(measured, sd / 10, rtol=0.35, atol=0)


def test_monte_carlo_prediction_switches_on_dropout_alone_and_leaves_every_mode_as_it_was():
    norm, frozen = nn.BatchNorm1d(4), dropout.Dropout(0.5, generator=stream(1))
    net = nn.Sequential(norm, frozen, dropout.Dropout(0.5, generator=stream()))
    frozen.eval()
    modes, running = [m.training for m in net.modules()], norm.running_mean.clone()
    got = dropout.mc_predict(net, 3 + normal(5, 4, dtype=torch.float32), 8)
    assert got.shape == (8, 5, 4)
    assert not got.requires_grad
    assert len({tuple(sample.flatten().tolist()) for sample in got}) == 8
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(norm.running_mean, running)


def test_modes_are_given_back_when_the_model_fails():
    net = two_layer_net(0.5).eval()
    with pytest.raises(RuntimeError):
        dropout.mc_predict(net, normal(2, 9), 3)
    assert not any(m.training for m in net.modules())


def test_with_p_zero_every_sample_is_the_prediction():
    net, x = two_layer_net(0.0), normal(2, 4)
    for sample in dropout.mc_predict(net, x, 3):
        torch.testing.assert_close(sample, net.eval()(x))


def test_monte_carlo_prediction_refuses_no_dropout_and_no_samples():
    expected = "^mc_predict: expected a model with coursekit.dropout.Dropout, got none$"
    with pytest.raises(ValueError, match=expected):
        dropout.mc_predict(nn.Sequential(nn.Dropout(0.5)), torch.ones(1, 1), 3)
    with pytest.raises(ValueError, match="^mc_predict: expected samples of at least 1, got 0$"):
        dropout.mc_predict(two_layer_net(0.5), normal(1, 4), 0)


# ---- entropies ----


@given(st.integers(1, 6), st.integers(2, 5), st.floats(0, 30), st.integers(0, 10**6))
@settings(max_examples=40)
def test_disagreement_is_between_zero_and_the_entropy_of_the_average(members, classes, size, seed):
    logits = size * normal(members, 7, classes, seed=seed)
    total, expected, mutual = dropout.entropy_decomposition(logits)
    assert (mutual > -1e-12).all()
    assert (mutual <= math.log(members) + 1e-12).all()
    assert (total <= math.log(classes) + 1e-12).all()
    torch.testing.assert_close(total, expected + mutual)


def test_entropies_are_those_of_scipy(dtype):
    logits = normal(5, 4, 3, dtype=dtype)
    got = dropout.entropy_decomposition(logits)
    each = logits.softmax(-1).numpy()
    np.testing.assert_allclose(got.total, stats.entropy(each.mean(0), axis=-1), rtol=1e-5)
    np.testing.assert_allclose(got.expected, stats.entropy(each, axis=-1).mean(0), rtol=1e-5)


@pytest.mark.covers("D4")
def test_members_that_agree_on_a_doubt_have_no_mutual_information_and_opposed_ones_only_that():
    agreed = torch.zeros(2, 1, 2, dtype=torch.float64)
    opposed = torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]], dtype=torch.float64)
    nats = [[h.item() for h in dropout.entropy_decomposition(v)] for v in (agreed, opposed)]
    assert nats[0] == pytest.approx([math.log(2), math.log(2), 0])
    assert nats[1] == pytest.approx([math.log(2), 0, math.log(2)])


@pytest.mark.usefixtures("unchecked_shapes")
def test_entropies_of_a_single_prediction_are_refused():
    expected = r"^entropy_decomposition: expected logits of shape \(members, batch, classes\), got"
    with pytest.raises(ValueError, match=expected):
        dropout.entropy_decomposition(torch.zeros(3, 2))


# ---- linear regression ----


def exact_dropout_loss(x, y, w, p):
    """Mean squared loss, averaged over every mask of every example."""
    masks = dropout.all_masks(x.shape[1])
    outputs = (x * masks[:, None] / (1 - p)) @ w  # (masks, n)
    return (dropout.mask_probabilities(masks, p) @ (y - outputs).square()).mean()


@pytest.mark.covers("D4")
@given(probabilities, st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6))
@settings(max_examples=40)
def test_the_loss_averaged_over_all_masks_is_the_penalized_loss(p, features, n, seed):
    x, y, w = (
        1 + normal(n, features, seed=seed),
        normal(n, seed=seed, name="y"),
        normal(features, seed=seed, name="w"),
    )
    plain = (y - x @ w).square().mean()
    penalized = plain + dropout.linear_dropout_penalty(x, w, p)
    torch.testing.assert_close(exact_dropout_loss(x, y, w, p), penalized, rtol=1e-10, atol=1e-10)


def test_a_penalty_without_the_second_moments_is_not_that_of_dropout():
    x, y, w = normal(50, 4) * torch.tensor([0.1, 1.0, 3.0, 10.0]), normal(50), normal(4, name="w")
    gap = exact_dropout_loss(x, y, w, 0.5) - (y - x @ w).square().mean()
    torch.testing.assert_close(dropout.linear_dropout_penalty(x, w, 0.5), gap)
    assert abs(w.square().sum() * x.square().mean() - gap) > 0.1 * gap  # ridge, one strength
    variance = (x.var(0, correction=0) * w**2).sum()
    shifted = x + 5  # the second moment is not the variance
    assert dropout.linear_dropout_penalty(shifted, w, 0.5) > 2 * variance


def test_the_penalty_is_what_sampled_masks_give(device, dtype):
    x, y, w = (
        t.to(device, dtype) for t in (normal(20, 5), normal(20, name="y"), normal(5, name="w"))
    )
    draws = dropout.dropout(x.expand(20_000, 20, 5), 0.3, generator=stream())
    losses = (y - draws @ w).square().mean(1)
    expected = (y - x @ w).square().mean() + dropout.linear_dropout_penalty(x, w, 0.3)
    assert abs(losses.mean() - expected) < 5 * losses.std() / math.sqrt(20_000)


def test_the_penalty_by_hand_and_its_gradient():
    x, w = torch.tensor([[3.0, 0.0], [1.0, 2.0]]).double(), torch.tensor([1.0, -2.0]).double()
    assert dropout.linear_dropout_penalty(x, w, 0.75).item() == 3 * (5 * 1 + 2 * 4)
    assert torch.autograd.gradcheck(
        lambda w: dropout.linear_dropout_penalty(x, w, 0.75), w.requires_grad_()
    )


@pytest.mark.covers("D4")
@given(probabilities, st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=30)
def test_the_minimizer_has_no_slope_in_the_exact_loss_and_neighbours_are_worse(p, features, seed):
    x, y = 1 + normal(12, features, seed=seed), normal(12, seed=seed, name="y")
    w = dropout.linear_dropout_minimizer(x, y, p).requires_grad_()
    loss = exact_dropout_loss(x, y, w, p)
    (slope,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(slope, torch.zeros_like(w), rtol=0, atol=1e-9)
    step = 0.01 * normal(features, seed=seed, name="step")
    assert exact_dropout_loss(x, y, w.detach() + step, p) > loss


def test_with_standardized_features_the_minimizer_is_ridge_regression_of_sklearn(dtype):
    split = data.load("diabetes").standardized()
    x, y = split.x_train, split.y_train - split.y_train.mean()
    n, p = len(x), 0.2
    ridge = Ridge(alpha=n * p / (1 - p), fit_intercept=False).fit(x, y)
    got = dropout.linear_dropout_minimizer(
        torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype), p
    )
    np.testing.assert_allclose(got, ridge.coef_, rtol=1e-3 if dtype == torch.float32 else 1e-9)


def test_without_dropout_the_minimizer_is_least_squares_even_where_features_repeat():
    x, y = normal(9, 4), normal(9, name="y")
    for a in (x, torch.cat([x, x[:, :1]], dim=1)):
        expected = np.linalg.lstsq(a.numpy(), y.numpy(), rcond=None)[0]
        np.testing.assert_allclose(dropout.linear_dropout_minimizer(a, y, 0.0), expected)


def test_the_units_of_a_feature_do_not_matter_to_the_prediction():
    """A ridge penalty shrinks a feature given in metres more than the same in millimetres."""
    x, y, units = normal(30, 3), normal(30, name="y"), torch.tensor([1.0, 1000.0, 0.01])
    w = dropout.linear_dropout_minimizer(x, y, 0.5)
    torch.testing.assert_close(dropout.linear_dropout_minimizer(x * units, y, 0.5), w / units)


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_do_not_fit_are_refused():
    x = normal(4, 3)
    with pytest.raises(
        ValueError, match=r"^linear_dropout_penalty: expected w of shape \(3,\), got \(4,\)$"
    ):
        dropout.linear_dropout_penalty(x, normal(4), 0.5)
    with pytest.raises(
        ValueError,
        match=r"^linear_dropout_penalty: expected x of shape \(n, features\), got \(3,\)$",
    ):
        dropout.linear_dropout_penalty(normal(3), normal(3), 0.5)
    with pytest.raises(
        ValueError, match=r"^linear_dropout_minimizer: expected y of shape \(4,\), got \(4, 1\)$"
    ):
        dropout.linear_dropout_minimizer(x, normal(4, 1), 0.5)


# ---- the studies ----


@pytest.fixture(scope="module")
def factorial():
    """The script of the study, as a dictionary of its names."""
    return runpy.run_path(str(ROOT / "experiments" / "dropout" / "factorial.py"))


@pytest.mark.covers("D3")
def test_each_cell_of_the_factorial_ran_at_the_setting_that_the_rule_chooses(factorial):
    record = experiment.stored("dropout/factorial")
    assert len(record.seeds) >= 5
    assert not set(record.seeds) & set(record.config["tuning_seeds"])
    assert set(record.config["cells"]) == {"/".join(cell) for cell in factorial["CELLS"]}
    for name, cell in record.config["cells"].items():
        sweep = {
            tuple(map(float, key.split(", "))): np.mean(accuracies)
            for key, accuracies in cell["held_out_accuracy"].items()
        }
        rate, radius = max(sorted(sweep), key=sweep.get)
        assert cell["lr"] == pytest.approx(rate, rel=0.01), name
        assert (cell["radius"] or math.inf) == radius, name
        rates = {lr for lr, _ in sweep}
        assert min(rates) < rate < max(rates), name


@pytest.mark.covers("D3")
def test_the_studys_bound_projects_incoming_weights_of_hidden_units_and_leaves_the_rest(factorial):
    net = factorial["network"](True, 0)
    linear = [module for module in net if isinstance(module, nn.Linear)]
    assert [m.p for m in net if isinstance(m, dropout.Dropout)] == list(factorial["DROP"])
    with torch.no_grad():
        linear[0].weight[0] *= 10
    before = [layer.weight.clone() for layer in linear]
    norms = before[0].norm(dim=1)
    factorial["project_"](net, 1.0)
    assert norms[0] > 1 > norms[1:].max()
    torch.testing.assert_close(linear[0].weight[0], before[0][0] / norms[0])
    torch.testing.assert_close(linear[0].weight[1:], before[0][1:])
    factorial["project_"](net, 0.1)
    torch.testing.assert_close(linear[1].weight.norm(dim=1), torch.full((256,), 0.1))
    assert torch.equal(linear[2].weight, before[2])


@pytest.mark.covers("D4")
def test_turned_digits_are_more_doubted_and_the_upright_ones_are_read():
    record = experiment.stored("dropout/rotated")
    angles = record.config["angles"]
    for name in ("softmax", "scaled", "sampled", "ensemble"):
        right, doubt = (np.mean(record.values[f"{name}/{k}"], 0) for k in ("accuracy", "entropy"))
        assert right[0] > 0.85 > 0.3 > right[angles.index(90)]
        assert doubt[angles.index(60)] > 1.5 * doubt[0]
    assert np.ptp(record.values["softmax/information"]) < 1e-6
    for kind, sweep in record.config["held_out_loss"].items():
        losses = {float(lr): np.mean(v) for lr, v in sweep.items()}
        best = min(losses, key=losses.get)
        assert best == pytest.approx(record.config["learning_rates"][kind], rel=0.01)
        assert min(losses) < best < max(losses)
