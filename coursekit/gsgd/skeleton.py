"""Which weights of a network a positive rescaling ties together, and which of them stay fixed.

A node is a unit or a feature map; an edge is one entry of a weight or kernel, or a bias, which
comes from a source that is always 1. A *chain* is a run of layers whose inner nodes can be
rescaled. A perceptron or a plain convolutional net is one chain; a residual block is a chain of its
own, since an identity cannot be rescaled; batch norm ends a chain and its γ begins the next.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coursekit import _check
from coursekit.models import BasicBlock

# σ(c x) = c σ(x) for every c > 0, and as many maps come out as went in.
HOMOGENEOUS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
Factors = Sequence[Float[Tensor, " _nodes"]]  # one tensor a set of hidden nodes


class Layer(NamedTuple):
    """Edges between two sets of nodes; ``taps`` of them, a kernel's entries, join each pair."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    fan_in: int
    taps: int
    normed: bool = False  # a batch norm follows, which the chain runs through ("paper")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and, if there is one, bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def matrix(self) -> Tensor:
        """The weight as (fan_out, fan_in · taps), in the same memory."""
        return self.weight.view(len(self.weight), -1)

    def at(self, edges: Tensor) -> Tensor:
        """The weights of the given edges."""
        return self.weight.take(edges)


class Group(NamedTuple):
    """The skeleton at one set of hidden nodes; every tensor has an entry a node.

    ``head`` and ``tail`` are flat positions in the layer before and the layer after of the edge
    by which the skeleton comes in and goes out; ``parent`` and ``child`` are the nodes at the other
    ends; ``held`` says which heads are also tails (of their parents) and therefore fixed.
    """

    head: Tensor
    tail: Tensor
    parent: Tensor | slice  # a slice where node j is joined to node j
    child: Tensor | slice
    held: Tensor
    all_held: bool


class Chain(NamedTuple):
    """Layers one after the other, and the skeleton between them: one group fewer."""

    layers: list[Layer]
    groups: list[Group]

    def products(self) -> tuple[list[Tensor], ...]:
        """Heads and tails, and their products S from an input and T to an output, by group."""
        tails = [layer.at(g.tail) for layer, g in zip(self.layers[1:], self.groups, strict=True)]
        heads = [self.layers[i].at(self.groups[i].head) for i in range(min(1, len(tails)))]
        for i, group in enumerate(self.groups[1:]):  # a held head is a tail, at hand already
            held = group.all_held
            heads.append(tails[i][group.parent] if held else self.layers[i + 1].at(group.head))
        S, T = heads[:1], tails[-1:]
        for head, group in zip(heads[1:], self.groups[1:], strict=True):
            S.append(head * S[-1][group.parent])
        for tail, group in zip(tails[-2::-1], self.groups[-2::-1], strict=True):
            T.insert(0, tail * T[0][group.child])
        return heads, tails, S, T


