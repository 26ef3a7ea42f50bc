"""The engine of coursekit.autodiff: values by hand, parity with torch, planted bugs, bad input."""

import re
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coursekit import autodiff as ad
from coursekit.autodiff import core, primitives, transforms

RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(3, 4))
POSITIVE = RNG.uniform(0.5, 2.0, size=(3, 4))
LABELS = np.array([0, 3, 1])


def like(x, array):
    """Return a constant in the precision of ``x``."""
    return array.astype(x.dtype)


# One row a case: the primitives that it exercises, a function of x, and a point where it is smooth.
CASES = {
    "negative": (lambda x: -x, MATRIX),
    "add": (lambda x: x + like(x, MATRIX[0]) + 1, MATRIX),
    "subtract": (lambda x: (2 - x) - x[0], MATRIX),
    "multiply": (lambda x: x * x[:, :1] * 3, MATRIX),
    "divide": (lambda x: (1 / x) / x[:1], POSITIVE),
    "power": (lambda x: x**3 + x**0.5 + 2.0**x + x**x, POSITIVE),
    "square": (ad.square, MATRIX),
    "sqrt": (ad.sqrt, POSITIVE),
    "absolute": (lambda x: abs(x) * x, MATRIX),
    "exp": (ad.exp, MATRIX),
    "log": (ad.log, POSITIVE),
    "log1p": (ad.log1p, POSITIVE),
    "sin": (ad.sin, MATRIX),
    "cos": (ad.cos, MATRIX),
    "tanh": (ad.tanh, MATRIX),
    "sigmoid": (ad.sigmoid, MATRIX),
    "relu": (lambda x: ad.relu(x) * x, MATRIX),
    "maximum": (lambda x: ad.maximum(x * x, x[:, :1]), MATRIX),
    "minimum": (lambda x: ad.minimum(x * x, x[:, :1]), MATRIX),
    "where": (lambda x: ad.where(x > 0.1, x**2, x[0] ** 3), MATRIX),
    "reshape": (lambda x: ad.reshape(x, (2, 6)) ** 2, MATRIX),
    "transpose": (lambda x: ad.transpose(x.reshape(3, 2, 2), (2, 0, 1)) ** 2 + x[0, 0], MATRIX),
    "transpose, negative axes": (
        lambda x: ad.transpose(ad.stack(x, x**2), (-1, 0, 1)) ** 3,
        MATRIX,
    ),
    "sum, axis by position": (lambda x: np.sum(x**2, 0) * ad.mean(x, 0) * ad.max(x, 0), MATRIX),
    "broadcast_to": (lambda x: ad.broadcast_to(x, (2, 3, 4)) ** 2, MATRIX),
    "getitem": (lambda x: x[np.array([0, 0, 2]), 1:3] ** 2, MATRIX),
    "putitem": (lambda x: primitives.putitem(x, np.array([0, 0, 2]), (5, 4)) ** 2, MATRIX),
    "sum": (lambda x: ad.sum(x**2, axis=0) * ad.sum(x, axis=(0, 1)), MATRIX),
    "mean": (lambda x: ad.mean(x**2, axis=-1, keepdims=True) * x.mean(), MATRIX),
    "logsumexp": (lambda x: ad.logsumexp(x, axis=1) + ad.logsumexp(x), MATRIX),
    "max": (lambda x: ad.max(x**2, axis=1) * ad.max(x, axis=(0, 1), keepdims=True), MATRIX),
    "matmul": (lambda x: x @ x.T @ like(x, MATRIX) @ x[0], MATRIX),
    "affine": (lambda x: ad.affine(x, x.T, x[:, 0]), MATRIX),
    "stack": (lambda x: ad.stack(x, x * x, like(x, MATRIX)), MATRIX),
    "log_softmax": (lambda x: ad.log_softmax(x) * like(x, MATRIX), MATRIX),
    "softmax": (lambda x: ad.softmax(x, axis=0) * like(x, MATRIX), MATRIX),
    "cross_entropy": (lambda x: ad.cross_entropy(x, LABELS), MATRIX),
}


@pytest.mark.covers("A1")
@pytest.mark.parametrize("name", CASES)
def test_every_primitive_agrees_with_differences_to_second_order(name):
    function, x = CASES[name]
    ad.check_grads(function, x, order=2, tolerance=1e-5)


