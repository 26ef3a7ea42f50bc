"""Networks: sizes counted by hand, outputs computed by hand, starts equal to torch's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coursekit import models
from coursekit.train import generator

INIT = generator(0, "init")


def count(net):
    return sum(p.numel() for p in net.parameters())


def output_shape(net, *shape):
    return tuple(net(torch.zeros(shape)).shape)


# ---- mlp ----


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.booleans())
def test_an_mlp_has_the_weights_of_its_widths(sizes, bias):
    net = models.mlp(sizes, bias=bias, generator=INIT)
    pairs = list(zip(sizes, sizes[1:], strict=False))
    assert count(net) == sum(n * m + bias * m for n, m in pairs)
    assert output_shape(net, 3, sizes[0]) == (3, sizes[-1])
    assert len(net) == 2 * len(pairs) - 1  # no activation after the last layer


def test_an_mlp_computes_what_numpy_computes(dtype):
    net = models.mlp([5, 4, 3], nn.Tanh, generator=INIT).to(dtype)
    w1, b1, w2, b2 = (p.detach().numpy() for p in net.parameters())
    x = np.random.default_rng(0).standard_normal((7, 5)).astype(w1.dtype)
    expected = np.tanh(x @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_same_draw_gives_torchs_own_start():
    """Torch draws from its global state, ours from a generator with the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
        torch.manual_seed(7)
        conv = nn.Conv2d(3, 8, 3)
    ours = models.mlp([20, 30, 5], generator=torch.Generator().manual_seed(7))
    cnn = models.small_cnn((3, 8, 8), width=8, generator=torch.Generator().manual_seed(7))
    pairs = [*zip(ours.parameters(), theirs.parameters(), strict=True)]
    for own, torchs in [*pairs, (cnn[0].weight, conv.weight), (cnn[0].bias, conv.bias)]:
        torch.testing.assert_close(own, torchs, rtol=1e-6, atol=0)


def test_weights_and_biases_are_uniform_up_to_one_over_root_fan_in():
    layer = models.mlp([400, 500], generator=INIT)[0]
    for parameter, tolerance in ((layer.weight, 0.01), (layer.bias, 0.15)):
        assert parameter.abs().max() <= 1 / 20
        assert parameter.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=tolerance)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([5], ValueError, r"^mlp: expected at least two sizes, got \[5\]$"),
        ([5, 0, 2], ValueError, r"^mlp: expected sizes of at least 1, got 0$"),
        ([5, 2.5], TypeError, r"^mlp: expected sizes as an integer, got 2.5$"),
    ],
)
def test_an_mlp_refuses_widths_that_make_no_network(sizes, error, message):
    with pytest.raises(error, match=message):
        models.mlp(sizes, generator=INIT)


# ---- small_cnn ----


@pytest.mark.parametrize(
    ("image", "width", "flat"), [((1, 28, 28), 16, 32 * 49), ((3, 32, 32), 8, 16 * 64)]
)
def test_a_small_cnn_has_the_weights_counted_by_hand(image, width, flat):
    net = models.small_cnn(image, 10, width=width, generator=INIT)
    first = width * (9 * image[0] + 1)
    second = 2 * width * (9 * width + 1)
    assert count(net) == first + second + 10 * (flat + 1)
    assert output_shape(net, 2, *image) == (2, 10)


def test_a_small_cnn_refuses_an_image_that_pools_to_nothing():
    with pytest.raises(ValueError, match=r"^small_cnn: expected image side of at least 4, got 3$"):
        models.small_cnn((1, 3, 8), generator=INIT)


# ---- CIFAR nets ----


def cifar_count(blocks, width, *, shortcut, classes=10):
    """Weights of stem, blocks, projections and head; a norm has two numbers a map."""

    def conv(fan_in, fan_out, size):
        return fan_in * fan_out * size**2 + 2 * fan_out

    total, maps = conv(3, width, 3), width
    for stage, number in enumerate(blocks):
        out = width * 2**stage
        total += conv(maps, out, 3) + (2 * number - 1) * conv(out, out, 3)
        total += conv(maps, out, 1) if shortcut and stage else 0
        maps = out
    return total + classes * (maps + 1)


@pytest.mark.parametrize(
    ("make", "depth", "blocks", "width", "known"),
    [
        (models.resnet_cifar, 20, (3, 3, 3), 16, 272_474),
        (models.plain_cifar, 20, (3, 3, 3), 16, 269_722),
        (models.resnet_cifar, 32, (5, 5, 5), 16, None),
        (models.resnet_cifar, 18, (2, 2, 2, 2), 64, 11_173_962),
        (models.resnet_cifar, 34, (3, 4, 6, 3), 64, 21_282_122),
        (models.plain_cifar, 34, (3, 4, 6, 3), 64, None),
    ],
)
def test_a_cifar_net_has_the_weights_counted_by_hand(make, depth, blocks, width, known):
    net = make(depth, generator=INIT)
    expected = cifar_count(blocks, width, shortcut=make is models.resnet_cifar)
    assert count(net) == expected
    assert known in (expected, None)
    three_by_three = [m for m in net.modules() if getattr(m, "kernel_size", 0) == (3, 3)]
    assert len(three_by_three) + 1 == depth  # the layers that give the net its name


