"""The paper's table: ResNet-20 on CIFAR-10 with SGD, SSGD, ASGD and DC-ASGD, and its controls.

    python experiments/dcasgd/cifar10_resnet20.py --method dc_a --workers 8 --lr 0.5 --seed 0
    python experiments/dcasgd/cifar10_resnet20.py --reduced    # half an hour of one core
    python experiments/dcasgd/cifar10_resnet20.py --smoke      # seconds, on noise, no record

CIFAR-10 is read from COURSEKIT_DATA. The first form makes one run of the full study and writes one
record; it goes on where it was interrupted, from a checkpoint in --runs. What is to be run:

    --method sgd --workers 1; ssgd asgd dc_c dc_a at --workers 4 and 8; 0.5 is the paper's rate
    controls: clip (--strength 0.5 1 2), spring (0.3 1 3), dc_a (0.5 2 8), permuted, mean,
    gap_aware, staleness_aware, ssgd --warmup 5 at a rate times the workers, --momentum 0.9
    --lr 0.025 to 1.6 in steps of √2, extended until the best is inside, one seed to scan, then
    five seeds at the best rate and its neighbours
    --norm batch: BatchNorm, whose statistics are taken anew from training images to evaluate

Settings as far as they are known of the paper: 160 passes, batches of 128 a worker, rate a
tenth after 80 and 120 passes, λ 0.04 and 2, m 0.95, no momentum. Assumed: crops and flips, and a
weight decay of 1e-4 on the server. Different on purpose: GroupNorm, the gain capped at 1, 5,000
training images held out. ``--device cuda`` runs on a GPU.

``--reduced`` is no reproduction: ResNet-8 of width 8 with GroupNorm, 10,000 images averaged to
16 x 16 pixels, batches of 32, 800 pushes (2.56 passes), no augmentation or decay of weights;
of the controls only clip and spring, at eight workers and one strength each.

Rule of choice. The rate with the lowest error on 5,000 held-out training images; ``--reduced``
tries factors of 2 on two tuning seeds, until the best is inside, and reports five others. Its
strengths are those of STRENGTHS: none is tuned.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from coursekit import data, models, parallelism, train
from coursekit.dcasgd import dc_asgd_a, dc_asgd_c
from coursekit.experiment import Record
from coursekit.parallelism.log import Log
from coursekit.parallelism.simulate import simulate
from coursekit.parallelism.times import gamma

COMPUTE, SERVICE = 20_000_000, 1_300_000  # ns, assumed: a worker's gradient, the server's update
FULL = dict(depth=20, width=16, images=45_000, pool=1, batch=128, passes=160.0, decay=1e-4)
REDUCED = dict(depth=8, width=8, images=10_000, pool=2, batch=32, passes=2.56, decay=0.0)
SMOKE = dict(depth=8, width=4, images=64, pool=4, batch=4, passes=1.0, decay=0.0)
HELD_OUT, POINTS = 5_000, 20
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101)
SCAN = (0.05, 0.1, 0.2, 0.4)  # tried for every method before its grid is extended
PLAN = [("sgd", 1)] + [(m, 8) for m in ("ssgd", "asgd", "dc_c", "dc_a", "clip", "spring")]
PLAN += [(m, 4) for m in ("ssgd", "asgd", "dc_c", "dc_a")]
STRENGTHS = {"dc_c": 0.04, "dc_a": 2.0, "permuted": 2.0, "mean": 2.0, "clip": 1.0, "spring": 1.0}
GATES = ("ssgd", "gap_aware", "staleness_aware", "clip")
METHODS = ("sgd", "asgd", *GATES, "spring", "dc_c", "dc_a", "permuted", "mean")


def rule_of(method: str, strength: float | None, sizes: tuple[int, ...], **state: float):
    """Return the server's rule; momentum and decay go to what makes the update."""
    strength = STRENGTHS.get(method) if strength is None else strength
    if method in ("dc_a", "permuted", "mean"):
        curvature = "squared" if method == "dc_a" else method
        return partial(dc_asgd_a, strength=strength, curvature=curvature, sizes=sizes, **state)
    if method == "dc_c":
        return partial(dc_asgd_c, strength=strength, **state)
    if method == "spring":
        return partial(parallelism.spring, strength=strength, **state)
    update = partial(parallelism.asgd, **state)
    if method == "clip":
        return partial(parallelism.clipped, max_norm=strength, update=update)
    return partial(getattr(parallelism, method), update=update) if method in GATES else update


