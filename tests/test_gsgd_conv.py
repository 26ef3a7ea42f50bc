"""Skeletons and G-SGD on convolutions, residual blocks and batch norm; numbers as in test_gsgd."""

import copy

import pytest
import torch
from gsgd_brute import brute_step
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import models, train
from coursekit.gsgd import (
    GSGD,
    FrozenSkeletonSGD,
    PathSGD,
    Skeleton,
    basis_paths,
    enorm_,
    path_norm,
    path_values,
    rescale_,
    structure_matrix,
)


def randomize_(net, seed=0):
    """Weights ±[0.5, 1.5] / √fan_in in float64, skeletons ±[0.5, 1.5]: values far from 0."""
    draw = train.generator(seed, "weights")
    net.double()
    signs = {}
    with torch.no_grad():
        for name, p in net.named_parameters():
            size = torch.rand(p.shape, generator=draw, dtype=torch.float64) + 0.5
            signs[name] = size * (2 * torch.randint(2, p.shape, generator=draw) - 1)
            p.copy_(signs[name] * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.5))
        for layer, edges in Skeleton(net).edges():
            layer.weight.view(-1)[edges] = signs[f"{layer.name}.weight"].view(-1)[edges]
    return net


def tiny(kind, seed=0):
    """Small nets, with their chains written by hand and the size of their images."""
    draw = train.generator(seed, "init")
    conv, plain, relu = nn.Conv2d, {"norm": nn.Identity, "generator": draw}, nn.ReLU()
    if kind == "stride, padding and max pool":
        net = nn.Sequential(
            *(conv(2, 3, 3, stride=2, padding=1), relu, nn.MaxPool2d(2)),
            *(conv(3, 4, 3, padding=1, bias=False), relu, nn.Flatten(), nn.Linear(16, 3)),
        )
        chains = [[("0.weight", "0.bias", 2), ("3.weight", None, 3), ("6.weight", "6.bias", 4)]]
    elif kind == "average pool and even kernels":
        net = nn.Sequential(
            *(
                conv(2, 4, 2),
                nn.LeakyReLU(0.1),
                nn.AvgPool2d(2, stride=1),
                conv(4, 2, (1, 2)),
                relu,
            ),
            *(conv(2, 3, 2, dilation=2), relu, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(3, 3, bias=False),
        )
        chains = [[("0.weight", "0.bias", 2), ("3.weight", "3.bias", 4), ("5.weight", "5.bias", 2),
                   ("9.weight", None, 3)]]  # fmt: skip
    elif kind == "nested":
        net = nn.Sequential(
            nn.Sequential(conv(2, 3, 1), nn.Dropout(0.0)), nn.Sequential(relu, conv(3, 2, 8)),
            nn.Flatten(), nn.PReLU(), nn.Linear(2, 3),
        )  # fmt: skip
        chains = [[("0.0.weight", "0.0.bias", 2), ("1.1.weight", "1.1.bias", 3),
                   ("4.weight", "4.bias", 2)]]  # fmt: skip
    elif kind == "plain":
        net = models.plain_cifar(8, 3, width=2, **plain)
        names = ["0", *(f"{i}.conv{k}" for i in (3, 4, 5) for k in (1, 2))]
        ins = [3, 2, 2, 2, 4, 4, 8]
        chains = [[(f"{n}.weight", None, i) for n, i in zip(names, ins, strict=True)]]
        chains[0].append(("8.weight", "8.bias", 8))
    else:
        net = models.resnet_cifar(8, 3, width=2, **plain)
        chains = [
            [(f"{i}.conv1.weight", None, n), (f"{i}.conv2.weight", None, k)]
            for i, n, k in [(3, 2, 2), (4, 2, 4), (5, 4, 8)]
        ]
    x = torch.randn(4, 3 if "weight" in chains[0][0] or kind in ("plain", "residual") else 2, 8, 8,
                    generator=draw, dtype=torch.float64)  # fmt: skip
    return randomize_(net, seed), chains, x, torch.randint(3, (4,), generator=draw)


KINDS = [
    "stride, padding and max pool", "average pool and even kernels", "nested", "plain", "residual",
]  # fmt: skip


def hidden(net, **options):
    skeleton = Skeleton(net, **options)
    return [len(group.head) for chain in skeleton.chains for group in chain.groups]


def factors(net, sigma=0.5, **options):
    draw = train.generator(0, "factors")
    return [
        (sigma * torch.randn(n, generator=draw, dtype=torch.float64)).exp()
        for n in hidden(net, **options)
    ]


def losses(net, optimizer, x, y, steps=20):
    out = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return torch.tensor(out)


def close(a, b, within=1e-11):
    return bool(((a - b).abs() <= within * b.abs().clamp(min=1)).all())


# ---- convolutions ----


@pytest.mark.covers("G3")
@pytest.mark.covers("G4")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_maps_is_gradient_descent_on_the_paths_of_the_multigraph(kind, seed):
    """spec 6.12"""
    net, chains, x, y = tiny(kind, seed)
    lr = 1e-5
    expected, ratio = brute_step(net, chains, lambda out: cross_entropy(out, y), x, lr)
    assert ratio > 0.2
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses(net, GSGD(net, lr=lr), x, y, 1)
    assert any(not close(p, before[name], 1e-9) for name, p in net.named_parameters())
    for name, p in net.named_parameters():
        assert close(p, expected[name]), name


@pytest.mark.covers("G3")
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_hidden_nodes(kind):
    """spec 6.12: H counts maps, m kernel entries; rank m - H"""
    net, chains, _, _ = tiny(kind)
    sizes = {name: p for name, p in net.named_parameters()}
    skeleton = Skeleton(net)
    assert skeleton.H == sum(len(sizes[name]) for chain in chains for name, _, _ in chain[:-1])
    if kind in ("plain", "residual"):
        return  # too many paths to write down
    assert skeleton.m == sum(p.numel() for p in net.parameters()) - (kind == "nested")
    basis = basis_paths(net)
    assert torch.linalg.matrix_rank(basis) == basis.shape[1] == skeleton.m - skeleton.H
    if kind == "nested":
        return
    # One tap for all keeps the enumeration small: a kernel's other entries are parallel edges.
    small = nn.Sequential(nn.Conv2d(2, 3, (1, 2)), nn.ReLU(), nn.Conv2d(3, 2, (2, 1)), nn.Flatten(),
                          nn.ReLU(), nn.Linear(4, 2)).double()  # fmt: skip
    A, skeleton = structure_matrix(small), Skeleton(small)
    assert A.shape[1] == 2 * 2 * 3 * 2 * 2 * 2 * 2 + 3 * 2 * 2 * 2 * 2 + 2 * 2 * 2 + 2
    assert torch.linalg.matrix_rank(A) == skeleton.m - skeleton.H
    columns = {tuple(c) for c in A.T.tolist()}
    assert {tuple(c) for c in basis_paths(small).T.tolist()} <= columns
    assert close(path_norm(small), path_values(small).norm())


@pytest.mark.covers("G1")
@pytest.mark.parametrize("kind", KINDS)
def test_a_rescaling_of_maps_leaves_the_function(kind):
    """spec 6.12, and 6.13: the inner maps of residual blocks"""
    net, _, x, _ = tiny(kind)
    twin = copy.deepcopy(net)
    rescale_(twin, factors(net))
    assert close(twin(x), net(x))
    enorm_(twin)
    assert close(twin(x), net(x))
    assert close(path_norm(twin), path_norm(net))


@pytest.mark.covers("G1")
@pytest.mark.parametrize("make", [GSGD, PathSGD, FrozenSkeletonSGD])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_from_rescaled_maps_agree(kind, make):
    """spec 6.9"""
    net, _, x, y = tiny(kind)
    Skeleton(net).ones_()
    twin = copy.deepcopy(net)
    rescale_(twin, factors(net))
    a, b = (losses(n, make(n, lr=1e-3), x, y) for n in (net, twin))
    assert a[-1] != a[0]
    gap = (a - b).abs().max()
    assert gap > 1e-6 if make is FrozenSkeletonSGD else gap < 1e-10


def test_a_perceptron_is_a_one_by_one_convolution_on_one_pixel():
    """spec 6.12"""
    perceptron = models.mlp([3, 4, 2, 5], generator=train.generator(0, "init")).double()
    layers = [m for m in perceptron if isinstance(m, nn.Linear)]
    convs = [nn.Conv2d(m.in_features, m.out_features, 1).double() for m in layers]
    for a, b in zip(convs, layers, strict=True):
        a.load_state_dict({"weight": b.weight.data[..., None, None], "bias": b.bias.data})
    net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.Flatten())
    x, y = torch.randn(8, 3, generator=train.generator(0, "x")).double(), torch.arange(8) % 5
    options = {"lr": 1e-4, "momentum": 0.5, "weight_decay": 0.1}
    a = losses(perceptron, GSGD(perceptron, **options), x, y, 5)
    b = losses(net, GSGD(net, **options), x[..., None, None], y, 5)
    assert close(b, a)
    for p, q in zip(net.parameters(), perceptron.parameters(), strict=True):
        assert close(p.flatten(), q.flatten())


