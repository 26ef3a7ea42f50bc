"""Delay compensation: DC-ASGD's server rules, what they rest on, and an optimizer with a delay.

``diagonal_curvature``  what stands in for the Hessian: λ_t g², and its controls
``compensate``          the stale gradient, corrected by curvature times displacement
``curvature_error``     how much of the gradient's change a prediction explains
``dc_asgd_c``           the rule with constant λ
``dc_asgd_a``           the rule with λ divided by the root of a running mean of g²
``DCASGD``              both in one process, as a `torch.optim.Optimizer` with a fixed delay

Source of the method: S. Zheng et al., Asynchronous Stochastic Gradient Descent with Delay
Compensation, ICML 2017, arXiv:1609.08326.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coursekit import _check, train
from coursekit.parallelism import Push, Server, step

Curvature = Float[Tensor, "*shape"] | Callable[[Tensor], Tensor]
CURVATURES = ("squared", "absolute", "none", "mean", "permuted")


def diagonal_curvature(
    gradient: Float[Tensor, "*shape"],
    strength: float,
    mean_square: Float[Tensor, "*shape"] | None = None,
    *,
    epsilon: float = 1e-7,
    curvature: str = "squared",
    sizes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the diagonal that stands in for the Hessian, one number a weight.

    λ_t ⊙ g ⊙ g with λ_t = λ_0, or λ_t = λ_0 / √(mean_square + ε)

    Parameters
    ----------
    gradient
        The stale gradient g, of a mini-batch.
    strength
        λ_0.
    mean_square
        The running mean of g² that makes λ_t adaptive; without it λ_t is constant.
    epsilon
        ε, inside the root.
    curvature
        ``"squared"`` is the paper's g². ``"absolute"`` has abs(g) in its place, as the authors'
        first public updater did. The others are controls: ``"none"`` has ones, so nothing is known
        of the loss; ``"mean"`` gives every weight of a tensor the mean over that tensor;
        ``"permuted"`` deals the values of a tensor out to other weights of it.
    sizes
        Lengths of the tensors in a flat ``gradient``; one tensor unless given.
    generator
        Draws the permutation.

    Returns
    -------
    Tensor
        Of the shape of ``gradient``.

    Raises
    ------
    ValueError
        For an unknown ``curvature``.
    TypeError
        For a permutation and nothing to draw it from.

    Convention: λ is not free of units. With g → c·g the term λ_0 g² grows by c², the adaptive one
    by c like the gradient itself.

    Source: arXiv:1609.08326, the server's algorithm. Curriculum: C2, C3.

    Examples
    --------
    >>> g = torch.tensor([3.0, -0.5])
    >>> diagonal_curvature(g, 0.1)
    tensor([0.9000, 0.0250])
    >>> diagonal_curvature(g, 2.0, g * g, epsilon=0.0)
    tensor([6., 1.])
    """
    _check.one_of("diagonal_curvature", "curvature", curvature, CURVATURES)
    if curvature == "permuted" and generator is None:
        raise TypeError("diagonal_curvature: expected a generator to permute with, got None")
    base = {"absolute": gradient.abs(), "none": torch.ones_like(gradient)}
    scale = strength if mean_square is None else strength / torch.sqrt(mean_square + epsilon)
    diagonal = scale * base.get(curvature, gradient * gradient)
    if curvature not in ("mean", "permuted"):
        return diagonal
    parts = diagonal.reshape(-1).split(list(sizes or [diagonal.numel()]))
    if curvature == "mean":
        parts = [part.mean().expand_as(part) for part in parts]
    else:
        orders = [torch.randperm(len(part), generator=generator) for part in parts]
        parts = [part[order.to(part.device)] for part, order in zip(parts, orders, strict=True)]
    return torch.cat(parts).view_as(gradient)


