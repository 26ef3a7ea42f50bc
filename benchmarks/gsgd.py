"""What a training step of G-SGD costs beside one of plain SGD: forward, backward and update.

    python benchmarks/gsgd.py                   # writes benchmarks/results/gsgd.json, 10 minutes
    python benchmarks/gsgd.py --device cuda     # the same on a GPU
    python benchmarks/gsgd.py --smoke           # small nets, a few steps, writes nothing

Two nets, both without batch norm, so that G-SGD is exact and all weights but one a map are in its
coordinates: the 49-1024-1024-10 perceptron at batches of 64, and Plain-34 (64 to 512 maps, 21
million weights) at batches of 128 of 32 x 32 images. The peer is `torch.optim.SGD` as it comes.
Both begin at the same weights and take turns, a step each, and change places every turn, so that a
busy machine slows both; on a CPU the clock is the time the process itself ran, with one thread.
What is promised is the ratio of the medians, which is stored with the 95 % interval of a bootstrap
over turns. Plain-34 has few turns, of seconds each, and no batch norm, which would make the rest of
a step dearer: its ratio says that the update is lost in a step of that size, and no more digits.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from itertools import repeat
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import gsgd, models, train
from coursekit.experiment import Record

LIMIT = 1.10


def perceptron(smoke, draw):
    """Return the net and a batch of the first case."""
    h = 32 if smoke else 1024
    net = models.mlp([49, h, h, 10], bias=False, generator=draw)
    return net, torch.randn(64, 49, generator=draw)


def plain34(smoke, draw):
    """Return the net and a batch of the second case."""
    net = models.plain_cifar(34, width=2 if smoke else None, norm=nn.Identity, generator=draw)
    return net, torch.randn(4 if smoke else 128, 3, 32, 32, generator=draw)


CASES = {"perceptron": (perceptron, 2000), "plain34": (plain34, 3)}


def race(make, turns, smoke, device):
    """Return the seconds of each step and of its update alone, by optimizer."""
    draw = train.generator(0, "benchmark")
    net, x = make(smoke, draw)
    y = torch.randint(10, (len(x),), generator=draw).to(device)
    net, x = net.to(device), x.to(device)
    gsgd.Skeleton(net).ones_()
    nets = {"sgd": net, "gsgd": copy.deepcopy(net)}
    optimizers = {
        "sgd": torch.optim.SGD(nets["sgd"].parameters(), lr=1e-6),
        "gsgd": gsgd.GSGD(nets["gsgd"], lr=1e-6),
    }

    def clock():
        if device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() if device == "cpu" else time.perf_counter()

    steps, updates = ({name: [] for name in nets} for _ in range(2))
    for turn in range(-1, turns):  # the first is not counted
        for name in sorted(nets, reverse=bool(turn % 2)):
            begin = clock()
            optimizers[name].zero_grad()
            cross_entropy(nets[name](x), y).backward()
            middle = clock()
            optimizers[name].step()
            end = clock()
            if turn >= 0:
                steps[name].append(end - begin)
                updates[name].append(end - middle)
    return steps, updates


def interval(a, b):
    """Return the 95 % bootstrap interval of median(a) / median(b); a turn is drawn as a whole."""
    draw, a, b = train.generator(0, "bootstrap"), torch.tensor(a), torch.tensor(b)
    turns = (torch.randint(len(a), (len(a),), generator=draw) for _ in repeat(None, 1000))
    ratios = torch.stack([a[i].median() / b[i].median() for i in turns])
    return [round(q.item(), 4) for q in ratios.quantile(torch.tensor([0.025, 0.975]))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small nets, write nothing")
    parser.add_argument("--device", default="cpu", help="where torch computes: cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, ms, ratios, ends = time.perf_counter(), {}, {}, {}
    for case, (make, turns) in CASES.items():
        steps, updates = race(make, 3 if options.smoke else turns, options.smoke, options.device)
        for name in steps:
            ms[f"{case}/{name}/step"] = [1e3 * s for s in steps[name]]
            ms[f"{case}/{name}/update"] = [1e3 * s for s in updates[name]]
        middle = {name: statistics.median(got) for name, got in ms.items()}
        ratios[case] = middle[f"{case}/gsgd/step"] / middle[f"{case}/sgd/step"]
        ends[case] = interval(steps["gsgd"], steps["sgd"])
        for name in steps:
            step, update = (middle[f"{case}/{name}/{what}"] for what in ("step", "update"))
            print(f"{case:10} {name:4} step {step:9.2f} ms, of which update {update:7.2f} ms")
        print(
            f"{case:10} gsgd / sgd = {ratios[case]:.3f} (at most {LIMIT}), {ends[case]}", flush=True
        )
    if not options.smoke:
        Record(
            study="benchmarks/gsgd",
            config={
                "torch_device": options.device, "threads": 1, "limit": LIMIT,
                "interval": ends,
                "turns": {case: turns for case, (_, turns) in CASES.items()},
                "ms": {name: [round(t, 4) for t in got] for name, got in ms.items()},
            },
            seeds=[0],
            values={f"{case}_gsgd_over_sgd": [ratio] for case, ratio in ratios.items()},
            selection="nothing is selected: medians of all counted turns",
            tier="full",
            wall_s=time.perf_counter() - start,
            command="OMP_NUM_THREADS=1 python benchmarks/gsgd.py"
            + f" --device {options.device}" * (options.device != "cpu"),
        ).save(Path(__file__).parent / "results" / "gsgd.json")  # fmt: skip


if __name__ == "__main__":
    main()