def test_regauging_a_convolutional_net_keeps_its_function():
    net, _, x, _ = tiny(KINDS[0])
    before, skeleton = net(x), Skeleton(net)
    skeleton.regauge_()
    assert close(net(x), before)
    S, T = skeleton.chains[0].products()[2:]
    assert close(T[0].abs(), torch.ones(3).double())
    assert S[0].abs().min() > 0


# ---- residual streams ----


def test_a_whole_residual_stream_can_be_rescaled_too():
    """spec 6.13: the paper says that there is no symmetry across blocks; without norms there is"""
    net = models.resnet_cifar(14, 3, width=2, norm=nn.Identity, generator=torch.Generator())
    x = torch.randn(2, 3, 8, 8, generator=train.generator(0, "x"))
    x, net = x.double(), net.double()
    before = net(x)
    with torch.no_grad():
        net[0].weight[0] *= 3  # the stem writes the stream of the first stage,
        for block in net[3:5]:
            block.conv2.weight[0] *= 3  # so do its blocks;
            block.conv1.weight[:, 0] /= 3  # they read it,
        net[5].conv1.weight[:, 0] /= 3  # and so does the next stage.
        net[5].shortcut[0].weight[:, 0] /= 3
    assert close(net(x), before)
    assert Skeleton(net).H == sum(block.conv1.weight.shape[0] for block in net[3:9])