@cache
def images(keep: int, pool: int) -> tuple[torch.Tensor, ...]:
    """Return images and classes: to train on, held out, to test on; a few of noise for --smoke."""
    if keep < 1000:
        draw = train.generator(0, "noise")
        x = torch.randn(3 * keep, 3, 32 // pool, 32 // pool, generator=draw)
        y = torch.randint(10, (3 * keep,), generator=draw)
        return x[:keep], y[:keep], x[keep : 2 * keep], y[keep : 2 * keep], x[-keep:], y[-keep:]
    x, y, x_test, y_test = data.load("cifar10", tier="full").tensors()
    rows = torch.cat([torch.arange(keep), torch.arange(len(x) - HELD_OUT, len(x))])
    x, y, x_test = avg_pool2d(x[rows], pool), y[rows], avg_pool2d(x_test, pool)
    mean = x[:keep].mean(dim=(0, 2, 3), keepdim=True)
    std = x[:keep].std(dim=(0, 2, 3), keepdim=True)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    return x[:keep], y[:keep], x[keep:], y[keep:], x_test, y_test


def crops_and_flips(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Shift each image by up to four pixels, and mirror every other one, at random."""
    n, _, side, _ = x.shape
    dy, dx, flip = (torch.randint(top, (n,), generator=draw).to(x.device) for top in (9, 9, 2))
    places = torch.arange(side, device=x.device)
    rows = (dy[:, None] + places)[:, None, :, None]
    columns = torch.where(flip[:, None] == 1, places.flip(0), places) + dx[:, None]
    batch = torch.arange(n, device=x.device)[:, None, None, None]
    maps = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return pad(x, (4, 4, 4, 4))[batch, maps, rows, columns[:, None, None, :]]


def scorer(net: nn.Module, recalibrate: torch.Tensor | None, parts: dict):
    """Return the function from packed weights to errors; BatchNorm gets its statistics first."""

    def evaluate(weights: torch.Tensor) -> dict[str, float]:
        own = parallelism.load_(copy.deepcopy(net), weights)
        if recalibrate is not None:
            for module in own.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.track_running_stats, module.momentum = True, None  # a plain average
                    module.running_mean = torch.zeros_like(module.weight)
                    module.running_var = torch.ones_like(module.weight)
                    module.num_batches_tracked = torch.tensor(0, device=weights.device)
            with torch.no_grad():
                for batch in recalibrate.split(500):
                    own.train()(batch)
        return {
            name: 1 - (train.evaluate(own, x, y).accuracy or 0) for name, (x, y) in parts.items()
        }

    return evaluate


def run(setting: dict, method: str, workers: int, lr: float, seed: int, **options) -> dict:
    """Train once, from the last checkpoint if there is one; errors are null if it diverged."""
    start, before = time.perf_counter(), 0.0
    norm, device = options.get("norm", "group"), options.get("device", "cpu")
    x, y, x_held_out, y_held_out, x_test, y_test = (
        part.to(device) for part in images(setting["images"], setting["pool"])
    )
    norms = {
        "group": lambda maps: nn.GroupNorm(4, maps),
        "batch": lambda maps: nn.BatchNorm2d(maps, track_running_stats=False),
    }
    net = models.resnet_cifar(
        setting["depth"],
        width=setting["width"],
        norm=norms[norm],
        generator=train.generator(seed, "init"),
    ).to(device)
    params = parallelism.trainable(net)
    sizes = tuple(params[name].numel() for name in sorted(params))
    state = {"momentum": options.get("momentum", 0.0), "weight_decay": setting["decay"]}
    samples = round(setting["passes"] * setting["images"])
    warm = options.get("warmup", 0.0) * setting["images"]

    def rate(done: int) -> float:
        factor = 1 if done < samples / 2 else 0.1 if done < 0.75 * samples else 0.01
        return lr * factor * (min(1.0, (done + setting["batch"]) / warm) if warm else 1)

    parts = {"validation": (x_held_out, y_held_out), "test": (x_test, y_test)}
    evaluate = scorer(net, x[:5_000] if norm == "batch" else None, parts)
    checkpoint, log = options.get("checkpoint"), None
    if checkpoint is not None and checkpoint.exists():
        log = Log.load(checkpoint)
        before = log.evaluations[-1]["wall_s"]  # what the run took until it was interrupted
    points = options.get("points", 1)
    for point in range(1, points + 1):
        budget = samples * point // points
        if log is not None and (log.diverged or log.server.samples >= budget):
            continue
        log = simulate(
            *(net, cross_entropy, x, y),
            rule=rule_of(method, options.get("strength"), sizes, **state),
            **dict(workers=workers, lr=rate, samples=budget, batch_size=setting["batch"]),
            **dict(seed=seed, times=gamma(COMPUTE, 0.3), server_time=SERVICE, device=device),
            augment=crops_and_flips if setting is FULL else None,
            resume=log,
        )
        log.evaluations.append(
            {"samples": log.server.samples, "clock": log.rows[-1].clock}
            | (evaluate(log.server.weights) if log.server.weights.isfinite().all() else {})
            | {"wall_s": before + time.perf_counter() - start}
        )
        if checkpoint is not None:
            log.save(checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
    last = {} if log.diverged else log.evaluations[-1]
    correction = log.column("correction_norm") / log.column("gradient_norm")
    return {
        "validation": last.get("validation"),
        "test": last.get("test"),
        "staleness": log.mean_staleness(),
        "correction": float(correction.mean()),
        "capped": float(log.column("capped").mean()),
        "curve": log.evaluations,
        "wall_s": before + time.perf_counter() - start,
    }


def full(args: argparse.Namespace, folder: Path) -> None:
    """Make one run of the full study and write its record."""
    options = {name: getattr(args, name) for name in ("norm", "device", "momentum", "warmup")}
    options |= {"strength": args.strength, "points": POINTS}
    name = f"{args.method}_M{args.workers}_lr{args.lr:.3g}_seed{args.seed}_{args.norm}"
    name += "".join(
        f"_{key}{value:g}"
        for key, value in (("strength", args.strength), ("momentum", args.momentum or None),
                           ("warmup", args.warmup or None))
        if value is not None
    )  # fmt: skip
    checkpoint = args.runs / f"{name}.pt"
    got = run(
        *(FULL, args.method, args.workers, args.lr, args.seed), checkpoint=checkpoint, **options
    )
    complete = [row for row in got["curve"] if "test" in row]
    values = {f"curve/{k}": [[row[k] for row in complete]] for k in ("samples", "clock", "test")}
    values["diverged"] = [got["test"] is None]
    for part in ("validation", "test", "staleness", "correction", "capped"):
        values |= {part: [got[part]]} if got[part] is not None else {}
    arguments = f"--method {args.method} --workers {args.workers} --lr {args.lr} --seed {args.seed}"
    record = Record(
        study="dcasgd/cifar10_resnet20",
        config=FULL | {"method": args.method, "workers": args.workers, "lr": args.lr} | options,
        seeds=[args.seed],
        values=values,
        selection="none in one run; rates are compared by the error on 5,000 held-out images",
        tier="full",
        wall_s=got["wall_s"],
        command=f"python experiments/dcasgd/cifar10_resnet20.py {arguments} --norm {args.norm}",
    )
    record.save(folder / f"cifar10_resnet20_{name}.json")
    print(name, got["validation"], got["test"])


def reduced(kept: Path, folder: Path) -> None:
    """Run the whole reduced study, rates chosen on held-out images, and write one record."""
    kept.mkdir(parents=True, exist_ok=True)

    def cached(method: str, workers: int, lr: float, seed: int) -> dict:
        file = kept / f"reduced_{method}_M{workers}_lr{lr:.3g}_seed{seed}.json"
        if not file.exists():
            got = run(REDUCED, method, workers, lr, seed)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(got), encoding="utf-8")
            part.rename(file)  # so that no half of a run is taken for one
            print(file.stem, got["validation"], f"{got['wall_s']:.0f} s", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def error(runs: list[dict]) -> float:
        found = [1.0 if got["validation"] is None else got["validation"] for got in runs]
        return sum(found) / len(found)

    rates, tried, values, wall = {}, {}, {}, 0.0
    for method, workers in PLAN:
        name = f"{method}/M{workers}"
        scan, wanted = {}, SCAN
        while True:
            for lr in wanted:
                scan[lr] = [cached(method, workers, lr, seed) for seed in TUNING_SEEDS]
            best = min(sorted(scan), key=lambda lr: error(scan[lr]))
            if min(scan) < best < max(scan):
                break
            wanted = (best / 2 if best == min(scan) else best * 2,)
        runs = [cached(method, workers, best, seed) for seed in SEEDS]
        rates[name] = best
        tried[name] = {f"{lr:.3g}": error(scan[lr]) for lr in sorted(scan)}
        for part in ("validation", "test", "staleness", "correction", "capped"):
            if all(got[part] is not None for got in runs):
                values[f"{name}/{part}"] = [got[part] for got in runs]
        wall += sum(
            got["wall_s"] for got in (*runs, *(one for many in scan.values() for one in many))
        )
    record = Record(
        study="dcasgd/cifar10_resnet20",
        config=REDUCED
        | {"reduced": True, "compute_ns": COMPUTE, "server_ns": SERVICE, "held_out": HELD_OUT}
        | {"tuning_seeds": TUNING_SEEDS, "learning_rates": rates, "validation_error": tried}
        | {"pushes": round(REDUCED["passes"] * REDUCED["images"] / REDUCED["batch"])},
        seeds=list(SEEDS),
        values=values,
        selection="lowest mean error on 5,000 held-out images over two tuning seeds",
        tier="full",
        wall_s=wall,
        command="python experiments/dcasgd/cifar10_resnet20.py --reduced",
    )
    record.save(folder / "cifar10_resnet20_reduced.json")
    print(record.summarize())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kept = Path(tempfile.gettempdir()) / "coursekit-dcasgd-cifar10"
    parser.add_argument("--method", choices=METHODS, default="asgd")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, help="of the method, where it has one")
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--warmup", type=float, default=0.0, help="passes of linear warm-up")
    parser.add_argument("--norm", choices=("group", "batch"), default="group")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=kept, help="checkpoints and finished runs")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    folder = Path(__file__).parents[1] / "results" / "dcasgd"
    if args.smoke:
        for method, norm in (("dc_a", "group"), ("ssgd", "batch"), ("clip", "group")):
            got = run(SMOKE, method, 4, 0.1, 0, norm=norm, points=2, warmup=0.5, momentum=0.9)
            print(method, norm, got["staleness"], got["test"], len(got["curve"]))
        x = images(64, 1)[0]
        print(crops_and_flips(x, train.generator(0, "augmentation")).shape)
    elif args.reduced:
        reduced(args.runs, folder)
    else:
        args.runs.mkdir(parents=True, exist_ok=True)
        full(args, folder)


if __name__ == "__main__":
    main()
