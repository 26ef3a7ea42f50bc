"""Dropout x max-norm x optimizer on 500 images of Fashion-MNIST, each cell at its own settings.

    python experiments/dropout/factorial.py            # 12 minutes of one core, or 6 of two
    python experiments/dropout/factorial.py --smoke    # seconds, writes nothing

The course says that dropout, a bound on each unit's weights, and Adam or a large learning rate with
high momentum belong together. So all twelve combinations are run: dropout (20 % of the inputs, half
of each hidden layer) or none; max-norm (the incoming weights of every hidden unit brought back into
a ball after each step) or none; and plain SGD, SGD with momentum 0.95, or Adam. The net is a
784-256-256-10 perceptron with ReLU; the learning rate falls to zero along a cosine.

Rows. Each seed draws 500 training images from the first 4,000 of the subset, its own initial
weights, its own order and its own masks; all cells of one seed share them, so that cells can be
compared in pairs. The last 1,000 training images are held out for the rule of choice; the 1,000
test images are looked at after training only, and nothing is chosen by them.

Rule of choice. For each cell the learning rate and, for a ball, its radius (0.25, 0.5 or 1) with
the highest mean accuracy on the held-out images after the last epoch, over three tuning seeds that
are not among the ten reported ones; the smaller rate in a tie, then the smaller radius. Every cell
of one optimizer tries the same four rates, half a decade apart, and further ones until the best is
inside. A run whose loss stops being finite counts as accuracy 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from coursekit import data, models, train
from coursekit.dropout import Dropout
from coursekit.experiment import Record

SIZES = (784, 256, 256, 10)
ROWS, EPOCHS, BATCH = 500, 60, 50
SEEDS, TUNING_SEEDS = tuple(range(10)), (100, 101, 102)
DROP = (0.2, 0.5, 0.5)  # inputs, first and second hidden layer
RADII = {"free": (math.inf,), "maxnorm": (0.25, 0.5, 1.0)}  # at the start norms are 0.58
STEP = 10**0.5  # between neighbouring learning rates
OPTIMIZERS = {  # options, where the grid begins
    "sgd": (torch.optim.SGD, {}, 0.1),
    "momentum": (torch.optim.SGD, {"momentum": 0.95}, 0.01),
    "adam": (torch.optim.Adam, {}, 0.001),
}
CELLS = list(itertools.product(("plain", "dropout"), RADII, OPTIMIZERS))

images = functools.cache(lambda: data.load("fashion_mnist", flatten=True))


@functools.cache
def split(seed: int, tuning: bool) -> data.Split:
    """Return the training rows of a seed, and the held-out or the test rows to score on."""
    whole = images()
    rows = train.rng(seed, "rows").choice(4000, ROWS, replace=False)
    x, y = whole.x_train[rows], whole.y_train[rows]
    x_test, y_test = whole.x_test, whole.y_test
    if tuning:
        x_test, y_test = whole.x_train[4000:], whole.y_train[4000:]
    scale = lambda z: (z - x.mean()) / x.std()
    return dataclasses.replace(
        whole, x_train=scale(x), y_train=y, x_test=scale(x_test), y_test=y_test
    )


def network(drop: bool, seed: int) -> nn.Sequential:
    """Build the perceptron, with dropout before each of its layers or without."""
    net = models.mlp(SIZES, generator=train.generator(seed, "init"))
    if not drop:
        return net
    masks = train.generator(seed, "dropout")
    layers: list[nn.Module] = []
    shares = iter(DROP)
    for module in net:
        if isinstance(module, nn.Linear):
            layers.append(Dropout(next(shares), generator=masks))
        layers.append(module)
    return nn.Sequential(*layers)


@torch.no_grad()
def project_(net: nn.Sequential, radius: float) -> None:
    """Bring the incoming weights of each hidden unit back into a ball of this radius."""
    hidden = [module for module in net if isinstance(module, nn.Linear)][:-1]
    for layer in hidden:
        layer.weight.copy_(torch.renorm(layer.weight, 2, 0, radius))


def run(job: tuple) -> dict | None:
    """Train once and return the scores after the last epoch; None when the loss was not finite."""
    (drop, norm, name), lr, radius, seed, tuning, epochs = job
    rows, net = split(seed, tuning), network(drop == "dropout", seed)
    kind, options, _ = OPTIMIZERS[name]
    optimizer = kind(net.parameters(), lr=lr, **options)
    steps = epochs * math.ceil(ROWS / BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    x_train, y_train, x_test, y_test = rows.tensors()
    order = train.generator(seed, "data")
    for _ in range(epochs):  # as train.fit, which would score after every epoch
        for x, y in train.batches(x_train, y_train, BATCH, generator=order):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            if not torch.isfinite(loss):
                return None
            loss.backward()
            optimizer.step()
            scheduler.step()
            if norm == "maxnorm":
                project_(net, radius)
    learned, tested = train.evaluate(net, x_train, y_train), train.evaluate(net, x_test, y_test)
    return {
        "train_accuracy": learned.accuracy,
        "train_loss": learned.loss,
        "test_accuracy": tested.accuracy,
        "test_loss": tested.loss,
    }


def chosen(sweep: dict[tuple[float, float], list[float]]) -> tuple[float, float]:
    """Return rate and radius of the highest mean accuracy, the smaller ones in a tie."""
    return max(sorted(sweep), key=lambda pair: sum(sweep[pair]))


def tune(pool, cell, seeds, epochs, reach) -> dict[tuple[float, float], list[float]]:
    """Return held-out accuracies by rate and radius, on a grid with its best rate inside."""
    sweep: dict[tuple[float, float], list[float]] = {}
    start, radii = OPTIMIZERS[cell[2]][2], RADII[cell[1]]
    wanted = [start * STEP**k for k in range(-reach, 2 * reach + 1)]
    while wanted:
        pairs = list(itertools.product(wanted, radii))
        jobs = [(cell, *pair, seed, True, epochs) for pair in pairs for seed in seeds]
        got = [0.0 if r is None else r["test_accuracy"] for r in pool.map(run, jobs)]
        sweep |= {pair: got[i * len(seeds) :][: len(seeds)] for i, pair in enumerate(pairs)}
        best, rates = chosen(sweep)[0], {lr for lr, _ in sweep}
        wanted = [best / STEP] * (best == min(rates)) + [best * STEP] * (best == max(rates))
    return dict(sorted(sweep.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--smoke", action="store_true", help="two cells, one epoch, no record")
    args = parser.parse_args()
    cells = [CELLS[1], CELLS[-1]] if args.smoke else CELLS
    epochs, reach = (1, 0) if args.smoke else (EPOCHS, 1)
    seeds, tuning_seeds = (SEEDS[:2], TUNING_SEEDS[:1]) if args.smoke else (SEEDS, TUNING_SEEDS)
    start = time.perf_counter()
    values, config = {}, {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for cell in cells:
            name, sweep = "/".join(cell), tune(pool, cell, tuning_seeds, epochs, reach)
            lr, radius = chosen(sweep)
            runs = list(pool.map(run, [(cell, lr, radius, s, False, epochs) for s in seeds]))
            if None in runs:
                raise RuntimeError(f"{name}: a reported seed left the finite numbers at lr {lr}")
            values |= {f"{name}/{metric}": [r[metric] for r in runs] for metric in runs[0]}
            config[name] = {
                "lr": lr,
                "radius": None if math.isinf(radius) else radius,
                "held_out_accuracy": {f"{a:.3g}, {b:.3g}": v for (a, b), v in sweep.items()},
            }
            mean = sum(r["test_accuracy"] for r in runs) / len(runs)
            print(f"{name:26} lr {lr:<8.3g} radius {radius:<4} test {mean:.4f}", flush=True)
    if args.smoke:
        return
    record = Record(
        study="dropout/factorial",
        config={
            "sizes": SIZES,
            "rows": ROWS,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "drop": DROP,
            "tuning_seeds": TUNING_SEEDS,
            "options": {name: OPTIMIZERS[name][1] for name in OPTIMIZERS},
            "cells": config,
        },
        seeds=list(SEEDS),
        values=values,
        selection="highest mean accuracy on 1,000 held-out training images after the last epoch "
        "over three tuning seeds, by learning rate and radius",
        tier="subset",
        wall_s=time.perf_counter() - start,
        command="python experiments/dropout/factorial.py",
    )
    record.save(Path(__file__).parents[1] / "results" / "dropout" / "factorial.json")


if __name__ == "__main__":
    main()