def test_no_primitive_is_left_out_of_the_table():
    names = {n for n, f in vars(primitives).items() if hasattr(f, "vjp") and n[0] != "_"}
    assert names <= CASES.keys()
    assert names >= {"exp", "matmul", "relu", "cross_entropy", "putitem"}


@pytest.mark.parametrize(
    ("left", "right"),
    [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((5, 2, 3), (3,)), ((3,), (5, 3, 2))],
)
def test_matmul_takes_vectors_as_numpy_does(left, right):
    x, y = RNG.normal(size=left), RNG.normal(size=right)
    ad.check_grads(lambda pair: pair[0] @ pair[1], (x, y))
    np.testing.assert_array_equal(core.value_of(ad.Node(x) @ y), x @ y)


# --- values that the course states ---


@pytest.mark.covers("A3")
def test_the_logistic_example_is_traced_in_order():
    z = ad.Node(1.5)
    y = 1 / (ad.exp(-z) + 1)
    graph = [n.fun.__name__ for n in ad.toposort(y) if n.fun]
    assert graph == ["divide", "add", "exp", "negative"]
    assert f"{ad.value_of(y):.3f}" == "0.818"
    assert y.parents[0].parents[0].parents[0].parents == (z,)


@pytest.mark.covers("A2")
def test_the_chain_of_five_has_the_slope_of_its_closed_form():
    def f(x):
        return 10 * ad.log(1 + ad.exp(-2 * x))

    slope = ad.grad(f)(0.3)
    assert slope == pytest.approx(-20 / (1 + np.exp(0.6)), rel=1e-14)


@pytest.mark.covers("A4")
def test_the_neuron_by_hand():
    x, y, w, b = 0.7, 1.0, -0.4, 0.2
    s = 1 / (1 + np.exp(-(w * x + b)))
    by_hand = (s - y) * s * (1 - s) * np.array([x, 1])

    def loss(p):
        return 0.5 * (ad.sigmoid(p[0] * x + p[1]) - y) ** 2

    np.testing.assert_allclose(ad.grad(loss)(np.array([w, b])), by_hand, rtol=1e-14)


@pytest.mark.covers("A5")
def test_the_example_of_two_inputs_three_ways():
    point = np.array([0.5, 0.75])
    ours = ad.grad(lambda x: ad.log(x[0] * x[1]) * ad.sin(x[1]))(point)
    t = torch.tensor(point, requires_grad=True)
    (torch.log(t[0] * t[1]) * torch.sin(t[1])).backward()
    x1, x2 = point
    by_hand = [np.sin(x2) / x1, np.sin(x2) / x2 + np.log(x1 * x2) * np.cos(x2)]
    np.testing.assert_allclose(ours, by_hand, rtol=1e-14)
    np.testing.assert_allclose(ours, t.grad.numpy(), rtol=1e-14)
    np.testing.assert_allclose(ours, [1.3633, 0.1912], atol=5e-5)


@pytest.mark.covers("A6")
def test_fan_out_adds_up():
    f = lambda x: ad.sin(x[0]) + x[0] * x[1]
    np.testing.assert_allclose(ad.grad(f)(np.array([2.0, 3.0])), [np.cos(2) + 3, 2.0])
    assert ad.grad(lambda x: x * x)(3.0) == 6.0
    assert ad.grad(lambda x: x + x + x)(3.0) == 3.0


@pytest.mark.covers("A9")
@pytest.mark.parametrize("engine", ["course", "torch"])
def test_one_function_written_three_ways_has_three_derivatives_at_its_kink(engine):
    relu = ad.relu if engine == "course" else torch.relu

    def f1(x):
        return x + 0

    def f2(x):
        return relu(x) - relu(-x)

    def f3(x):
        return 10 * f1(x) - 9 * f2(x)

    def slope(f, at):
        if engine == "course":
            return ad.grad(f)(at)
        x = torch.tensor(at, requires_grad=True)
        f(x).backward()
        return x.grad.item()

    assert [slope(f, 0.0) for f in (f1, f2, f3)] == [1, 0, 10]
    assert [slope(f, 0.5) for f in (f1, f2, f3)] == [1, 1, 1]


