"""What networks doubt when digits turn: one net, dropout by one pass or by sampling, an ensemble.

    python experiments/dropout/rotated.py            # 3 minutes of one core
    python experiments/dropout/rotated.py --smoke    # seconds, writes nothing

A 784-128-128-10 perceptron learns upright digits: 2,000 images of MNIST, drawn for each seed from
the first 4,000. Then 500 test images are turned by 0, 15, ..., 180 degrees (bilinear, about the
centre), and four predictions are scored at each angle by the same labels:

    softmax      one net without dropout
    scaled       one net trained with half of each hidden layer dropped, weights scaled
    sampled      the same net, the mean of 50 thinned networks (Monte Carlo)
    ensemble     five nets without dropout, from five starts and orders, the mean of their softmax

Per angle: accuracy, loss, total entropy and mutual information. Over all angles: how well the
entropy, and the mutual information, tells wrong answers from right ones (area under the ROC curve;
0.5 for a constant), and the mean probability given to the winning class in wrong answers.

Rule of choice. For nets with and without dropout, the learning rate of Adam with the lowest mean
loss on the last 1,000 training images, upright, over two tuning seeds; the smaller rate in a tie.
Rates lie half a decade apart, and the grid is extended until the best is inside. Turned images are
not used to choose anything.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.dropout import Dropout, entropy_decomposition, mc_predict
from coursekit.experiment import Record

SIZES, P = (784, 128, 128, 10), 0.5
ROWS, EPOCHS, BATCH = 2000, 20, 50
ANGLES = tuple(range(0, 181, 15))
IMAGES, SAMPLES, MEMBERS = 500, 50, 5
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101)
STEP = 10**0.5

mnist = functools.cache(lambda: data.load("mnist"))


def flat(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images.reshape(len(images), -1))


def turned(angle: float, count: int = IMAGES) -> torch.Tensor:
    """Turn the first test images counter-clockwise by so many degrees; one row an image."""
    images = mnist().x_test[:count]
    return flat(rotate(images, angle, axes=(3, 2), reshape=False, order=1))


def network(p: float, seed: int, lr: float, epochs: int = EPOCHS, member: int = 0) -> nn.Module:
    """Train on the rows of a seed; each member has a start, an order and masks of its own."""
    rows = train.rng(seed, "rows").choice(4000, ROWS, replace=False)
    x_train, y_train = flat(mnist().x_train[rows]), torch.tensor(mnist().y_train[rows])
    layers = list(models.mlp(SIZES, generator=train.generator(seed, f"init {member}")))
    masks = train.generator(seed, f"dropout {member}")
    for i in (4, 2):  # before every linear layer but the first
        layers.insert(i, Dropout(p, generator=masks))
    net, order = nn.Sequential(*layers), train.generator(seed, f"data {member}")
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        for x, y in train.batches(x_train, y_train, BATCH, generator=order):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def tune(p: float, seeds, epochs: int) -> dict[float, list[float]]:
    """Return held-out losses by learning rate, on a grid that has its best inside."""
    x, y = flat(mnist().x_train[4000:]), torch.tensor(mnist().y_train[4000:])
    sweep: dict[float, list[float]] = {}
    wanted = [1e-3]
    while wanted:
        for lr in wanted:
            nets = [network(p, seed, lr, epochs) for seed in seeds]
            sweep[lr] = [train.evaluate(net, x, y).loss for net in nets]
        best = min(sorted(sweep), key=lambda lr: sum(sweep[lr]))
        wanted = [best / STEP] * (best == min(sweep)) + [best * STEP] * (best == max(sweep))
    return dict(sorted(sweep.items()))


def scores(logits: torch.Tensor, y: torch.Tensor, angles: int) -> dict:
    """Score an ensemble's logits ``(members, angles * images, classes)``."""
    mean = logits.double().softmax(-1).mean(0)
    doubt = entropy_decomposition(logits.double())
    right = mean.argmax(1) == y
    loss = -mean.gather(1, y[:, None])[:, 0].clamp_min(1e-12).log()
    by_angle = lambda v: v.double().reshape(angles, -1).mean(1).tolist()
    return {
        "accuracy": by_angle(right),
        "loss": by_angle(loss),
        "entropy": by_angle(doubt.total),
        "information": by_angle(doubt.mutual_information),
        "auc_entropy": float(roc_auc_score(~right, doubt.total)),
        "auc_information": float(roc_auc_score(~right, doubt.mutual_information)),
        "confidence_when_wrong": mean.max(1).values[~right].mean().item(),
    }


@torch.no_grad()
def run(seed: int, rates: dict, angles=ANGLES, images=IMAGES, epochs=EPOCHS) -> dict:
    """Train six nets and score the four predictions; names are ``prediction/score``."""
    x = torch.cat([turned(angle, images) for angle in angles])
    y = torch.tensor(mnist().y_test[:images]).repeat(len(angles))
    with torch.enable_grad():
        plain = [network(0.0, seed, rates["plain"], epochs, member=k) for k in range(MEMBERS)]
        dropped = network(P, seed, rates["dropout"], epochs)
    outputs = {
        "softmax": plain[0](x)[None],
        "scaled": dropped(x)[None],
        "sampled": mc_predict(dropped, x, SAMPLES),
        "ensemble": torch.stack([net(x) for net in plain]),
    }
    found = {name: scores(logits, y, len(angles)) for name, logits in outputs.items()}
    return {f"{name}/{key}": v for name, score in found.items() for key, v in score.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one epoch, two angles, no record")
    args = parser.parse_args()
    if args.smoke:
        got = run(0, {"plain": 1e-3, "dropout": 1e-3}, angles=(0, 90), images=50, epochs=1)
        print({k: np.round(v, 2).tolist() for k, v in got.items() if k.endswith("accuracy")})
        return
    start = time.perf_counter()
    sweeps = {"plain": tune(0.0, TUNING_SEEDS, EPOCHS), "dropout": tune(P, TUNING_SEEDS, EPOCHS)}
    rates = {k: min(sorted(sweep), key=lambda lr: sum(sweep[lr])) for k, sweep in sweeps.items()}
    print(rates, flush=True)
    runs = [run(seed, rates) for seed in SEEDS]
    record = Record(
        study="dropout/rotated",
        config={
            "sizes": SIZES,
            "p": P,
            "rows": ROWS,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "angles": ANGLES,
            "images": IMAGES,
            "samples": SAMPLES,
            "members": MEMBERS,
            "tuning_seeds": TUNING_SEEDS,
            "learning_rates": rates,
            "held_out_loss": {
                k: {f"{lr:.3g}": v for lr, v in s.items()} for k, s in sweeps.items()
            },
        },
        seeds=list(SEEDS),
        values={name: [r[name] for r in runs] for name in runs[0]},
        selection="lowest mean loss on 1,000 held-out upright training images after the last epoch "
        "over two tuning seeds",
        tier="subset",
        wall_s=time.perf_counter() - start,
        command="python experiments/dropout/rotated.py",
    )
    print(record.summarize())
    record.save(Path(__file__).parents[1] / "results" / "dropout" / "rotated.json")


if __name__ == "__main__":
    main()
