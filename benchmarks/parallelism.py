"""What the simulator costs beside plain SGD, and how many gradients it computes at once.

    python benchmarks/parallelism.py           # writes benchmarks/results/parallelism.json
    python benchmarks/parallelism.py --smoke   # few steps, writes nothing

One update of an asynchronous run with eight workers (a 64-128-64-10 perceptron on digits, batches
of 32) against one step of an ordinary torch loop: zero_grad, loss, backward, an optimizer's step,
and the loss read. Contestants take turns, so that a busy machine slows all of them; what is
promised is the median over the turns of the ratio of processor times. The times of computing are
virtual, they decide how many gradients are pending when one is needed.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: two busy threads would measure noise

import torch
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.experiment import Record
from coursekit.parallelism import asgd, constant, gamma, shifted_exponential, simulate

WORKERS, BATCH, RATE, STEPS, TURNS = 8, 32, 0.05, 800, 9
MS = 1e6  # ns
SIMULATED = {
    "constant": {"times": constant(10 * MS)},
    "gamma, cv 0.3": {"times": gamma(10 * MS, 0.3)},
    "gamma, cv 0.7": {"times": gamma(10 * MS, 0.7)},
    "exponential": {"times": shifted_exponential(10 * MS)},
    "constant, one by one": {"times": constant(10 * MS), "batched": False},
}
X, Y, _, _ = data.load("digits").tensors("cpu")
NET = models.mlp([64, 128, 64, 10], generator=train.generator(0, "init"))


def plain(steps):
    """Make steps of SGD in an ordinary loop; return the processor time of one in ms."""
    net = copy.deepcopy(NET)
    sgd = torch.optim.SGD(net.parameters(), lr=RATE)
    order = train.generator(0, "order")
    begin, step = time.process_time(), 0
    while step < steps:
        for x, y in train.batches(X, Y, BATCH, generator=order, drop_last=True):
            sgd.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            sgd.step()
            loss.item()
            step += 1
            if step == steps:
                break
    return 1e3 * (time.process_time() - begin) / steps


def simulated(steps, **options):
    """Simulate as many updates; return the processor time of one in ms, and the log."""
    fixed = {"rule": asgd, "workers": WORKERS, "lr": RATE, "batch_size": BATCH}
    begin = time.process_time()
    log = simulate(NET, cross_entropy, X, Y, samples=steps * BATCH, **fixed, **options)
    return 1e3 * (time.process_time() - begin) / steps, log


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few steps, write nothing")
    smoke = parser.parse_args().smoke
    steps, turns = (80, 2) if smoke else (STEPS, TURNS)
    begin = time.perf_counter()
    took = {name: [] for name in ("plain", *SIMULATED)}
    logs = {}
    plain(80)
    simulated(80)  # warm up
    for _ in range(turns):
        took["plain"].append(plain(steps))
        for name, options in SIMULATED.items():
            ms, logs[name] = simulated(steps, **options)
            took[name].append(ms)
    print(f"an update of {WORKERS} workers against a plain step, {turns} turns of {steps}")
    print(f"  {'plain torch loop':22} {statistics.median(took['plain']):7.3f} ms")
    ratios, stacked = {}, {}
    for name, log in logs.items():
        each = [a / b for a, b in zip(took[name], took["plain"], strict=True)]
        ratios[name], stacked[name] = statistics.median(each), statistics.mean(log.stacked)
        print(
            f"  {name:22} {statistics.median(took[name]):7.3f} ms, {ratios[name]:.2f} of plain, "
            f"{stacked[name]:.1f} gradients at once"
        )
    print(f"  promised: constant at most 1.2 of plain, got {ratios['constant']:.2f}")
    if not smoke:
        Record(
            study="benchmarks/parallelism",
            config={
                "workers": WORKERS, "batch": BATCH, "rate": RATE, "steps": steps,
                "net": [64, 128, 64, 10], "peer": "ordinary torch loop with torch.optim.SGD",
                "ratio": ratios, "gradients_at_once": stacked,
            },
            seeds=list(range(turns)),
            values={f"{name}, ms": ms for name, ms in took.items()},
            selection="nothing is selected: one setting for all, fixed before",
            tier="full",
            wall_s=time.perf_counter() - begin,
            command="OMP_NUM_THREADS=1 python benchmarks/parallelism.py",
        ).save(Path(__file__).parent / "results" / "parallelism.json")  # fmt: skip


if __name__ == "__main__":
    main()