def test_ties_are_shared_as_torch_does():
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    torch.maximum(x, y).sum().backward()
    ours = ad.grad(lambda p: ad.sum(ad.maximum(p[0], p[1])))((np.zeros(2), np.zeros(2)))
    np.testing.assert_array_equal(ours[0], x.grad.numpy())
    t = torch.ones(3, requires_grad=True)
    torch.amax(t, dim=0).backward()
    np.testing.assert_allclose(ad.grad(lambda x: ad.max(x))(np.ones(3)), t.grad.numpy())


# --- transforms ---


@pytest.mark.covers("A7")
def test_both_modes_give_the_jacobian_of_torch():
    w = RNG.normal(size=(4, 2))

    def ours(x):
        return ad.tanh(x @ w)

    def theirs(x):
        return torch.tanh(x @ torch.tensor(w))

    expected = torch.autograd.functional.jacobian(theirs, torch.tensor(MATRIX)).numpy()
    for mode in ("reverse", "forward"):
        found = ad.jacobian(ours, mode=mode)(MATRIX)
        assert found.shape == (3, 2, 3, 4)
        np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.covers("A7")
@given(
    hnp.arrays(float, 3, elements=st.floats(-2, 2)), hnp.arrays(float, 3, elements=st.floats(-2, 2))
)
def test_hvp_is_the_hessian_times_the_vector(x, v):
    def f(x):
        return ad.sum(ad.exp(x) * ad.sin(x[::-1])) + x[0] * x[1] * x[2]

    hessian = ad.jacobian(ad.grad(f))(x)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    np.testing.assert_allclose(ad.hvp(f, x, v), hessian @ v, atol=1e-10)


@given(hnp.arrays(float, (2, 3), elements=st.floats(-3, 3)), st.integers(0, 10**6))
def test_forward_and_reverse_are_adjoint(x, seed):
    rng = np.random.default_rng(seed)
    f = lambda x: ad.tanh(x * x[0]) @ np.arange(3.0)
    v, u = rng.normal(size=(2, 3)), rng.normal(size=2)
    _, pullback = ad.vjp(f, x)
    _, tangent = ad.jvp(f, x, v)
    assert np.sum(pullback(u) * v) == pytest.approx(u @ tangent, abs=1e-9)


@given(st.lists(st.sampled_from([1, 2, 3]), max_size=3), st.lists(st.booleans(), max_size=3))
def test_broadcasting_is_undone_for_any_shapes(shape, keep):
    small = tuple(n if k else 1 for n, k in zip(shape, keep, strict=False))
    small = small[-len(shape) :] if shape else ()
    small = tuple(
        a if a == b else 1 for a, b in zip(small, shape[len(shape) - len(small) :], strict=True)
    )
    x, y = np.ones(small), np.full(shape, 2.0)
    x, y = RNG.normal(size=x.shape), RNG.normal(size=y.shape)
    gradient = ad.grad(lambda x: ad.sum(x * y))(x)
    assert gradient.shape == x.shape
    tx = torch.tensor(x, requires_grad=True)
    (tx * torch.tensor(y)).sum().backward()
    np.testing.assert_allclose(gradient, tx.grad.numpy(), atol=1e-12)


def test_derivatives_nest_without_confusing_their_variables():
    inner = lambda x: ad.grad(lambda y: x * y)(1.0)
    assert ad.grad(inner)(3.0) == 1.0
    assert ad.grad(lambda x: ad.grad(lambda y: y * x)(1.0))(3.0) == 1.0
    assert ad.grad(lambda x: ad.value_and_grad(lambda y: x * x)(1.0)[0])(3.0) == 6.0
    assert ad.jvp(lambda x: ad.jvp(lambda y: x * x, 1.0, 1.0)[1], 3.0, 1.0) == (0.0, 0.0)
    assert ad.grad(lambda x: x * inner(x))(3.0) == 6.0
    assert ad.jvp(lambda x: x * ad.jvp(lambda y: x + y, 1.0, 1.0)[1], 2.0, 1.0)[1] == 1.0
    assert ad.jvp(lambda x: x * ad.grad(lambda y: x * y**2)(x), 2.0, 1.0)[1] == 6 * 2.0**2
    third = ad.grad(ad.grad(ad.grad(lambda x: x**4)))
    assert third(2.0) == 48.0


