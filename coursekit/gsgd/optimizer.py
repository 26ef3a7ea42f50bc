"""G-SGD, gradient descent on the values of basis paths, in O(m); and SGD with the free set frozen.

Notation: δ_e = ∂l/∂w_e; S(a) and T(b), the products of skeleton weights from an input to node a and
from node b to an output; v_e = S(a) w_e T(b), the value of the basis path of e = (a → b).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coursekit import _check
from coursekit.gsgd.skeleton import Chain, Layer, Skeleton, gradient_of


class _Plan(NamedTuple):
    """All that a step needs from the old weights of a chain; one entry a set of hidden nodes."""

    gradients: list[Tensor]  # δ of each layer, (fan_out, fan_in · taps)
    tails: list[Tensor]  # F
    S: list[Tensor]
    T: list[Tensor]
    raw: list[Tensor]  # R before max_ratio clips it
    ratios: list[Tensor]  # new S over old S
    heads: list[Any]  # None where all are held; else new skeleton weights into the nodes
    buffers: list[Any]  # the heads' momentum


class _WithSkeleton(torch.optim.Optimizer):
    """An optimizer whose state says which edges are the skeleton."""

    skeleton: Skeleton

    def state_dict(self) -> dict[str, Any]:
        """Return options, momentum, and which edges are the skeleton."""
        return super().state_dict() | {"skeleton": self.skeleton.chosen()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, for a network of the same shape, or nothing."""
        if "skeleton" not in state_dict:
            raise ValueError("load_state_dict: expected 'skeleton' in the state, got none")
        old = self.skeleton.chosen()
        self.skeleton.choose_(state_dict["skeleton"])
        try:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "skeleton"})
        except Exception:
            self.skeleton.choose_(old)
            raise