def test_resnet_20_has_65_parameter_tensors():
    assert len(list(models.resnet_cifar(20, generator=INIT).parameters())) == 65


def test_plain_34_has_the_kernel_entries_of_the_gsgd_study():
    """21.1 million, in stages of 6, 8, 12 and 6 convolutions."""
    net = models.plain_cifar(34, generator=INIT)
    kernels = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.weight.numel() for m in kernels) == 21_087_936
    widths = [m.out_channels for m in kernels[1:]]
    assert [widths.count(w) for w in (64, 128, 256, 512)] == [6, 8, 12, 6]


@pytest.mark.parametrize("make", [models.resnet_cifar, models.plain_cifar])
@pytest.mark.parametrize("depth", [8, 18])
def test_a_cifar_net_gives_one_row_of_logits_an_image(make, depth):
    net = make(depth, classes=7, width=4, generator=INIT)
    assert output_shape(net, 2, 3, 32, 32) == (2, 7)


def test_stages_halve_the_resolution_and_double_the_maps():
    net = models.resnet_cifar(8, width=4, generator=INIT)
    x, shapes = torch.zeros(1, 3, 32, 32), []
    for layer in net:
        x = layer(x)
        if isinstance(layer, models.BasicBlock):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]


def test_a_residual_block_whose_second_norm_is_silent_passes_its_input():
    block = models.resnet_cifar(8, generator=INIT)[3]
    plain = models.plain_cifar(8, generator=INIT)[3]
    x = torch.rand(2, 16, 8, 8)
    for net in (block, plain):
        nn.init.zeros_(net.norm2.weight)
    torch.testing.assert_close(block(x), x)  # what makes depth harmless at the start
    torch.testing.assert_close(plain(x), torch.zeros_like(x))


def test_a_block_computes_its_formula():
    block = models.BasicBlock(4, 8, 2, nn.BatchNorm2d, INIT).eval()
    x = torch.randn(2, 4, 6, 6, generator=generator(0, "x"))
    with torch.no_grad():
        inner = block.norm1(nn.functional.conv2d(x, block.conv1.weight, stride=2, padding=1))
        inner = block.norm2(nn.functional.conv2d(inner.clamp(min=0), block.conv2.weight, padding=1))
        projection, norm = block.shortcut
        outer = norm(nn.functional.conv2d(x, projection.weight, stride=2))
        torch.testing.assert_close(block(x), (inner + outer).clamp(min=0))


def test_without_normalization_a_cifar_net_is_positively_homogeneous():
    """No norm and no bias but the head's: scaling the image scales every map."""
    net = models.resnet_cifar(8, width=4, norm=nn.Identity, generator=INIT)
    nn.init.zeros_(net[-1].bias)
    x = torch.rand(2, 3, 32, 32, generator=generator(0, "x"))
    torch.testing.assert_close(net(3 * x), 3 * net(x), rtol=1e-4, atol=1e-5)
    normed = models.resnet_cifar(8, width=4, generator=INIT)
    nn.init.zeros_(normed[-1].bias)
    assert not torch.allclose(normed(3 * x), 3 * normed(x), rtol=0.1)


@pytest.mark.parametrize("depth", [-4, 2, 19, 22])
@pytest.mark.parametrize("make", [models.resnet_cifar, models.plain_cifar])
def test_a_depth_outside_the_family_is_refused(make, depth):
    message = rf"^{make.__name__}: expected depth 6n \+ 2 \(8, 14, 20, …\), 18 or 34, got {depth}$"
    with pytest.raises(ValueError, match=message):
        make(depth, generator=INIT)


# ---- randomness ----

MODELS = {
    "mlp": lambda g: models.mlp([4, 3, 2], generator=g),
    "small_cnn": lambda g: models.small_cnn((1, 4, 4), generator=g),
    "resnet_cifar": lambda g: models.resnet_cifar(8, width=2, generator=g),
    "plain_cifar": lambda g: models.plain_cifar(8, width=2, generator=g),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_depends_on_its_generator_and_nothing_else(make):
    first, again, other = (make(generator(seed, "init")) for seed in (0, 0, 1))
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_number_of_a_model_is_set(make):
    """Layers are made without torch's draw: what nobody set would be leftover memory."""
    state = make(generator(0, "init")).state_dict()
    assert all(torch.isfinite(value).all() and value.abs().max() <= 1 for value in state.values())
