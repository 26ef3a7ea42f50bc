"""Paths, skeletons and G-SGD on perceptrons; convolutions and blocks are in test_gsgd_conv.py.

The numbers behind "spec" are those of the list of 14 laws that an implementation must satisfy. The
step in path space is brute force: weights as a function of path values, differentiated by autograd.
"""

import copy
import itertools
import math
import statistics
from pathlib import Path

import pytest
import torch
from gsgd_brute import brute_step, perceptron_chain
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.experiment import Record
from coursekit.gsgd import (
    GSGD,
    FrozenSkeletonSGD,
    PathSGD,
    Skeleton,
    basis_paths,
    enorm_,
    path_activations,
    path_norm,
    path_sum,
    path_values,
    rescale_,
    structure_matrix,
    unit_norm_,
    weight_norm_,
)

WIDTHS = st.lists(st.integers(1, 8), min_size=2, max_size=6)
SHAPES = [(3, 4, 4, 2), (6, 5, 3, 2), (4, 3, 6, 2, 3), (3, 1, 4, 1, 2), (5, 2, 6, 2, 3), (2, 5, 3),
          (2, 3, 7), (3, 2)]  # fmt: skip


def perceptron(widths, bias=True, seed=0, activation=nn.ReLU):
    """A net in float64 whose weights are ±[0.5, 1.5], so that path values are far from 0."""
    draw = train.generator(seed, "init")
    net = models.mlp(widths, activation, bias=bias, generator=draw).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((torch.rand(p.shape, generator=draw) + 0.5) * p.sign())
    return net


def batch(net, seed=0, size=16):
    draw = train.generator(seed, "batch")
    x = torch.randn(size, net[0].in_features, generator=draw, dtype=torch.float64)
    return x, torch.randint(net[-1].out_features, (size,), generator=draw)


def factors(net, seed=0, sigma=1.0):
    """Log-normal c for every hidden layer."""
    draw = train.generator(seed, "factors")
    hidden = [m.out_features for m in net if isinstance(m, nn.Linear)][:-1]
    return [(sigma * torch.randn(n, generator=draw, dtype=torch.float64)).exp() for n in hidden]


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def free(net):
    """Which entries of `flat` are in the free set."""
    masks = Skeleton(net).masks(heads=False)
    parts = [
        masks[name[: -len(".weight")]] if name.endswith("weight") else torch.zeros_like(p).bool()
        for name, p in net.named_parameters()
    ]
    return torch.cat([part.flatten() for part in parts])


def backward(net, x, y):
    net.zero_grad()
    loss = cross_entropy(net(x), y)
    loss.backward()
    return loss.item()


def losses(net, optimizer, steps=20, after=lambda net: None):
    out = []
    for step in range(steps):
        out.append(backward(net, *batch(net, step)))
        optimizer.step()
        after(net)
    return torch.tensor(out)


def close(a, b, within=1e-12):
    return bool(((a - b).abs() <= within * b.abs().clamp(min=1)).all())


# ---- 1 and 2: what a rescaling leaves alone ----


@pytest.mark.covers("G1")
@pytest.mark.covers("G2")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.PReLU])
@pytest.mark.parametrize("widths", SHAPES[:5], ids=str)
def test_a_rescaling_leaves_the_function_path_values_and_activations(widths, activation):
    """spec 6.1"""
    net = perceptron(widths, activation=activation).double()
    x, _ = batch(net)
    before = net(x), path_values(net), path_activations(net, x), flat(net)
    hidden = net[1](net[0](x))
    c = factors(net)
    rescale_(net, c)
    after = net(x), path_values(net), path_activations(net, x)
    assert all(close(a, b) for a, b in zip(after, before, strict=False))
    assert close(net[1](net[0](x)), c[0] * hidden)
    assert not close(flat(net), before[3], 0.01)
    rescale_(net, [1 / f for f in c])  # g o g^-1 is the identity
    assert close(flat(net), before[3])


@pytest.mark.covers("G1")
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.ReLU6])
def test_an_activation_that_is_not_homogeneous_is_refused_by_name(activation):
    net = perceptron([3, 4, 2], activation=activation)
    x, _ = batch(net)
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled[0].weight.mul_(2), scaled[0].bias.mul_(2), scaled[2].weight.div_(2)
    assert not close(scaled(x), net(x), 1e-3)  # it is right to refuse
    for use in (Skeleton, GSGD, PathSGD, structure_matrix, lambda n: rescale_(n, factors(n))):
        with pytest.raises(ValueError, match=rf"got layer '1': {activation.__name__}\("):
            use(net)


@pytest.mark.covers("G2")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_the_output_is_the_sum_over_paths(widths, bias):
    """spec 6.2"""
    for activation in (nn.ReLU, nn.LeakyReLU):
        net = perceptron(widths, bias, activation=activation)
        x, _ = batch(net)
        assert close(path_sum(net, x), net(x))


def test_path_functions_refuse_what_is_no_perceptron():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    for use in (path_activations, path_sum):
        with pytest.raises(ValueError, match=r"expected a perceptron, got layer '0': Conv2d"):
            use(net, torch.ones(1, 1))