class Skeleton:
    """The rescalable chains of a network, with one edge into and one edge out of each hidden node.

    F, the *free set* of the ``H`` outgoing edges, is what G-SGD holds fixed: as many weights as the
    group of rescalings has dimensions. Each of the other ``m - H`` edges lies on one basis path:
    skeleton edges from an input to it, itself, then edges of F to an output.

    Parameters
    ----------
    net
        `nn.Sequential`, nested as you like, of `nn.Linear`, `nn.Conv2d` (stride, padding and
        dilation are free), `models.BasicBlock`, batch norm, pooling, dropout and activations with
        σ(cx) = c σ(x).
    batch_norm
        ``"gamma"`` treats γ as the edge into its map and β as its bias, and the convolution before
        it as plain weights: exact. ``"paper"`` runs chains through batch norm, from one change of
        width of a CIFAR net to the next, and G-SGD then multiplies gradients by the norm of a map's
        incoming weights: the heuristic of the paper's section 11.2, for comparison only, since
        rescaling around a batch norm changes the function.
    choose
        ``"modulo"``: node j is entered from j mod h of the layer before and left to j mod h of the
        layer after, by the centre of a kernel: the paper's. ``"largest"``: the edges with the
        largest product of sizes from an input and to an output, which no rescaling changes.

    Attributes
    ----------
    m, H
        Number of edges in chains, biases among them, and of their inner nodes.
    weights, all_skeleton
        Number of skeleton edges, and of basis paths that have no other.
    chains, rest
        The chains, and the parameters in none of them, which take plain steps of SGD.

    Raises
    ------
    ValueError
        For a layer that is not supported, by its name.

    Source: Q. Meng et al., G-SGD, arXiv:1802.03713, section 4.1 and appendix 9; chosen here for
    any widths, with biases. Curriculum: G3.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> skeleton = Skeleton(net)
    >>> skeleton.m, skeleton.H, skeleton.weights
    (26, 4, 8)
    """

    def __init__(self, net: nn.Module, *, batch_norm: str = "gamma", choose: str = "modulo"):
        _check.one_of("Skeleton", "batch_norm", batch_norm, ("gamma", "paper"))
        _check.one_of("Skeleton", "choose", choose, ("modulo", "largest"))
        runs = _runs(net, batch_norm == "paper")
        self.named = list(net.named_parameters())
        self.chains = [_chain(layers, *_choice(layers, choose == "largest")) for layers in runs]
        inside = [p for layers in runs for layer in layers for p in layer.parameters]
        self.rest = [p for _, p in self.named if not any(p is q for q in inside)]
        self.m = sum(p.numel() for p in inside)
        groups = [group for chain in self.chains for group in chain.groups]
        self.H = sum(len(group.head) for group in groups)
        self.all_skeleton = self.H - sum(int(group.held.sum()) for group in groups)
        self.weights = self.H + self.all_skeleton

    def edges(self, *, heads: bool = True) -> Iterator[tuple[Layer, Tensor]]:
        """Go through the skeleton's edges, flat positions in a layer; F alone without heads."""
        for layers, groups in self.chains:
            for before, group, after in zip(layers, groups, layers[1:], strict=False):
                if heads:
                    yield before, group.head
                yield after, group.tail

    def ones_(self) -> "Skeleton":
        """Set every skeleton weight to 1, where the paper starts, and return the skeleton."""
        for layer, edges in self.edges():
            layer.weight.detach().view(-1)[edges] = 1.0
        return self

    def masks(self, *, heads: bool = True) -> dict[str, Tensor]:
        """Return by layer, in the weight's shape, which entries are skeleton (or F) edges."""
        layers = [layer for chain in self.chains for layer in chain.layers]
        masks = {la.name: torch.zeros_like(la.weight, dtype=torch.bool) for la in layers}
        for layer, edges in self.edges(heads=heads):
            masks[layer.name].view(-1)[edges] = True
        return masks

    def require_nonzero(self, function: str) -> None:
        """Refuse a skeleton weight of zero: path values cannot tell the network there."""
        for layer, edges in self.edges():
            if zeros := int((layer.at(edges) == 0).sum()):
                raise ValueError(
                    f"{function}: expected skeleton weights other than 0, got {zeros} zeros in "
                    f"layer '{layer.name}'; Skeleton(net).ones_() or choose='largest' mends it"
                )

    def require_gradients(self, function: str) -> None:
        """Refuse a parameter that has no gradient, by its name."""
        for name, p in self.named:
            if p.grad is None:
                raise RuntimeError(
                    f"{function}: expected a gradient for every parameter, got none for '{name}'"
                )

    def regauge_(self) -> None:
        """Choose the largest skeleton anew and rescale so that F is ±1; the function stays.

        A node that is cut off, all its edges on one side 0, is refused before anything changes.
        """
        old = self.chosen()
        self.choose_([_choice(layers, True) for layers, _ in self.chains])
        try:
            self.require_nonzero("regauge_")
        except ValueError:
            self.choose_(old)
            raise
        for chain in self.chains:
            _rescale_(chain.layers, [tail.abs() for tail in chain.products()[3]])

    def choose_(self, edges: Sequence[tuple[list[Tensor], list[Tensor]]]) -> None:
        """Take the given heads and tails of each chain, one tensor a group, in place of its own.

        Positions that are not one edge into and one out of each hidden node are refused.
        """
        shapes = [[len(la.weight) for la in chain.layers[:-1]] for chain in self.chains]
        fits = len(edges) == len(shapes) and all(
            [len(head) for head in heads] == [len(tail) for tail in tails] == shape
            for (heads, tails), shape in zip(edges, shapes, strict=True)
        )
        fits = fits and all(
            torch.equal(head.cpu() // before.weight[0].numel(), torch.arange(len(head)))
            and torch.equal(tail.cpu() // after.taps % after.fan_in, torch.arange(len(tail)))
            and 0 <= int(tail.min()) <= int(tail.max()) < after.weight.numel()
            for chain, (heads, tails) in zip(self.chains, edges, strict=True)
            for before, head, after, tail in zip(chain.layers, heads, chain.layers[1:], tails)  # noqa: B905
        )
        if not fits:
            raise ValueError(
                f"choose_: expected an edge into and one out of each of {self.H} hidden nodes, "
                "got the skeleton of another network"
            )
        pairs = zip(self.chains, edges, strict=True)
        self.chains = [_chain(chain.layers, *chosen) for chain, chosen in pairs]

    def chosen(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return what `choose_` takes."""
        return [([g.head for g in c.groups], [g.tail for g in c.groups]) for c in self.chains]

    def follow_(self) -> None:
        """Bring the positions to the device where the weights are."""
        if any(g.head.device != c.layers[0].weight.device for c in self.chains for g in c.groups):
            self.choose_(self.chosen())


def leaves(module: Any, name: str = "", paper: bool = False) -> Iterator[Any]:
    """Go through layers in order, with None where the nodes must keep their scale."""
    dot = f"{name}." if name else ""
    if isinstance(module, nn.Sequential):
        in_blocks = False
        for key, child in zip(module._modules, module, strict=True):  # a shared one each time
            if paper and in_blocks != isinstance(child, BasicBlock):
                yield None
            in_blocks = isinstance(child, BasicBlock)
            yield from leaves(child, dot + key, paper)
    elif isinstance(module, BasicBlock):
        wider = module.conv1.weight.shape[0] != module.conv1.weight.shape[1]
        if module.shortcut is not None or (paper and wider):
            yield None
        for part in ("conv1", "norm1", "conv2", "norm2"):
            yield from leaves(getattr(module, part), dot + part, paper)
        if module.shortcut is not None:
            yield None
    else:
        yield name, module


def _runs(net: nn.Module, paper: bool) -> list[list[Layer]]:
    """Read the chains of layers off a network, or name the layer that is in the way."""
    runs: list[list[Layer]] = [[]]
    seen = set()
    form = "units"  # of the nodes: "maps", "flattened" maps, or "units" of a linear layer
    for leaf in leaves(net, paper=paper):
        run = runs[-1]
        if leaf is None:
            runs.append([])
            continue
        name, module = leaf
        if isinstance(module, HOMOGENEOUS) and (form == "maps" or not (run and _pools(module))):
            if isinstance(module, nn.Flatten) and module.start_dim == 1 and form == "maps":
                form = "flattened"
            continue
        weight: Any = getattr(module, "weight", None)
        bias: Any = getattr(module, "bias", None)
        if isinstance(module, NORMS):
            if paper and run:
                run[-1] = run[-1]._replace(normed=True)
            elif not paper:
                runs.append([Layer(name, weight, bias, 1, 1)] if module.affine else [])
                form = "maps" if isinstance(module, nn.BatchNorm2d) else "units"
            continue
        fan_in = len(run[-1].weight) if run else 0
        conv = isinstance(module, nn.Conv2d)
        if (
            not isinstance(module, nn.Linear | nn.Conv2d)
            or not isinstance(weight, nn.Parameter)  # a parametrization computes it
            or getattr(module, "groups", 1) != 1
            or id(module) in seen
            or (run and conv != (form == "maps"))
            or (
                run
                and weight.shape[1] != fan_in
                and (form != "flattened" or weight.shape[1] % fan_in)
            )
        ):
            raise ValueError(
                "Skeleton: expected Linear, Conv2d without groups, BasicBlock, batch norm, pooling "
                "and activations with σ(cx) = c σ(x), in Sequential and each once, Flatten between "
                f"maps and units, got layer '{name}': {module}"
            )
        seen.add(id(module))
        form = "maps" if conv else "units"
        fan_in = fan_in or weight.shape[1]
        run.append(Layer(name, weight, bias, fan_in, weight[0].numel() // fan_in))
    return [run for run in runs if run]


def _pools(module: nn.Module) -> bool:
    return isinstance(module, HOMOGENEOUS[-4:])


@torch.no_grad()
def _choice(layers: list[Layer], largest: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Choose an edge into and an edge out of each hidden node of a chain."""
    heads: list[Tensor] = []
    tails: list[Tensor] = []
    cubes = [layer.matrix.abs().view(-1, layer.fan_in, layer.taps) for layer in layers]
    size = torch.ones_like(cubes[0][0, :, 0])  # abs(S) of the nodes before
    for cube in cubes[:-1]:
        size, nodes, other, tap = _pick(cube, size, largest)
        heads.append((nodes * cube.shape[1] + other) * cube.shape[2] + tap)
    size = torch.ones_like(cubes[-1][:, 0, 0])  # abs(T) of the nodes after
    for cube in reversed(cubes[1:]):
        size, nodes, other, tap = _pick(cube.transpose(0, 1), size, largest)
        tails.insert(0, (other * cube.shape[1] + nodes) * cube.shape[2] + tap)
    return heads, tails


def _pick(cube: Tensor, size: Tensor, largest: bool) -> tuple[Tensor, ...]:
    """Of the edges (node, other, tap) take one a node; return its product of sizes, and where."""
    others, taps = cube.shape[1:]
    nodes = torch.arange(len(cube), device=cube.device)
    sizes = (cube * size[:, None]).flatten(1)
    tie = 1 - 100 * torch.finfo(sizes.dtype).eps  # the first of equals, however they were rounded
    best = (sizes >= tie * sizes.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    edge = best if largest else nodes % others * taps + taps // 2
    return sizes[nodes, edge], nodes, edge // taps, edge % taps


def _chain(layers: list[Layer], heads: Sequence[Tensor], tails: Sequence[Tensor]) -> Chain:
    """Look up where the chosen edges lead."""
    groups: list[Group] = []
    device = layers[0].weight.device
    for layer, head, after, tail in zip(layers, heads, layers[1:], tails, strict=False):
        head, tail = head.to(device), tail.to(device)
        parent = _straight(head // layer.taps % layer.fan_in, layer.fan_in)
        child = _straight(tail // after.taps // after.fan_in, len(after.weight))
        held = groups[-1].tail[parent] == head if groups else torch.zeros_like(head).bool()
        groups.append(Group(head, tail, parent, child, held, bool(held.all())))
    return Chain(layers, groups)


def _straight(nodes: Tensor, among: int) -> Tensor | slice:
    same = torch.equal(nodes, torch.arange(among, device=nodes.device))
    return slice(None) if same else nodes


def gradient_of(p: nn.Parameter) -> Tensor:
    """The gradient of a parameter that `Skeleton.require_gradients` has seen."""
    gradient: Any = p.grad
    return gradient


@torch.no_grad()
def rescale_(net: nn.Module, factors: Factors, *, batch_norm: str = "gamma") -> None:
    """Multiply the weights into each hidden node by c > 0 and divide those out of it by c.

    Parameters
    ----------
    net
        As in `Skeleton`; changed in place. Its function is the same as before.
    factors
        c for each set of hidden nodes, in the order of the layers.
    batch_norm
        As in `Skeleton`. With ``"paper"`` the function of a net with batch norm changes.

    Raises
    ------
    ValueError
        For another number of factors, or one that is not positive and finite.

    Source: Q. Meng et al., arXiv:1802.03713, definition 3.1. Curriculum: G1.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 3.0), nn.init.constant_(net[2].weight, 4.0)
    >>> rescale_(net, [torch.tensor([2.0])])
    >>> net[0].weight.item(), net[2].weight.item()
    (6.0, 2.0)
    """
    runs = _runs(net, batch_norm == "paper")
    inner = [layer for layers in runs for layer in layers[:-1]]
    if len(factors) != len(inner):
        raise ValueError(f"rescale_: expected {len(inner)} tensors of factors, got {len(factors)}")
    for layer, c in zip(inner, factors, strict=True):
        _check.shape("rescale_", f"factors of layer '{layer.name}'", c, (len(layer.weight),))
        if not bool(((c > 0) & c.isfinite()).all()):
            raise ValueError(f"rescale_: expected positive finite factors, got {c.tolist()}")
    rest = iter(factors)
    for layers in runs:
        _rescale_(layers, [next(rest) for _ in layers[1:]])


@torch.no_grad()
def _rescale_(layers: list[Layer], factors: list[Tensor]) -> None:
    for before, c, after in zip(layers, factors, layers[1:], strict=False):
        before.matrix.mul_(c[:, None])
        if before.bias is not None:
            before.bias.mul_(c)
        after.matrix.div_(c.repeat_interleave(after.taps))
