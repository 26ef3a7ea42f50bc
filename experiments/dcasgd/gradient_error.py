"""How much of a gradient's change does a correction predict? Seven predictors and the Hessian.

    python experiments/dcasgd/gradient_error.py            # about four minutes of one core
    python experiments/dcasgd/gradient_error.py --smoke    # seconds, writes nothing

Net, images and times are those of `learning_rate.py`; ASGD with eight workers at a constant rate,
with ReLU and with tanh. At sixteen pushes of each run the gradient of the *same* mini-batch is
taken anew at the server's weights w, and its difference from the stale gradient g at w_bak is
compared with what each predictor makes of g and d = w − w_bak:

    hessian   H(w_bak) d of that mini-batch: Taylor's first order
    fisher    the mean over the batch's examples of g_i (g_i · d), with the labels of the data:
              the empirical Fisher matrix, not the Fisher matrix
    outer     g (g · d), of the batch's mean gradient
    squared   g ⊙ g ⊙ d, its diagonal: DC-ASGD-c
    adaptive  g ⊙ g ⊙ d / √(MeanSquare + ε): DC-ASGD-a
    permuted  adaptive, the curvatures of a tensor dealt out to other weights of it
    mean      adaptive, each weight with the mean curvature of its tensor
    spring    d, with no curvature at all

Stored for each: the cosine to the true change, and the strength that would leave least. With the
strength s and the best one s*, the share of the change that is left is
√(1 − 2 (s/s*) cos² + (s/s*)² cos²), so every strength can be drawn.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from learning_rate import BATCH, COMPUTE, SERVICE, WORKERS, images, network
from torch import nn
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from coursekit import curvature, parallelism, train
from coursekit.dcasgd import curvature_error, diagonal_curvature
from coursekit.experiment import Record
from coursekit.parallelism.simulate import simulate
from coursekit.parallelism.times import gamma
from coursekit.parallelism.work import Shards, gradient, objective

SEEDS, RATES, DECAY = (0, 1, 2, 3, 4), (0.0125, 0.1, 0.4), 0.95
NETS = {"relu": nn.ReLU, "tanh": nn.Tanh}
FIRST, EVERY, PROBES = 100, 30, 16  # pushes 100, 130, … 550


def predictions(g, d, of_weights, backup, x, y, mean_square, sizes, push_number) -> dict:
    """Return what each predictor makes of the stale gradient and the displacement."""
    leaf = backup.detach().requires_grad_()
    (product,) = curvature.hvp(lambda: of_weights(leaf, x, y), [leaf], [d])
    one = lambda x, y: grad(of_weights)(backup, x[None], y[None])
    each = vmap(one)(x, y)  # (batch, n)
    adaptive = partial(diagonal_curvature, g, 1.0, mean_square, sizes=sizes)
    deal = train.generator(push_number, "permuted")
    return {
        "hessian": product,
        "fisher": each.T @ (each @ d) / len(each),
        "outer": g * (g @ d),
        "squared": g * g * d,
        "adaptive": adaptive() * d,
        "permuted": adaptive(curvature="permuted", generator=deal) * d,
        "mean": adaptive(curvature="mean") * d,
        "spring": d,
    }


def run(net: str, lr: float, seed: int, probes: int = PROBES, tier: str = "full") -> dict:
    """Train, and return one list a quantity, with one number a probe."""
    x, y, *_ = images(tier)
    model = network(seed, NETS[net])
    params = parallelism.trainable(model)
    sizes = tuple(params[name].numel() for name in sorted(params))
    _, of_weights = objective(model, cross_entropy)
    shards = Shards(len(x), WORKERS, BATCH, seed)
    found: dict[str, list[float]] = {}
    mean_square = torch.zeros(sum(sizes))

    def probing(server, push, rate):
        nonlocal mean_square
        g, backup = push.gradient, server.backups[push.worker]
        mean_square = DECAY * mean_square + (1 - DECAY) * g * g
        late = server.version - FIRST
        if late >= 0 and late % EVERY == 0 and server.version > push.version:
            rows = shards.rows(push.worker, server.clocks[push.worker] - 1)
            batch, d = (x[rows], y[rows]), server.weights - backup
            again, _ = gradient(of_weights, backup, batch[0][None], batch[1][None], rate)
            fresh, _ = gradient(of_weights, server.weights, batch[0][None], batch[1][None], rate)
            if not torch.allclose(again, g, atol=1e-4):
                raise RuntimeError("gradient_error: expected the batch of the push")
            made = predictions(
                *(again, d, of_weights, backup, *batch, mean_square, sizes, server.version)
            )
            for name, guess in made.items():
                got = curvature_error(again, fresh, guess)
                found.setdefault(f"{name}/cosine", []).append(got.cosine)
                found.setdefault(f"{name}/strength", []).append(got.strength)
            change = ((fresh - again).norm() / again.norm()).item()
            found.setdefault("change", []).append(change)
            found.setdefault("distance", []).append(d.norm().item())
            found.setdefault("staleness", []).append(server.version - push.version)
        return parallelism.asgd(server, push, rate)

    simulate(
        *(model, cross_entropy, x, y),
        **dict(rule=probing, workers=WORKERS, lr=lr, batch_size=BATCH, seed=seed),
        samples=(FIRST + EVERY * probes) * BATCH,
        times=gamma(COMPUTE, 0.3),
        server_time=SERVICE,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two probes, no record")
    args = parser.parse_args()
    if args.smoke:
        for name, got in run("tanh", 0.1, 0, probes=2, tier="subset").items():
            print(f"{name:18}", [round(value, 3) for value in got])
        return
    start = time.perf_counter()
    values = {}
    for net in NETS:
        for lr in RATES:
            runs = [run(net, lr, seed) for seed in SEEDS]
            least = min(len(got["change"]) for got in runs)  # fewer where a push was not stale
            for name in runs[0]:
                values[f"{net}/{lr}/{name}"] = [
                    [float(f"{value:.4g}") for value in got[name][:least]] for got in runs
                ]
            print(net, lr, least, "probes", f"{time.perf_counter() - start:.0f} s", flush=True)
    record = Record(
        study="dcasgd/gradient_error",
        config={
            "workers": WORKERS,
            "batch_size": BATCH,
            "learning_rates": RATES,
            "nets": list(NETS),
            "mean_square_decay": DECAY,
            "first_probe": FIRST,
            "probe_every": EVERY,
        },
        seeds=list(SEEDS),
        values=values,
        selection="none: all rates and both nets are reported",
        tier="full",
        wall_s=time.perf_counter() - start,
        command="python experiments/dcasgd/gradient_error.py",
    )
    record.save(Path(__file__).parents[1] / "results" / "dcasgd" / "gradient_error.json")


if __name__ == "__main__":
    main()
