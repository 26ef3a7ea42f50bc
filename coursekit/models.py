"""The networks that chapters train: a perceptron, a small convolutional net, CIFAR nets.

Convention: every weight and bias starts as torch's default has it, uniform in ±1/√fan_in, but
drawn from the generator that the caller hands over, never from the global one. Normalization starts
at scale 1 and shift 0. A chapter that wants another start overwrites this one.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from coursekit import _check


def _draw(kind: type[nn.Module], *sizes: int, generator: torch.Generator, **options) -> nn.Module:
    """Make a linear or convolutional layer without torch's own draw, then draw it."""
    layer = nn.utils.skip_init(kind, *sizes, **options)
    bound = layer.weight[0].numel() ** -0.5  # kaiming_uniform_ with a = √5, as in nn.Linear
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def mlp(
    sizes: Sequence[int],
    activation: Callable[[], nn.Module] = nn.ReLU,
    *,
    bias: bool = True,
    generator: torch.Generator,
) -> nn.Sequential:
    """Build a multi-layer perceptron; the last layer is linear.

    Parameters
    ----------
    sizes
        Widths from input to output, at least two; `ValueError` otherwise.
    activation
        Called once a hidden layer.
    bias
        Whether layers add one.
    generator
        A CPU generator, which draws weight and bias of one layer after the other.

    Returns
    -------
    nn.Sequential
        Maps ``(batch, sizes[0])`` to ``(batch, sizes[-1])``.

    Examples
    --------
    >>> mlp([64, 128, 10], nn.Tanh, generator=torch.Generator())
    Sequential(
      (0): Linear(in_features=64, out_features=128, bias=True)
      (1): Tanh()
      (2): Linear(in_features=128, out_features=10, bias=True)
    )
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: expected at least two sizes, got {list(sizes)}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        _check.integer("mlp", "sizes", min(fan_in, fan_out), at_least=1)
        layers += [_draw(nn.Linear, fan_in, fan_out, bias=bias, generator=generator), activation()]
    return nn.Sequential(*layers[:-1])


def small_cnn(
    image: tuple[int, int, int] = (1, 28, 28),
    classes: int = 10,
    *,
    width: int = 16,
    generator: torch.Generator,
) -> nn.Sequential:
    """Build two 3 x 3 convolutions, each with ReLU and 2 x 2 max pooling, and a linear layer.

    Parameters
    ----------
    image
        Channels, height and width of an input, the last two at least 4.
    classes
        Outputs.
    width
        Maps of the first convolution; the second has twice as many.
    generator
        A CPU generator that draws the weights.

    Returns
    -------
    nn.Sequential
        Maps ``(batch, *image)`` to ``(batch, classes)``.
    """
    channels, height, breadth = image
    _check.integer("small_cnn", "image side", min(height, breadth), at_least=4)

    def conv(fan_in, fan_out):
        return _draw(nn.Conv2d, fan_in, fan_out, 3, padding=1, generator=generator)

    flat = 2 * width * (height // 4) * (breadth // 4)
    first, second = conv(channels, width), conv(width, 2 * width)
    head = _draw(nn.Linear, flat, classes, generator=generator)
    return nn.Sequential(
        *(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), head),
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input passes: ``relu(x + norm(conv(relu(…))))``.

    Where the block changes width or resolution, a 1 x 1 convolution and a norm bring the input to
    the new shape. ``shortcut = False`` leaves the input out: two layers of a plain net.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        generator: torch.Generator,
        *,
        shortcut: bool = True,
    ):
        super().__init__()
        self.conv1 = _conv(fan_in, fan_out, 3, stride, generator)
        self.norm1 = norm(fan_out)
        self.conv2 = _conv(fan_out, fan_out, 3, 1, generator)
        self.norm2 = norm(fan_out)
        self.shortcut: nn.Module | None = None
        if shortcut and (stride, fan_in) == (1, fan_out):
            self.shortcut = nn.Identity()
        elif shortcut:
            projection = _conv(fan_in, fan_out, 1, stride, generator)
            self.shortcut = nn.Sequential(projection, norm(fan_out))

    def forward(
        self, x: Float[Tensor, "batch fan_in height width"]
    ) -> Float[Tensor, "batch fan_out new_height new_width"]:
        """Apply the block."""
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        return relu(y if self.shortcut is None else y + self.shortcut(x))


def _conv(fan_in, fan_out, size, stride, generator):
    options = {"stride": stride, "padding": size // 2, "bias": False}
    return _draw(nn.Conv2d, fan_in, fan_out, size, generator=generator, **options)


def resnet_cifar(
    depth: int = 20,
    classes: int = 10,
    *,
    width: int | None = None,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    generator: torch.Generator,
) -> nn.Sequential:
    """Build a residual network for 32 x 32 colour images.

    ========== ================ ============== ==========
    depth      blocks per stage maps           parameters
    ========== ================ ============== ==========
    6n + 2     n, n, n          16, 32, 64     20: 272,474
    18         2, 2, 2, 2       64, …, 512     11,173,962
    34         3, 4, 6, 3       64, …, 512     21,282,122
    ========== ================ ============== ==========

    A 3 x 3 convolution, then stages of `BasicBlock`; the first block of every stage but the first
    halves the resolution; then the average over all positions and a linear layer.

    Parameters
    ----------
    depth
        Layers with weights, projections not counted; `ValueError` if it is not in the table.
    classes
        Outputs.
    width
        Maps of the first stage, where the table's is not wanted; each next stage doubles it.
    norm
        Makes a normalization for so many maps; `nn.Identity` for none.
    generator
        A CPU generator that draws the weights.

    Returns
    -------
    nn.Sequential
        Maps ``(batch, 3, 32, 32)`` to ``(batch, classes)``.

    Convention: shortcuts that change shape are projections (option B of the paper); its CIFAR nets
    pad with zeros (option A), which saves 2,752 of ResNet-20's parameters.

    Source: K. He, X. Zhang, S. Ren and J. Sun, Deep Residual Learning for Image Recognition,
    arXiv:1512.03385, section 4.2 and table 1. Curriculum: C5, G5.
    """
    return _cifar("resnet_cifar", depth, classes, width, norm, generator, shortcut=True)


def plain_cifar(
    depth: int = 20,
    classes: int = 10,
    *,
    width: int | None = None,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    generator: torch.Generator,
) -> nn.Sequential:
    """Build `resnet_cifar` without its shortcuts.

    Parameters
    ----------
    depth, classes, width, norm, generator
        As there.

    Returns
    -------
    nn.Sequential

    Curriculum: G5.
    """
    return _cifar("plain_cifar", depth, classes, width, norm, generator, shortcut=False)


def _cifar(function, depth, classes, width, norm, generator, *, shortcut):
    _check.integer(function, "depth", depth)
    big = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    blocks = big.get(depth) or ((depth - 2) // 6,) * 3
    if depth not in big and (depth < 8 or depth % 6 != 2):
        raise ValueError(f"{function}: expected depth 6n + 2 (8, 14, 20, …), 18 or 34, got {depth}")
    maps = width or (64 if depth in big else 16)
    layers = [_conv(3, maps, 3, 1, generator), norm(maps), nn.ReLU()]
    for stage, count in enumerate(blocks):
        for block in range(count):
            halve = stage > 0 and block == 0
            fan_in, maps = maps, maps * (1 + halve)
            stride = 1 + halve
            layers.append(BasicBlock(fan_in, maps, stride, norm, generator, shortcut=shortcut))
    head = _draw(nn.Linear, maps, classes, generator=generator)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