def test_trees_of_parameters_keep_their_structure():
    params = {"layers": [(MATRIX, MATRIX[0])], "scale": np.array(2.0)}
    loss = lambda p: ad.sum(p["scale"] * (p["layers"][0][0] + p["layers"][0][1]))
    value, gradient = ad.value_and_grad(loss)(params)
    assert value == pytest.approx(2 * (MATRIX + MATRIX[0]).sum())
    assert gradient["layers"][0][0].shape == (3, 4)
    np.testing.assert_allclose(gradient["layers"][0][1], np.full(4, 6.0))
    direction = {"layers": [(MATRIX, MATRIX[0])], "scale": 1.0}
    _, slope = ad.jvp(loss, params, direction)
    assert slope == pytest.approx(value + value / 2)  # along the layers, and along the scale


def test_argnum_picks_the_argument():
    f = lambda x, y: ad.sum(x * y**2)
    np.testing.assert_allclose(ad.grad(f, 1)(np.ones(2), np.array([2.0, 3.0])), [4, 6])
    np.testing.assert_allclose(ad.grad(f, -1)(np.ones(2), np.array([2.0, 3.0])), [4, 6])


def test_gradients_belong_to_the_caller():
    one, two = ad.grad(lambda p: ad.sum(p[0] + p[1]))((np.ones(3), np.ones(3)))
    one *= 5  # neither read-only nor shared
    np.testing.assert_array_equal(two, np.ones(3))
    one, two = ad.grad(lambda p: ad.sum((p[0] + p[1]) ** 2))((np.ones(3), np.ones(3)))
    assert one is not two
    v = np.ones(3)
    tangent = ad.jvp(lambda x: x, np.ones(3), v)[1]
    tangent *= 5
    product = ad.hvp(lambda x: ad.sum(x) ** 2, np.ones(3), v)
    product *= 5
    np.testing.assert_array_equal(v, np.ones(3))
    g = np.ones(3)
    back = ad.vjp(lambda x: x, np.ones(3))[1](g)
    back += 1
    np.testing.assert_array_equal(g, np.ones(3))


def test_what_the_output_does_not_depend_on_has_gradient_zero():
    np.testing.assert_array_equal(ad.grad(lambda x: ad.sum(np.ones(2)))(np.ones(3)), np.zeros(3))
    used, unused = ad.grad(lambda p: p[0] * 2)((1.0, np.ones(3)))
    assert used == 2.0
    np.testing.assert_array_equal(unused, np.zeros(3))
    assert ad.jvp(lambda x: 5.0, 1.0, 1.0) == (5.0, 0.0)


def test_a_pullback_can_be_called_twice():
    _, pullback = ad.vjp(lambda x: x**2, np.array([1.0, 2.0]))
    np.testing.assert_allclose(pullback(np.array([1.0, 0.0])), [2, 0])
    np.testing.assert_allclose(pullback(np.array([0.0, 1.0])), [0, 4])


@pytest.mark.parametrize("name", CASES)
def test_single_precision_stays_single(name):
    function, x = CASES[name]
    x = x.astype(np.float32)
    y, pullback = ad.vjp(function, x)
    assert y.dtype == np.float32
    assert pullback(np.ones_like(y)).dtype == np.float32
    assert ad.jvp(function, x, x)[1].dtype == np.float32


def test_numpy_functions_work_on_nodes_by_their_own_names():
    f = lambda x: np.sum(np.exp(x) * np.where(x > 0, x, 1.0)) + np.ones(3) @ x
    g = lambda x: ad.sum(ad.exp(x) * ad.where(x > 0, x, 1.0)) + np.ones(3) @ x
    x = np.array([-1.0, 0.5, 2.0])
    np.testing.assert_array_equal(ad.grad(f)(x), ad.grad(g)(x))


@given(st.floats(-700, 700))
def test_sigmoid_and_logsumexp_never_overflow(x):
    with np.errstate(over="raise", invalid="raise"):
        assert 0 <= ad.sigmoid(x) <= 1
        assert np.isfinite(ad.grad(lambda x: ad.logsumexp(x))(np.array([x, 10 * x]))).all()