class GSGD(_WithSkeleton):
    """Step along the gradient with respect to basis-path values, then find weights that have them.

    .. code-block:: text

        backward, l = L … 1:  Q(a) = Σ w_e δ_e over e = (a → b) not in F
                                     + Σ Q(b) over heads (a → b) in F
                              g_e = δ_e / (S(a) T(b));  for a head (w_e δ_e − Q(b)) / v_e
        forward, l = 1 … L:   R_e = 1 − lr g_e / v_e for a head e outside F
                              w_e ← (w_e − lr g_e / (S(a) T(b))) / r(a)
                              r(b) = R of b's head, or r(a) if that is in F, which stays

    The path gradient g solves the chain rule w_f δ_f = Σ_{paths p_e through f} v_e g_e for every f
    at once, and the new path values are v − lr g exactly. A rescaling of the network before
    training changes nothing that training does to its function.

    Parameters
    ----------
    net
        As in `Skeleton`. Its start is left alone: the paper's is ``Skeleton(net).ones_()``.
    lr
        Learning rate of path values and of what lies in no chain.
    momentum
        Heavy ball on path gradients, as in the released code.
    weight_decay
        Times v_e on the gradient of the paths that have an edge outside the skeleton, as there;
        times w on that of what lies in no chain, as in SGD.
    max_ratio
        ρ ≥ 1 clips the R of all-skeleton paths to [1/ρ, ρ].
    refuse
        Raise before a step that would bring an all-skeleton path's value to zero or past it,
        whether or not ``max_ratio`` would clip it.
    regauge
        After so many steps choose the largest skeleton anew, rescale to abs(F) = 1 and drop the
        momentum; the function stays.
    skeleton
        ``Skeleton(net)`` unless given.

    Raises
    ------
    ValueError
        For an option outside its range, a network `Skeleton` refuses, or a skeleton weight of 0.
    RuntimeError
        In ``step``, before anything has changed: when a gradient is missing, when an R is not
        finite or leaves a head at 0, and, with ``refuse``, when an R is not positive.

    Only the R are looked at, and what they are made of: heads and their gradients, and of the two
    layers at a node the gradients of the smaller one. Any other gradient that is not finite gets
    into its weight, as in `torch.optim.SGD`, and the next step is refused. ``regauge`` finds a node
    that is cut off only after the step has been taken: then skeleton and scale stay as they were.

    Convention: the loss is to depend on the network's outputs alone; a penalty on weights is no
    function of path values. Then Σ w δ over a node's incoming edges equals that over its outgoing
    ones (Euler), and Q is computed from the smaller side.

    Source: Q. Meng et al., G-SGD, arXiv:1802.03713, algorithm 1, sections 4.2 and 11.1; the form
    for any widths and biases is ours. Curriculum: G4.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 0.5), nn.init.constant_(net[2].weight, 4.0)
    >>> optimizer = GSGD(net, lr=0.1)
    >>> net(torch.ones(1, 1)).sum().backward()  # the only path has v = 2 and g = 1
    >>> optimizer.step()
    >>> net[0].weight.item(), net[2].weight.item()  # v = 1.9
    (0.4749999940395355, 4.0)
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 1e-2,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_ratio: float | None = None,
        refuse: bool = False,
        regauge: int | None = None,
        skeleton: Skeleton | None = None,
    ):
        _below("lr", lr, 0, math.inf)
        _below("momentum", momentum, 0, 1)
        _below("weight_decay", weight_decay, 0, math.inf)
        if max_ratio is not None:
            _below("max_ratio", max_ratio, 1, math.inf)
        if regauge is not None:
            _check.integer("GSGD", "regauge", regauge, at_least=1)
        self.skeleton = skeleton or Skeleton(net)
        self.skeleton.require_nonzero("GSGD")
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        options |= {"max_ratio": max_ratio, "refuse": refuse, "regauge": regauge, "steps": 0}
        super().__init__(net.parameters(), options)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        options, skeleton = self.param_groups[0], self.skeleton
        skeleton.require_gradients("GSGD")
        skeleton.follow_()
        plans = [(chain, self._plan(chain, options)) for chain in skeleton.chains]
        for chain, plan in plans:
            _guard(chain, plan, options["refuse"])
        for chain, plan in plans:
            self._write_(chain, plan, options)
        for p in skeleton.rest:
            self._descend_(p, gradient_of(p), None, None, None, options)
        options["steps"] += 1
        if options["regauge"] and options["steps"] % options["regauge"] == 0:
            skeleton.regauge_()
            self.state.clear()
        return loss

    def _plan(self, chain: Chain, options: dict[str, Any]) -> _Plan:
        """Solve for the path gradients of the skeleton and find its new weights (ICR and WA)."""
        lr, momentum, clip = (options[k] for k in ("lr", "momentum", "max_ratio"))
        gradients = [_gradient(layer) for layer in chain.layers]
        heads, tails, S, T = chain.products()
        plan = _Plan(gradients, tails, S, T, [], [], [], [])
        Q = _through(chain, gradients, tails)
        for i, (layer, group) in enumerate(zip(chain.layers, chain.groups, strict=False)):
            before: Any = plan.ratios[i - 1][group.parent] if i else 1.0
            raw, ratio, head, g = before, before, None, None
            if not group.all_held:
                value = S[i] * T[i]
                g = (heads[i] * gradients[i].take(group.head) - Q[i]) / value
                old = self.state.get(layer.weight, {}).get("momentum_buffer")
                if old is not None:
                    g += momentum * old.take(group.head)
                raw = ratio = torch.addcdiv(torch.ones_like(g), g, value, value=-lr)
                if clip:
                    ratio = raw.clamp(1 / clip, clip)
                head = heads[i] * ratio
                if i:
                    raw, ratio = (torch.where(group.held, before, x) for x in (raw, ratio))
                    head = heads[i] * (ratio / before)
            plan.raw.append(raw)
            plan.ratios.append(ratio)
            plan.heads.append(head)
            plan.buffers.append(g)
        return plan

    def _write_(self, chain: Chain, plan: _Plan, options: dict[str, Any]) -> None:
        """Move the weights of a chain to where their path values are v − lr g."""
        groups = chain.groups
        for i, layer in enumerate(chain.layers):
            T = plan.T[i] if i < len(groups) else None
            S: Any = plan.S[i - 1] if i else None
            ratio: Any = plan.ratios[i - 1] if i else None
            if i and layer.taps > 1:
                S, ratio = (x.repeat_interleave(layer.taps) for x in (S, ratio))
            self._descend_(layer.weight, plan.gradients[i], S, T, ratio, options)
            head = plan.heads[i] if i < len(groups) else None
            if head is not None:
                layer.weight.put_(groups[i].head, head)
                if options["momentum"]:
                    buffer = self.state[layer.weight]["momentum_buffer"]
                    buffer.put_(groups[i].head, plan.buffers[i])
            if i:  # bring F back, bit for bit
                layer.weight.put_(groups[i - 1].tail, plan.tails[i - 1])
            if layer.bias is not None:
                self._descend_(layer.bias, gradient_of(layer.bias)[:, None], None, T, None, options)

    def _descend_(self, p, gradient, S, T, ratio, options) -> None:
        """w ← (w − lr g / (S T)) / ratio with g = δ / (S T), its momentum and weight decay."""
        lr, momentum, decay = (options[k] for k in ("lr", "momentum", "weight_decay"))
        w, g, power = p.view(gradient.shape), gradient, 2
        if momentum or decay:
            power, scale = 1, (1.0 if T is None else T[:, None]) * (1.0 if S is None else S)
            g = g / scale + decay * w * scale
        if momentum:
            old = self.state[p].get("momentum_buffer")
            new = g.view(p.shape) if old is None else old.mul_(momentum).add_(g.view(p.shape))
            self.state[p]["momentum_buffer"] = new
            g = new.view(gradient.shape)
        if T is not None:
            T = T if power == 1 else T * T
            if S is None:
                w.addcdiv_(g, T[:, None], value=-lr)
            elif not torch.equal(T, torch.ones_like(T)):
                g = g / T[:, None]
        if S is not None:  # in two passes that need no memory of their own
            scale = (S if power == 1 else S * S) * ratio
            w.div_(ratio).addcmul_(g, scale.reciprocal_(), value=-lr)
        elif T is None:
            w.sub_(g, alpha=lr)


def _below(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"GSGD: expected {name} in [{low}, {high}), got {value}")


def _gradient(layer: Layer) -> Tensor:
    """The gradient as a matrix; with "paper" times the norm of each map's incoming weights."""
    gradient = gradient_of(layer.weight).reshape(len(layer.weight), -1)
    return gradient * layer.matrix.norm(dim=1, keepdim=True) if layer.normed else gradient


