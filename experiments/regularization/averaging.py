"""The last weights, averages of weights, and averages of predictions, each at its own rate.

    python experiments/regularization/averaging.py            # 4 minutes
    python experiments/regularization/averaging.py --smoke    # seconds, writes nothing

A 784-64-10 perceptron is trained on the first 2,000 images of Fashion-MNIST for 15 epochs by plain
SGD with batches of 50. One run at a constant learning rate gives four candidates: its last weights;
the uniform mean of the weights after each of the last 8 epochs (SWA); the exponential mean over
steps with decay 0.99 (EMA); and the mean of the probabilities of the 8 nets that SWA averages
(ensemble of checkpoints). A second run lets the rate fall linearly to zero and keeps its last
weights (decayed).

Rule of choice. For each candidate the learning rate with the lowest mean error on images 4,001 to
5,000, over three tuning seeds that are not among the ten reported ones; the smaller rate in a tie.
Rates are a quarter of a decade apart; when the best is at an end of the grid, the study fails. The
1,000 test images are looked at after training only.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn.functional import cross_entropy, nll_loss

from coursekit import data, models, train
from coursekit import regularization as reg
from coursekit.experiment import Record

SEEDS, TUNING_SEEDS = tuple(range(10)), (100, 101, 102)
EPOCHS, BATCH, TRAIN, KEPT, DECAY = 15, 50, 2000, 8, 0.99
RATES = tuple(round(10 ** (k / 4), 4) for k in range(-7, 0))  # 0.0178 … 0.5623
CANDIDATES = {False: ("last", "swa", "ema", "ensemble"), True: ("decayed",)}


@functools.cache
def images():
    """Return images to train on, for validation, and for the test, with labels; standardized."""
    x, y, x_test, y_test = data.load("fashion_mnist", flatten=True).tensors()
    mean, std = x[:TRAIN].mean(), x[:TRAIN].std()
    parts = (x[:TRAIN], y[:TRAIN]), (x[4000:], y[4000:]), (x_test, y_test)
    return [((x - mean) / std, y) for x, y in parts]


@torch.no_grad()
def score(nets, x, y):
    """Return percent wrong and loss of the mean of the nets' probabilities."""
    p = torch.stack([net(x).softmax(dim=1) for net in nets]).mean(dim=0)
    return 100 * (p.argmax(dim=1) != y).double().mean().item(), nll_loss(p.log(), y).item()


def run(seed, lr, decayed, epochs=EPOCHS, part=2):
    """Train once; return each candidate's error and loss on one part of the images."""
    parts = images()
    net = models.mlp([784, 64, 10], generator=train.generator(seed, "init"))
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    steps, order = epochs * -(-TRAIN // BATCH), train.generator(seed, "data")
    fall = torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: 1 - decayed * t / steps)
    swa, ema, checkpoints = reg.WeightAverage(), reg.WeightAverage(DECAY), []
    for epoch in range(epochs):
        for x, y in train.batches(*parts[0], BATCH, generator=order):
            sgd.zero_grad()
            cross_entropy(net(x), y).backward()
            sgd.step()
            fall.step()
            ema.update(net)
        if epoch >= epochs - KEPT:
            swa.update(net)
            checkpoints.append(copy.deepcopy(net))
    if decayed:
        return {"decayed": score([net], *parts[part])}
    averaged = {"last": [net], "ensemble": checkpoints}
    for name, average in (("swa", swa), ("ema", ema)):
        averaged[name] = [copy.deepcopy(net)]
        average.copy_to_(averaged[name][0])
    return {name: score(nets, *parts[part]) for name, nets in averaged.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one rate, two epochs, no record")
    args = parser.parse_args()
    epochs, rates, seeds, tuning_seeds = EPOCHS, RATES, SEEDS, TUNING_SEEDS
    if args.smoke:
        epochs, rates, seeds, tuning_seeds = 2, (0.1,), (0,), (100,)
    start = time.perf_counter()
    values, chosen, sweeps = {}, {}, {}
    for decayed, names in CANDIDATES.items():
        tuned = {lr: [run(seed, lr, decayed, epochs, 1) for seed in tuning_seeds] for lr in rates}
        runs = {}
        for name in names:
            sweeps[name] = {lr: [r[name][0] for r in tuned[lr]] for lr in rates}
            lr = chosen[name] = min(sweeps[name], key=lambda lr: sum(sweeps[name][lr]))
            if not args.smoke and not min(rates) < lr < max(rates):
                raise RuntimeError(f"{name}: the best rate {lr} is at an end of the grid")
            if lr not in runs:
                runs[lr] = [run(seed, lr, decayed, epochs) for seed in seeds]
            values[f"{name}/error"] = [r[name][0] for r in runs[lr]]
            values[f"{name}/loss"] = [r[name][1] for r in runs[lr]]
            mean = sum(values[f"{name}/error"]) / len(seeds)
            print(f"{name:9} lr {lr:<7g} test error {mean:.2f} %", flush=True)
    if args.smoke:
        return
    record = Record(
        study="regularization/averaging",
        config={
            "sizes": (784, 64, 10),
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "training_images": TRAIN,
            "checkpoints": KEPT,
            "decay": DECAY,
            "tuning_seeds": TUNING_SEEDS,
            "learning_rates": chosen,
            "validation_error": {k: {str(lr): e for lr, e in s.items()} for k, s in sweeps.items()},
            "unit": "error in percent of 1,000 test images, loss as mean cross-entropy",
        },
        seeds=list(SEEDS),
        values=values,
        selection="lowest mean validation error after the last epoch over three tuning seeds",
        tier="subset",
        wall_s=time.perf_counter() - start,
        command="python experiments/regularization/averaging.py",
    )
    record.save(Path(__file__).parents[1] / "results" / "regularization" / "averaging.json")


if __name__ == "__main__":
    main()