def test_conventions_at_the_edges_are_those_of_torch():
    assert ad.grad(lambda x: x**0)(0.0) == ad.grad(lambda x: x**0.0)(0.0) == 0.0
    np.testing.assert_array_equal(
        ad.grad(lambda x: ad.sum(x ** np.array([0.0, 1.0, 2.0])))(np.zeros(3)), [0, 1, 0]
    )
    assert ad.grad(lambda n: 0.0**n)(2.0) == 0.0
    assert ad.grad(lambda n: ad.sum(np.zeros(2) ** n))(2.0) == 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        assert np.isnan(ad.grad(lambda n: (-2.0) ** n)(3.0))
        assert np.isnan(ad.grad(lambda n: ad.sum(np.array([-2.0]) ** n))(3.0))
        assert ad.grad(lambda x: ad.sqrt(ad.where(x > 0, x, 0.0)))(-1.0) == 0.0
    mixed = ad.grad(lambda x: ad.sum(ad.where(np.array([0, 1, 2]), x, -x)))(np.ones(3))
    np.testing.assert_array_equal(mixed, [-1, 1, 1])
    with np.errstate(divide="ignore"):
        assert ad.logsumexp(np.full(2, -np.inf)) == -np.inf
    assert ad.logsumexp(np.array([np.inf, 1.0])) == np.inf
    assert ad.jvp(lambda x: ad.logsumexp(ad.stack(x, -np.inf)), 1.0, 1.0)[1] == 1.0
    np.testing.assert_allclose(ad.softmax(np.array([1e4, 0.0])), [1, 0])


def test_results_that_are_plain_numbers_or_empty_are_differentiated():
    assert ad.grad(lambda x: 5.0)(1.0) == 0.0
    assert ad.vjp(lambda x: x[0], np.ones(2))[1](1.0).tolist() == [1.0, 0.0]
    assert ad.grad(lambda x: ad.sum(ad.mean(x, axis=1)))(np.ones((0, 3))).shape == (0, 3)
    Point = namedtuple("Point", "x y")
    slope = ad.grad(lambda p: p.x * p.y)(Point(2.0, 3.0))
    assert slope == Point(3.0, 2.0)


def test_a_gradient_has_the_precision_of_its_input():
    x = np.ones(2, dtype=np.float32)
    assert ad.grad(lambda x: ad.sum(x * np.float64(2)))(x).dtype == np.float32


@pytest.mark.covers("A3")
def test_a_chain_of_many_nodes_needs_no_recursion():
    def chain(x):
        for _ in range(20_000):  # the benchmark runs 400,000
            x = x * 0.9999
        return x

    assert ad.grad(chain)(1.0) == pytest.approx(0.9999**20_000, rel=1e-9)


def test_toposort_gives_each_node_once_and_after_its_users():
    x = ad.Node(2.0)
    a = x * x
    b = a + x
    end = a * b
    order = list(ad.toposort(end))
    assert order[0] is end
    assert [n is x for n in order] == [False, False, False, True]
    assert len(order) == 4
    for node in order:
        assert all(order.index(p) > order.index(node) for p in node.parents)


# --- checkpoints ---


@pytest.mark.covers("A8")
def test_checkpoints_change_no_number():
    f = lambda x, y: ad.sin(x * y) + ad.exp(x)
    g = ad.checkpoint(f)
    x, y = MATRIX, MATRIX[0]
    both = [ad.grad(lambda p, h=h: ad.sum(h(*p) ** 2))((x, y)) for h in (f, g)]
    np.testing.assert_array_equal(both[0][0], both[1][0])
    np.testing.assert_array_equal(both[0][1], both[1][1])
    ad.check_grads(lambda p: g(*p), (x, y))


@pytest.mark.covers("A8")
def test_a_checkpoint_runs_once_more_and_stores_one_node():
    calls = []

    def f(x):
        calls.append(type(x).__name__)
        return ad.sin(ad.exp(ad.sin(x)))

    x = ad.Node(1.0, level=1)
    y = ad.checkpoint(f)(x)
    assert y.parents == (x,)
    assert len(calls) == 1
    ad.backward(y, 1.0)
    assert calls == ["float64", "Node"]


def test_a_checkpoint_refuses_what_it_cannot_see():
    hidden = lambda w: ad.checkpoint(lambda x: ad.sum(x * w))(np.ones(2))
    with pytest.raises(RuntimeError, match=r"checkpoint: f depends on a traced value"):
        ad.grad(hidden)(np.ones(2))
    for kind, tree in (("tuple", (np.ones(2),)), ("list", [np.ones(2)]), ("dict", {0: np.ones(2)})):
        with pytest.raises(TypeError, match=f"expected arrays as arguments, got a {kind}"):
            ad.grad(lambda p: ad.checkpoint(lambda q: ad.sum(q[0]))(p))(tree)


