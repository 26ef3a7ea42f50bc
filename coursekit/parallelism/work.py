"""What workers do: which examples they draw, and the gradient they send.

The simulator and the real workers share it: given how many workers a run began with, worker m's
k-th batch depends on (seed, m, k) alone.
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap

from coursekit import train
from coursekit.parallelism.packing import Vector, pack, trainable, unpack

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # (weights, x, y) -> mean loss
STACK = 8  # gradients computed at once: more of a convolutional net were slower, not faster


class Shards:
    """The rows of each worker's batches: every epoch is shuffled and dealt out among all workers.

    Parameters
    ----------
    examples, shards
        Rows of the data, and workers among whom an epoch is dealt out. A newcomer, whose number is
        not below that of the shards, draws what an old worker of the same remainder draws.
    batch_size
        Rows of a batch; what is left of an epoch after whole batches is left out.
    seed
        Of the stream ``"order"``.

    Examples
    --------
    >>> shards = Shards(8, 2, 2, seed=0)
    >>> torch.cat([shards.rows(worker, step) for worker in (0, 1) for step in (0, 1)]).sort()[0]
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    def __init__(self, examples: int, shards: int, batch_size: int, seed: int):
        self.examples, self.shards, self.batch_size, self.seed = examples, shards, batch_size, seed
        self.steps = examples // shards // batch_size  # of an epoch
        if self.steps < 1:
            raise ValueError(
                f"Shards: expected at least {shards * batch_size} examples for {shards} batches of "
                f"{batch_size}, got {examples}"
            )
        self._dealt: dict[int, tuple[int, Tensor]] = {}  # the epoch each worker is in, its rows

    def rows(self, worker: int, step: int) -> Int[Tensor, " batch"]:
        """Return the rows of a worker's batch number ``step``, on the CPU."""
        epoch, place = divmod(step, self.steps)
        if worker not in self._dealt or self._dealt[worker][0] != epoch:
            draw = train.generator(self.seed, f"order/{epoch}")
            mine = torch.randperm(self.examples, generator=draw)[
                worker % self.shards :: self.shards
            ]
            self._dealt[worker] = epoch, mine
        return self._dealt[worker][1][place * self.batch_size : (place + 1) * self.batch_size]


def objective(model: nn.Module | Tensor, loss: Callable, device: str | torch.device = "cpu"):
    """Return the packed start weights of a model and its loss as a function of packed weights.

    Parameters
    ----------
    model
        A module, which is copied, in the mode it has; or a vector of start weights.
    loss
        Of (output, target) for a module; of (weights, x, y) for a vector.
    device
        Where both will live.

    Returns
    -------
    (weights, objective)
        Of shape (n,), and a function of (weights, x, y).

    Raises
    ------
    ValueError
        For a module whose forward pass changes buffers or draws random numbers: many gradients are
        computed at once, and no running statistics belong to one of them.
    """
    if isinstance(model, Tensor):
        return model.detach().clone().to(device), loss
    for name, module in model.named_modules():
        kind = type(module).__name__
        if module.training and getattr(module, "track_running_stats", False):
            raise ValueError(
                f"objective: expected no running statistics in training mode, got {kind} {name!r}; "
                "use GroupNorm, track_running_stats=False or eval()"
            )
        if module.training and "Dropout" in kind and getattr(module, "p", 0) > 0:
            raise ValueError(
                f"objective: expected no random layer in training mode, got {kind} {name!r}; "
                "use eval(), or draw in `augment`"
            )
    own = copy.deepcopy(model).to(device)
    like = {name: param.detach() for name, param in trainable(own).items()}
    names = dict(own.named_parameters()), dict(own.named_parameters(remove_duplicate=False))
    tied = len(names[0]) < len(names[1])  # to look for them at every call would take its time

    def of_weights(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(own, unpack(weights, like), (x,), tie_weights=tied), y)

    return pack(like), of_weights


def gradient(
    objective: Objective,
    weights: Vector,
    x: Shaped[Tensor, "steps batch ..."],
    y: Shaped[Tensor, "steps batch ..."],
    lr: float | Tensor,
) -> tuple[Vector, Tensor]:
    """Return a worker's (pseudo-)gradient and its mean loss.

    One step: ∇f(w). H steps: (w − w_H) / lr, where w_{h+1} = w_h − lr · ∇f_h(w_h).

    Parameters
    ----------
    objective
        Of (weights, x, y).
    weights
        As they were pulled.
    x, y
        One batch a local step, of shape (steps, batch, ...).
    lr
        Of the local steps.

    Returns
    -------
    (gradient, loss)
    """
    return _gradient(objective, weights, x, y, lr)


def _gradient(objective, weights, x, y, lr):
    """Serve one worker and, since the gradient of a sum of losses falls apart, many."""
    local, total = weights, 0.0
    for x_batch, y_batch in zip(x, y, strict=True):
        leaf = local.detach().requires_grad_()
        losses = objective(leaf, x_batch, y_batch)
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        total = total + losses.detach()
        local = local - lr * slope if len(x) > 1 else local
    return (slope if len(x) == 1 else (weights - local) / lr), total / len(x)


def gradients(
    objective: Objective,
    weights: Float[Tensor, "workers n"],
    x: Shaped[Tensor, "workers steps batch ..."],
    y: Shaped[Tensor, "workers steps batch ..."],
    lr: Float[Tensor, " workers"],
) -> tuple[Float[Tensor, "workers n"], Float[Tensor, " workers"]]:
    """Return the `gradient` of several workers, each at its own weights, computed as one.

    Their losses are one `vmap`; no loss depends on another's weights, so the gradient of the sum
    holds the gradient of each.

    Parameters
    ----------
    objective
        Of (weights, x, y), of one worker.
    weights, x, y, lr
        One row a worker.

    Returns
    -------
    (gradients, losses)
    """
    together = vmap(objective, chunk_size=STACK)
    return _gradient(together, weights, x.transpose(0, 1), y.transpose(0, 1), lr[:, None])