def test_path_values_want_paths_of_the_same_edges(unchecked_shapes):
    with pytest.raises(ValueError, match=r"path_values: expected paths of shape \(26, paths\)"):
        path_values(perceptron([3, 4, 2]), torch.ones(25, 3))


# ---- 3, 4 and 5: rank, counts, coordinates ----


def check_theorem(widths, bias, seed=0):
    net = perceptron(widths, bias, seed)
    skeleton, basis = Skeleton(net), basis_paths(net)
    m, H = flat(net).numel(), sum(widths[1:-1])
    assert (skeleton.m, skeleton.H) == (m, H)
    assert basis.shape == (m, m - H)
    # Lower bound: the rows outside F are triangular with ones.
    outside = ~free(net)
    assert outside.sum() == m - H
    det = torch.linalg.det(basis[outside])
    assert abs(abs(det.item()) - 1) < 1e-9
    # Upper bound: H independent directions that no path value feels.
    generators = torch.zeros(H, m, dtype=torch.float64)
    ones = [torch.ones(n, dtype=torch.float64) for n in widths[1:-1]]
    moved, start, row = copy.deepcopy(net), flat(net).abs().log(), 0
    for layer, n in enumerate(widths[1:-1]):
        for j in range(n):
            c = [one.clone() for one in ones]
            c[layer][j] = math.e
            moved.load_state_dict(net.state_dict())
            rescale_(moved, c)
            generators[row] = flat(moved).abs().log() - start
            row += 1
    assert torch.allclose(generators @ basis, torch.zeros_like(generators @ basis), atol=1e-12)
    if H:
        assert torch.linalg.matrix_rank(generators) == H
    if math.prod(widths) <= 600:
        A = structure_matrix(net)
        assert A.shape[1] == math.prod(widths) + bias * sum(
            math.prod(widths[i:]) for i in range(1, len(widths))
        )
        assert torch.allclose(generators @ A, torch.zeros_like(generators @ A), atol=1e-12)
        assert torch.linalg.matrix_rank(A) == m - H
        columns = {tuple(column) for column in A.T.tolist()}
        assert len(columns) == A.shape[1]
        assert {tuple(column) for column in basis.T.tolist()} <= columns


@pytest.mark.covers("G3")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_the_structure_matrix_has_rank_m_minus_h_and_the_basis_determinant_one(widths, bias):
    """spec 6.3"""
    check_theorem(widths, bias)


@pytest.mark.covers("G3")
@settings(max_examples=25)
@given(WIDTHS, st.booleans())
def test_the_rank_is_m_minus_h_for_any_widths(widths, bias):
    """spec 6.3"""
    check_theorem(widths, bias)


def test_the_jacobian_of_log_values_is_the_structure_matrix():
    """spec 6.3: d log abs(v) / d log abs(w)"""
    net = perceptron([3, 4, 2, 2])
    basis, w = basis_paths(net), flat(net)
    rows = []
    for i in range(basis.shape[1]):
        v = path_values(net, basis)[i]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(v, list(net.parameters()))])
        rows.append(gradient * w / v.detach())
    assert close(torch.stack(rows), basis.T)


@pytest.mark.parametrize(
    "widths", [(6, 6, 6, 6), (4, 6, 6, 3), (9, 8, 5, 3), (20, 8, 4, 8, 3), (3, 1, 4, 1, 2),
               (2, 4, 9), (2, 7, 3), (3, 2)], ids=str,
)  # fmt: skip
def test_skeletons_and_basis_paths_are_as_many_as_the_formulas_say(widths):
    """spec 6.4"""
    skeleton = Skeleton(perceptron(widths, bias=False))
    h = widths[1:-1]
    m, H = sum(a * b for a, b in itertools.pairwise(widths)), sum(h)
    assert (skeleton.m, skeleton.H) == (m, H)
    larger = [max(a, b) for a, b in itertools.pairwise(h)]
    assert skeleton.weights == (h[0] + sum(larger) + h[-1] if h else 0)
    both = sum(int(mask.sum()) for mask in skeleton.masks().values())
    assert both == skeleton.weights
    assert sum(int(mask.sum()) for mask in skeleton.masks(heads=False).values()) == H
    assert skeleton.all_skeleton == (h[0] + sum(larger) - sum(h[:-1]) if h else 0)
    if len(set(h)) == 1:  # equal widths
        L = len(widths) - 1
        assert (skeleton.weights, skeleton.all_skeleton) == (h[0] * L, h[0])


