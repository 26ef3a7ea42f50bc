"""Eleven methods from a net and from rescaled copies of it, each over a grid of learning rates.

    python experiments/gsgd/rescaled.py            # handwritten digits, two minutes on one core
    python experiments/gsgd/rescaled.py --smoke    # seconds, writes nothing

The net is a 64-32-32-32-10 perceptron with ReLU and no biases, in float64. Its start is He's
normal one with every skeleton weight overwritten by one, as the authors of G-SGD have it; the rows
``he`` and ``default`` are plain SGD without that overwriting, from He's start and from torch's.
A copy multiplies the weights into each hidden node by a log-normal factor (sigma 1 or 2) and
divides those out of it by the same, so it is the same function.

Rule of choice. For each method and each of the three starts, the rate with the lowest mean loss
after the last epoch on held-out rows, the last sixth of the training rows; the smaller one in a
tie. Test rows are looked at only afterwards. Rates lie half a decade apart over four decades, as
strongly rescaled starts need small ones; when the best is at an end of the grid, the grid is
extended until it is not. A run that leaves the finite numbers, or that the optimizer refuses to go
on with, counts as loss 10 and accuracy 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

from coursekit import data, gsgd, models, train
from coursekit.experiment import Record

SIZES = (64, 32, 32, 32, 10)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS, BATCH_SIZE = 5, 64
SIGMAS = (0, 1, 2)  # of the logarithm of the factors
STEP = 10**0.5  # between neighbouring learning rates
METHODS = {  # about the middle of the upper half of the grid
    "gsgd": 0.1,
    "frozen": 0.1,
    "path_sgd": 1.0,
    "sgd": 0.1,
    "he": 0.1,
    "default": 0.3,
    "momentum": 0.01,
    "enorm": 0.1,
    "unit_norm": 0.1,
    "weight_norm": 0.1,
    "adam": 0.003,
}
LOST = {"loss": 10.0, "accuracy": 0.0}


def start(method: str, sizes, seed: int, dtype=torch.float64) -> nn.Sequential:
    """Draw the net that a method begins with: one draw for all but torch's own start."""
    net = models.mlp(sizes, bias=False, generator=train.generator(seed, "init")).to(dtype)
    if method == "default":
        return net
    g = train.generator(seed, "he")
    for weight in net.parameters():
        std = (2 / weight.shape[1]) ** 0.5
        weight.data = std * torch.randn(weight.shape, generator=g, dtype=torch.float64).to(dtype)
    if method != "he":
        gsgd.Skeleton(net).ones_()
    return net


def rescale_(net: nn.Sequential, sigma: float, seed: int) -> None:
    """Move to another member of the family: log-normal factors for all hidden nodes."""
    g = train.generator(seed, "factors")
    hidden = [layer.weight for layer in net if isinstance(layer, nn.Linear)][:-1]
    normal = [torch.randn(len(w), generator=g, dtype=torch.float64).to(w.dtype) for w in hidden]
    gsgd.rescale_(net, [(sigma * z).exp() for z in normal])


def method_of(name: str, net: nn.Sequential, lr: float):
    """Return the optimizer, and what is to be done to the net after each of its steps, or None."""
    if name == "gsgd":
        return gsgd.GSGD(net, lr), None
    if name == "frozen":
        return gsgd.FrozenSkeletonSGD(net, lr), None
    if name == "path_sgd":
        return gsgd.PathSGD(net, lr), None
    if name == "weight_norm":
        gsgd.weight_norm_(net)
    if name == "unit_norm":
        gsgd.unit_norm_(net)
    if name == "adam":
        return torch.optim.Adam(net.parameters(), lr=lr), None
    momentum = 0.9 if name == "momentum" else 0.0
    sgd = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    after = {"enorm": lambda net: gsgd.enorm_(net, sgd), "unit_norm": gsgd.unit_norm_}
    return sgd, after.get(name)


def fitted(method, net, rows, lr, epochs, seed) -> train.History | None:
    """Train; None when the numbers did not stay finite, or the method could not go on."""
    try:
        optimizer, after_step = method_of(method, net, lr)
        return train.fit(
            *(net, rows, optimizer, epochs, BATCH_SIZE),
            generator=train.generator(seed, "data"),
            after_step=after_step,
            device="cpu",
        )
    except (RuntimeError, ValueError) as error:  # a loss or a step that is not finite
        if not any(word in str(error) for word in ("finite", "zero", "singular")):
            raise
        return None


