"""What delay costs and what mends it: twelve server rules, each at its own learning rate.

    python experiments/dcasgd/learning_rate.py                  # half an hour of a free core
    python experiments/dcasgd/learning_rate.py --methods asgd   # part of it, kept in --runs
    python experiments/dcasgd/learning_rate.py --smoke          # seconds, writes nothing

Fashion-MNIST, averaged down to 14 x 14 pixels; three convolutions with GroupNorm, 10,078 weights.
Eight workers in the deterministic simulator, batches of 32, gamma times with cv 0.3; the learning
rate falls to a tenth after half and after three quarters of the samples. No momentum, no decay of
weights, no augmentation. Every method sees the same number of samples (SSGD too). With one seed
all methods have the same start, the same batches of each worker and the same computing times.

Rule of choice. 12,800 training images are trained on, the next 5,000 are held out. For each method
the learning rate with the lowest mean error on the held-out images over two tuning seeds, which
are not among the five reported ones; the smaller rate in a tie. Rates lie a factor of √2 apart
around the best, and the grid is extended until the best is inside; before that, the six methods of
MAIN are tried at five rates and the others at three. The test set's 10,000 images are looked at
after training only, and no rate is chosen by them; the strengths 10, 1 and 1 of DC-a, clipping and
spring come from an earlier study, which chose them on its test set. A run with weights or gradients
that are not finite counts as error 1 in the choice, and is stored as null. All methods have the
five reported seeds at their own rate and at a shared one, six have them at both neighbours too.
Permutations depend on the number of the update alone, so the five seeds share them.

A second record, of four methods at their own rate, has error against samples and against virtual
clock from one log.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import data, dcasgd, parallelism, train
from coursekit.experiment import Record
from coursekit.parallelism.simulate import simulate
from coursekit.parallelism.times import gamma

TRAIN, HELD_OUT, BATCH, PUSHES, WORKERS = 12_800, 5_000, 32, 1_200, 8
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101)
ORIGIN, STEP = 0.1, 2**0.5  # rates are ORIGIN * STEP**k
MAIN = ("sgd", "asgd", "dc_a", "dc_a10", "clip", "spring")  # five seeds beside the best rate too
SCAN, MAIN_SCAN = (0, 2, 4), (-2, 0, 2, 4, 6)  # the k tried first: 0.1 to 0.4, 0.05 to 0.8
SHARED = 4  # 0.4, at which methods are compared at one rate, and ASGD at 0.7 of it
COMPUTE, SERVICE = 20_000_000, 1_300_000  # ns: mean of a gradient, and what the server needs
METHODS = {  # rule, workers
    "sgd": (parallelism.asgd, 1),
    "ssgd": (parallelism.ssgd, WORKERS),
    "asgd": (parallelism.asgd, WORKERS),
    "dc_c": (partial(dcasgd.dc_asgd_c, strength=0.04), WORKERS),
    "dc_a": (partial(dcasgd.dc_asgd_a, strength=2.0), WORKERS),
    "dc_a10": (partial(dcasgd.dc_asgd_a, strength=10.0), WORKERS),
    "clip": (partial(parallelism.clipped, max_norm=1.0), WORKERS),
    "spring": (partial(parallelism.spring, strength=1.0), WORKERS),
    "gap_aware": (parallelism.gap_aware, WORKERS),
    "staleness_aware": (parallelism.staleness_aware, WORKERS),
    "permuted": (partial(dcasgd.dc_asgd_a, strength=2.0, curvature="permuted"), WORKERS),
    "mean": (partial(dcasgd.dc_asgd_a, strength=2.0, curvature="mean"), WORKERS),
}
NEED_SIZES = ("permuted", "mean")
CURVES = ("sgd", "ssgd", "asgd", "dc_a")


@functools.cache
def images(tier: data.Tier = "full") -> tuple[torch.Tensor, ...]:
    """Return images and classes: to train on, held out, to test on; in units of the pixels' sd.

    The subset has 4,000 images to train on and 1,000 held out.
    """
    x, y, x_test, y_test = data.load("fashion_mnist", tier=tier).tensors()
    keep, end = (TRAIN, TRAIN + HELD_OUT) if tier == "full" else (4_000, 5_000)
    small = [nn.functional.avg_pool2d(part, 2) for part in (x[:end], x_test)]
    mean, std = small[0][:keep].mean(), small[0][:keep].std()
    x, x_test = ((part - mean) / std for part in small)
    return x[:keep], y[:keep], x[keep:], y[keep:end], x_test, y_test


def network(seed: int, activation=nn.ReLU) -> nn.Sequential:
    """Return three convolutions with GroupNorm and a linear layer, torch's start from one seed."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, stride in ((1, 12, 2), (12, 24, 2), (24, 32, 1)):
        conv = nn.utils.skip_init(nn.Conv2d, fan_in, fan_out, 3, stride, 1, bias=False)
        layers += [conv, nn.GroupNorm(4, fan_out), activation()]
    head = nn.utils.skip_init(nn.Linear, 32, 10)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    draw = train.generator(seed, "init")
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            for p in layer.parameters():
                nn.init.uniform_(p, -bound, bound, generator=draw)
    return net