# --- planted bugs: each must be noticed by the checks above ---


def differentiates_rightly():
    """Run the checks that a right engine passes; raise AssertionError or ValueError otherwise."""
    test_fan_out_adds_up()
    ad.check_grads(lambda x: ad.sin(x) * x[0], MATRIX)


def _overwrite(end, upstream):
    gradients, roots = {end: upstream}, {}
    for node in ad.toposort(end):
        g = gradients[node]
        if node.fun is None:
            roots[node] = g
            continue
        gradients.update(zip(node.parents, node.fun.vjp(g, node), strict=True))
    return roots


def test_the_right_engine_passes_the_check_for_planted_bugs():
    differentiates_rightly()


def test_overwriting_in_place_of_adding_up_is_caught(monkeypatch):
    monkeypatch.setattr(transforms, "backward", _overwrite)
    with pytest.raises(AssertionError):
        differentiates_rightly()


def test_forgetting_to_unbroadcast_is_caught(monkeypatch):
    monkeypatch.setattr(core, "unbroadcast", lambda g, to, name="": g)
    with pytest.raises((AssertionError, ValueError)):
        differentiates_rightly()


def test_a_wrong_sign_in_one_rule_is_caught(monkeypatch):
    right = ad.sin.vjp
    monkeypatch.setattr(ad.sin, "vjp", lambda g, node: [-m for m in right(g, node)])
    with pytest.raises(AssertionError):
        differentiates_rightly()
    with pytest.raises(AssertionError, match="order 1, reverse mode gives"):
        ad.check_grads(ad.sin, MATRIX)


def test_check_grads_notices_a_rule_that_is_wrong_at_second_order_only():
    double = ad.primitive(lambda x: x**2)
    slope = lambda x: np.asarray(2 * ad.value_of(x))  # right value, cut out of the graph
    ad.defvjp(double, lambda g, ans, x: g * slope(x))
    ad.defjvp(double, lambda t, ans, x: t * slope(x))
    ad.check_grads(double, np.array([1.0, 2.0]), order=1)
    with pytest.raises(AssertionError, match="order 2"):
        ad.check_grads(double, np.array([1.0, 2.0]), order=2)


def test_check_grads_notices_a_forward_rule_that_leaves_the_graph():
    double = ad.primitive(lambda x: x**2)
    ad.defvjp(double, lambda g, ans, x: g * 2 * x)
    ad.defjvp(double, lambda t, ans, x: t * 2 * ad.value_of(x))
    ad.check_grads(double, np.array([1.0, 2.0]), order=1)
    with pytest.raises(AssertionError, match="order 2"):
        ad.check_grads(double, np.array([1.0, 2.0]), order=2)


# --- bad input ---


def _no_rule():
    return ad.primitive(np.arctan)


def _half_a_rule():
    f = ad.primitive(np.hypot)
    ad.defvjp(f, None, lambda g, ans, x, y: g * y / ans)
    ad.defjvp(f, None, lambda t, ans, x, y: t * y / ans)
    return f


def _wrong_shape():
    f = ad.primitive(lambda x: np.sum(x))
    f.__name__ = "total"
    ad.defvjp(f, lambda g, ans, x: np.ones(7))
    return f


