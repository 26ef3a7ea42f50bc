"""Nine optimizers on Fashion-MNIST with one budget of epochs, each at its own tuned learning rate.

    python experiments/optimizers/fashion_mnist.py                # the shipped subset, 10 minutes
    python experiments/optimizers/fashion_mnist.py --tier full    # needs COURSEKIT_DATA or a fetch
    python experiments/optimizers/fashion_mnist.py --smoke        # seconds, writes nothing

The net is a 784-128-64-10 perceptron with ReLU, drawn anew for each seed. The last sixth of the
training images is held out for the choice of learning rates; it is never trained on. The test set
is looked at after training only, and nothing is chosen by it.

Rule of choice. For each method and schedule the learning rate with the highest mean validation
accuracy after the last epoch, over three tuning seeds that are not among the five reported ones;
the smaller rate in a tie. Rates lie half a decade apart; when the best is at an end of the grid,
the grid is extended until it is not. A run whose loss stops being finite counts as accuracy 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, several processes

import torch

from coursekit import data, models, optimizers, train
from coursekit.experiment import Record

SIZES = (784, 128, 64, 10)
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101, 102)
BUDGET = {"subset": (10, 64), "full": (3, 128)}  # epochs, batch size
REACH = {"subset": 2, "full": 1}  # rates tried on each side before the grid is extended
STEP = 10**0.5  # between neighbouring learning rates
METHODS = {  # class, options other than the learning rate, where the grid begins
    "sgd": (optimizers.SGD, {}, 0.1),
    "momentum": (optimizers.SGD, {"momentum": 0.9}, 0.03),
    "nesterov": (optimizers.SGD, {"momentum": 0.9, "nesterov": True}, 0.03),
    "adagrad": (optimizers.Adagrad, {}, 0.03),
    "rmsprop": (optimizers.RMSprop, {}, 0.001),
    "adam": (optimizers.Adam, {}, 0.001),
    "amsgrad": (optimizers.Adam, {"amsgrad": True}, 0.001),
    "adamw": (optimizers.AdamW, {}, 0.001),
    "adahessian": (optimizers.AdaHessian, {}, 0.03),
}
SCHEDULES = ("constant", "cosine")


@functools.cache
def split(tier: str, tuning: bool) -> data.Split:
    """Return five sixths of the training rows, and the held-out sixth or the test rows to test on.

    The mean image of the former is taken from both parts; pixels stay in units of white.
    """
    whole = data.load("fashion_mnist", tier=tier, flatten=True)
    keep = len(whole.x_train) * 5 // 6
    x = whole.x_train[:keep]
    x_test, y_test = whole.x_test, whole.y_test
    if tuning:
        x_test, y_test = whole.x_train[keep:], whole.y_train[keep:]
    mean = x.mean(axis=0)
    return dataclasses.replace(
        whole,
        x_train=x - mean,
        y_train=whole.y_train[:keep],
        x_test=x_test - mean,
        y_test=y_test,
    )


def run(job: tuple) -> dict | None:
    """Train once and return the scores after each epoch; None when the loss was not finite."""
    method, schedule, lr, seed, tier, epochs, tuning = job
    batch_size = BUDGET[tier][1]
    rows = split(tier, tuning)
    net = models.mlp(SIZES, generator=train.generator(seed, "init"))
    kind, options, _ = METHODS[method]
    if kind is optimizers.AdaHessian:
        options = {**options, "generator": train.generator(seed, "probes")}
    optimizer = kind(net.parameters(), lr=lr, **options)
    steps = epochs * -(-len(rows.x_train) // batch_size)
    factor = optimizers.cosine(steps) if schedule == "cosine" else lambda step: 1.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    try:
        history = train.fit(
            *(net, rows, optimizer, epochs, batch_size),
            generator=train.generator(seed, "data"),
            scheduler=scheduler,
            device="cpu",
        )
    except (RuntimeError, ValueError) as error:  # from fit, or from an optimizer's own check
        if "finite" not in str(error):
            raise
        return None
    return {
        "train_loss": [score.loss for score in history.train],
        "train_accuracy": [score.accuracy for score in history.train],
        "test_loss": [score.loss for score in history.test],
        "test_accuracy": [score.accuracy for score in history.test],
    }


def chosen(sweep: dict[float, list[float]]) -> float:
    """Return the rate with the highest mean validation accuracy, the smaller one in a tie."""
    return max(sorted(sweep), key=lambda lr: sum(sweep[lr]) / len(sweep[lr]))


def tune(pool, pair, tier, epochs, seeds, reach) -> dict[float, list[float]]:
    """Return validation accuracies by learning rate, on a grid that has its best inside."""
    method, schedule = pair
    sweep: dict[float, list[float]] = {}
    wanted = [METHODS[method][2] * STEP**k for k in range(-reach, reach + 1)]
    while wanted:
        jobs = [(method, schedule, lr, s, tier, epochs, True) for lr in wanted for s in seeds]
        got = [0.0 if r is None else r["test_accuracy"][-1] for r in pool.map(run, jobs)]
        for i, lr in enumerate(wanted):
            sweep[lr] = got[i * len(seeds) : (i + 1) * len(seeds)]
        best = chosen(sweep)
        wanted = [best / STEP] if best == min(sweep) else []
        wanted += [best * STEP] if best == max(sweep) else []
    return dict(sorted(sweep.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=sorted(BUDGET), default="subset")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--smoke", action="store_true", help="two methods, one epoch, no record")
    args = parser.parse_args()
    epochs = 1 if args.smoke else BUDGET[args.tier][0]
    methods = ["momentum", "adam"] if args.smoke else list(METHODS)
    seeds, tuning_seeds = (SEEDS[:2], TUNING_SEEDS[:1]) if args.smoke else (SEEDS, TUNING_SEEDS)
    reach = 0 if args.smoke else REACH[args.tier]
    start = time.perf_counter()
    values, tuning, rates = {}, {}, {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for name in (f"{m}/{s}" for s in SCHEDULES for m in methods):
            pair = tuple(name.split("/"))
            sweep = tune(pool, pair, args.tier, epochs, tuning_seeds, reach)
            tuning[name] = {f"{lr:.3g}": accuracies for lr, accuracies in sweep.items()}
            lr = rates[name] = chosen(sweep)
            runs = list(pool.map(run, [(*pair, lr, s, args.tier, epochs, False) for s in seeds]))
            if None in runs:
                raise RuntimeError(f"{name}: a reported seed left the finite numbers at lr {lr}")
            for metric in runs[0]:
                values[f"{name}/{metric}"] = [r[metric] for r in runs]
            last = [r["test_accuracy"][-1] for r in runs]
            print(f"{name:22} lr {lr:<8.3g} test accuracy {sum(last) / len(last):.4f}", flush=True)
    if args.smoke:
        return
    record = Record(
        study="optimizers/fashion_mnist",
        config={
            "sizes": SIZES,
            "epochs": epochs,
            "batch_size": BUDGET[args.tier][1],
            "tuning_seeds": TUNING_SEEDS,
            "options": {name: METHODS[name][1] for name in METHODS},
            "learning_rates": rates,
            "validation_accuracy": tuning,
        },
        seeds=list(SEEDS),
        values=values,
        selection="highest mean validation accuracy after the last epoch over three tuning seeds",
        tier=args.tier,
        wall_s=time.perf_counter() - start,
        command=f"python experiments/optimizers/fashion_mnist.py --tier {args.tier}",
    )
    results = Path(__file__).parents[1] / "results" / "optimizers"
    record.save(results / f"fashion_mnist_{args.tier}.json")


if __name__ == "__main__":
    main()
