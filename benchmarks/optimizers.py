"""What a step of each optimizer costs beside torch's, and a top eigenvalue beside a whole Hessian.

    python benchmarks/optimizers.py            # writes benchmarks/results/optimizers.json
    python benchmarks/optimizers.py --smoke    # a few repetitions, writes nothing

1. One step on the 65 parameters of ResNet-20 for CIFAR, float32, against the class of `torch.optim`
   with the same options and its loop over parameters (`foreach=False`). The two take turns step by
   step; medians of processor time are compared, so that a busy machine slows both alike. Ours check
   that all gradients are finite, torch's do not.
2. The largest eigenvalue of the Hessian of a digits perceptron's training loss, to one per cent,
   against forming the Hessian: ours row by row, and torch's two ways.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads would measure noise

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from coursekit import curvature, data, models, optimizers, train

DECAY = {"weight_decay": 1e-2}
STEPS = {
    "SGD": ("SGD", {}),
    "SGD, weight decay": ("SGD", DECAY),
    "momentum": ("SGD", {"momentum": 0.9}),
    "Nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "momentum, weight decay": ("SGD", {"momentum": 0.9, **DECAY}),
    "dampening, weight decay": ("SGD", {"momentum": 0.9, "dampening": 0.1, **DECAY}),
    "AdaGrad": ("Adagrad", {}),
    "RMSProp": ("RMSprop", {}),
    "Adam": ("Adam", {}),
    "AMSGrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
}


def parameters() -> list[torch.Tensor]:
    """Return ResNet-20's parameters, each with its gradient on 64 images of noise.

    The passes also leave the heap as training leaves it: in a fresh process the allocator would
    give the check's buffer back to the system after every step.
    """
    net = models.resnet_cifar(20, generator=train.generator(0, "init"))
    images = torch.randn(64, 3, 32, 32, generator=train.generator(0, "images"))
    cross_entropy(net(images), torch.arange(64) % 10).backward()
    return list(net.parameters())


def take_turns(contestants: dict, turns: int) -> dict[str, float]:
    """Return the median processor time in ms of each contestant; who begins changes every turn."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.thread_time()
            contestants[name]()
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(t[len(t) // 10 :]) for name, t in times.items()}


def step_times(turns: int) -> dict[str, dict[str, float]]:
    """Return the time of a step, ours and torch's, of every method."""
    times = {}
    for name, (kind, options) in STEPS.items():
        ours = getattr(optimizers, kind)(parameters(), lr=1e-3, **options)
        theirs = getattr(torch.optim, kind)(parameters(), lr=1e-3, foreach=False, **options)
        times[name] = take_turns({"ours": ours.step, "torch": theirs.step}, turns)
        times[name]["ratio"] = times[name]["ours"] / times[name]["torch"]
        pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
        # Wide: the same gradient a thousand times is rounded the same way a thousand times.
        for p, q in pairs:
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)
    return times


def adahessian_over_adam(turns: int) -> float:
    """Return how much longer AdaHessian takes than Adam with its gradient, digits, batch 64."""
    x, y, _, _ = (part[:64] for part in data.load("digits").tensors())
    net = models.mlp([64, 32, 10], generator=train.generator(0, "init"))
    other = copy.deepcopy(net)
    adam = optimizers.Adam(net.parameters())
    ada_hessian = optimizers.AdaHessian(other.parameters(), generator=train.generator(0, "probes"))

    def first():
        adam.zero_grad()
        cross_entropy(net(x), y).backward()
        adam.step()

    second = lambda: ada_hessian.step(lambda: cross_entropy(other(x), y))
    times = take_turns({"Adam": first, "AdaHessian": second}, turns)
    return times["AdaHessian"] / times["Adam"]


def eigenvalue(width: int, turns: int) -> dict:
    """Return times in ms, the eigenvalue from the whole Hessian and ours' relative error."""
    split = data.load("digits")
    net = models.mlp([64, width, 10], generator=train.generator(0, "init"))
    sgd = optimizers.SGD(net.parameters(), lr=0.1)
    train.fit(net, split, sgd, 3, 64, generator=train.generator(0, "data"), device="cpu")
    x, y, _, _ = split.tensors()
    params, names = list(net.parameters()), [name for name, _ in net.named_parameters()]
    flat = parameters_to_vector(params).detach()
    loss = lambda: cross_entropy(net(x), y)

    def of_flat(w):
        parts = w.split([p.numel() for p in params])
        given = {n: part.view(p.shape) for n, part, p in zip(names, parts, params, strict=True)}
        return cross_entropy(torch.func.functional_call(net, given, (x,)), y)

    top = functools.partial(curvature.top_eigenvalue, loss, params, tol=1e-2)

    def func_hessian(w):
        """`torch.func.hessian` with 64 columns at a time: all at once take gigabytes."""
        column = lambda v: torch.func.jvp(torch.func.grad(of_flat), (w,), (v,))[1]
        return torch.func.vmap(column, chunk_size=64)(torch.eye(len(w)))

    contestants = {
        "top eigenvalue": lambda: top(generator=train.generator(0, "start")),
        "full Hessian": lambda: curvature.full_hessian(loss, params),
        "torch.func": lambda: func_hessian(flat),
        "torch.autograd": lambda: torch.autograd.functional.hessian(of_flat, flat),
    }
    exact = torch.linalg.eigvalsh(contestants["full Hessian"]().double())[-1].item()
    peer = torch.linalg.eigvalsh(contestants["torch.func"]().double())[-1].item()
    assert abs(peer / exact - 1) < 1e-4
    times = take_turns(contestants, turns)
    return {
        "parameters": len(flat),
        "ms": times,
        "exact": exact,
        "relative_error": abs(contestants["top eigenvalue"]() / exact - 1),
        "full_over_top": times["full Hessian"] / times["top eigenvalue"],
        "torch_over_top": min(times["torch.func"], times["torch.autograd"])
        / times["top eigenvalue"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few repetitions, write nothing")
    smoke = parser.parse_args().smoke

    steps = step_times(10 if smoke else 1000)
    print(f"one step on the {len(parameters())} parameters of ResNet-20, medians")
    for name, of in steps.items():
        line = f"ours {of['ours']:6.3f} ms  torch {of['torch']:6.3f} ms  ratio {of['ratio']:.2f}"
        print(f"  {name:24} {line}")
    print(f"  largest ratio {max(of['ratio'] for of in steps.values()):.2f} (at most 1.1)")
    second_order = adahessian_over_adam(10 if smoke else 1000)
    print(f"  AdaHessian / Adam, gradients included, digits: {second_order:.2f}")

    top = eigenvalue(4 if smoke else 32, 1 if smoke else 3)
    print(f"top eigenvalue of the Hessian of {top['parameters']:,} weights, to one per cent")
    for name, ms in top["ms"].items():
        print(f"  {name:24} {ms:9.1f} ms")
    print(f"  relative error {top['relative_error']:.1e}")
    print(f"  full Hessian / top eigenvalue {top['full_over_top']:.0f} (at least 20)")
    print(f"  faster of torch's two / top eigenvalue {top['torch_over_top']:.0f} (at least 20)")

    if not smoke:
        record = {
            "steps": steps,
            "adahessian_over_adam": second_order,
            "top_eigenvalue": top,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": "OMP_NUM_THREADS=1 python benchmarks/optimizers.py",
        }
        path = Path(__file__).parent / "results" / "optimizers.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
