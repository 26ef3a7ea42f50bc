"""Eight augmentations of Fashion-MNIST, each alone, on clean and on changed test images.

    python experiments/regularization/augmentation.py            # the shipped subset, 8 minutes
    python experiments/regularization/augmentation.py --smoke    # seconds, writes nothing

The net is a perceptron with 64 hidden units, drawn anew for each seed, trained for 50 epochs by
SGD with momentum 0.9 and a cosine schedule on 1,000 images, other ones for each seed, out of the
first 4,000. Grey images are repeated in three channels for every method, so that colour can shift.
Each training image is changed anew whenever it is used. "Inversion" has two meanings, and both are
run: left for right (mirror) and dark for bright (negative).

Rule of choice. For each augmentation, in its weak form, the learning rate with the lowest mean
error on images 4,001 to 5,000, as they are, over five tuning seeds that are not among the five
reported ones; then, at this rate, the weak or the strong form by the same error. The smaller one in
a tie. Rates lie half a decade apart; when the best is at an end of the grid, the grid is extended
until it is not. The 1,000 test images are looked at after training only: as they are, and under
each change in its strong form, where inversion inverts every image.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit import regularization as reg
from coursekit.experiment import Record

SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101, 102, 103, 104)
EPOCHS, BATCH, TRAIN, HIDDEN = 50, 50, 1000, 64
FIRST_RATE, STEP = 0.01, 10**0.5
CHANGES = {  # function, its weak and its strong form, other arguments
    "none": (None, (0.0,), {}),
    "mirror": (reg.augment_inversion, (0.25, 0.5), {"kind": "mirror"}),
    "negative": (reg.augment_inversion, (0.25, 0.5), {"kind": "negative"}),
    "scaling": (reg.augment_scaling, (1.1, 1.3), {}),
    "translation": (reg.augment_translation, (0.05, 0.15), {}),
    "rotation": (reg.augment_rotation, (8.0, 25.0), {}),
    "brightness": (reg.augment_brightness, (0.1, 0.3), {}),
    "contrast": (reg.augment_contrast, (1.3, 2.0), {}),
    "noise": (reg.augment_noise, (0.1, 0.3), {}),
    "colour shift": (reg.augment_color_shift, (0.1, 0.3), {}),
}


def change(name, x, strength, generator):
    """Apply an augmentation by name."""
    function, _, options = CHANGES[name]
    return x if function is None else function(x, strength, generator=generator, **options)


@functools.cache
def images():
    """Return 4,000 images to train on, 1,000 for validation, 1,000 for the test, with labels."""
    x, y, x_test, y_test = data.load("fashion_mnist").tensors()
    x, x_test = (z.expand(-1, 3, -1, -1).contiguous() for z in (x, x_test))
    return (x[:4000], y[:4000]), (x[4000:], y[4000:]), (x_test, y_test)


def error(net, x, y):
    """Return the percentage of images that a net gets wrong."""
    return 100 * (1 - train.evaluate(net, x - 0.5, y).accuracy)


def run(job: tuple) -> dict[str, float]:
    """Train once; return the validation error, or test errors under each change of the images."""
    name, strength, lr, seed, epochs, tuning = job
    (x, y), validation, test = images()
    rows = torch.randperm(len(x), generator=train.generator(seed, "rows"))[:TRAIN]
    x, y = x[rows], y[rows]
    layers = models.mlp([3 * 28 * 28, HIDDEN, 10], generator=train.generator(seed, "init"))
    net = nn.Sequential(nn.Flatten(), layers)
    sgd = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    order, draws = train.generator(seed, "data"), train.generator(seed, "augmentation")
    steps = epochs * -(-len(x) // BATCH)
    fall = torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: (1 + math.cos(math.pi * t / steps)) / 2)
    for _ in range(epochs):
        for x_batch, y_batch in train.batches(x, y, BATCH, generator=order):
            sgd.zero_grad()
            loss = cross_entropy(net(change(name, x_batch, strength, draws) - 0.5), y_batch)
            if not torch.isfinite(loss):
                return {"validation": 100.0}  # only in tuning: the rule does not choose such a rate
            loss.backward()
            sgd.step()
            fall.step()
    if tuning:
        return {"validation": error(net, *validation)}
    errors = {"train": error(net, x, y)}
    for changed, (function, forms, _) in CHANGES.items():  # the same test images for every net
        strongest = 1.0 if function is reg.augment_inversion else forms[-1]
        draws = train.generator(0, f"test {changed}")
        errors[changed] = error(net, change(changed, test[0], strongest, draws), test[1])
    return errors


def chosen(sweep: dict[float, list[float]]) -> float:
    """Return the setting with the lowest mean validation error, the smaller one in a tie."""
    return min(sorted(sweep), key=lambda setting: sum(sweep[setting]) / len(sweep[setting]))


def tune(name, epochs, seeds, reach) -> tuple[dict, dict]:
    """Return validation errors by learning rate, its best inside, and then by strength."""

    def tried(strength, lr):
        return [run((name, strength, lr, seed, epochs, True))["validation"] for seed in seeds]

    forms = CHANGES[name][1]
    rates: dict[float, list[float]] = {}
    wanted = [FIRST_RATE * STEP**k for k in range(-reach, reach + 1)]
    while wanted:
        rates |= {lr: tried(forms[0], lr) for lr in wanted}
        best = chosen(rates)
        wanted = [best / STEP] if reach and best == min(rates) else []
        wanted += [best * STEP] if reach and best == max(rates) else []
    strengths = {forms[0]: rates[best]} | {form: tried(form, best) for form in forms[1:]}
    return dict(sorted(rates.items())), strengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two methods, one epoch, no record")
    args = parser.parse_args()
    epochs, names, seeds, tuning_seeds, reach = EPOCHS, list(CHANGES), SEEDS, TUNING_SEEDS, 1
    if args.smoke:
        epochs, names, seeds, tuning_seeds, reach = 1, ["none", "rotation"], (0,), (100,), 0
    start = time.perf_counter()
    values, tuning, settings = {}, {}, {}
    for name in names:
        rates, strengths = tune(name, epochs, tuning_seeds, reach)
        lr, strength = chosen(rates), chosen(strengths)
        settings[name] = {"lr": lr, "strength": strength}
        tuning[name] = {f"lr {lr:.3g}": errors for lr, errors in rates.items()}
        tuning[name] |= {f"strength {form:g}": errors for form, errors in strengths.items()}
        runs = [run((name, strength, lr, seed, epochs, False)) for seed in seeds]
        for test in runs[0]:
            values[f"{name}/{test}"] = [errors[test] for errors in runs]
        clean, own = (sum(values[f"{name}/{test}"]) / len(seeds) for test in ("none", name))
        print(f"{name:12} {strength:<5g} lr {lr:<7.3g} error {clean:5.2f} %, changed {own:5.2f} %")
        sys.stdout.flush()
    if args.smoke:
        return
    record = Record(
        study="regularization/augmentation",
        config={
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "training_images": TRAIN,
            "hidden": HIDDEN,
            "momentum": 0.9,
            "schedule": "cosine",
            "forms": {name: forms for name, (_, forms, _) in CHANGES.items()},
            "tuning_seeds": TUNING_SEEDS,
            "chosen": settings,
            "validation_error": tuning,
            "unit": "percent of 1,000 test images; <augmentation in training>/<change in the test>",
        },
        seeds=list(SEEDS),
        values=values,
        selection="lowest mean validation error after the last epoch over five tuning seeds",
        tier="subset",
        wall_s=time.perf_counter() - start,
        command="python experiments/regularization/augmentation.py",
    )
    record.save(Path(__file__).parents[1] / "results" / "regularization" / "augmentation.json")


if __name__ == "__main__":
    main()