@pytest.mark.parametrize(
    ("h", "weights"),
    [(8, 536), (16, 1200), (32, 2912), (64, 7872), (128, 23936), (256, 80640), (512, 292352),
     (1024, 1108992)],
)  # fmt: skip
def test_the_nets_of_the_ratio_study_have_twice_the_printed_ratio(h, weights):
    skeleton = Skeleton(models.mlp([49, h, h, 10], bias=False, generator=torch.Generator()))
    assert (skeleton.m, skeleton.H) == (weights, 2 * h)
    if h == 8:
        assert skeleton.H / skeleton.m == pytest.approx(2 * 1.49e-2, rel=0.01)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_weights_and_basis_values_are_coordinates_of_one_another(widths, bias):
    """spec 6.5"""
    net = perceptron(widths, bias)
    basis, w, F = basis_paths(net), flat(net), free(net)
    v = path_values(net, basis).detach()
    held = basis[F].T @ w[F].abs().log()
    theta = torch.linalg.solve(basis[~F].T, v.abs().log() - held).exp()
    assert close(theta, w[~F].abs())
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.where(F, w, torch.zeros_like(w).masked_scatter(~F, theta) * w.sign()),
            net.parameters(),
        )
    assert close(path_values(net, basis), v)
    if math.prod(widths) <= 300:  # every path is an integer product of basis paths
        A = structure_matrix(net)
        powers = torch.linalg.lstsq(basis, A, driver="gelsd").solution
        assert close(powers, powers.round(), 1e-8)
        values = v.abs().log() @ powers.round()
        assert close(values.exp(), path_values(net).abs(), 1e-10)
        odd = (v < 0).double() @ powers.round() % 2  # how many negative factors
        assert torch.equal(odd == 1, path_values(net) < 0)


# ---- 6 and 7: the inverse chain rule and the step ----


@pytest.mark.covers("G4")
@settings(max_examples=25)
@given(WIDTHS, st.booleans(), st.integers(0, 99))
def test_weight_times_gradient_flows_in_and_out_of_every_node_alike(widths, bias, seed):
    """spec 6.6: Euler's identities, a bias among what comes in"""
    net = perceptron(widths, bias, seed)
    backward(net, *batch(net, seed))
    layers = [m for m in net if isinstance(m, nn.Linear)]
    for before, after in itertools.pairwise(layers):
        into = (before.weight * before.weight.grad).sum(dim=1)
        into = into + (before.bias * before.bias.grad if bias else 0)
        out = (after.weight * after.weight.grad).sum(dim=0)
        assert close(into, out)


@pytest.mark.covers("G4")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_the_path_gradient_solves_the_chain_rule_on_every_edge(widths, bias):
    """spec 6.6 and 6.7: δ = Jᵀ g in all m equations, those of F too; v' = v - lr g"""
    lr = 1e-2  # large, so that g is known to many digits
    seed = far_from_zero(widths, bias, lr)
    net = perceptron(widths, bias, seed)
    basis = basis_paths(net)
    v = path_values(net, basis)
    rows = [torch.autograd.grad(x, list(net.parameters()), retain_graph=True) for x in v]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    backward(net, *batch(net, seed))
    delta = torch.cat([p.grad.flatten() for p in net.parameters()])
    GSGD(net, lr=lr).step()
    g = (v.detach() - path_values(net, basis).detach()) / lr
    assert (g @ jacobian - delta).abs().max() < 1e-10


def far_from_zero(widths, bias, lr):
    """The first seed from which a step keeps every ratio of path values above 0.2."""
    for seed in range(200):
        net = perceptron(widths, bias, seed)
        x, y = batch(net, seed)
        chains = [perceptron_chain(net)]
        if brute_step(net, chains, lambda out, y=y: cross_entropy(out, y), x, lr)[1] > 0.2:
            return seed
    raise AssertionError("no such seed")


def one_step(widths, bias, seed, lr=1e-4, **options):
    net = perceptron(widths, bias, seed)
    x, y = batch(net, seed)
    expected, ratio = brute_step(
        net, [perceptron_chain(net)], lambda out: cross_entropy(out, y), x, lr
    )
    if ratio < 0.2:
        return False  # a path value near 0: no digit of the step is exact
    backward(net, x, y)
    GSGD(net, lr=lr, **options).step()
    for name, p in net.named_parameters():
        assert close(p, expected[name]), name
    return True


@pytest.mark.covers("G4")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_a_step_is_gradient_descent_on_path_values(widths, bias):
    """spec 6.7"""
    assert one_step(widths, bias, far_from_zero(widths, bias, 1e-2), lr=1e-2)  # g to 1e-10


@pytest.mark.covers("G4")
@settings(max_examples=40)
@given(WIDTHS, st.booleans(), st.integers(0, 10**6))
def test_a_step_is_gradient_descent_on_path_values_for_any_widths(widths, bias, seed):
    """spec 6.7"""
    assume(one_step(widths, bias, seed))


