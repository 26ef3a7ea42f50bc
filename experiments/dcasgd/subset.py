"""A sweep on the data that the package ships, small enough for a page to run a column of it again.

    python experiments/dcasgd/subset.py            # six minutes of one core
    python experiments/dcasgd/subset.py --smoke    # seconds, writes nothing

Net, rules, schedule and times of a gradient are those of `learning_rate.py`, but the server needs
no time for an update, which moves the order of arrivals a little; the data are the 5,000 + 1,000
images of Fashion-MNIST in the package, and a run has 600 pushes of 32 examples, about four passes.

Rule of choice. None: every rate is reported. A run that leaves the finite numbers has error 1 and
is named in ``lost``.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from learning_rate import BATCH, COMPUTE, METHODS, network
from torch.nn.functional import avg_pool2d, cross_entropy

from coursekit import data, parallelism
from coursekit.experiment import Record

SEEDS, PUSHES, RATES = (0, 1, 2, 3, 4), 600, (0.1, 0.2, 0.4, 0.8)
SHOWN = ("sgd", "asgd", "dc_a", "dc_a10", "clip", "spring")


@functools.cache
def images() -> tuple[torch.Tensor, ...]:
    """Return images of 14 x 14 pixels and classes, in units of the pixels' sd."""
    x, y, x_test, y_test = data.load("fashion_mnist", tier="subset").tensors()
    x, x_test = avg_pool2d(x, 2), avg_pool2d(x_test, 2)
    return (x - x.mean()) / x.std(), y, (x_test - x.mean()) / x.std(), y_test


def error(method: str, lr: float, seed: int, pushes: int = PUSHES) -> float | None:
    """Train once and return the share of wrong answers on the test images."""
    x, y, x_test, y_test = images()
    net, (rule, workers), samples = network(seed), METHODS[method], pushes * BATCH

    def rate(done: int) -> float:
        return lr * (1 if done < samples / 2 else 0.1 if done < 0.75 * samples else 0.01)

    log = parallelism.simulate(
        *(net, cross_entropy, x, y),
        **dict(rule=rule, workers=workers, lr=rate, samples=samples, batch_size=BATCH, seed=seed),
        times=parallelism.gamma(COMPUTE, 0.3),
    )
    if log.diverged or not log.server.weights.isfinite().all():
        return None
    return parallelism.score_on(net, x_test, y_test)(log.server.weights)["error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few pushes, no record")
    if parser.parse_args().smoke:
        print("asgd", error("asgd", 0.1, 0, 24))
        return
    start, values, lost = time.perf_counter(), {}, []
    for method in SHOWN:
        for lr in RATES:
            got = [error(method, lr, seed) for seed in SEEDS]
            lost += [[method, lr, seed] for seed, e in zip(SEEDS, got, strict=True) if e is None]
            values[f"{method}@{lr:g}"] = [1.0 if e is None else e for e in got]
            print(method, lr, got, flush=True)
    record = Record(
        study="dcasgd/subset",
        config={"pushes": PUSHES, "batch_size": BATCH, "rates": RATES, "workers": 8, "lost": lost},
        seeds=list(SEEDS),
        values=values,
        selection="none: every rate is reported",
        tier="subset",
        wall_s=time.perf_counter() - start,
        command="python experiments/dcasgd/subset.py",
    )
    record.save(Path(__file__).parents[1] / "results" / "dcasgd" / "subset.json")
    print(record.summarize())


if __name__ == "__main__":
    main()