def compensate(
    gradient: Float[Tensor, "*shape"],
    displacement: Float[Tensor, "*shape"],
    curvature: Curvature,
    *,
    lr: float | None = None,
    cap: float | None = 1.0,
) -> Float[Tensor, "*shape"]:
    """Return the gradient that is expected where the server's weights are now.

    g + min(c, cap / lr) ⊙ (w − w_bak)

    Parameters
    ----------
    gradient, displacement
        g, computed at w_bak, and w − w_bak.
    curvature
        The diagonal c, or a function that multiplies a displacement by the Hessian.
    lr
        Learning rate of the step to come, which together with c makes the gain lr · c: the share of
        the way back to w_bak that the correction goes. Needed to cap a diagonal; 0 bounds nothing.
    cap
        Largest gain; ``None`` for none. Above 1 the correction overshoots w_bak, above 2 it ends
        farther off than it began. A function's products are not capped.

    Returns
    -------
    Tensor
        Of the shape of ``gradient``; ``gradient`` itself, to the last bit, where the displacement
        or the curvature is 0.

    Raises
    ------
    ValueError, TypeError
        For a ``cap`` that is not positive, or a diagonal to be capped without ``lr``.

    Source: arXiv:1609.08326, the server's algorithm; the cap is ours. Curriculum: C1, C2.

    Examples
    --------
    >>> g, d = torch.tensor([1.0, 1.0]), torch.tensor([-0.5, 0.25])
    >>> compensate(g, d, torch.tensor([2.0, 2.0]), lr=0.1)
    tensor([0.0000, 1.5000])
    """
    if callable(curvature):
        return gradient + curvature(displacement)
    if cap is not None:
        _check.positive("compensate", "cap", cap)
        if lr is None:
            raise TypeError("compensate: expected lr, which the cap bounds, or cap=None; got None")
    return gradient + _capped(curvature, lr, cap) * displacement


class CurvatureError(NamedTuple):
    """How well a prediction explains the change of the gradient.

    ``left`` is the share of the error that it leaves, ``cosine`` its angle to the true change,
    ``strength`` the factor on it that would leave least, and ``best`` the share left then.
    """

    left: float
    cosine: float
    strength: float
    best: float


def curvature_error(
    stale: Float[Tensor, "*shape"],
    fresh: Float[Tensor, "*shape"],
    prediction: Float[Tensor, "*shape"],
) -> CurvatureError:
    """Compare a predicted change of the gradient with the true one, of the same mini-batch.

    left = ‖stale + p − fresh‖ / ‖stale − fresh‖, strength = ⟨p, fresh − stale⟩ / ‖p‖²

    Parameters
    ----------
    stale, fresh
        Gradients at w_bak and at w, of one shape.
    prediction
        What the correction adds to ``stale``, for instance c ⊙ (w − w_bak).

    Returns
    -------
    CurvatureError
        A prediction of 0 leaves 1, and has cosine and strength 0.

    Raises
    ------
    ValueError
        When the gradient has not changed: there is nothing to predict.

    Curriculum: C2.

    Examples
    --------
    >>> stale, fresh = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    >>> curvature_error(stale, fresh, torch.tensor([0.0, 1.0]))
    CurvatureError(left=0.5, cosine=1.0, strength=2.0, best=0.0)
    """
    change = (fresh - stale).double()
    predicted = prediction.double()
    scale, size = change.norm().item(), predicted.norm().item()
    if scale == 0:
        raise ValueError("curvature_error: expected a gradient that changed, got fresh = stale")
    dot = (predicted * change).sum().item()
    cosine = dot / (scale * size) if size else 0.0
    strength = dot / size**2 if size else 0.0
    left = (predicted - change).norm().item() / scale
    return CurvatureError(left, cosine, strength, math.sqrt(max(0.0, 1 - cosine**2)))