@pytest.mark.parametrize(
    ("make", "H", "edges"),
    [(models.plain_cifar, 6592, 21_086_208), (models.resnet_cifar, 3776, 21_086_208)],
)
def test_the_papers_nets_have_as_many_maps_and_weights_as_its_code_quotients(make, H, edges):
    net = make(34, width=4, generator=train.generator(0, "init"))
    skeleton = Skeleton(net, batch_norm="paper")
    assert skeleton.H == H // 16  # 64 maps in the first stage there, 4 here
    inner = [c for c in skeleton.chains if c.groups]
    assert sum(la.weight.numel() for c in inner for la in c.layers) == edges // 256
    assert skeleton.H / (edges / 16) == pytest.approx(H / edges)


# ---- batch norm ----


def normed(seed=0):
    net = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)),
    )
    draw = train.generator(seed, "x")
    x = torch.randn(8, 2, 5, 5, generator=draw, dtype=torch.float64)
    return randomize_(net, seed), x, torch.randint(3, (8,), generator=draw)


@pytest.mark.covers("G1")
def test_around_batch_norm_gamma_is_the_edge_and_the_convolution_before_it_is_not():
    """spec 6.13"""
    net, x, _ = normed()
    before, c = net(x), torch.tensor([2.0, 0.5, 3.0]).double()
    wrong, right, alone = (copy.deepcopy(net) for _ in range(3))
    with torch.no_grad():
        wrong[0].weight.mul_(c[:, None, None, None])
        wrong[3].weight.div_(c[:, None, None])
        right[1].weight.mul_(c), right[1].bias.mul_(c), right[3].weight.div_(c[:, None, None])
        alone[0].weight.mul_(c[:, None, None, None])
    assert (wrong(x) - before).abs().max() > 0.1
    assert close(right(x), before)
    assert close(alone(x), before, 1e-3)  # but for batch norm's eps
    by_rescale = copy.deepcopy(net)
    rescale_(by_rescale, [c, torch.ones(4).double()])
    for p, q in zip(by_rescale.parameters(), right.parameters(), strict=True):
        assert torch.equal(p, q)
    paper = copy.deepcopy(right)
    rescale_(paper, factors(paper, batch_norm="paper"), batch_norm="paper")
    assert (paper(x) - before).abs().max() > 0.1


