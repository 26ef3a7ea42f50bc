"""Paths of small networks: a path is a column of zeros and ones, one entry an edge.

Edges are numbered like `parameters_to_vector(net.parameters())` numbers a perceptron's parameters:
layer after layer, the weight flattened and then its bias. A net of several chains, such as a
residual one, has the paths of each chain.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coursekit import _check
from coursekit.gsgd.skeleton import Skeleton, leaves


def _by_layer(skeleton: Skeleton, rows: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """Cut (m, k) into (fan_out, fan_in, taps, k) and (fan_out or 0, k), chain by chain."""
    cut: list[list[tuple[Tensor, Tensor]]] = []
    for layers, _ in skeleton.chains:
        cut.append([])
        for layer in layers:
            edges, biases = layer.weight.numel(), len(layer.weight) * (layer.bias is not None)
            weight, bias, rows = rows.tensor_split((edges, edges + biases))
            cut[-1].append((weight.view(len(layer.weight), layer.fan_in, layer.taps, -1), bias))
    return cut


def _edges(skeleton: Skeleton) -> list[list[tuple[Tensor, Tensor]]]:
    """The columns that have one edge each."""
    device = skeleton.chains[0].layers[0].weight.device
    return _by_layer(skeleton, torch.eye(skeleton.m, dtype=torch.float64, device=device))


def structure_matrix(net: nn.Module) -> Float[Tensor, "m paths"]:
    """Return which edges each path has: log abs(v) = Aᵀ log abs(w).

    Parameters
    ----------
    net
        As in `Skeleton`, and small: the number of paths is the product of all widths.

    Returns
    -------
    Tensor of shape (m, paths)
        Zeros and ones in float64, ready for `torch.linalg.matrix_rank`, which is m - H.

    Source: Q. Meng et al., G-SGD, arXiv:1802.03713, section 3.2, theorem 3.4. Curriculum: G3.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> structure_matrix(net).long()
    tensor([[1, 0],
            [0, 1],
            [1, 0],
            [0, 1]])
    """
    skeleton, columns = Skeleton(net), []
    for layers in _edges(skeleton):
        into = [layers[0][0].new_zeros(1, skeleton.m)] * layers[0][0].shape[1]
        for weight, bias in layers:
            longer = [
                [into[a] + edge for a, taps in enumerate(node) for edge in taps] for node in weight
            ]
            into = [torch.cat(longer[b] + [bias[b : b + 1]]) for b in range(len(longer))]
        columns += into
    return torch.cat(columns).T


def basis_paths(net: nn.Module, skeleton: Skeleton | None = None) -> Float[Tensor, "m basis"]:
    """Return the m - H independent paths whose values are G-SGD's coordinates.

    One for each edge e outside the free set, in the order of these edges: skeleton edges into e,
    then e, then the free set out of e. A bias has nothing before it.

    Parameters
    ----------
    net
        As in `Skeleton`.
    skeleton
        ``Skeleton(net)`` unless given.

    Returns
    -------
    Tensor of shape (m, m - H)
        Columns of `structure_matrix`. Their rows outside F form a triangular matrix of
        determinant ±1.

    Source: Q. Meng et al., G-SGD, arXiv:1802.03713, section 4.1. Curriculum: G3.
    """
    skeleton, columns = skeleton or Skeleton(net), []
    for (_, groups), layers in zip(skeleton.chains, _edges(skeleton), strict=True):
        into = [layers[0][0].new_zeros(layers[0][0].shape[1], skeleton.m)]
        for group, (weight, _) in zip(groups, layers, strict=False):
            into.append(into[-1][group.parent] + weight.flatten(0, 2)[group.head])
        out = [layers[0][0].new_zeros(len(layers[-1][0]), skeleton.m)]
        for group, (weight, _) in zip(reversed(groups), reversed(layers), strict=False):
            out.insert(0, out[0][group.child] + weight.flatten(0, 2)[group.tail])
        for i, (weight, bias) in enumerate(layers):
            paths = (into[i][None, :, None] + weight + out[i][:, None, None]).flatten(0, 2)
            free = torch.ones(len(paths), dtype=torch.bool)
            if i:
                free[groups[i - 1].tail] = False
            columns += [paths[free], bias + out[i][: len(bias)]]
    return torch.cat(columns).T


def path_values(
    net: nn.Module, paths: Float[Tensor, "m paths"] | None = None
) -> Float[Tensor, " paths"]:
    """Return the product of the weights along each path; a rescaling does not change it.

    v_p(w) = Π_{e in p} w_e

    Parameters
    ----------
    net
        As in `Skeleton`; the values carry a gradient with respect to its parameters.
    paths
        Columns like those of `structure_matrix`, all of them unless given.

    Returns
    -------
    Tensor of shape (paths,)

    Source: B. Neyshabur, R. Salakhutdinov and N. Srebro, Path-SGD, arXiv:1506.02617, section 3;
    Q. Meng et al., arXiv:1802.03713, section 3.1. Curriculum: G2.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(net[0].weight, 3.0), nn.init.constant_(net[2].weight, 4.0)
    >>> path_values(net).tolist()
    [12.0]
    """
    paths = structure_matrix(net) if paths is None else paths
    layers = [layer for chain in Skeleton(net).chains for layer in chain.layers]
    weights = torch.cat([p.flatten() for layer in layers for p in layer.parameters])
    _check.shape("path_values", "paths", paths, (len(weights), "paths"))
    on = paths.to(weights.device) > 0
    return torch.where(on, weights[:, None], torch.ones_like(weights[:, None])).prod(dim=0)


def path_activations(
    net: nn.Module, x: Float[Tensor, "batch d"], paths: Float[Tensor, "m paths"] | None = None
) -> Float[Tensor, "batch paths"]:
    """Return the product of the slopes along each path: with ReLU, 1 if all its nodes are on.

    a_p(x; w) = Π over the hidden nodes of p of σ(z) / z

    Parameters
    ----------
    net
        A perceptron: `nn.Sequential` of linear layers and activations with σ(cx) = c σ(x).
    x, paths
        Inputs, and columns as in `path_values`.

    Returns
    -------
    Tensor of shape (batch, paths)

    Raises
    ------
    ValueError
        For a network that is not such a perceptron: a map has a status at every pixel.

    Source: Q. Meng et al., arXiv:1802.03713, section 3.1, theorem 3.3. Curriculum: G2.
    """
    skeleton = _perceptron("path_activations", net)
    paths = (structure_matrix(net) if paths is None else paths).to(x)
    activations = torch.ones(len(x), paths.shape[1]).to(x)
    for slope, (weight, bias) in zip(_slopes(net, x), _by_layer(skeleton, paths)[0], strict=True):
        through = weight.sum(dim=(1, 2)) + (bias if len(bias) else 0)  # which paths enter the node
        activations = activations * (slope @ through + 1 - through.sum(dim=0))
    return activations


def path_sum(net: nn.Module, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch outputs"]:
    """Return a perceptron's output as the sum over paths of value, activation and input.

    N_k(x) = Σ_{p ends in k} v_p a_p(x) x_{p(0)}; the path of a bias begins at a 1. The network's
    forward pass is not used for the sum, only for the activations. Curriculum: G2.
    """
    skeleton, paths = _perceptron("path_sum", net), structure_matrix(net).to(x)
    layers = _by_layer(skeleton, paths)[0]
    begin, (weight, bias) = layers[0][0].sum(dim=(0, 2)), layers[-1]
    end = weight.sum(dim=(1, 2)) + (bias if len(bias) else 0)
    inputs = x @ begin + 1 - begin.sum(dim=0)
    return (path_values(net, paths) * path_activations(net, x, paths) * inputs) @ end.T


def _perceptron(function: str, net: nn.Module) -> Skeleton:
    kinds = (nn.Sequential, nn.Linear, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Flatten)
    for name, module in net.named_modules():
        if not isinstance(module, kinds):
            raise ValueError(f"{function}: expected a perceptron, got layer '{name}': {module}")
    return Skeleton(net)


@torch.no_grad()
def _slopes(net: nn.Module, x: Tensor) -> list[Tensor]:
    """σ(z) / z after each linear layer, by the forward pass; 0 where z = 0."""
    slopes: list[Tensor] = []
    for _, module in filter(None, leaves(net)):
        z, x = x, module(x)
        if isinstance(module, nn.Linear):
            slopes.append(torch.ones_like(x))
        elif slopes:
            slopes[-1] = slopes[-1] * torch.where(z == 0, torch.zeros_like(z), x / z)
    return slopes


def path_norm(net: nn.Module) -> Float[Tensor, ""]:
    """Return the norm of the vector of all path values, by one pass of the squared network.

    (Σ_p v_p²)^½; ``net`` is as in `Skeleton`, and the sum runs over the paths of all its chains.
    A rescaling does not change it. It carries a gradient.

    Source: B. Neyshabur, R. Tomioka and N. Srebro, Norm-based capacity control in neural networks,
    arXiv:1503.00036, section 4. Curriculum: G2.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> torch.isclose(path_norm(net), path_values(net).norm())
    tensor(True)
    """
    total: Tensor | int = 0
    for chain in Skeleton(net).chains:
        reach = torch.ones(chain.layers[0].fan_in).to(chain.layers[0].weight)
        for layer in chain.layers:
            squares = layer.weight.view(len(layer.weight), layer.fan_in, -1).square().sum(dim=2)
            reach = squares @ reach + (0 if layer.bias is None else layer.bias.square())
        total = total + reach.sum()
    return torch.as_tensor(total).sqrt()
