"""Schedules, as functions from the step, counted from 0, to a factor on the learning rate.

Each is what `torch.optim.lr_scheduler.LambdaLR` takes. Beside them, what tells how far a learning
rate may grow with the batch: the gradient noise scale.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from coursekit import _check

Schedule = Callable[[int], float]


def step_decay(every: int, gamma: float = 0.1) -> Schedule:
    """Return gamma^⌊step / every⌋, a staircase.

    `ValueError` for ``every`` below 1 or a factor ``gamma`` outside [0, 1]. Curriculum: O7.

    >>> [step_decay(2, 0.5)(s) for s in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    _check.integer("step_decay", "every", every, at_least=1)
    _check.in_range("step_decay", "gamma", gamma)
    return lambda step: float(gamma ** (step // every))


def exponential_decay(gamma: float) -> Schedule:
    """Return gamma^step, the discounted step.

    The sum of all factors is 1 / (1 − gamma), so the whole way is bounded: below that length no
    minimum is out of reach, beyond it every one is. `ValueError` for ``gamma`` outside [0, 1].
    Curriculum: O1, O7.

    >>> [exponential_decay(0.5)(s) for s in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """
    _check.in_range("exponential_decay", "gamma", gamma)
    return lambda step: float(gamma**step)


def cosine(steps: int, final: float = 0.0) -> Schedule:
    """Return half a cosine from 1 down to ``final`` at step ``steps``, and ``final`` from there on.

    final + (1 − final) · (1 + cos(π · step / steps)) / 2

    `ValueError` for ``steps`` below 1 or ``final`` outside [0, 1].

    Source: I. Loshchilov and F. Hutter, SGDR, arXiv:1608.03983, equation 5, without restarts.
    Curriculum: O7.

    >>> [round(cosine(4)(s), 3) for s in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    _check.integer("cosine", "steps", steps, at_least=1)
    _check.in_range("cosine", "final", final)

    def factor(step: int) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2

    return factor


def warmup(steps: int, then: Schedule = lambda step: 1.0) -> Schedule:
    """Return (step + 1) / steps for the first ``steps`` steps, then ``then``, from its start.

    `ValueError` for ``steps`` below 1.

    Source: P. Goyal et al., Accurate, large minibatch SGD, arXiv:1706.02677, section 2.2, "gradual
    warmup". Curriculum: O7.

    >>> [warmup(4, then=step_decay(1, 0.5))(s) for s in range(7)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.25]
    """
    _check.integer("warmup", "steps", steps, at_least=1)
    return lambda step: (step + 1) / steps if step < steps else then(step - steps)


def gradient_noise_scale(
    grads: Mapping[str, Float[Tensor, "n ..."]] | Iterable[Float[Tensor, "n ..."]],
) -> float:
    """Return tr(Σ) / ‖G‖² of the gradients of single examples.

    G is their mean and Σ their covariance matrix, both over the n examples given. It is the batch
    size at which a mini-batch gradient has as much noise as signal.

    Parameters
    ----------
    grads
        One tensor a parameter, its first dimension the examples, as `curvature.per_sample_grads`
        returns them.

    Returns
    -------
    float
        In examples; infinite where the mean gradient vanishes.

    Raises
    ------
    ValueError
        For fewer than two examples, or tensors that differ in their number.

    Source: S. McCandlish et al., An empirical model of large-batch training, arXiv:1812.06162,
    equation 2.9 ("simple" noise scale). Curriculum: O8.

    Examples
    --------
    >>> import torch
    >>> gradient_noise_scale([torch.tensor([[3.0], [1.0]])])  # mean 2, variance 1
    0.25
    """
    tensors = list(grads.values() if isinstance(grads, Mapping) else grads)
    n = len(tensors[0]) if tensors else 0
    _check.integer("gradient_noise_scale", "number of examples", n, at_least=2)
    for grad in tensors:
        _check.shape("gradient_noise_scale", "grads", grad, (n, ...))
    noise = sum(float(grad.var(dim=0, correction=0).sum()) for grad in tensors)
    signal = sum(float(grad.mean(dim=0).square().sum()) for grad in tensors)
    return noise / signal if signal else math.inf