def run(
    method: str,
    lr: float,
    seed: int,
    *,
    pushes: int = PUSHES,
    curve: bool = False,
    tier: data.Tier = "full",
) -> dict:
    """Train once; errors are null where the run left the finite numbers."""
    start = time.perf_counter()
    x, y, x_held_out, y_held_out, x_test, y_test = images(tier)
    net = network(seed)
    rule, workers = METHODS[method]
    if method in NEED_SIZES:
        params = parallelism.trainable(net)
        rule = partial(rule, sizes=tuple(params[name].numel() for name in sorted(params)))
    samples = pushes * BATCH

    def rate(done: int) -> float:
        return lr * (1 if done < samples / 2 else 0.1 if done < 0.75 * samples else 0.01)

    on_test = parallelism.score_on(net, x_test, y_test)
    log = simulate(
        *(net, cross_entropy, x, y),
        **dict(rule=rule, workers=workers, lr=rate, samples=samples, batch_size=BATCH, seed=seed),
        times=gamma(COMPUTE, 0.3),
        server_time=SERVICE,
        evaluate=on_test if curve else None,
        evaluate_every=samples // 20,
    )
    result = {"validation": None, "test": None, "staleness": log.mean_staleness()}
    if not log.diverged and log.server.weights.isfinite().all():
        result["test"] = on_test(log.server.weights)["error"]
        on_held_out = parallelism.score_on(net, x_held_out, y_held_out)
        result["validation"] = on_held_out(log.server.weights)["error"]
        result["train_loss"] = float(log.column("loss")[-len(log.rows) // 10 :].mean())
        share = log.column("correction_norm") / log.column("gradient_norm")
        result |= {"correction": float(share.mean()), "capped": float(log.column("capped").mean())}
    if curve:
        for name in ("samples", "clock", "error"):
            result[f"curve/{name}"] = [row[name] for row in log.evaluations]
    return result | {"wall_s": time.perf_counter() - start}


class Runs:
    """Finished runs, kept in a folder so that an interrupted study goes on."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, method: str, k: int, seed: int, **options) -> dict:
        name = "_".join(map(str, (method, PUSHES, k, seed, *options.values())))
        file = self.folder / f"{name}.json"
        if not file.exists():
            result = run(method, ORIGIN * STEP**k, seed, **options)
            file.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
            file.with_suffix(".part").rename(file)
            print(f"{name:24} {result['validation']} {result['wall_s']:.1f} s", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))


def mean_error(results: list[dict]) -> float:
    """Return the mean error on the held-out images, 1 for a run that was lost."""
    found = [1.0 if r["validation"] is None else r["validation"] for r in results]
    return sum(found) / len(found)


def study(method: str, runs: Runs) -> tuple[int, dict[int, dict[int, dict]]]:
    """Return the chosen k, and every result by k and seed."""
    found: dict[int, dict[int, dict]] = {}

    def at(k: int, seeds) -> dict[int, dict]:
        found.setdefault(k, {}).update({seed: runs(method, k, seed) for seed in seeds})
        return found[k]

    def best() -> int:
        errors = {k: mean_error([got[s] for s in TUNING_SEEDS]) for k, got in found.items()}
        return min(sorted(errors), key=lambda k: errors[k])

    for k in MAIN_SCAN if method in MAIN else SCAN:
        at(k, TUNING_SEEDS)
    while True:
        k = best()
        wanted = {k - 1, k + 1} | ({k - 2} if k == min(found) else set())
        wanted |= {k + 2} if k == max(found) else set()
        wanted -= set(found)
        if not wanted:
            break
        for near in sorted(wanted):
            at(near, TUNING_SEEDS)
    also = {k - 1, k + 1} if method in MAIN else set()
    also |= {SHARED - 1} if method == "asgd" else set()
    for near in sorted({k, SHARED} | also):
        at(near, SEEDS)
    return k, dict(sorted(found.items()))


def listed(found: dict[int, dict[int, dict]]) -> dict[str, dict[str, list]]:
    """Return errors by learning rate, one a seed in the order of ``seeds``."""
    return {
        f"{ORIGIN * STEP**k:.3g}": {"seeds": sorted(got)}
        | {part: [got[s][part] for s in sorted(got)] for part in ("validation", "test")}
        for k, got in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kept = Path(tempfile.gettempdir()) / "coursekit-dcasgd-learning-rate"
    parser.add_argument("--runs", type=Path, default=kept, help="folder of finished runs")
    parser.add_argument("--methods", help="only these, separated by commas; writes no record")
    parser.add_argument("--smoke", action="store_true", help="a few pushes, no record")
    args = parser.parse_args()
    if args.smoke:
        for method in ("ssgd", "dc_a", "permuted"):
            got = run(method, 0.1, 0, pushes=40, curve=True, tier="subset")
            print(method, got["staleness"], got["test"], got["curve/samples"])
        return
    runs = Runs(args.runs)
    results = {}
    for method in args.methods.split(",") if args.methods else METHODS:
        results[method] = study(method, runs)
        k, found = results[method]
        errors = [found[k][seed]["test"] for seed in SEEDS]
        print(f"{method:16} lr {ORIGIN * STEP**k:<8.3g} test error {errors}", flush=True)
    if args.methods:
        return
    rates = {method: round(ORIGIN * STEP**k, 4) for method, (k, _) in results.items()}
    values, wall = {}, 0.0
    for method, (k, found) in results.items():
        for part in ("test", "validation", "train_loss", "staleness", "correction", "capped"):
            values[f"{method}/{part}"] = [found[k][seed][part] for seed in SEEDS]
        values[f"{method}/at_shared_rate"] = [found[SHARED][seed]["test"] for seed in SEEDS]
        wall += sum(r["wall_s"] for got in found.values() for r in got.values())
    values["asgd/at_0.7_of_shared_rate"] = [
        results["asgd"][1][SHARED - 1][seed]["test"] for seed in SEEDS
    ]
    lost = sorted(name for name, got in values.items() if None in got)
    values = {name: got for name, got in values.items() if name not in lost}
    shared = {
        "study": "dcasgd/learning_rate",
        "seeds": list(SEEDS),
        "selection": "rates: lowest mean error on 5,000 held-out images over two tuning seeds; "
        "strengths 10, 1, 1: set before, by the test set of an earlier study",
        "tier": "full",
        "command": "python experiments/dcasgd/learning_rate.py",
    }
    config = {
        "workers": WORKERS,
        "pushes": PUSHES,
        "batch_size": BATCH,
        "train_images": TRAIN,
        "held_out_images": HELD_OUT,
        "passes": PUSHES * BATCH / TRAIN,
        "compute_ns": COMPUTE,
        "server_ns": SERVICE,
        "tuning_seeds": TUNING_SEEDS,
        "learning_rates": rates,
        "shared_rate": round(ORIGIN * STEP**SHARED, 4),
    }
    lists = {"all_runs": {method: listed(found) for method, (_, found) in results.items()}}
    lists["with_lost_runs"] = lost
    folder = Path(__file__).parents[1] / "results" / "dcasgd"
    record = Record(**shared, config=config | lists, values=values, wall_s=wall)
    record.save(folder / "learning_rate.json")
    print(record.summarize())
    curves, wall = {}, 0.0
    for method in CURVES:
        got = [runs(method, results[method][0], seed, curve=True) for seed in SEEDS]
        wall += sum(r["wall_s"] for r in got)
        for name in ("samples", "clock", "error"):
            curves[f"{method}/{name}"] = [r[f"curve/{name}"] for r in got]
    record = Record(**shared, config=config, values=curves, wall_s=wall)
    record.save(folder / "learning_rate_curves.json")


if __name__ == "__main__":
    main()
