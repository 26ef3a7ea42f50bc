"""Six ways to keep a network from learning wrong labels, each at its own tuned strength.

    python experiments/regularization/remedies.py            # 3 minutes
    python experiments/regularization/remedies.py --smoke    # seconds, writes nothing

150 images of scikit-learn's digits, three in ten of which got a label at random, and a perceptron
with one hidden layer of 256 units, trained for 60 epochs by plain SGD at a learning rate of 0.3.
Each remedy changes one knob: width, hidden layers, λ of a squared penalty on all parameters, λ of
an absolute penalty on the weights (soft-thresholded after each step), radius of a max-norm ball, or
the patience of early stopping, which watches the validation loss.

Rule of choice. For each knob the value with the lowest mean error on 300 validation images, whose
labels are as noisy as the training labels, over five tuning seeds that are not among the twenty
reported ones; the first of its grid in a tie. A seed draws split, wrong labels, start and order.
The 360 test images have their true labels and are looked at after training only.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from coursekit import data, models, train
from coursekit import regularization as reg
from coursekit.experiment import Record

SEEDS, TUNING_SEEDS = tuple(range(20)), tuple(range(100, 105))
EPOCHS, BATCH, LR, ROWS, SHARE = 60, 25, 0.3, 150, 0.3
GRIDS = {
    "width": (4, 8, 16, 32, 64, 128),
    "layers": (0, 1, 2),
    "l2": (0.001, 0.002, 0.004, 0.008, 0.016),
    "l1": (0.00025, 0.0005, 0.001, 0.002, 0.004),
    "radius": (0.5, 0.7, 1.0, 1.4, 2.0),
    "patience": (2, 5, 10, 20),
}


def noisy_digits(seed):
    """Return rows to train on and rows to validate on, both with wrong labels; and test rows."""
    whole, r = data.load("digits", seed=seed), train.rng(seed, "labels")
    x, y = whole.x_train, whole.y_train.copy()
    wrong = r.random(len(y)) < SHARE
    y[wrong] = r.integers(0, 10, wrong.sum())
    train_rows, validation = slice(ROWS), slice(ROWS, 3 * ROWS)
    rows = dataclasses.replace(
        whole,
        x_train=x[train_rows],
        y_train=y[train_rows],
        x_test=x[validation],
        y_test=y[validation],
    )
    return rows, whole.tensors()[2:]


def run(seed, epochs=EPOCHS, width=256, layers=1, l2=0.0, l1=0.0, radius=None, patience=None):
    """Train once; return the percentages of validation, test and training rows that are wrong."""
    rows, test = noisy_digits(seed)
    net = models.mlp([64, *[width] * layers, 10], generator=train.generator(seed, "init"))

    def after_step(model):
        for layer in model[::2]:
            w = layer.weight.detach()
            if l1:
                w.copy_(reg.soft_threshold(w, LR * l1))
            if radius:
                reg.project_norm_ball_(w, radius, dim=1)

    sgd = torch.optim.SGD(net.parameters(), lr=LR, weight_decay=2 * l2)
    stop = reg.EarlyStopping(patience or epochs)
    order = train.generator(seed, "data")
    options = {"generator": order, "device": "cpu", "after_step": after_step, "callbacks": [stop]}
    train.fit(net, rows, sgd, epochs, BATCH, **options)
    if patience:
        stop.restore_(net)
    tensors = rows.tensors()
    parts = {"validation": tensors[2:], "test": test, "train": tensors[:2]}
    return {k: 100 * (1 - train.evaluate(net, *xy).accuracy) for k, xy in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two knobs, one epoch, no record")
    args = parser.parse_args()
    epochs, grids, seeds, tuning_seeds = EPOCHS, GRIDS, SEEDS, TUNING_SEEDS
    if args.smoke:
        epochs, grids, seeds, tuning_seeds = 1, {"l1": (0.1,), "patience": (1,)}, (0, 1), (100,)
    start = time.perf_counter()
    values, chosen, sweeps = {}, {}, {}
    for knob in ("none", *grids):
        sweeps[knob] = {
            value: [run(seed, epochs, **{knob: value})["validation"] for seed in tuning_seeds]
            for value in grids.get(knob, ())
        }
        if knob in grids:
            chosen[knob] = min(sweeps[knob], key=lambda value: sum(sweeps[knob][value]))
        options = {knob: chosen[knob]} if knob in grids else {}
        errors = [run(seed, epochs, **options) for seed in seeds]
        for part in ("test", "train"):
            values[f"{knob}/{part}"] = [e[part] for e in errors]
        mean = sum(values[f"{knob}/test"]) / len(seeds)
        print(f"{knob:9} {chosen.get(knob, '')!s:>7}  test error {mean:.1f} %", flush=True)
    if args.smoke:
        return
    record = Record(
        study="regularization/remedies",
        config={
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "learning_rate": LR,
            "training_rows": ROWS,
            "share_of_random_labels": SHARE,
            "tuning_seeds": TUNING_SEEDS,
            "chosen": chosen,
            "validation_error": {k: {str(v): e for v, e in s.items()} for k, s in sweeps.items()},
            "unit": "percent of rows; <knob>/<test or train>",
        },
        seeds=list(SEEDS),
        values=values,
        selection="lowest mean validation error after the last epoch over five tuning seeds",
        tier="full",
        wall_s=time.perf_counter() - start,
        command="python experiments/regularization/remedies.py",
    )
    record.save(Path(__file__).parents[1] / "results" / "regularization" / "remedies.json")


if __name__ == "__main__":
    main()