@functools.cache
def parts() -> tuple[data.Split, data.Split]:
    """Return digits without their mean image, tested on held-out rows and on test rows."""
    whole = data.load("digits", flatten=True)
    keep = len(whole.x_train) * 5 // 6
    mean = whole.x_train[:keep].mean(axis=0)
    both = []
    for x, y in ((whole.x_train[keep:], whole.y_train[keep:]), (whole.x_test, whole.y_test)):
        train_rows = {"x_train": whole.x_train[:keep] - mean, "y_train": whole.y_train[:keep]}
        both.append(dataclasses.replace(whole, **train_rows, x_test=x - mean, y_test=y))
    return both[0], both[1]


def run(method: str, sigma: float, lr: float, seed: int, epochs: int = EPOCHS) -> dict:
    """Train once; losses on all three parts, and the loss on the training rows by epoch."""
    held_out, test = parts()
    net = start(method, SIZES, seed)
    rescale_(net, sigma, seed)
    history = fitted(method, net, held_out, lr, epochs, seed)
    if history is None:
        lost = {f"{part}_{k}": LOST[k] for part in ("train", "valid", "test") for k in LOST}
        return lost | {"curve": [LOST["loss"]] * epochs}
    on_test = train.evaluate(net, *test.tensors(dtype=torch.float64)[2:])
    scores = {"train": history.train[-1], "valid": history.test[-1], "test": on_test}
    result = {f"{part}_{k}": getattr(s, k) for part, s in scores.items() for k in LOST}
    return result | {"curve": [s.loss for s in history.train]}


def sweep(method: str, sigma: float, seeds, reach: range, epochs: int) -> dict[float, list[dict]]:
    """Run a grid of rates that has the best by held-out loss inside."""
    found: dict[float, list[dict]] = {}
    wanted = [METHODS[method] * STEP**k for k in reach]
    while wanted:
        for lr in wanted:
            found[lr] = [run(method, sigma, lr, seed, epochs) for seed in seeds]
        best = chosen(found)
        wanted = [best / STEP] if best == min(found) else []
        wanted += [best * STEP] if best == max(found) else []
        wanted = wanted if len(reach) > 1 else []
    return dict(sorted(found.items()))


def chosen(found: dict[float, list[dict]]) -> float:
    """Return the rate with the lowest mean held-out loss, the smaller one in a tie."""
    return min(sorted(found), key=lambda lr: sum(r["valid_loss"] for r in found[lr]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one epoch, one rate, no record")
    args = parser.parse_args()
    seeds, epochs = (SEEDS[:1], 1) if args.smoke else (SEEDS, EPOCHS)
    reach = range(1) if args.smoke else range(-6, 3)
    begun = time.perf_counter()
    values, rates, grids = {}, {}, {}
    for method in METHODS:
        for sigma in SIGMAS:
            name = f"{method}/{sigma}"
            found = sweep(method, sigma, seeds, reach, epochs)
            rates[name] = best = chosen(found)
            grids[name] = list(found)
            for lr, runs in found.items():
                for metric in runs[0]:
                    if metric != "curve" or lr == best:
                        got = np.array([r[metric] for r in runs])
                        values[f"{name}/{lr:.3g}/{metric}"] = got.round(6)
            loss = sum(r["train_loss"] for r in found[best]) / len(seeds)
            error = 1 - sum(r["test_accuracy"] for r in found[best]) / len(seeds)
            print(
                f"{name:13} lr {best:<8.3g} train loss {loss:.4f} test error {error:.4f} "
                f"({time.perf_counter() - begun:.0f} s)",
                flush=True,
            )
    if args.smoke:
        return
    record = Record(
        study="gsgd/rescaled",
        config={
            "sizes": SIZES,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "sigmas": SIGMAS,
            "grids": {name: [f"{lr:.3g}" for lr in grid] for name, grid in grids.items()},
            "learning_rates": {name: f"{lr:.3g}" for name, lr in rates.items()},
            "lost": LOST,
        },
        seeds=list(SEEDS),
        values=values,
        selection="lowest mean loss on held-out rows after the last epoch, for each start",
        tier=parts()[0].tier,
        wall_s=time.perf_counter() - begun,
        command="python experiments/gsgd/rescaled.py",
    )
    record.save(Path(__file__).parents[1] / "results" / "gsgd" / "rescaled.json")


if __name__ == "__main__":
    main()
