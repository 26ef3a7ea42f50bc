"""Random changes of images that keep their label; every image gets its own draw."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from coursekit import _check

Images = Float[Tensor, "n channels height width"]


def _draw(function, images, name, value, generator, *shape, low=0, high=1) -> Tensor:
    """Check the arguments, and draw from U(-1, 1), for each image an array of ``shape``."""
    _check.shape(function, "images", images, ("n", "channels", "height", "width"))
    least, most = images.min(), images.max()
    if not (images.is_floating_point() and least >= 0 and most <= 1):
        raise ValueError(
            f"{function}: expected real images in [0, 1], got {images.dtype} from {least:.3g} to "
            f"{most:.3g}; divide bytes by 255 before, standardize after"
        )
    _check.in_range(function, name, value, low, high)
    if generator is None:
        raise TypeError(f"{function}: expected a generator to draw from, got None")
    u = torch.rand((len(images), *shape), generator=generator, device=generator.device)
    return 2 * u.to(images) - 1


def _resample(images: Images, rows: list[list[Tensor | int]]) -> Tensor:
    """Look up, for each pixel of the result, the point of the image that ``rows`` send it to.

    ``rows`` are those of a 2 x 3 matrix on coordinates (x, y, 1), x and y from -1 to 1.
    """
    n = len(images)
    matrix = torch.stack(
        [torch.stack([torch.as_tensor(e).to(images).expand(n) for e in row], 1) for row in rows], 1
    )
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False).clamp(0, 1)  # rounding may leave [0, 1]


def augment_inversion(
    images: Images,
    probability: float,
    *,
    generator: torch.Generator,
    kind: str = "mirror",
) -> Images:
    """Invert some of the images: left and right, or dark and bright.

    Parameters
    ----------
    images
        Shape ``(n, channels, height, width)``, real numbers in [0, 1].
    probability
        Of an image to be inverted, each by its own draw.
    generator
        Any device; one on the CPU gives the same result on every device.
    kind
        ``"mirror"`` reverses the order of the columns, ``"negative"`` maps x to 1 - x. "Inversion"
        is said of both, and they teach different things.

    Returns
    -------
    Tensor
        New images, in [0, 1]. So do all functions ``augment_*``, so they can be chained.

    Raises
    ------
    ValueError
        For bytes, for images outside [0, 1] such as standardized ones, for no probability.
    TypeError
        Without a generator.

    Curriculum: R7.

    Examples
    --------
    >>> image = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    >>> augment_inversion(image, 1.0, generator=torch.Generator())
    tensor([[[[1.0000, 0.2500, 0.0000]]]])
    """
    _check.one_of("augment_inversion", "kind", kind, ("mirror", "negative"))
    u = _draw("augment_inversion", images, "probability", probability, generator, 1, 1, 1)
    inverted = images.flip(3) if kind == "mirror" else 1 - images
    return torch.where((u + 1) / 2 < probability, inverted, images)


def augment_scaling(images: Images, factor: float, *, generator: torch.Generator) -> Images:
    """Zoom each image about its centre by s, with log s uniform in ± log(factor).

    Parameters
    ----------
    images, generator
        As in `augment_inversion`.
    factor
        From 1, which changes nothing, to 10.

    Returns
    -------
    Tensor
        What comes from outside is 0, black; values between pixels are interpolated.

    Curriculum: R7.
    """
    u = _draw("augment_scaling", images, "factor", factor, generator, low=1, high=10)
    shrink = factor**-u
    return _resample(images, [[shrink, 0, 0], [0, shrink, 0]])


def augment_translation(images: Images, fraction: float, *, generator: torch.Generator) -> Images:
    """Shift each image in both directions by up to ± fraction of its width and its height.

    Parameters
    ----------
    images, generator
        As in `augment_inversion`.
    fraction
        From 0, which changes nothing, to 1.

    Returns
    -------
    Tensor
        Black comes in, as in `augment_scaling`.

    Curriculum: R7.
    """
    shift = 2 * fraction * _draw("augment_translation", images, "fraction", fraction, generator, 2)
    return _resample(images, [[1, 0, shift[:, 0]], [0, 1, shift[:, 1]]])


def augment_rotation(images: Images, degrees: float, *, generator: torch.Generator) -> Images:
    """Turn each image about its centre by an angle uniform in ± degrees.

    Parameters
    ----------
    images, generator
        As in `augment_inversion`.
    degrees
        From 0, which changes nothing, to 180.

    Returns
    -------
    Tensor
        Black comes in, as in `augment_scaling`. Images that are not square are turned, not sheared.

    Curriculum: R7.
    """
    u = _draw("augment_rotation", images, "degrees", degrees, generator, high=180)
    cos, sin = torch.cos(math.radians(degrees) * u), torch.sin(math.radians(degrees) * u)
    aspect = images.shape[3] / images.shape[2]  # x and y are in units of half a side
    return _resample(images, [[cos, -sin / aspect, 0], [sin * aspect, cos, 0]])


def augment_brightness(images: Images, amount: float, *, generator: torch.Generator) -> Images:
    """Add to each image a number uniform in ± amount, and clip to [0, 1].

    Parameters
    ----------
    images, generator
        As in `augment_inversion`.
    amount
        From 0, which changes nothing, to 1.

    Returns
    -------
    Tensor

    Curriculum: R7.
    """
    u = _draw("augment_brightness", images, "amount", amount, generator, 1, 1, 1)
    return (images + amount * u).clamp(0, 1)


def augment_contrast(images: Images, factor: float, *, generator: torch.Generator) -> Images:
    """Multiply each image's distance from its mean by c, log c uniform in ± log(factor), and clip.

    Parameters
    ----------
    images, generator
        As in `augment_inversion`.
    factor
        From 1, which changes nothing, to 10.

    Returns
    -------
    Tensor

    Curriculum: R7.
    """
    u = _draw("augment_contrast", images, "factor", factor, generator, 1, 1, 1, low=1, high=10)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor**u).clamp(0, 1)


def augment_noise(images: Images, std: float, *, generator: torch.Generator) -> Images:
    """Add noise from N(0, s²) to each pixel, s uniform in [0, std] for each image, and clip.

    Parameters
    ----------
    images, generator
        As in `augment_inversion`.
    std
        From 0, which changes nothing, to 1.

    Returns
    -------
    Tensor

    Curriculum: R7.
    """
    s = std * _draw("augment_noise", images, "std", std, generator, 1, 1, 1).abs()
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
    return (images + s * noise).clamp(0, 1)


def augment_color_shift(images: Images, amount: float, *, generator: torch.Generator) -> Images:
    """Add to each channel of each image its own number uniform in ± amount, and clip to [0, 1].

    Parameters
    ----------
    images, generator
        As in `augment_inversion`. A single channel has no colour: it is `augment_brightness` then.
    amount
        From 0, which changes nothing, to 1.

    Returns
    -------
    Tensor

    Curriculum: R7.
    """
    u = _draw("augment_color_shift", images, "amount", amount, generator, *images.shape[1:2], 1, 1)
    return (images + amount * u).clamp(0, 1)
