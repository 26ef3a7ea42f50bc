"""Mini-batches, the training loop, and random streams that do not disturb one another."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from coursekit import _check


def _digest(function: str, seed: int, stream: str) -> bytes:
    """32 bytes that depend on every character of the stream's name and every digit of the seed."""
    _check.integer(function, "seed", seed)
    if not isinstance(stream, str):
        raise TypeError(f"{function}: expected stream as a string, got {stream!r}")
    return hashlib.sha256(f"{seed}/{stream}".encode()).digest()


def generator(seed: int, stream: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Open the torch random stream named ``stream`` of experiment ``seed``.

    Two streams of one seed are unrelated, so drawing one number more for the dropout masks does not
    reorder the data.

    Parameters
    ----------
    seed
        Any integer.
    stream
        What the numbers are for: ``"data"``, ``"init"``, ``"dropout"``.
    device
        Where the numbers are drawn. A CPU stream gives the same numbers on every machine.

    Returns
    -------
    torch.Generator

    Raises
    ------
    TypeError
        If the seed is no integer or the stream no string.

    Notes
    -----
    Torch's CPU generator keeps 32 bits of its seed, so among 9,000 streams two coincide with a
    probability of one per cent. NumPy's, from `rng`, keeps 256.

    Examples
    --------
    >>> torch.randint(100, (4,), generator=generator(0, "data")).tolist()
    [60, 13, 83, 38]
    >>> torch.randint(100, (4,), generator=generator(0, "init")).tolist()
    [22, 77, 8, 23]
    """
    eight_bytes = _digest("generator", seed, stream)[:8]
    return torch.Generator(device).manual_seed(int.from_bytes(eight_bytes, "little"))


def rng(seed: int, stream: str) -> np.random.Generator:
    """Open the NumPy random stream named ``stream`` of experiment ``seed``; see `generator`.

    Examples
    --------
    >>> rng(0, "bootstrap").integers(100, size=4).tolist()
    [9, 51, 24, 31]
    """
    return np.random.default_rng(np.frombuffer(_digest("rng", seed, stream), dtype="<u4"))


def default_device() -> torch.device:
    """Return the CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batches(
    x: Shaped[Tensor, "n ..."],
    y: Shaped[Tensor, "n ..."],
    size: int,
    *,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    shuffle: bool = True,
) -> Iterator[tuple[Shaped[Tensor, "batch ..."], Shaped[Tensor, "batch ..."]]]:
    """Go once through whole arrays, a mini-batch at a time.

    The arrays stay where they are, on the CPU or a GPU; no worker process is started.

    Parameters
    ----------
    x, y
        Inputs and targets, one row an example.
    size
        Examples a batch.
    generator
        Draws the order, all of it before the first batch. Its device need not be that of ``x``, so
        one CPU generator gives one order on every device.
    drop_last
        Leave out the last batch when it would be smaller than ``size``.
    shuffle
        With ``False`` the batches are views in the given order, and no generator is needed.

    Yields
    ------
    x, y
        ``size`` rows of each; the last batch has what is left.

    Raises
    ------
    ValueError
        If ``x`` and ``y`` differ in length, if ``size`` is below 1, or if not one batch would come.
    TypeError
        If there is a shuffle and nothing to draw it from.

    Examples
    --------
    >>> x = torch.arange(5)
    >>> [a.tolist() for a, _ in batches(x, x, 2, generator=generator(0, "data"))]
    [[0, 2], [4, 3], [1]]
    >>> [a.tolist() for a, _ in batches(x, x, 2, shuffle=False, drop_last=True)]
    [[0, 1], [2, 3]]
    """
    n = len(x)
    _check.shape("batches", "y", y, (n, ...))
    _check.integer("batches", "size", size, at_least=1)
    if n < (size if drop_last else 1):
        raise ValueError(f"batches: expected at least one batch of {size}, got {n} examples")
    stop = n - n % size if drop_last else n
    if not shuffle:
        return ((x[i : i + size], y[i : i + size]) for i in range(0, stop, size))
    if generator is None:
        raise TypeError("batches: expected a generator to shuffle with, got None")
    order = torch.randperm(n, generator=generator, device=generator.device).to(x.device)
    return ((x[rows], y[rows]) for rows in order[:stop].split(size))
