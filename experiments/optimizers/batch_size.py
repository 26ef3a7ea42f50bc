"""Steps to a fixed training loss against batch size, for SGD at its own learning rate each time.

    python experiments/optimizers/batch_size.py            # 5 minutes on two cores
    python experiments/optimizers/batch_size.py --smoke    # seconds, writes nothing

A 784-64-10 perceptron with ReLU learns the shipped part of Fashion-MNIST until the loss on all
5,000 training images is at most 0.45. It is looked at after every twentieth part of the steps so
far, so a count is at most five per cent too high.

Rule of choice. For each batch size the learning rate with the fewest steps, averaged over three
tuning seeds that are not among the five reported ones. Rates are a factor of two apart, and the
grid is extended until the best is not at its end. A run that diverges or needs more than 40 epochs
counts as 40 epochs.

The gradient noise scale tr(Σ)/|G|² is measured where a run ends, and at the start.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, several processes

import torch
from torch.nn.functional import cross_entropy

from coursekit import curvature, data, models, optimizers, train
from coursekit.experiment import Record

SIZES, TARGET, EPOCHS = (784, 64, 10), 0.45, 40
BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101, 102)


@functools.cache
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training images less their mean image, and their classes."""
    x, y, _, _ = data.load("fashion_mnist", tier="subset", flatten=True).tensors()
    return x - x.mean(dim=0), y


def noise_scale(net: torch.nn.Module) -> float:
    """Return tr(Σ)/|G|² over all training images."""
    return float(
        optimizers.gradient_noise_scale(curvature.per_sample_grads(net, cross_entropy, *rows()))
    )


def run(job: tuple) -> dict:
    """Train until the target, and return the steps and the noise scale before and after."""
    batch_size, lr, seed, measure, epochs = job
    x, y = rows()
    net = models.mlp(SIZES, generator=train.generator(seed, "init"))
    order = train.generator(seed, "data")
    optimizer = optimizers.SGD(net.parameters(), lr=lr)
    limit = math.ceil(epochs * len(x) / batch_size)
    found = {"noise_start": noise_scale(net)} if measure else {}
    step, look = 0, 1
    while step < limit:
        for x_batch, y_batch in train.batches(x, y, batch_size, generator=order, drop_last=True):
            optimizer.zero_grad()
            cross_entropy(net(x_batch), y_batch).backward()
            optimizer.step()
            step += 1
            if step >= look:
                loss = train.evaluate(net, x, y, batch_size=len(x)).loss
                look = step + max(1, step // 20)
                if loss <= TARGET or not loss < 100 or step >= limit:
                    if measure:
                        found["noise_end"] = noise_scale(net)
                    reached = loss <= TARGET
                    return {"steps": step if reached else limit, "reached": reached, **found}
    raise AssertionError("the last step is always looked at")


def tune(pool, batch_size, epochs, seeds, reach) -> dict[float, list[int]]:
    """Return steps by learning rate, on a grid that has its best inside."""
    sweep: dict[float, list[int]] = {}
    wanted = [0.1 * (batch_size / 8) ** 0.7 * 2.0**k for k in range(-reach, reach + 1)]
    while wanted:
        got = list(
            pool.map(run, [(batch_size, r, s, False, epochs) for r in wanted for s in seeds])
        )
        for i, lr in enumerate(wanted):
            sweep[lr] = [one["steps"] for one in got[i * len(seeds) : (i + 1) * len(seeds)]]
        best = chosen(sweep)
        wanted = [best / 2] if reach and best == min(sweep) else []
        wanted += [best * 2] if reach and best == max(sweep) else []
    return dict(sorted(sweep.items()))


def chosen(sweep: dict[float, list[int]]) -> float:
    """Return the rate with the fewest steps, the smaller one in a tie."""
    return min(sorted(sweep), key=lambda lr: sum(sweep[lr]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--smoke", action="store_true", help="two sizes, one epoch, no record")
    args = parser.parse_args()
    sizes, epochs = ((256, 1024), 1) if args.smoke else (BATCHES, EPOCHS)
    seeds, tuning_seeds = (SEEDS[:2], TUNING_SEEDS[:1]) if args.smoke else (SEEDS, TUNING_SEEDS)
    start = time.perf_counter()
    values, tuning, rates = {}, {}, {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for size in sizes:
            sweep = tune(pool, size, epochs, tuning_seeds, 0 if args.smoke else 2)
            tuning[str(size)] = {f"{lr:.4g}": steps for lr, steps in sweep.items()}
            lr = rates[str(size)] = chosen(sweep)
            runs = list(pool.map(run, [(size, lr, s, not args.smoke, epochs) for s in seeds]))
            for name in runs[0]:
                values[f"{size}/{name}"] = [one[name] for one in runs]
            print(f"batch {size:5} lr {lr:<7.3g} steps {values[f'{size}/steps']}", flush=True)
    if args.smoke:
        return
    Record(
        study="optimizers/batch_size",
        config={
            "sizes": SIZES,
            "target_loss": TARGET,
            "epochs_at_most": EPOCHS,
            "batch_sizes": BATCHES,
            "tuning_seeds": TUNING_SEEDS,
            "learning_rates": rates,
            "steps_by_learning_rate": tuning,
        },
        seeds=list(SEEDS),
        values=values,
        selection="fewest steps, averaged over three tuning seeds",
        tier="subset",
        wall_s=time.perf_counter() - start,
        command="python experiments/optimizers/batch_size.py",
    ).save(Path(__file__).parents[1] / "results" / "optimizers" / "batch_size.json")


if __name__ == "__main__":
    main()
