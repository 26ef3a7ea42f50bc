"""What G-SGD is compared with: Path-SGD, and three ways to fix the scale of a node."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from coursekit import _check
from coursekit.gsgd.skeleton import Layer, Skeleton, _rescale_, gradient_of


class PathSGD(torch.optim.Optimizer):
    """Step along the gradient, each entry divided by the sum of the squared paths beyond its edge.

    w_e ← w_e − lr δ_e / κ_e, κ_e = Σ over paths p through e of Π_{f in p, f ≠ e} w_f²

    κ takes one pass forward and one backward through the squared network.

    Parameters
    ----------
    net
        As in `Skeleton`; chains are squared one by one.
    lr
        Learning rate.
    skeleton
        ``Skeleton(net)`` unless given; only its chains are used.

    Source: B. Neyshabur, R. Salakhutdinov and N. Srebro, Path-SGD, arXiv:1506.02617, equation 7.
    Curriculum: G5.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 0.5), nn.init.constant_(net[2].weight, 4.0)
    >>> net(torch.ones(1, 1)).sum().backward()  # δ = 4 and 0.5, κ = 16 and 0.25
    >>> PathSGD(net, lr=0.1).step()
    >>> round(net[0].weight.item(), 4), round(net[2].weight.item(), 4)
    (0.475, 3.8)
    """

    def __init__(self, net: nn.Module, lr: float = 1e-2, *, skeleton: Skeleton | None = None):
        _check.in_range("PathSGD", "lr", lr, 0, math.inf)
        self.skeleton = skeleton or Skeleton(net)
        super().__init__(net.parameters(), {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        lr = self.param_groups[0]["lr"]
        self.skeleton.require_gradients("PathSGD")
        for layers, _ in self.skeleton.chains:
            into = [torch.ones(layers[0].fan_in).to(layers[0].weight)]
            for layer in layers[:-1]:
                into.append(_squares(layer) @ into[-1])
                if layer.bias is not None:
                    into[-1] += layer.bias.square()
            out = torch.ones(len(layers[-1].weight)).to(layers[-1].weight)
            for layer, above in zip(reversed(layers), reversed(into), strict=True):
                below = out
                out = _squares(layer).T @ out  # with the old weights
                tiny = torch.finfo(out.dtype).tiny  # where no path goes on, δ is 0
                kappa = torch.outer(below, above.repeat_interleave(layer.taps)).clamp(min=tiny)
                layer.matrix.sub_(gradient_of(layer.weight).reshape(kappa.shape) / kappa, alpha=lr)
                if layer.bias is not None:
                    layer.bias.sub_(gradient_of(layer.bias) / below.clamp(min=tiny), alpha=lr)
        for p in self.skeleton.rest:
            p.sub_(gradient_of(p), alpha=lr)
        return loss


def _squares(layer: Layer) -> Tensor:
    """Σ over taps of w², (fan_out, fan_in)."""
    return layer.matrix.square().view(-1, layer.fan_in, layer.taps).sum(dim=2)


@torch.no_grad()
def enorm_(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Balance each hidden node once: scale its incoming weights to the norm of the outgoing ones.

    in ← d in, out ← out / d with d = (‖out‖ / ‖in‖)^½, layer after layer; the function stays.

    Parameters
    ----------
    net
        As in `Skeleton`, with no node cut off; changed in place. Call it after each step of SGD.
    optimizer
        Its momentum buffers are scaled the other way, like gradients.

    Source: P. Stock et al., Equi-normalization of neural networks, arXiv:1902.10416, algorithm 1
    with one cycle and p = 2. Curriculum: G5.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 1.0), nn.init.constant_(net[2].weight, 4.0)
    >>> enorm_(net)
    >>> net[0].weight.item(), net[2].weight.item()
    (2.0, 2.0)
    """
    for chain in Skeleton(net).chains:
        for before, after in zip(chain.layers, chain.layers[1:], strict=False):
            outgoing = after.matrix.view(len(after.weight), after.fan_in, -1).norm(dim=(0, 2))
            d = (outgoing / before.matrix.norm(dim=1)).sqrt()
            _rescale_([before, after], [d])
            if optimizer is not None:
                buffers = [_buffer(optimizer, layer) for layer in (before, after)]
                _rescale_(buffers, [1 / d])


def _buffer(optimizer: torch.optim.Optimizer, layer: Layer) -> Layer:
    """The layer with momentum in place of its weights; zeros where there is none yet."""
    state: list[Any] = [optimizer.state[p].get("momentum_buffer") for p in layer.parameters]
    for i, p in enumerate(layer.parameters):
        state[i] = torch.zeros_like(p) if state[i] is None else state[i]
    return layer._replace(weight=state[0], bias=None if layer.bias is None else state[1])


@torch.no_grad()
def unit_norm_(net: nn.Module) -> None:
    """Rescale each hidden node so that its incoming weights have norm 1; the function stays.

    After each step of SGD this is descent in one gauge, whatever rescaling the start had. ``net``
    is as in `Skeleton`, with no node cut off, and changed in place.

    Source: V. Badrinarayanan, B. Mishra and R. Cipolla, Understanding symmetries in deep networks,
    arXiv:1511.01029. Curriculum: G5.
    """
    for chain in Skeleton(net).chains:
        for before, after in zip(chain.layers, chain.layers[1:], strict=False):
            _rescale_([before, after], [1 / before.matrix.norm(dim=1)])


def weight_norm_(net: nn.Module) -> None:
    """Split each weight but the last into norms and directions, by torch's parametrization.

    w = g v / ‖v‖ for each node's incoming weights. ``net`` is as in `Skeleton` and changed in
    place; its function stays, and any optimizer made afterwards trains g and v.

    Source: T. Salimans and D. Kingma, Weight normalization, arXiv:1602.07868, equation 2.
    Curriculum: G5.
    """
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers[:-1]:
        weight_norm(layer)
