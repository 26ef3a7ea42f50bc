"""G-SGD against its controls on a net 49-h-h-10, over the share H/m of what rescaling can change.

    python experiments/gsgd/invariant_ratio.py                     # all widths, half an hour
    python experiments/gsgd/invariant_ratio.py --widths 8 1024     # some of them
    python experiments/gsgd/invariant_ratio.py --smoke             # seconds, writes nothing

Fashion-MNIST, averaged over 4 x 4 pixels to 7 x 7. The first 10,000 training images are learned
from, the last 10,000 of the 60,000 choose the rates, all 10,000 test images are for the report
alone. It needs COURSEKIT_DATA or `python -m coursekit.data fetch fashion_mnist`. Perceptrons with
ReLU and no biases, batches of 64, six epochs, three at h = 1024, in which the rate falls linearly
to zero. Every width has a record of its own. (The paper: all images, 100 epochs, no held-out rows,
one rate for all, 0.01, which does not fall.)

The methods are those of `rescaled.py`: G-SGD, SGD with the free weights frozen, Path-SGD and SGD,
all from He's start with unit skeletons; SGD from He's start as it is (``he``), and from torch's
(``default``).

Rule of choice. For each method and width the rate with the highest mean accuracy on the held-out
rows after the last epoch, over tuning seeds that are not among the five reported ones; the smaller
rate in a tie. There are two tuning seeds, and three from h = 512 on, where a net can explode at one
seed and do well at another. Rates lie half a decade apart; when the best is at an end of the grid,
the grid is extended until it is not. Beside it every method runs at the paper's constant 0.01. A
run that leaves the finite numbers, or that the optimizer refuses to go on with, counts as loss 10
and accuracy 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import torch
from rescaled import BATCH_SIZE, LOST, SEEDS, STEP, method_of, start
from torch.nn.functional import avg_pool2d, cross_entropy

from coursekit import data, train
from coursekit.experiment import Record

WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
TUNING_SEEDS = (100, 101, 102)
PAPER_RATE = 0.01
METHODS = {  # where the grid begins
    "gsgd": 0.3,
    "frozen": 0.3,
    "path_sgd": 3.0,
    "sgd": 0.3,
    "he": 1.0,
    "default": 1.0,
}


@functools.cache
def parts(tier: str, tuning: bool) -> data.Split:
    """Return 10,000 rows to learn from, and as many to choose by, or the test rows."""
    whole = data.load("fashion_mnist", tier=tier)
    keep = 10_000 if tier == "full" else 4000

    def pooled(x):
        return avg_pool2d(torch.from_numpy(x), 4).flatten(1).numpy()

    x = pooled(whole.x_train[:keep])
    mean = x.mean(axis=0)
    x_test, y_test = whole.x_test, whole.y_test
    if tuning:
        last = 10_000 if tier == "full" else 1000
        x_test, y_test = whole.x_train[-last:], whole.y_train[-last:]
    rows = {"x_train": x - mean, "y_train": whole.y_train[:keep]}
    return dataclasses.replace(whole, **rows, x_test=pooled(x_test) - mean, y_test=y_test)


def epochs_at(width: int) -> int:
    """Return how long a net of this width is trained."""
    return 3 if width == 1024 else 6


def trained(method: str, net, x, y, lr: float, epochs: int, seed: int) -> bool:
    """Train, with no look at any score on the way; False when the numbers did not stay finite.

    The rate falls linearly to zero, but for the paper's, which is constant.
    """
    g = train.generator(seed, "data")
    steps = epochs * -(-len(x) // BATCH_SIZE)
    rates = (lr if lr == PAPER_RATE else lr * (1 - step / steps) for step in range(steps))
    try:
        optimizer, _ = method_of(method, net, lr)
        for _ in range(epochs):
            for x_batch, y_batch in train.batches(x, y, BATCH_SIZE, generator=g):
                loss = cross_entropy(net(x_batch), y_batch)
                if not loss.isfinite():
                    return False
                optimizer.zero_grad()
                loss.backward()
                optimizer.param_groups[0]["lr"] = next(rates)
                optimizer.step()
    except RuntimeError as error:  # a step that is not finite
        if "finite" not in str(error):
            raise
        return False
    return True


def run(method, width, lr, seed, *, tuning=False, tier="full", epochs=None) -> dict:
    """Train once and return the scores after the last epoch."""
    x, y, x_test, y_test = parts(tier, tuning).tensors()
    net = start(method, (49, width, width, 10), seed, torch.float32)
    if not trained(method, net, x, y, lr, epochs or epochs_at(width), seed):
        return {f"{part}_{k}": LOST[k] for part in ("train", "test") for k in LOST}
    scores = {"test": train.evaluate(net, x_test, y_test)}
    if not tuning:
        scores["train"] = train.evaluate(net, x, y)
    return {f"{part}_{k}": getattr(s, k) for part, s in scores.items() for k in LOST}


def tune(method: str, width: int, seeds) -> dict[float, list[float]]:
    """Return held-out accuracies by learning rate, on a grid that has its best inside."""
    found: dict[float, list[float]] = {}
    wanted = [METHODS[method] * STEP**k for k in (-1, 0, 1)]
    while wanted:
        for lr in wanted:
            runs = [run(method, width, lr, seed, tuning=True) for seed in seeds]
            found[lr] = [r["test_accuracy"] for r in runs]
        best = chosen(found)
        wanted = [best / STEP] if best == min(found) else []
        wanted += [best * STEP] if best == max(found) else []
    return dict(sorted(found.items()))


def chosen(found: dict[float, list[float]]) -> float:
    """Return the rate with the highest mean accuracy, the smaller one in a tie."""
    return max(sorted(found), key=lambda lr: sum(found[lr]))


def study(width: int) -> Record:
    """Tune every method at one width, then run it on the reported seeds."""
    begun = time.perf_counter()
    values, rates, sweeps = {}, {}, {}
    tuning_seeds = TUNING_SEEDS[: 3 if width >= 512 else 2]
    for method in METHODS:
        found = tune(method, width, tuning_seeds)
        rates[method] = chosen(found)
        sweeps[method] = {f"{lr:.3g}": got for lr, got in found.items()}
        for rule, lr in (("tuned", rates[method]), ("paper", PAPER_RATE)):
            runs = [run(method, width, lr, seed) for seed in SEEDS]
            for metric in runs[0]:
                got = np.array([r[metric] for r in runs])
                values[f"{method}/{rule}/{metric}"] = got.round(6)
            print(
                f"h {width:4} {method:9} {rule:6} lr {lr:<7.3g} "
                f"train loss {values[f'{method}/{rule}/train_loss'].mean():.4f} "
                f"test accuracy {values[f'{method}/{rule}/test_accuracy'].mean():.4f} "
                f"({time.perf_counter() - begun:.0f} s)",
                flush=True,
            )
    m, hidden = 49 * width + width * width + width * 10, 2 * width
    return Record(
        study="gsgd/invariant_ratio",
        config={
            "width": width,
            "weights": m,
            "hidden_nodes": hidden,
            "ratio": hidden / m,
            "epochs": epochs_at(width),
            "batch_size": BATCH_SIZE,
            "train_rows": 10_000,
            "tuning_seeds": tuning_seeds,
            "learning_rates": rates,
            "paper_rate": PAPER_RATE,
            "validation_accuracy": sweeps,
            "lost": LOST,
        },
        seeds=list(SEEDS),
        values=values,
        selection="highest mean accuracy on held-out rows after the last epoch, over tuning seeds",
        tier="full",
        wall_s=time.perf_counter() - begun,
        command=f"python experiments/gsgd/invariant_ratio.py --widths {width}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--smoke", action="store_true", help="h = 8, one epoch, no record")
    args = parser.parse_args()
    if args.smoke:
        for method in METHODS:
            got = run(method, 8, METHODS[method], 0, tier="subset", epochs=1)
            print(f"{method:9} test accuracy {got['test_accuracy']:.3f}")
        return
    results = Path(__file__).parents[1] / "results" / "gsgd"
    for width in args.widths:
        study(width).save(results / f"invariant_ratio_{width:04}.json")


if __name__ == "__main__":
    main()
