"""What many samples of the bound cost, and what inference by likelihood costs.

    python benchmarks/lacim.py             # writes benchmarks/results/lacim.json
    python benchmarks/lacim.py --smoke     # a few steps, writes nothing

1. A training step of LaCIM (paint decoder) on coloured MNIST, 128 images of each of two domains,
   with M = 16 samples of the bound beside M = 1, at 28 x 28 and at 14 x 14. The two take turns,
   step by step. The encoder runs once an image, and no coloured image is made, so sixteen samples
   are no sixteenfold cost.
2. Inference for 1,000 images at 28 x 28: `predict`, which is amortised, beside `infer_latents` with
   50 steps from 2 starts, all in one batch; and how far the latents move when the batch is 1,000,
   250 or 37 images, in double precision.

Times are CPU times of the one thread that computes. A turn is a seed. What is promised is a ratio,
in the median over turns: at most 2.5 and at most 50.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: two busy threads would measure noise

import torch

from coursekit import data, lacim, train
from coursekit.experiment import Record

BATCH, IMAGES, SIDES, SIZES = 128, 1000, (28, 14), (1000, 250, 37)


def domains(side, n=IMAGES):
    """Return two training domains of coloured digits."""
    split = data.load("mnist")
    x, digits = torch.tensor(split.x_train[: 2 * n]), torch.tensor(split.y_train[: 2 * n])
    parts = zip(x.split(n), digits.split(n), (0.9, 0.8), strict=True)
    draw = train.generator(0, "colour")
    return [lacim.colored_mnist(*part, side=side, generator=draw)[:2] for part in parts]


def model(side, samples):
    """Return LaCIM as the study of coloured MNIST has it."""
    options = {"decoder": "paint", "class_weight": 30.0, "samples": samples}
    shape = (3, side, side)
    return lacim.LaCIM(shape, domains=2, **options, generator=train.generator(0, "model"))


def step_ms(side, steps):
    """Return medians in ms of a step with one and with sixteen samples, which take turns."""
    batches = [(x[:BATCH], y[:BATCH]) for x, y in domains(side)]
    contestants = {m: model(side, m) for m in (1, 16)}
    times = {m: [] for m in contestants}
    for _ in range(steps + 1):
        for m, contestant in contestants.items():
            begin = time.process_time()
            contestant.update(batches)
            times[m].append(1e3 * (time.process_time() - begin))
    return {m: statistics.median(rest) for m, (_, *rest) in times.items()}  # the first warms up


def inference_ms(trained, x, turns):
    """Return medians in ms of amortised and of optimised inference, which take turns."""
    times = {"amortised": [], "optimised": []}
    for turn in range(turns + 1):
        begin = time.process_time()
        trained.predict(x)
        middle = time.process_time()
        draw = train.generator(turn, "candidates")
        lacim.infer_latents(trained, x, steps=50, starts=2, batch_size=len(x), generator=draw)
        end = time.process_time()
        times["amortised"].append(1e3 * (middle - begin))
        times["optimised"].append(1e3 * (end - middle))
    return {name: statistics.median(rest) for name, (_, *rest) in times.items()}


def farthest(trained, x):
    """Return how far any latent moves, and how many classes change, with the batch size."""
    trained, x, found = trained.double(), x.double(), []
    for size in SIZES:
        draw = train.generator(0, "candidates")
        found.append(lacim.infer_latents(trained, x, batch_size=size, generator=draw))
    classes = [lacim.predictions(trained, f)["optimised"].argmax(dim=1) for f in found]
    moved = max(float((f.optimised - found[0].optimised).abs().max()) for f in found[1:])
    return moved, max(int((c != classes[0]).sum()) for c in classes[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, write nothing")
    smoke = parser.parse_args().smoke
    seeds, steps, images = ([0], 2, 60) if smoke else (list(range(5)), 7, IMAGES)
    begin = time.perf_counter()
    values: dict[str, list[float]] = {}
    first = domains(28, images)
    trained = model(28, 1)
    draw = train.generator(0, "batches")
    lacim.fit_domains(trained, first, 3 if smoke else 200, 32, generator=draw)
    for _ in seeds:
        got = {}
        for side in SIDES:
            times = step_ms(side, steps)
            got |= {f"step_{side}_m{m}_ms": ms for m, ms in times.items()}
            got[f"step_{side}_ratio"] = times[16] / times[1]
        got |= {f"{name}_ms": ms for name, ms in inference_ms(trained, first[0][0], 1).items()}
        got["inference_ratio"] = got["optimised_ms"] / got["amortised_ms"]
        for name, value in got.items():
            values.setdefault(name, []).append(value)
    median = {name: statistics.median(turns) for name, turns in values.items()}
    for side in SIDES:
        one, many = (median[f"step_{side}_m{m}_ms"] for m in (1, 16))
        ratio = median[f"step_{side}_ratio"]
        print(f"{side} x {side}: a step with M = 1 {one:6.1f} ms, M = 16 {many:6.1f} ms, ", end="")
        print(f"ratio {ratio:.2f} (at most 2.5)")
    print(f"{images} images: amortised {median['amortised_ms']:.1f} ms, ", end="")
    print(f"optimised {median['optimised_ms']:.0f} ms, ", end="")
    print(f"ratio {median['inference_ratio']:.1f} (at most 50)")
    moved, changed = farthest(trained, first[0][0])
    print(f"batches of {SIZES}: latents move by {moved:.1e} at most, {changed} classes change")
    if smoke:
        return
    Record(
        study="benchmarks/lacim",
        config={
            "batch": BATCH, "images": IMAGES, "steps": steps, "batch_sizes": SIZES,
            "latents_move": moved, "classes_change": changed,
        },
        seeds=seeds,
        values=values,
        selection="nothing is selected: one setting, fixed before",
        tier="subset",
        wall_s=time.perf_counter() - begin,
        command="OMP_NUM_THREADS=1 python benchmarks/lacim.py",
    ).save(Path(__file__).parent / "results" / "lacim.json")  # fmt: skip


if __name__ == "__main__":
    main()