def dc_asgd_a(
    server: Server,
    push: Push,
    lr: float,
    *,
    strength: float = 2.0,
    decay: float | None = 0.95,
    epsilon: float = 1e-7,
    curvature: str | Callable[[Push, Tensor], Tensor] = "squared",
    backup: str = "pull",
    mean_square: str = "global",
    cap: float | None = 1.0,
    sizes: Sequence[int] | None = None,
    **options: float,
) -> tuple[Server, tuple[int, ...]]:
    """Update as DC-ASGD-a does: the correction's strength adapts to the size of the gradients.

    MeanSquare ← m · MeanSquare + (1 − m) g ⊙ g, from 0
    w ← w − lr (g + λ_0 / √(MeanSquare + ε) ⊙ g ⊙ g ⊙ (w − w_bak(m)))

    Parameters
    ----------
    server, push, lr
        As for every rule: the weights, the gradient that came, the learning rate.
    strength, epsilon
        λ_0 and ε.
    decay
        m; ``None`` keeps λ = λ_0 constant.
    curvature
        As in `diagonal_curvature`, or a function of the push and of w − w_bak that returns the
        product with the Hessian; strength and cap do not touch that. ``"permuted"`` knows only
        the number of the update: runs of all seeds share their permutations.
    backup
        When w_bak is taken. ``"pull"``: the weights that the worker was sent, at which it computed
        g. ``"push"``: the weights after the worker's own last update, as in the authors' released
        server; others may have changed them before it pulled. Its first w_bak is what it pulled.
    mean_square
        ``"global"``: one MeanSquare, as the equation is written; ``"worker"``: one a worker, as in
        the authors' released server. Without ``decay`` there is none.
    cap
        Largest gain, as in `compensate`.
    sizes
        Lengths of the tensors in the weights, for ``"mean"`` and ``"permuted"``.
    options
        ``momentum`` and ``weight_decay`` as in `parallelism.asgd`; neither enters the correction.

    Returns
    -------
    (server, workers to be served now)

    Raises
    ------
    ValueError
        For an option outside its range.

    Convention: MeanSquare starts at 0 and has no bias correction, so the first correction is
    1 / √(1 − m) = 4.5 times that of a settled MeanSquare; ``decay=0.0`` has none of it, and
    λ_t g² = λ_0 · abs(g).

    Source: arXiv:1609.08326, the server's algorithm. Curriculum: C3.

    Examples
    --------
    >>> from coursekit import parallelism as pa
    >>> server = pa.join(pa.join(pa.Server(torch.tensor([1.0])), 0), 1)
    >>> for worker in (0, 1):
    ...     server, _ = pa.pull(server, worker)
    >>> for worker in (0, 1):  # both gradients come from w = 1; the second is compensated
    ...     push = pa.Push(worker, 0, torch.tensor([2.0]), samples=1)
    ...     server, _ = pa.receive(server, push, 0.1, lambda *now: dc_asgd_a(*now, decay=0.0))
    ...     print(f"{server.weights.item():.2f}")
    0.80
    0.68
    """
    _check_options(decay, cap, strength=strength, epsilon=epsilon)
    _check.one_of("dc_asgd_a", "backup", backup, ("pull", "push"))
    _check.one_of("dc_asgd_a", "mean_square", mean_square, ("global", "worker"))
    mine = f"/{push.worker}"  # what belongs to a worker goes with it
    table = "mean_square" + mine * (mean_square == "worker")

    def correct(gradient, displacement, memory):
        if callable(curvature):
            return curvature(push, displacement), memory, 0.0
        squares = None
        if decay is not None:
            before = memory.get(table, torch.zeros_like(gradient))
            squares = decay * before + (1 - decay) * gradient * gradient
            memory = {**memory, table: squares}
        draw = train.generator(server.version, "permuted") if curvature == "permuted" else None
        how: dict = {"epsilon": epsilon, "curvature": curvature, "sizes": sizes}
        diagonal = diagonal_curvature(gradient, strength, squares, generator=draw, **how)
        bounded = _capped(diagonal, lr, cap)
        return bounded * displacement, memory, (diagonal > bounded).double().mean().item()

    old = server.memory.get(f"backup{mine}") if backup == "push" else None
    server = step(server, push, lr, correct, backup=old, **options)
    if backup == "push":
        server = replace(server, memory={**server.memory, f"backup{mine}": server.weights})
    return server, (push.worker,)