@pytest.mark.covers("G4")
def test_with_gamma_as_the_edge_a_step_is_gradient_descent_on_path_values():
    net, x, y = normed()
    chains = [
        [("1.weight", "1.bias", 1), ("3.weight", "3.bias", 3)],
        [("4.weight", "4.bias", 1), ("7.weight", "7.bias", 4)],
    ]
    expected, ratio = brute_step(net, chains, lambda out: cross_entropy(out, y), x, 1e-3)
    assert ratio > 0.2
    losses(net, GSGD(net, lr=1e-3), x, y, 1)
    for name, p in net.named_parameters():
        assert close(p, expected[name]), name
    twin = copy.deepcopy(net)
    rescale_(twin, factors(net))
    a, b = (losses(n, GSGD(n, lr=1e-3), x, y) for n in (net, twin))
    assert (a - b).abs().max() < 1e-10


def test_the_papers_treatment_of_batch_norm_is_what_its_label_says():
    """Gradients times the norm of a map's incoming weights, in the space of the convolutions."""
    net, x, y = normed()
    net = nn.Sequential(*net[:4], nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)).double()
    net[3] = nn.Conv2d(3, 4, 1).double()
    net[6] = nn.Linear(100, 3).double()
    randomize_(net)
    skeleton = Skeleton(net, batch_norm="paper")
    assert [[la.name for la in c.layers] for c in skeleton.chains] == [["0", "3", "6"]]
    assert [la.normed for la in skeleton.chains[0].layers] == [True, True, False]
    assert skeleton.H == 7
    assert {id(p) for p in skeleton.rest} == {id(p) for i in (1, 4) for p in net[i].parameters()}
    cross_entropy(net(x), y).backward()
    W = [net[i].weight.detach().clone() for i in (0, 3, 6)]
    D = [net[i].weight.grad.clone() for i in (0, 3, 6)]
    for i in (0, 1):
        D[i] *= W[i].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    lr, beta = 1e-4, net[1].bias - 1e-4 * net[1].bias.grad
    GSGD(net, lr=lr, skeleton=skeleton).step()
    assert close(net[1].bias, beta)
    # The skip weights of the first layer: w - lr δ / T², with T by hand.
    head = W[2].view(3, 4, 25)[torch.arange(4) % 3, torch.arange(4), 12]
    T = W[1][torch.arange(3), torch.arange(3), 0, 0] * head[:3]
    skip = torch.ones_like(W[0], dtype=torch.bool)
    skip[torch.arange(3), torch.arange(3) % 2, 1, 1] = False
    expected = W[0] - lr * D[0] / T.view(-1, 1, 1, 1) ** 2
    assert close(net[0].weight[skip], expected[skip])
    # A head of the first layer: R = 1 - lr (w δ - Σ of what the skeleton brings on) / v².
    s, j = W[0][0, 0, 1, 1], 0
    flow = (W[1][:, j] * D[1][:, j]).sum() - W[1][j, j, 0, 0] * D[1][j, j, 0, 0]
    flow += (W[2] * D[2]).view(3, 4, 25)[:, j].sum() - head[j] * D[2].view(3, 4, 25)[j, j, 12]
    R = 1 - lr * (s * D[0][0, 0, 1, 1] - flow) / (s * T[0]) ** 2
    assert close(net[0].weight[0, 0, 1, 1], s * R)