def test_the_equal_width_step_is_the_papers_closed_form():
    """The formulas of the paper's section 11.1, skip weights and skeletons one by one."""
    d, h, K, lr = 3, 4, 2, 1e-3
    net = perceptron([d, h, h, K], bias=False)
    Skeleton(net).ones_()
    backward(net, *batch(net))
    W, D = (
        [f(net[i].weight).clone() for i in (0, 2, 4)] for f in (lambda p: p.data, lambda p: p.grad)
    )
    GSGD(net, lr=lr).step()
    for j in range(h):
        flow = sum(W[1][k, j] * D[1][k, j] for k in range(h) if k != j)
        flow += sum(W[2][k, j] * D[2][k, j] for k in range(K) if k != j % K)
        s = W[0][j, j % d]
        R = 1 - lr * (s * D[0][j, j % d] - flow) / s**2
        assert close(net[0].weight[j, j % d], s * R)
        for k in range(h):
            new = 1.0 if k == j else (W[1][k, j] - lr * D[1][k, j] / s**2) / R
            assert close(net[2].weight[k, j], torch.as_tensor(new, dtype=torch.float64))
        for i in range(d):
            if i != j % d:
                assert close(net[0].weight[j, i], W[0][j, i] - lr * D[0][j, i])


def test_momentum_is_a_heavy_ball_on_path_gradients_and_decay_spares_the_skeleton():
    net, lr, mu, wd = perceptron([3, 4, 2, 2]), 1e-4, 0.9, 0.1
    optimizer = GSGD(net, lr=lr, momentum=mu, weight_decay=wd)
    basis = basis_paths(net)
    skeleton_only = torch.cat([m.flatten() for m in _with_biases(net, Skeleton(net).masks())])
    skip = (basis[~skeleton_only].sum(dim=0) > 0).double()
    buffer = None
    for step in range(4):
        x, y = batch(net, step)
        v = path_values(net, basis).detach()
        twin = copy.deepcopy(net)
        backward(twin, x, y)
        GSGD(twin, lr=1e-7).step()
        g = (v - path_values(twin, basis).detach()) / 1e-7 + wd * v * skip
        buffer = g if buffer is None else mu * buffer + g
        backward(net, x, y)
        optimizer.step()
        assert close(path_values(net, basis), v - lr * buffer, 1e-9)


def _with_biases(net, masks):
    for name, p in net.named_parameters():
        weight = name.endswith("weight")
        yield masks[name[: -len(".weight")]] if weight else torch.zeros_like(p).bool()


# ---- 8 to 11 ----


def test_the_free_set_stays_bit_for_bit_and_biases_take_plain_steps():
    """spec 6.8"""
    net = perceptron([3, 4, 6, 2])
    Skeleton(net).ones_()
    F, before = free(net), flat(net)
    backward(net, *batch(net))
    biases = [(m.bias, m.bias - 0.01 * m.bias.grad) for m in net if isinstance(m, nn.Linear)]
    GSGD(net, lr=0.01).step()
    assert all(torch.equal(b, expected) for b, expected in biases)
    losses(net, GSGD(net, lr=0.01, momentum=0.9, weight_decay=0.01))
    losses(net, FrozenSkeletonSGD(net, lr=0.01, momentum=0.9, weight_decay=0.01))
    assert torch.equal(flat(net)[F], before[F])
    assert (flat(net)[~F] != before[~F]).any()


MAKERS = {
    "gsgd": lambda net: GSGD(net, lr=0.01),
    "gsgd, momentum and decay": lambda net: GSGD(net, lr=0.001, momentum=0.9, weight_decay=0.01),
    "gsgd, largest": lambda net: GSGD(net, lr=0.01, skeleton=Skeleton(net, choose="largest")),
    "gsgd, regauged": lambda net: GSGD(net, lr=0.01, regauge=5),
    "path-sgd": lambda net: PathSGD(net, lr=0.1),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.01),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01),
}


def start(widths, seed=0):
    net = perceptron(widths, seed=seed)
    Skeleton(net).ones_()
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(layer.in_features**-0.5)
    return net