def dc_asgd_c(
    server: Server, push: Push, lr: float, *, strength: float = 0.04, **options
) -> tuple[Server, tuple[int, ...]]:
    """Update as DC-ASGD-c does: λ is constant.

    w ← w − lr (g + λ g ⊙ g ⊙ (w − w_bak(m)))

    Parameters
    ----------
    server, push, lr
        As for every rule.
    strength
        λ. It has units: with gradients c times as large, λ / c makes the same correction
        in proportion.
    options
        The others of `dc_asgd_a`, except ``decay``, ``epsilon`` and ``mean_square``.

    Returns
    -------
    (server, workers to be served now)

    Raises
    ------
    TypeError
        For one of these three.

    Source: arXiv:1609.08326, the server's algorithm. Curriculum: C3.
    """
    for name in {"decay", "epsilon", "mean_square"} & options.keys():
        raise TypeError(f"dc_asgd_c: expected no {name}, which only an adaptive λ has")
    return dc_asgd_a(server, push, lr, strength=strength, decay=None, **options)


class DCASGD(torch.optim.Optimizer):
    """Step with gradients that are a fixed number of steps old, compensated for the delay.

    Every step puts (gradient, weights) into a queue and uses the pair put there ``delay`` steps
    ago; the first ``delay`` steps change nothing. Update k therefore has the k-th batch and a
    gradient as stale as that of ``delay + 1`` workers that take turns.

    Parameters
    ----------
    params
        Tensors, or dictionaries that give groups of them options of their own.
    lr
        Learning rate, not negative.
    delay
        τ; 0 is SGD to the last bit.
    options
        Those of `dc_asgd_a`, each parameter being one tensor: ``decay=None`` is DC-ASGD-c, and
        ``strength=0.0`` is SGD with old gradients. With one worker ``mean_square="worker"`` is
        ``"global"``, and ``backup="push"`` is refused: it would correct nothing.

    Raises
    ------
    ValueError
        For a value outside its range or ``backup="push"``, in a group's options too; in ``step``
        for a gradient that is not finite, before anything has changed.

    Curriculum: C3.

    Examples
    --------
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = DCASGD([w], lr=0.1, delay=1, strength=1.0, decay=None)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     (w**2).sum().backward()
    ...     optimizer.step()
    ...     print(f"{w.item():.3f}")
    1.000
    0.800
    0.680
    """

    def __init__(self, params, lr: float = 1e-2, *, delay: int = 1, **options):
        super().__init__(params, {"lr": lr, "delay": delay, **options})

    def add_param_group(self, param_group):
        """Add tensors, with options of their own if they have any; construction comes by here."""
        self._refuse(**self.defaults | {k: v for k, v in param_group.items() if k != "params"})
        super().add_param_group(param_group)

    @staticmethod
    def _refuse(lr, delay, **options):
        """Refuse what is out of range; the rule does so with options that are none of its own."""
        _check.in_range("DCASGD", "lr", lr, 0, math.inf)
        _check.integer("DCASGD", "delay", delay, at_least=0)
        zero = torch.zeros(1)
        dc_asgd_a(Server(zero, backups={0: zero}), Push(0, 0, zero, 1), lr, **options)
        if options.get("backup") == "push":
            raise ValueError("DCASGD: expected backup 'pull', got 'push', the weights it is at")

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p, _ in given:
            _check.finite("DCASGD", "gradients", p.grad)
        for p, group in given:
            state = self.state[p]
            state.setdefault("queue", []).append((p.grad.flatten().clone(), p.flatten().clone()))
            options = {k: v for k, v in group.items() if k not in ("params", "lr", "delay")}
            if len(state["queue"]) <= group["delay"]:
                continue
            gradient, backup = state["queue"].pop(0)
            count, memory = state.get("updates", 0), state.get("memory", {})
            server = Server(p.flatten(), count, backups={0: backup}, memory=memory)
            server, _ = dc_asgd_a(server, Push(0, 0, gradient, 1), group["lr"], **options)
            state["updates"], state["memory"] = server.version, server.memory
            p.copy_(server.weights.view_as(p))
        return loss


def _capped(diagonal, lr, cap):
    """Bound the gain lr · c of every weight."""
    return diagonal if cap is None or not lr else diagonal.clamp(max=cap / lr)


def _check_options(decay, cap, **amounts):
    for name, amount in amounts.items():
        _check.in_range("dc_asgd_a", name, amount, 0, math.inf)
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"dc_asgd_a: expected decay in [0, 1), got {decay}")
    if cap is not None:
        _check.positive("dc_asgd_a", "cap", cap)
