"""Mini-batches, the training loop, and random streams that do not disturb one another."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coursekit import _check
from coursekit.data import Split

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, target) -> mean over the batch


def _digest(function: str, seed: int, stream: str) -> bytes:
    """32 bytes that depend on every character of the stream's name and every digit of the seed."""
    _check.integer(function, "seed", seed)
    if not isinstance(stream, str):
        raise TypeError(f"{function}: expected stream as a string, got {stream!r}")
    return hashlib.sha256(f"{seed}/{stream}".encode()).digest()


def generator(seed: int, stream: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Open the torch random stream named ``stream`` of experiment ``seed``.

    Streams of one seed are unrelated: drawing one number more from ``"dropout"`` does not reorder
    ``"data"``.

    Parameters
    ----------
    seed, stream
        Any integer, and what the numbers are for; `TypeError` for anything else.
    device
        Where the numbers are drawn. A CPU stream is the same on every machine.

    Returns
    -------
    torch.Generator
        Torch keeps 32 bits of a CPU generator's seed, so among 9,000 streams two coincide with a
        probability of one per cent; NumPy's, from `rng`, keeps 256.

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
    """Open the NumPy random stream named ``stream`` of experiment ``seed``; see `generator`."""
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
        Examples a batch; the last batch has what is left.
    generator
        Draws the order, all of it before the first batch. Its device need not be that of ``x``, so
        one CPU generator gives one order on every device.
    drop_last
        Leave out the last batch when it is smaller than ``size``.
    shuffle
        With ``False`` the batches are views in the given order, and no generator is needed.

    Returns
    -------
    Iterator of (x, y)

    Raises
    ------
    ValueError
        If ``x`` and ``y`` differ in length, ``size`` is below 1, or not one batch would come.
    TypeError
        If there is a shuffle and nothing to draw it from.

    Examples
    --------
    >>> x = torch.arange(5)
    >>> [a.tolist() for a, _ in batches(x, x, 2, generator=generator(0, "data"))]
    [[0, 2], [4, 3], [1]]
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


class Score(NamedTuple):
    """What a model is worth on some examples; no accuracy where the targets are no classes."""

    loss: float
    accuracy: float | None


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or evaluate, then give every module the mode it had: one may be frozen on purpose."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


@torch.no_grad()
def evaluate(
    model: nn.Module,
    x: Shaped[Tensor, "n ..."],
    y: Shaped[Tensor, "n ..."],
    *,
    loss: Loss = cross_entropy,
    batch_size: int = 1000,
) -> Score:
    """Return mean loss and accuracy in evaluation mode; every module's mode is left as it was.

    Parameters
    ----------
    model, x, y
        All on one device. Accuracy is the share of rows whose largest output is the integer ``y``.
    loss
        Takes output and target, returns the mean over the batch.
    batch_size
        Bounds the memory; batches count by their size, so the result does not depend on it.

    Returns
    -------
    Score
    """
    total, correct = 0.0, 0
    classes = not y.is_floating_point()
    with _mode(model, training=False):
        for x_batch, y_batch in batches(x, y, batch_size, shuffle=False):
            output = model(x_batch)
            total += loss(output, y_batch).item() * len(y_batch)
            if classes:
                correct += int((output.argmax(dim=1) == y_batch).sum())
    return Score(total / len(y), correct / len(y) if classes else None)


@dataclass
class History:
    """What happened in `fit`.

    ``step_loss`` is the loss of each mini-batch before its step, in training mode; ``train`` and
    ``test`` have a `Score` after each epoch, in evaluation mode.
    """

    step_loss: list[float] = field(default_factory=list)
    train: list[Score] = field(default_factory=list)
    test: list[Score] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, ready for JSON."""
        scores = {"train": self.train, "test": self.test}
        as_dicts = {part: [score._asdict() for score in scores[part]] for part in scores}
        return {"step_loss": list(self.step_loss), **as_dicts}


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Differentiate and step; an optimizer that differentiates twice is handed the loss itself."""
    if getattr(optimizer, "needs_the_loss", False):
        optimizer.step(lambda: loss)  # type: ignore[arg-type, return-value]
    else:
        loss.backward()
        optimizer.step()


def fit(
    model: nn.Module,
    data: Split,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    *,
    generator: torch.Generator,
    device: str | torch.device | None = None,
    loss: Loss = cross_entropy,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    after_step: Callable[[nn.Module], object] | None = None,
    callbacks: Sequence[Callable[[nn.Module, History], bool | None]] = (),
) -> History:
    """Train a model in place, an epoch being one shuffled pass over the training rows.

    Parameters
    ----------
    model, data, optimizer
        The model is moved to ``device`` and sets the precision; the optimizer has its parameters.
    epochs, batch_size
        At least 1 each; the last batch of an epoch has what is left.
    generator
        Draws the order of each epoch. On a CPU, with the same start, the same generator gives the
        same history to the last bit.
    device
        `default_device` unless given.
    loss
        Takes output and target, returns the mean over the batch.
    scheduler
        Stepped after every optimizer step, so its times are counted in steps.
    after_step
        Called with the model after every step, for instance to project its weights.
    callbacks
        Each called with model and history after every epoch; ``True`` from one ends the training.

    Returns
    -------
    History

    Raises
    ------
    RuntimeError
        At the first loss that is infinite or NaN, before it has changed a parameter.

    Examples
    --------
    >>> from coursekit import data, models
    >>> net = models.mlp([64, 32, 10], generator=generator(0, "init"))
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    >>> history = fit(net, data.load("digits"), sgd, 5, 64, generator=generator(0, "data"))
    >>> len(history.step_loss), history.test[-1].accuracy > 0.9
    (115, True)
    """
    _check.integer("fit", "epochs", epochs, at_least=1)
    device = default_device() if device is None else device
    model.to(device)
    dtype = next(model.parameters()).dtype
    x_train, y_train, x_test, y_test = data.tensors(device, dtype)
    history = History()
    with _mode(model, training=True):
        for epoch in range(epochs):
            for x, y in batches(x_train, y_train, batch_size, generator=generator):
                optimizer.zero_grad()
                batch_loss = loss(model(x), y)
                history.step_loss.append(batch_loss.item())
                if not math.isfinite(history.step_loss[-1]):
                    raise RuntimeError(
                        f"fit: expected a finite loss, got {history.step_loss[-1]} in epoch "
                        f"{epoch}, step {len(history.step_loss) - 1}; try a smaller learning rate"
                    )
                _step(optimizer, batch_loss)
                if scheduler is not None:
                    scheduler.step()
                if after_step is not None:
                    after_step(model)
            history.train.append(evaluate(model, x_train, y_train, loss=loss))
            history.test.append(evaluate(model, x_test, y_test, loss=loss))
            if any([callback(model, history) for callback in callbacks]):
                break
    return history
