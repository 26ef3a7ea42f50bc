"""The linear world: accuracy of each method at every test correlation, for pairs of training ones.

    python experiments/lacim/correlations.py             # five worlds
    python experiments/lacim/correlations.py --smoke     # seconds, writes nothing

x = W (s, v) + 2 ε in R⁸, P(y = 1) = sigmoid(6 s), correlation of s and v r_d in domain d; see
`coursekit.lacim.simulate_scm`. Trained on two domains of 5,000 examples, tested on 5,000 of each
test correlation. Least squares knows W, Bayes knows W and the test correlation.

Rule of choice. None: settings are those of the chapter, the same for all pairs; IRM has the weight
1,000, which no honest rule would choose.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from coursekit import lacim, train
from coursekit.experiment import Record

RESULTS = Path(__file__).parents[1] / "results" / "lacim"
SEEDS = tuple(range(5))
TRAIN = ((0.0, 0.0), (0.5, 0.3), (0.9, 0.7), (0.9, 0.9), (0.99, 0.95), (0.9, 0.0), (0.9, -0.9))
TEST = tuple(round(-0.95 + 0.19 * k, 2) for k in range(11))


def logistic(kind, seed, domains, steps, **options):
    """Return a fitted logistic regression: ERM, or IRM with a weight."""
    model = kind(
        (8,), domains=2, width=8, lr=3e-2, features=lambda generator: nn.Identity(),
        generator=train.generator(seed, "logistic"), **options,
    )  # fmt: skip
    model.classifier = model.classifier[1]
    model.optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(model.optimizer, steps)
    draw = train.generator(seed, "batches")
    lacim.fit_domains(model, domains, steps, 256, generator=draw, scheduler=cosine)
    return model.predict


def causal(seed, domains, steps):
    """Return the optimised prediction of LaCIM with 16 samples."""
    model = lacim.LaCIM(
        (8,), domains=2, s_dim=1, v_dim=1, decoder="linear", prior="full", samples=16,
        full_posterior=True, lr=5e-2, generator=train.generator(seed, "causal"),
    )  # fmt: skip
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(model.optimizer, steps)
    draw = train.generator(seed, "batches")
    lacim.fit_domains(model, domains, steps, 128, generator=draw, scheduler=cosine)

    def predict(x):
        found = lacim.infer_latents(model, x, draws=0, starts=1, steps=150, batch_size=5000)
        return lacim.predictions(model, found)["optimised"]

    return predict


def run(pair, seed, n=5000, scale=1.0):
    """Return the accuracies of each method over all test correlations."""
    draw = train.generator(seed, "scm")
    sim = lacim.simulate_scm("linear", n, [*pair, *TEST], generator=draw)
    parts = [(sim.x[sim.domain == k], sim.y[sim.domain == k]) for k in range(2 + len(TEST))]
    domains, tests = parts[:2], parts[2:]
    w = torch.linalg.lstsq(torch.cat([sim.s, sim.v], dim=1), sim.x).solution.T
    rules = {
        "ERM": logistic(lacim.ERM, seed, domains, int(300 * scale)),
        "IRM": logistic(lacim.IRM, seed, domains, int(300 * scale), weight=1e3),
        "LaCIM": causal(seed, domains, int(400 * scale)),
    }
    found = {k: [lacim.accuracy(f, x, y) for x, y in tests] for k, f in rules.items()}
    found |= {"least squares": [], "Bayes": []}
    for r, (x, y) in zip(TEST, tests, strict=True):
        c = torch.tensor([[1.0, r], [r, 1.0]])
        bayes = c @ w.T @ torch.linalg.solve(w @ c @ w.T + 4 * torch.eye(8), x.T)
        for name, s in (("least squares", torch.linalg.lstsq(w, x.T).solution), ("Bayes", bayes)):
            found[name].append(float(((s[0] > 0) == y).double().mean()))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one pair, few steps, no record")
    args = parser.parse_args()
    if args.smoke:
        for name, got in run(TRAIN[2], 0, n=300, scale=0.03).items():
            print(f"{name:14} {got[0]:.3f} to {got[-1]:.3f}")
        return
    begin, values = time.perf_counter(), {}
    for pair in TRAIN:
        for seed in SEEDS:
            for name, got in run(pair, seed).items():
                values.setdefault(f"{pair[0]},{pair[1]}/{name}", []).append(got)
        print(pair, f"{time.perf_counter() - begin:.0f} s", flush=True)
    Record(
        study="lacim/correlations",
        config={"train": TRAIN, "test": TEST, "examples": 5000, "irm_weight": 1e3},
        seeds=list(SEEDS),
        values=values,
        selection="none: the chapter's settings for all pairs",
        tier="full",
        wall_s=time.perf_counter() - begin,
        command="python experiments/lacim/correlations.py",
    ).save(RESULTS / "correlations.json")


if __name__ == "__main__":
    main()