@pytest.mark.parametrize("make", [models.plain_cifar, models.resnet_cifar])
def test_cifar_nets_with_batch_norm_train_in_either_treatment(make):
    for batch_norm in ("gamma", "paper"):
        net = make(8, width=4, generator=train.generator(0, "init"))
        x = torch.randn(16, 3, 16, 16, generator=train.generator(0, "x"))
        skeleton = Skeleton(net, batch_norm=batch_norm).ones_()
        y = torch.arange(16) % 10
        out = losses(net, GSGD(net, lr=0.05, skeleton=skeleton), x, y)
        assert out[-1] < 0.95 * out[0]


def test_batch_norm_without_gamma_is_no_edge():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(),
        nn.Linear(5, 2),
    )  # fmt: skip
    assert [len(chain.layers) for chain in Skeleton(net).chains] == [1, 2]
    assert Skeleton(net).H == 5


def test_a_gamma_of_zero_is_refused():
    net, _, _ = normed()
    nn.init.zeros_(net[1].weight)
    with pytest.raises(
        ValueError, match="GSGD: expected skeleton weights other than 0, got 3 .* '1'"
    ):
        GSGD(net)


# ---- what is not supported ----


class Custom(nn.Module):
    def forward(self, x):
        return x


SHARED = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(2, 4, 1, groups=2)], r"got layer '1': Conv2d\(2, 4, .*groups=2"),
        ([nn.ConvTranspose2d(2, 4, 1)], r"got layer '1': ConvTranspose2d"),
        ([nn.LayerNorm(2)], r"got layer '1': LayerNorm"),
        ([nn.Sequential(nn.ReLU(), nn.LSTM(2, 2))], r"got layer '1\.1': LSTM"),
        ([Custom()], r"got layer '1': Custom"),
        ([SHARED, SHARED], r"got layer '2': Linear"),
        ([nn.Flatten(), nn.Linear(5, 2)], r"got layer '2': Linear\(in_features=5"),
        ([nn.Softmax(dim=1)], r"got layer '1': Softmax"),
        ([nn.Conv2d(2, 3, 1)], r"Flatten between maps and units, got layer '1': Conv2d"),
        ([nn.Flatten(), nn.Linear(4, 2)], r"got layer '2': Linear\(in_features=4"),  # of 2 units
        ([nn.MaxPool2d(1)], r"got layer '1': MaxPool2d"),  # over units
    ],
)
def test_a_layer_that_is_not_supported_is_named(layers, message):
    net = nn.Sequential(nn.Linear(2, 2), *layers)
    for use in (GSGD, PathSGD, FrozenSkeletonSGD, path_norm, enorm_):
        with pytest.raises(ValueError, match=message):
            use(net)


@pytest.mark.parametrize("between", [[], [nn.Flatten(2)], [nn.AvgPool2d(1)]])
def test_maps_that_are_not_flattened_do_not_meet_a_linear_layer(between):
    """It acts on the columns of an image: to rescale maps as if it read them is wrong."""
    layers = [nn.Conv2d(1, 2, 1), nn.ReLU(), *between, nn.Linear(4, 3)]
    for net in (nn.Sequential(*layers), nn.Sequential(layers[0], nn.BatchNorm2d(2), *layers[1:])):
        with pytest.raises(
            ValueError, match=rf"maps and units, got layer '{len(net) - 1}': Linear"
        ):
            Skeleton(net)


def test_a_bad_layer_inside_a_block_is_named():
    net = models.resnet_cifar(8, width=2, generator=torch.Generator())
    net[3].norm1 = nn.GroupNorm(1, 2)
    with pytest.raises(ValueError, match=r"got layer '3\.norm1': GroupNorm"):
        Skeleton(net)


def test_modules_of_a_block_pair_up():
    """The chains of a residual net without norms, by name."""
    net = models.resnet_cifar(8, width=2, norm=nn.Identity, generator=torch.Generator())
    names = [[layer.name for layer in chain.layers] for chain in Skeleton(net).chains]
    blocks = [[f"{i}.conv1", f"{i}.conv2"] for i in (3, 4, 5)]
    assert names == [["0"], *blocks, ["8"]]
    assert len(Skeleton(net).rest) == 2  # the projections