@pytest.mark.covers("G1")
@pytest.mark.covers("G4")
@pytest.mark.parametrize("widths", [(6, 5, 5, 3), (4, 6, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_losses_from_w_and_from_g_of_w_agree_for_what_lives_on_paths_only(name, widths):
    """spec 6.9"""
    net = start(widths)
    twin = copy.deepcopy(net)
    rescale_(twin, factors(net, sigma=0.5))
    a, b = (losses(n, MAKERS[name](n)) for n in (net, twin))
    assert a.isfinite().all()
    assert a[-1] != a[0]
    if name in ("sgd", "adam"):
        assert (a - b).abs().max() > 1e-3
    else:
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("after", [unit_norm_, enorm_])
def test_balanced_nets_forget_the_scale_they_began_with(after):
    """A unit-norm gauge is reached at once; one cycle of ENorm only comes nearer."""
    net = start([6, 5, 5, 3])
    twin = copy.deepcopy(net)
    rescale_(twin, factors(net, sigma=0.5))
    gap = {}
    for use in (lambda n: None, after):
        pair = [copy.deepcopy(n) for n in (net, twin)]
        for n in pair:
            use(n)
        a, b = (losses(n, torch.optim.SGD(n.parameters(), lr=0.01), after=use) for n in pair)
        gap[use] = (a - b).abs().max().item()
    without, with_it = gap.values()
    assert with_it < (1e-10 if after is unit_norm_ else 0.8 * without)


def test_frozen_sgd_is_invariant_once_the_free_set_is_one():
    net = start([6, 5, 5, 3])
    twin = copy.deepcopy(net)
    rescale_(twin, factors(net, sigma=0.5))
    pair = []
    for n in (net, twin):
        raw, skeleton = copy.deepcopy(n), Skeleton(n)
        skeleton.regauge_()
        pair.append(
            [
                losses(raw, FrozenSkeletonSGD(raw, lr=0.01)),
                losses(n, FrozenSkeletonSGD(n, lr=0.01, skeleton=skeleton)),
            ]
        )
    (raw_a, a), (raw_b, b) = pair
    assert (raw_a - raw_b).abs().max() > 1e-3
    assert (a - b).abs().max() < 1e-10


def test_every_weight_allocation_gives_the_same_function_and_another_skeleton_another_step():
    """spec 6.10: the new path values fix the function, the basis counts"""
    net = start([5, 4, 4, 3])
    x, y = batch(net)
    by_g = copy.deepcopy(net)
    backward(by_g, x, y)
    GSGD(by_g, lr=0.01).step()
    basis = basis_paths(net)
    v = path_values(by_g, basis).detach()
    # Another allocation: of all w with these values, the one nearest to w in logarithms.
    w = flat(net)
    change = torch.linalg.pinv(basis.T) @ (v.abs().log() - path_values(net, basis).abs().log())
    nearest = copy.deepcopy(net)
    nn.utils.vector_to_parameters((w * change.exp()).detach(), nearest.parameters())
    assert not close(flat(nearest), flat(by_g), 1e-4)
    assert close(path_values(nearest, basis), v)
    assert close(nearest(x), by_g(x))
    other = copy.deepcopy(net)
    backward(other, x, y)
    GSGD(other, lr=0.01, skeleton=Skeleton(other, choose="largest")).step()
    assert (other(x) - by_g(x)).abs().max() > 1e-5


@pytest.mark.covers("G2")
def test_the_smallest_net_by_hand():
    """spec 6.11: two inputs, one hidden node, two outputs; v4 = v2 v3 / v1 (paper, figure 1)"""
    net = models.mlp([2, 1, 2], bias=False, generator=torch.Generator()).double()
    with torch.no_grad():
        (
            net[0].weight.copy_(torch.tensor([[2.0, 3.0]])),
            net[2].weight.copy_(torch.tensor([[5.0], [7.0]])),
        )
    v1, v2, v3, v4 = path_values(net).tolist()
    assert (v1, v2, v3, v4) == (10.0, 15.0, 14.0, 21.0)  # by output, then by input
    assert v4 == v2 * v3 / v1
    # one input of (1, 1), loss = first output: dl/dv1 = dl/dv2 = 1 on the basis v1, v2, v3
    net(torch.ones(1, 2, dtype=torch.float64))[0, 0].backward()
    GSGD(net, lr=1.0).step()
    assert path_values(net).tolist() == pytest.approx([9.0, 14.0, 14.0, 14 * 14 / 9])
    assert net[0].weight.tolist() == [pytest.approx([1.8, 2.8])]
    assert net[2].weight.flatten().tolist() == pytest.approx([5.0, 7 / 0.9])
    assert path_norm(net).item() == pytest.approx(path_values(net).norm().item())


def test_a_zero_weight_is_legal_outside_the_skeleton():
    """spec 6.11"""
    net = start([3, 4, 4, 2])
    with torch.no_grad():
        net[0].weight[0, 1] = net[2].weight[1, 2] = net[4].weight[1, 0] = 0.0
    x, y = batch(net)
    expected, _ = brute_step(net, [perceptron_chain(net)], lambda o: cross_entropy(o, y), x, 0.01)
    backward(net, x, y)
    GSGD(net, lr=0.01).step()
    assert all(close(p, expected[name]) for name, p in net.named_parameters())
    assert net[0].weight[0, 1] != 0


@pytest.mark.parametrize("guard", [{}, {"max_ratio": 2.0}, {"max_ratio": 2.0, "refuse": True}])
@pytest.mark.parametrize(("layer", "entry"), [(0, (1, 1)), (2, (2, 2)), (4, (1, 3))])
def test_a_zero_skeleton_weight_is_refused_and_nothing_moves(layer, entry, guard):
    """spec 6.11"""
    net = start([3, 4, 4, 2])
    optimizer = GSGD(net, lr=0.01, momentum=0.9, **guard)
    losses(net, optimizer, 2)
    with torch.no_grad():
        net[layer].weight[entry] = 0.0
    backward(net, *batch(net))
    before, state = flat(net), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RuntimeError, match=r"GSGD: expected finite ratios .* layer '0'.* value is 0"
    ):
        optimizer.step()
    assert torch.equal(flat(net), before)
    _same_state(optimizer.state_dict(), state)
    with pytest.raises(ValueError, match=rf"other than 0, got 1 zeros in layer '{layer}'"):
        GSGD(net, lr=0.01)
    Skeleton(net).ones_()
    GSGD(net, lr=0.01)


def _same_state(a, b):
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert torch.equal(state["momentum_buffer"], b["state"][key]["momentum_buffer"])


# ---- 14: small and large steps ----


def test_a_small_step_lowers_the_loss_by_lr_times_the_squared_path_gradient():
    """spec 6.14"""
    net, lr = start([4, 5, 3, 2]), 1e-6
    x, y = batch(net)
    basis = basis_paths(net)
    v, before = path_values(net, basis).detach(), backward(net, x, y)
    GSGD(net, lr=lr).step()
    g = (v - path_values(net, basis).detach()) / lr
    assert (before - cross_entropy(net(x), y).item()) / lr == pytest.approx(
        (g @ g).item(), rel=1e-4
    )


def test_a_step_that_would_turn_a_path_round_is_refused_or_clipped():
    """spec 6.14"""
    net = start([3, 4, 4, 2], seed=1)
    x, y = batch(net, 1)
    backward(net, x, y)
    before, S = flat(net), net[0].weight[range(4), [0, 1, 2, 0]].clone()
    optimizer = GSGD(net, lr=100.0, momentum=0.5, refuse=True)
    with pytest.raises(RuntimeError, match=r"every ratio R of path values above zero, got -.* '0'"):
        optimizer.step()
    assert torch.equal(flat(net), before)
    assert not optimizer.state_dict()["state"]
    clipped = copy.deepcopy(net)
    backward(clipped, x, y)
    with pytest.raises(RuntimeError, match="every ratio R of path values above zero"):
        GSGD(clipped, lr=100.0, max_ratio=2.0, refuse=True).step()  # a sign, clipped or not
    GSGD(clipped, lr=100.0, max_ratio=2.0).step()
    R = (clipped[0].weight[range(4), [0, 1, 2, 0]] / S).detach()
    assert R.min().item() == pytest.approx(0.5)
    assert R.max() <= 2.0
    GSGD(net, lr=100.0).step()  # off by default: the sign turns
    assert (net[0].weight[range(4), [0, 1, 2, 0]] * S).min() < 0


def test_regauging_keeps_the_function_and_sets_the_free_set_to_one():
    net = start([4, 6, 3, 2])
    x, _ = batch(net)
    before, skeleton, w = net(x), Skeleton(net), flat(net)
    skeleton.regauge_()
    assert close(net(x), before)
    assert not close(flat(net), w, 0.1)
    F = torch.cat([layer.at(edges) for layer, edges in skeleton.edges(heads=False)])
    assert close(F.abs(), torch.ones_like(F))


@pytest.mark.parametrize(("layer", "cut"), [(0, (slice(2, 3),)), (2, (slice(None), 2))])
def test_regauging_refuses_a_node_that_is_cut_off_and_nothing_changes(layer, cut):
    net = start([4, 6, 3, 2])
    skeleton = Skeleton(net)
    with torch.no_grad():
        net[layer].weight[cut] = 0.0
    before, chosen = flat(net), skeleton.chosen()
    with pytest.raises(ValueError, match=rf"regauge_: .* other than 0, .* layer '{layer}'"):
        skeleton.regauge_()
    assert torch.equal(flat(net), before)
    _same_edges(skeleton.chosen(), chosen)


def _same_edges(a, b):
    for p, q in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(p[0] + p[1], q[0] + q[1], strict=True))


def test_the_largest_skeleton_is_the_best_of_all_and_no_rescaling_changes_it():
    net = perceptron([3, 4, 2, 3])
    skeleton = Skeleton(net, choose="largest")
    _, _, S, T = skeleton.chains[0].products()
    W = [net[i].weight.detach().abs() for i in (0, 2, 4)]
    assert close(S[1].abs(), (W[1] * W[0].amax(dim=1)).amax(dim=1))
    assert close(T[0].abs(), (W[1] * W[2].amax(dim=0)[:, None]).amax(dim=0))
    chosen = skeleton.chosen()
    rescale_(net, factors(net))
    for a, b in zip(chosen, Skeleton(net, choose="largest").chosen(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a[0] + a[1], b[0] + b[1], strict=True))
    Skeleton(net).ones_()  # equals, which a rescaling rounds in one way or another
    chosen = Skeleton(net, choose="largest").chosen()
    rescale_(net, factors(net))
    for a, b in zip(chosen, Skeleton(net, choose="largest").chosen(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a[0] + a[1], b[0] + b[1], strict=True))
    basis = basis_paths(net, skeleton)
    A = structure_matrix(net)
    assert {tuple(c) for c in basis.T.tolist()} <= {tuple(c) for c in A.T.tolist()}
    assert torch.linalg.matrix_rank(basis) == basis.shape[1]


# ---- baselines, the optimizer as torch's ----


@pytest.mark.covers("G5")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", SHAPES[:6], ids=str)
def test_path_sgd_divides_by_the_squared_paths_through_an_edge(widths, bias):
    net = perceptron(widths, bias)
    backward(net, *batch(net))
    A, w = structure_matrix(net), flat(net)
    squares = path_values(net, A).detach() ** 2
    kappa = (A @ squares) / w**2  # over paths through e, without e
    delta = torch.cat([p.grad.flatten() for p in net.parameters()])
    PathSGD(net, lr=0.1).step()
    assert close(flat(net), w - 0.1 * delta / kappa)
    assert close(path_norm(net), path_values(net).norm())


def test_path_sgd_leaves_a_cut_off_node_alone():
    net = perceptron([2, 3, 2])
    with torch.no_grad():
        net[2].weight[:, 0] = 0.0
    backward(net, *batch(net))
    before = net[0].weight[0].clone()
    PathSGD(net, lr=0.1).step()
    assert torch.equal(net[0].weight[0], before)
    assert flat(net).isfinite().all()


def test_enorm_balances_in_cycles_and_scales_momentum_like_a_gradient():
    net = perceptron([3, 4, 4, 2])
    x, y = batch(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    backward(net, x, y)
    optimizer.step()
    before = net(x)
    enorm_(net, optimizer)
    assert close(net(x), before)
    backward(net, x, y)
    for p in net.parameters():
        assert close(optimizer.state[p]["momentum_buffer"], p.grad)
    for _ in range(200):
        enorm_(net)
    assert close(net[0].weight.norm(dim=1), net[2].weight.norm(dim=0), 1e-8)
    assert close(net[2].weight.norm(dim=1), net[4].weight.norm(dim=0), 1e-8)
    enorm_(net, torch.optim.SGD(net.parameters(), lr=0.0))


def test_unit_norms_and_weight_norm_keep_the_function():
    net = perceptron([3, 4, 4, 2])
    x, y = batch(net)
    before = net(x)
    unit_norm_(net)
    assert close(net(x), before)
    assert close(net[2].weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
    weight_norm_(net)
    assert close(net(x), before)
    assert len(list(net.parameters())) == 3 * 2 + 2
    first = losses(net, torch.optim.SGD(net.parameters(), lr=0.01))
    assert first[-1] < first[0]
    with pytest.raises(ValueError, match="got layer '0': ParametrizedLinear"):
        Skeleton(net)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"regauge": 3}])
