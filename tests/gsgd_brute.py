"""A step of gradient descent in path space by brute force, for the tests of `coursekit.gsgd`.

A chain is written by hand as a list of (name of the weight, name of the bias or None, fan_in). The
skeleton is the paper's: node j is joined to j mod h on either side, at the centre of the kernel.
"""

import torch
from torch import nn
from torch.func import functional_call


def perceptron_chain(net):
    return [
        (f"{name}.weight", None if module.bias is None else f"{name}.bias", module.in_features)
        for name, module in net.named_children()
        if isinstance(module, nn.Linear)
    ]


def cubes(chain, params):
    """Weights as (fan_out, fan_in, taps)."""
    return [params[name].reshape(len(params[name]), fan_in, -1) for name, _, fan_in in chain]


def tails(weights):
    """Masks of the free set, and the products T out of the nodes behind each layer."""
    masks = [torch.zeros_like(w).bool() for w in weights]
    T = [torch.ones_like(weights[-1][:, 0, 0])]
    for w, mask in zip(weights[:0:-1], masks[:0:-1], strict=True):
        fan_out, fan_in, taps = w.shape
        nodes = torch.arange(fan_in)
        mask[nodes % fan_out, nodes, taps // 2] = True
        T.insert(0, w[nodes % fan_out, nodes, taps // 2] * T[0][nodes % fan_out])
    return masks, T


def heads(w, S):
    """Products S into the nodes behind a layer."""
    nodes = torch.arange(len(w))
    return w[nodes, nodes % w.shape[1], w.shape[2] // 2] * S[nodes % w.shape[1]]


def values(chain, params):
    """The value of the basis path of every edge; of an edge in F, the edge itself."""
    weights = cubes(chain, params)
    masks, T = tails(weights)
    S = torch.ones_like(weights[0][0, :, 0])
    out = {}
    for (name, bias, _), w, mask, t in zip(chain, weights, masks, T, strict=True):
        out[name] = torch.where(mask, w, S[None, :, None] * w * t[:, None, None])
        if bias:
            out[bias] = params[bias] * t
        S = heads(w, S)
    return out


def weights_of(chain, v):
    """The inverse of `values`, layer after layer."""
    given = cubes(chain, v)
    masks, T = tails(given)
    S = torch.ones_like(given[0][0, :, 0])
    out = {}
    for (name, bias, _), x, mask, t in zip(chain, given, masks, T, strict=True):
        w = torch.where(mask, x, x / (S[None, :, None] * t[:, None, None]))
        out[name] = w
        if bias:
            out[bias] = v[bias] / t
        S = heads(w, S)
    return out


def brute_step(net, chains, loss, x, lr):
    """New parameters after v ← v - lr ∂l/∂v, and the smallest ratio of all-skeleton values."""
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    v = dict(params)
    for chain in chains:
        v |= values(chain, params)
    v = {name: p.reshape(params[name].shape).requires_grad_() for name, p in v.items()}

    def rebuilt(v):
        out = dict(v)
        for chain in chains:
            out |= weights_of(chain, v)
        return {name: p.reshape(params[name].shape) for name, p in out.items()}

    value = loss(functional_call(net, rebuilt(v), (x,)))
    gradients = torch.autograd.grad(value, list(v.values()))
    fixed = {}
    for chain in chains:
        masks, _ = tails(cubes(chain, params))
        fixed |= {name: mask for (name, _, _), mask in zip(chain, masks, strict=True)}
    moved, smallest = {}, 1.0
    for (name, p), g in zip(v.items(), gradients, strict=True):
        new = p.detach() - lr * g
        if name in fixed:
            new = torch.where(fixed[name].reshape(new.shape), p.detach(), new)
        moved[name] = new
    for chain in chains:
        for name, _, fan_in in chain[:-1]:
            a, b = (x[name].detach().reshape(len(x[name]), fan_in, -1) for x in (v, moved))
            one = torch.ones_like(a[0, :, 0])
            ratio = heads(b, one) / heads(a, one)
            smallest = min(smallest, ratio.min().item())
    return rebuilt(moved), smallest
