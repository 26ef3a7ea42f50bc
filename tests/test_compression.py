"""Compressed gradients: what is kept, what is right on average, what is late, what leaks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.parallelism.compression import (
    CountSketch,
    count_sketch,
    error_feedback,
    match_gradient,
    recover_input,
    top_k,
)

SEEDS = st.integers(0, 10**6)


def vector(seed, d=50, dtype=torch.float64):
    """A vector with entries of very different size."""
    g = train.generator(seed, "vector")
    return torch.randn(d, generator=g, dtype=dtype) * torch.logspace(0, -3, d, dtype=dtype)


# ---- the largest entries ----


@pytest.mark.covers("P6")
@given(seed=SEEDS, k=st.integers(1, 50))
def test_top_k_keeps_the_k_largest_and_nothing_else(seed, k):
    x = vector(seed)
    kept = top_k(x, k)
    largest = x.abs().sort(descending=True).values
    assert (kept != 0).sum() == k
    assert torch.equal(kept[kept != 0], x[kept != 0])
    assert kept[kept != 0].abs().min() == largest[k - 1]
    assert (x - kept).square().sum() <= (1 - k / 50) * x.square().sum()  # a contraction


def test_top_k_of_all_is_the_vector_and_no_argument_changes(device, dtype):
    x = vector(0, dtype=dtype).to(device)
    before = x.clone()
    assert torch.equal(top_k(x, 50), x)
    top_k(x, 3)
    assert torch.equal(x, before)
    assert top_k(x, 3).device == x.device


def test_top_k_is_not_linear_so_it_cannot_be_summed_on_the_way():
    a, b = torch.tensor([3.0, 2.0, 0.0]), torch.tensor([-3.0, 2.0, 0.0])
    assert not torch.equal(top_k(a + b, 1), top_k(a, 1) + top_k(b, 1))


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k of at least 1, got 0"),
        (4, ValueError, r"k in \[1, 3\], got 4"),
        (1.0, TypeError, "k as an integer, got 1.0"),
    ],
)
def test_top_k_refuses(k, error, message, unchecked_shapes):
    with pytest.raises(error, match=f"top_k: expected {message}"):
        top_k(torch.ones(3), k)


def test_top_k_refuses_a_matrix(unchecked_shapes):
    with pytest.raises(ValueError, match=r"top_k: expected x of shape \(d,\), got \(2, 3\)"):
        top_k(torch.ones(2, 3), 1)


# ---- sketches ----


@given(seed=SEEDS, size=st.integers(1, 60))
def test_a_sketch_is_the_matrix_that_it_says_it_is(seed, size):
    x = vector(seed)
    sketch = count_sketch(50, size, generator=train.generator(seed, "sketch"))
    S = sketch.matrix().double()
    assert S.shape == (size, 50)
    assert torch.equal(S.abs().sum(0), torch.ones(50))  # one entry in each column
    torch.testing.assert_close(sketch.compress(x), S @ x)
    torch.testing.assert_close(sketch.expand(sketch.compress(x)), S.T @ S @ x)


@given(seed=SEEDS)
def test_the_sketch_of_a_sum_is_the_sum_of_the_sketches(seed):
    x, y = vector(seed), vector(seed + 1)
    sketch = count_sketch(50, 7, generator=train.generator(seed, "sketch"))
    together = sketch.compress(x + 2 * y)
    torch.testing.assert_close(together, sketch.compress(x) + 2 * sketch.compress(y))


def every_sketch(d, size):
    """All sketches there are, each as likely as the other."""
    for buckets in itertools.product(range(size), repeat=d):
        for signs in itertools.product((-1, 1), repeat=d):
            yield CountSketch(torch.tensor(buckets), torch.tensor(signs), size)


@pytest.mark.covers("P6")
@pytest.mark.parametrize(("d", "size"), [(3, 2), (4, 2), (3, 3)])
def test_de_sketching_is_unbiased_and_has_the_variance_stated_over_all_sketches(d, size):
    x = vector(3, d)
    all_of_them = torch.stack([s.expand(s.compress(x)) for s in every_sketch(d, size)])
    torch.testing.assert_close(all_of_them.mean(0), x, rtol=0, atol=1e-12)
    stated = (x.square().sum() - x.square()) / size
    torch.testing.assert_close(all_of_them.var(0, correction=0), stated, rtol=0, atol=1e-12)


def test_without_signs_de_sketching_is_biased():
    x = vector(3, 3)
    plain = [CountSketch(s.bucket, s.sign.abs(), 2) for s in every_sketch(3, 2)]
    mean = torch.stack([s.expand(s.compress(x)) for s in plain]).mean(0)
    assert not torch.allclose(mean, x)
    torch.testing.assert_close(mean, x + (x.sum() - x) / 2)


def test_drawn_sketches_are_unbiased_and_repeatable():
    x, g = vector(1, 20), train.generator(0, "sketch")
    draws = [count_sketch(20, 5, generator=g) for _ in range(4000)]
    error = torch.stack([s.expand(s.compress(x)) for s in draws]).mean(0) - x
    assert error.abs().max() < 5 * x.norm() / math.sqrt(5 * 4000)
    again = count_sketch(20, 5, generator=train.generator(0, "sketch"))
    assert torch.equal(again.matrix(), draws[0].matrix())


def test_a_sketch_works_in_the_precision_of_what_it_is_given(device, dtype):
    sketch = count_sketch(50, 7, generator=train.generator(0, "sketch"), device=device)
    x = vector(0, dtype=dtype).to(device)
    back = sketch.expand(sketch.compress(x))
    assert back.dtype == dtype
    assert back.device == x.device


@pytest.mark.parametrize(("d", "size"), [(0, 1), (1, 0)])
def test_count_sketch_refuses(d, size):
    with pytest.raises(ValueError, match="count_sketch: expected .* of at least 1, got 0"):
        count_sketch(d, size, generator=train.generator(0, "sketch"))


def test_a_sketch_refuses_what_has_another_length():
    sketch = count_sketch(4, 2, generator=train.generator(0, "sketch"))
    with pytest.raises(ValueError, match=r"compress: expected x of shape \(4,\), got \(5,\)"):
        sketch.compress(torch.ones(5))
    with pytest.raises(ValueError, match=r"expand: expected y of shape \(2,\), got \(4,\)"):
        sketch.expand(torch.ones(4))


# ---- error feedback ----


@pytest.mark.covers("P6")
@given(seed=SEEDS, steps=st.integers(1, 8), k=st.integers(1, 50))
def test_with_error_feedback_nothing_is_lost_only_late(seed, steps, k):
    residual, sent, given_ = torch.zeros(50, dtype=torch.float64), 0.0, 0.0
    for step in range(steps):
        gradient = vector(seed + step)
        message, residual = error_feedback(gradient, residual, lambda x: top_k(x, k))
        sent, given_ = sent + message, given_ + gradient
    torch.testing.assert_close(sent + residual, given_, rtol=0, atol=1e-12)


def test_top_k_alone_stops_where_the_small_directions_are_left_and_feedback_goes_on():
    def walk(feedback):
        w, residual, g = torch.ones(2), torch.zeros(2), train.generator(0, "noise")
        for _ in range(3000):
            noise = 2.0 * torch.randint(2, (1,), generator=g) - 1
            gradient = torch.stack([0.1 * w[0] + noise[0], 0.01 * w[1]])
            message, left = error_feedback(gradient, residual, lambda x: top_k(x, 1))
            residual = left if feedback else residual
            w = w - 0.1 * message
        return w

    assert walk(feedback=False)[1] == 1  # never the larger entry
    assert abs(walk(feedback=True)[1]) < 0.3


def test_error_feedback_changes_no_argument():
    gradient, residual = vector(0), vector(1)
    before = gradient.clone(), residual.clone()
    error_feedback(gradient, residual, lambda x: top_k(x, 2))
    assert torch.equal(gradient, before[0])
    assert torch.equal(residual, before[1])


def test_error_feedback_refuses_a_residual_of_another_length(unchecked_shapes):
    with pytest.raises(ValueError, match=r"expected residual of shape \(3,\), got \(2,\)"):
        error_feedback(torch.ones(3), torch.zeros(2), lambda x: x)


# ---- what a gradient gives away ----


def digit_and_net(dtype):
    """One digit, its label, and a net that has not been trained."""
    x, y, _, _ = data.load("digits").tensors(dtype=dtype)
    net = models.mlp([64, 16, 10], nn.Tanh, generator=train.generator(0, "init"))
    return x[:1], y[:1], net.to(dtype)


@pytest.mark.covers("P6")
def test_the_gradient_of_the_first_layer_gives_the_input_exactly(device, dtype):
    x, y, net = digit_and_net(dtype)
    x, y, net = x.to(device), y.to(device), net.to(device)
    weight, bias, *_ = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    close = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(recover_input(weight, bias), x[0], rtol=0, atol=close)


@given(seed=SEEDS)
def test_of_a_batch_the_recovered_input_is_a_mixture(seed):
    g = train.generator(seed, "batch")
    x, delta = torch.randn(4, 6, generator=g), torch.randn(4, 3, generator=g)
    found = recover_input(delta.T @ x, delta.sum(0))
    weights = delta @ delta.sum(0) / delta.sum(0).square().sum()
    torch.testing.assert_close(found, weights @ x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)


def test_recover_input_refuses():
    with pytest.raises(ValueError, match="recover_input: expected a gradient of the bias, got zer"):
        recover_input(torch.ones(2, 3), torch.zeros(2))


def test_recover_input_refuses_another_length(unchecked_shapes):
    with pytest.raises(ValueError, match=r"recover_input: expected bias of shape \(2,\), got \(3"):
        recover_input(torch.ones(2, 3), torch.ones(3))


def gradient_of(net, y):
    """A differentiable map from an input to the gradient of the weights without biases."""

    def flat(x):
        weights = [p for p in net.parameters() if p.dim() == 2]
        loss = cross_entropy(net(x), y)
        parts = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.cat([part.flatten() for part in parts])

    return flat


@pytest.mark.covers("P6")
def test_matching_the_gradient_finds_the_input_where_no_bias_gives_it_away():
    x, y, net = digit_and_net(torch.float64)
    observe = gradient_of(net, y)
    start = torch.rand(x.shape, generator=train.generator(0, "guess"), dtype=x.dtype)
    found = match_gradient(observe, observe(x).detach(), start)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-3)
    assert not found.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_a_small_sketch_gives_away_less_than_the_gradient():
    x, y, net = digit_and_net(torch.float64)
    flat = gradient_of(net, y)
    d = len(flat(x))
    start = torch.rand(x.shape, generator=train.generator(0, "guess"), dtype=x.dtype)

    def error(size):
        sketch = count_sketch(d, size, generator=train.generator(0, "sketch"))
        observed = sketch.compress(flat(x).detach())
        found = match_gradient(lambda guess: sketch.compress(flat(guess)), observed, start)
        return float((found - x).norm() / x.norm())

    assert error(400) < 0.1  # six times as many numbers as there are pixels
    assert error(8) > 0.3


@pytest.mark.parametrize(
    ("observed", "steps", "message"),
    [
        (torch.zeros(2), 5, "expected an observed gradient, got zeros"),
        (torch.ones(2), 0, "expected steps of at least 1, got 0"),
    ],
)
def test_match_gradient_refuses(observed, steps, message):
    with pytest.raises(ValueError, match=f"match_gradient: {message}"):
        match_gradient(lambda x: x, observed, torch.ones(2), steps=steps)