def _through(chain: Chain, gradients: list[Tensor], tails: list[Tensor]) -> list[Tensor]:
    """Q of each set of nodes: Σ v g over the basis paths that the skeleton brings there."""
    layers, groups = chain
    Q: list[Tensor] = []
    for i in reversed(range(len(groups))):
        before, after = layers[i], layers[i + 1]
        if before.normed or after.normed or after.weight.numel() <= before.weight.numel():
            through = (after.matrix * gradients[i + 1]).view(len(after.weight), -1, after.taps)
            total = through.sum(dim=(0, 2))
        else:  # Euler: what enters a node leaves it
            total = (before.matrix * gradients[i]).sum(dim=1)
            if before.bias is not None:
                total += before.bias * gradient_of(before.bias)
        total.addcmul_(tails[i], gradients[i + 1].take(groups[i].tail), value=-1)
        if Q:
            parent, held = groups[i + 1].parent, groups[i + 1].held
            up = Q[0] if groups[i + 1].all_held else torch.where(held, Q[0], 0.0)
            total = total + up if isinstance(parent, slice) else total.index_add_(0, parent, up)
        Q.insert(0, total)
    return Q


def _guard(chain: Chain, plan: _Plan, refuse: bool) -> None:
    """Refuse a step that has no finite weights, or none of the same signs."""
    for i, (layer, group) in enumerate(zip(chain.layers, chain.groups, strict=False)):
        raw, ratio = plan.raw[i], plan.ratios[i]
        if group.all_held:
            continue
        if not math.isfinite(raw.sum()) or not bool(ratio.all()):
            raise RuntimeError(
                f"GSGD: expected finite ratios of path values, got others into layer "
                f"'{layer.name}': a gradient is not finite, or an all-skeleton path value is 0 or "
                "would be"
            )
        if refuse and not bool((raw > 0).all()):
            raise RuntimeError(
                f"GSGD: expected every ratio R of path values above zero, got {raw.min():.3g} "
                f"into layer '{layer.name}'; a smaller lr or regauge avoids it"
            )


class FrozenSkeletonSGD(_WithSkeleton, torch.optim.SGD):
    """Step along the gradient with respect to the weights, and leave the free set F as it is.

    Where abs(F) = 1 this is descent in coordinates that a rescaling leaves alone, w_e T(b) / T(a):
    the simplest peer of `GSGD`, with no division by path values.

    Parameters
    ----------
    net
        As in `Skeleton`.
    lr, options
        As in `torch.optim.SGD`, such as ``momentum`` and ``weight_decay``.
    skeleton
        ``Skeleton(net)`` unless given.

    Curriculum: G4.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 0.5), nn.init.constant_(net[2].weight, 4.0)
    >>> net(torch.ones(1, 1)).sum().backward()
    >>> FrozenSkeletonSGD(net, lr=0.1).step()
    >>> round(net[0].weight.item(), 4), net[2].weight.item()
    (0.1, 4.0)
    """

    def __init__(self, net, lr: float = 1e-2, *, skeleton: Skeleton | None = None, **options):
        self.skeleton = skeleton or Skeleton(net)
        super().__init__(net.parameters(), lr, **options)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; ``closure``, if given, recomputes loss and gradients first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.skeleton.follow_()
        free = [(la, edges, la.at(edges)) for la, edges in self.skeleton.edges(heads=False)]
        super().step()
        for layer, edges, values in free:
            layer.weight.put_(edges, values)
        return loss