ERRORS = {
    "integers": (lambda: ad.grad(lambda x: x)(3), TypeError, "floating-point input, got int64"),
    "integers forward": (
        lambda: ad.jvp(ad.sin, 3, 1),
        TypeError,
        "floating-point input, got int64",
    ),
    "text": (lambda: ad.grad(lambda x: x)("a"), TypeError, "floating-point input, got <U1"),
    "vector output": (
        lambda: ad.grad(lambda x: x * 2)(np.ones(3)),
        ValueError,
        r"expected f to return a scalar, got shape \(3,\); .*jacobian",
    ),
    "list output": (
        lambda: ad.grad(lambda x: [x, x])(1.0),
        TypeError,
        "expected f to return one array, got list",
    ),
    "missing argument": (
        lambda: ad.grad(lambda x: x, 1)(1.0),
        ValueError,
        "expected argument 1, got 1 arguments",
    ),
    "missing argument of a jacobian": (
        lambda: ad.jacobian(ad.sin, 2)(1.0),
        ValueError,
        "jacobian: expected argument 2, got 1 arguments",
    ),
    "tangent shape": (
        lambda: ad.jvp(ad.sin, np.ones(3), np.ones(2)),
        ValueError,
        r"expected v of shape \(3,\), got \(2,\)",
    ),
    "cotangent shape": (
        lambda: ad.vjp(ad.sin, np.ones(3))[1](np.ones(2)),
        ValueError,
        r"pullback: expected g of shape \(3,\), got \(2,\)",
    ),
    "shapes that do not fit": (
        lambda: ad.grad(lambda x: ad.sum(x @ np.ones((2, 2))))(np.ones((2, 3))),
        ValueError,
        "matmul",
    ),
    "no reverse rule": (
        lambda: ad.grad(_no_rule())(1.0),
        NotImplementedError,
        "arctan has no reverse rule; use defvjp",
    ),
    "no forward rule": (
        lambda: ad.jvp(_no_rule(), 1.0, 1.0),
        NotImplementedError,
        "arctan has no forward rule; use defjvp",
    ),
    "no rule for one argument": (
        lambda: ad.grad(lambda x: _half_a_rule()(x, 1.0))(1.0),
        NotImplementedError,
        "hypot has no rule for argument 0",
    ),
    "no forward rule for one argument": (
        lambda: ad.jvp(lambda x: _half_a_rule()(x, 1.0), 1.0, 1.0),
        NotImplementedError,
        "hypot has no rule for argument 0",
    ),
    "a NumPy function nobody registered": (
        lambda: ad.grad(lambda x: np.arctan(x))(1.0),
        NotImplementedError,
        "numpy.arctan: no derivative rule; wrap it with autodiff.primitive",
    ),
    "a ufunc method": (
        lambda: ad.grad(lambda x: np.add.reduce(x))(np.ones(2)),
        NotImplementedError,
        "numpy.add.reduce: no derivative rule",
    ),
    "an array written in place": (
        lambda: ad.grad(lambda x: ad.sum(np.add(x, 1.0, out=np.zeros(2))))(np.ones(2)),
        TypeError,
        "numpy.add: expected no options for a traced value, got out; an array written in place",
    ),
    "a rule of the wrong shape": (
        lambda: ad.grad(_wrong_shape())(np.ones(3)),
        ValueError,
        r"total: expected a gradient that reduces to the argument's shape \(3,\), got \(7,\)",
    ),
    "float()": (lambda: ad.grad(lambda x: float(x))(1.0), TypeError, "value_of"),
    "numpy.array()": (lambda: ad.grad(lambda x: np.array(x))(1.0), TypeError, "value_of"),
    "a traced option": (
        lambda: ad.grad(lambda x: ad.sum(np.ones(2), axis=x))(1.0),
        TypeError,
        "expected options by keyword to be plain values",
    ),
    "jacobian mode": (lambda: ad.jacobian(ad.sin, mode="up"), ValueError, "got 'up'"),
    "order zero": (lambda: ad.check_grads(ad.sin, 1.0, order=0), ValueError, "at least 1, got 0"),
    "check in float32": (
        lambda: ad.check_grads(ad.sin, np.float32(1)),
        TypeError,
        "expected float64, got float32",
    ),
    "draw a number": (lambda: ad.draw(1.0), TypeError, "expected a Node, got float"),
    "labels that are a mask": (
        lambda: ad.cross_entropy(np.ones((2, 3)), [True, False]),
        TypeError,
        "expected integer labels, got bool",
    ),
    "a negative label": (
        lambda: ad.cross_entropy(np.ones((2, 3)), [0, -1]),
        ValueError,
        "expected labels in 0 … 2",
    ),
    "no labels": (
        lambda: ad.cross_entropy(np.ones((0, 3)), np.zeros(0, int)),
        ValueError,
        "expected labels in 0 … 2",
    ),
    "a bias that does not fit": (
        lambda: ad.affine(np.ones((1, 3)), np.ones((3, 2)), np.ones((4, 2))),
        ValueError,
        r"affine: expected b of shape \(2,\), got \(4, 2\)",
    ),
    "iterating a number": (lambda: ad.grad(lambda x: sum(v for v in x))(3.0), TypeError, "len"),
    "complex numbers": (
        lambda: ad.grad(lambda x: abs(x * 1j) ** 2)(2.0),
        TypeError,
        "complex",
    ),
    "labels out of range": (
        lambda: ad.cross_entropy(np.ones((2, 3)), [0, 3]),
        ValueError,
        r"expected labels in 0 … 2, got \[0 3\]",
    ),
    "labels of another length": (
        lambda: ad.cross_entropy(np.ones((2, 3)), [0]),
        ValueError,
        r"got \(2, 3\) and \(1,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused_with_a_clear_message(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


# --- drawing ---


@pytest.mark.covers("A3")
def test_a_drawing_reads_out_every_node_and_is_the_same_each_time():
    z = ad.Node(1.5)
    y = 1 / (ad.exp(-z) + 1)
    picture = ad.draw(y, names={z: "z"}, notes={z: "gradient 0.1491"}, highlight=[z])
    assert picture == ad.draw(y, names={z: "z"}, notes={z: "gradient 0.1491"}, highlight=[z])
    assert picture._repr_html_() == picture
    assert repr(picture).startswith("Computation graph of 5 nodes")
    assert "1 / · = ?" in ad.draw(y, hide=[y])
    alt = re.search(r'role="img" aria-label="([^"]+)"', picture).group(1)
    assert alt.startswith("Computation graph of 5 nodes, inputs first: z = 1.5, gradient 0.1491;")
    assert alt.endswith("1 / · = 0.8176")
    assert picture.count("<rect") == 5
    assert picture.count("fill-opacity") == 1


def test_a_drawing_tells_nodes_of_equal_value_apart_and_takes_arrays():
    a, b = ad.Node(2.0), ad.Node(2.0)
    assert ad.draw(a * b, highlight=[a]).count("fill-opacity") == 1
    picture = ad.draw(ad.exp(ad.Node(np.ones((2, 3)))[0, 1:]) * 2)
    assert "array 2×3" in picture
    assert "getitem(·, …)" in picture


def test_a_drawing_escapes_what_is_not_markup():
    assert "<b>" not in ad.draw(ad.Node(1.0) * 2, alt='"<b>"')


# --- samples ---


@pytest.mark.covers("A10")
def test_a_sample_is_refused_rather_than_given_a_silent_zero():
    rng = np.random.default_rng(0)
    with pytest.raises(TypeError, match="expected numbers, got a traced value"):
        ad.grad(lambda mu: rng.normal(mu, 1.0))(1.0)


@pytest.mark.covers("A10")
def test_both_estimators_of_a_gradient_through_a_sample_are_unbiased():
    noise = np.random.default_rng(0).normal(size=200_000)
    x, mu = 1.0 + noise, np.ones(200_000)
    score = x**2 * ad.grad(lambda m: ad.sum(-0.5 * (x - m) ** 2))(mu)
    path = ad.grad(lambda m: ad.sum((m + noise) ** 2))(mu)
    np.testing.assert_allclose(path, 2 * x)
    for estimate, variance in ((score, 30), (path, 4)):
        error = np.sqrt(variance / noise.size)
        assert abs(estimate.mean() - 2) < 4 * error
        assert estimate.var() == pytest.approx(variance, rel=0.1)


# --- training: the course engine beside torch ---


@pytest.mark.covers("A11")
def test_an_mlp_has_the_losses_of_torch_to_rounding():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(32, 8)), rng.integers(0, 3, 32)
    params = [
        (rng.normal(size=(8, 16)) / 3, np.zeros(16)),
        (rng.normal(size=(16, 3)) / 4, np.zeros(3)),
    ]
    theirs = [[torch.tensor(a, requires_grad=True) for a in layer] for layer in params]
    for _ in range(20):
        (w1, b1), (w2, b2) = params
        loss, gradient = ad.value_and_grad(
            lambda p: ad.cross_entropy(ad.relu(x @ p[0][0] + p[0][1]) @ p[1][0] + p[1][1], y)
        )(params)
        params = [
            tuple(a - 0.3 * g for a, g in zip(*pair, strict=True))
            for pair in zip(params, gradient, strict=True)
        ]
        (w1, b1), (w2, b2) = theirs
        out = torch.relu(torch.tensor(x) @ w1 + b1) @ w2 + b2
        their_loss = torch.nn.functional.cross_entropy(out, torch.tensor(y))
        their_loss.backward()
        assert loss == pytest.approx(their_loss.item(), abs=1e-12)
        with torch.no_grad():
            for a in (w1, b1, w2, b2):
                a -= 0.3 * a.grad
                a.grad = None