def test_a_stored_state_continues_where_it_stopped(options, tmp_path):
    net = start([4, 6, 3, 2])
    optimizer = GSGD(net, lr=0.01, **options)
    losses(net, optimizer, 5)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    expected = losses(net, optimizer, 5)
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    again = start([4, 6, 3, 2], seed=1)
    resumed = GSGD(again, lr=0.5)
    again.load_state_dict(stored[0])
    resumed.load_state_dict(stored[1])
    assert torch.equal(losses(again, resumed, 5), expected)


def test_a_resumed_frozen_run_freezes_the_same_weights():
    net = start([4, 6, 3, 2])
    options = {"momentum": 0.9}
    largest = Skeleton(net, choose="largest")
    optimizer = FrozenSkeletonSGD(net, lr=0.01, skeleton=largest, **options)
    losses(net, optimizer, 5)
    stored = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    expected = losses(net, optimizer, 5)
    again = start([4, 6, 3, 2], seed=1)
    resumed = FrozenSkeletonSGD(again, lr=0.5, **options)
    again.load_state_dict(stored[0])
    resumed.load_state_dict(stored[1])
    assert torch.equal(losses(again, resumed, 5), expected)
    _same_edges(resumed.skeleton.chosen(), largest.chosen())


@pytest.mark.parametrize("kind", [GSGD, FrozenSkeletonSGD])
def test_a_state_that_does_not_fit_is_refused_whole(kind):
    net = start([4, 6, 3, 2])
    optimizer = kind(net, lr=0.01, momentum=0.9)
    losses(net, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    largest = copy.deepcopy(before) | {"skeleton": Skeleton(net, choose="largest").chosen()}
    other = kind(start([4, 3, 6, 2]), lr=0.5).state_dict()
    swapped = [(tails, heads) for heads, tails in before["skeleton"]]
    bad = [
        (other, "choose_: expected an edge into and one out of each of 9 hidden nodes"),
        (largest | {"skeleton": swapped}, "choose_: expected an edge into"),
        (largest | {"param_groups": []}, "different number of parameter groups"),
        ({k: v for k, v in largest.items() if k != "skeleton"}, "expected 'skeleton' in the state"),
    ]
    for state, message in bad:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        _same_state(optimizer.state_dict(), before)
        _same_edges(optimizer.skeleton.chosen(), before["skeleton"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"GSGD: expected lr in \[0, inf\), got -1.0"),
        ({"lr": math.inf}, r"GSGD: expected lr in \[0, inf\), got inf"),
        ({"momentum": 1.0}, r"GSGD: expected momentum in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "GSGD: expected weight_decay in"),
        ({"max_ratio": 0.5}, r"GSGD: expected max_ratio in \[1, inf\), got 0.5"),
        ({"max_ratio": math.inf}, r"GSGD: expected max_ratio in \[1, inf\), got inf"),
        ({"regauge": 0}, "GSGD: expected regauge of at least 1, got 0"),
    ],
)
def test_an_option_outside_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GSGD(perceptron([3, 4, 2]), **options)


def test_skeletons_and_factors_are_checked(unchecked_shapes):
    net = perceptron([3, 4, 2])
    with pytest.raises(ValueError, match="expected batch_norm to be one of 'gamma', 'paper'"):
        Skeleton(net, batch_norm="beta")
    with pytest.raises(ValueError, match="expected choose to be one of 'modulo', 'largest'"):
        Skeleton(net, choose="best")
    with pytest.raises(ValueError, match="rescale_: expected 1 tensors of factors, got 2"):
        rescale_(net, [torch.ones(4), torch.ones(2)])
    with pytest.raises(ValueError, match=r"factors of layer '0' of shape \(4,\), got \(3,\)"):
        rescale_(net, [torch.ones(3)])
    before = flat(net)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rescale_: expected positive finite factors, got"):
            rescale_(net, [torch.tensor([1.0, 1.0, 1.0, bad])])
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("kind", [GSGD, PathSGD])
def test_a_missing_gradient_is_refused_before_anything_moves(kind):
    net = perceptron([3, 4, 2])
    backward(net, *batch(net))
    net[2].bias.grad = None
    before = flat(net)
    with pytest.raises(
        RuntimeError, match=r"expected a gradient for every parameter, got none for '2\.bias'"
    ):
        kind(net, lr=0.1).step()
    assert torch.equal(flat(net), before)


def test_steps_take_closures_and_schedulers(device, dtype):
    for kind in (GSGD, FrozenSkeletonSGD, PathSGD):
        net = start([4, 6, 3, 2])
        optimizer = kind(net, lr=0.05)
        net.to(device, dtype)  # after the optimizer was made
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        x, y = batch(start([4, 6, 3, 2]))
        x, y = x.to(device, dtype), y.to(device)

        def closure(net=net, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            return loss

        values = []
        for _ in range(20):
            values.append(optimizer.step(closure).item())
            scheduler.step()
        assert values[-1] < values[0]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_gsgd_trains_digits_with_fit():
    net = models.mlp([64, 32, 32, 10], generator=train.generator(0, "init"))
    Skeleton(net).ones_()
    history = train.fit(
        net, data.load("digits"), GSGD(net, lr=0.1), 5, 32, generator=train.generator(0, "data")
    )
    assert history.test[-1].accuracy > 0.9


def test_the_stored_benchmark_keeps_the_promised_ratio():
    """A whole step of G-SGD at most 1.10 times one of SGD, on both nets."""
    record = Record.load(Path(__file__).parents[1] / "benchmarks" / "results" / "gsgd.json")
    middle = {name: statistics.median(times) for name, times in record.config["ms"].items()}
    for case in ("perceptron", "plain34"):
        ratio = middle[f"{case}/gsgd/step"] / middle[f"{case}/sgd/step"]
        if "interval" in record.config:
            low, high = record.config["interval"][case]
            assert low <= ratio <= high
        assert ratio == pytest.approx(record.values[f"{case}_gsgd_over_sgd"][0], rel=1e-3)
        assert ratio <= 1.10


@pytest.mark.covers("G5")
def test_the_reduced_cifar_records_have_every_control_at_its_own_rate():
    results = Path(__file__).parents[1] / "experiments" / "results" / "gsgd"
    for method in ("sgd", "sgd-skeleton", "frozen", "gsgd-paper", "gsgd"):
        record = Record.load(results / f"cifar_reduced_plain8_{method}.json")
        assert len(record.seeds) == 3
        assert record.config["tuning_seed"] not in record.seeds
        sweep = {float(k): v for k, v in record.config["validation_accuracy"].items()}
        best = max(sorted(sweep), key=sweep.get)
        assert best == pytest.approx(record.config["lr"], rel=0.01)
        assert min(sweep) < best < max(sweep)
        assert (record.config["schedule"], record.config["net"]) == ("same", "plain8")


# ---- beyond feed-forward nets ----


@pytest.mark.covers("G6")
def test_a_recurrent_node_and_an_attention_head_may_be_rescaled_too():
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(5, 2, 3, generator=g).double(), 7.0
    rnn, out = nn.RNN(3, 4, nonlinearity="relu").double(), nn.Linear(4, 2).double()
    head = nn.MultiheadAttention(3, 1, bias=False).double()
    with torch.no_grad():
        for p in (*rnn.parameters(), *out.parameters(), *head.parameters()):
            p.copy_(torch.randn(p.shape, generator=g))
        before = out(rnn(x)[0])
        for p in (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0):
            p[1] *= c  # all that comes into hidden node 1, its own past included
        assert not close(out(rnn(x)[0]), before)
        rnn.weight_hh_l0[:, 1] /= c
        out.weight[:, 1] /= c
        assert close(out(rnn(x)[0]), before)
        before = head(x, x, x)[0]
        query, key, value = head.in_proj_weight.split(3)
        query *= c
        assert not close(head(x, x, x)[0], before)
        key /= c  # scores are products of the two
        value *= c
        head.out_proj.weight /= c
        assert close(head(x, x, x)[0], before)
