"""Error against width: random features, one-hidden-layer nets, and three kinds of minima.

    python experiments/generalization/double_descent.py           # 8 minutes on one core
    python experiments/generalization/double_descent.py --smoke   # seconds, writes nothing

Everything is regression on one-hot targets with the squared error, from 200 training images, which
are a different draw for each seed; the test rows are 1,000 others. Label noise gives a fifth of the
training images another class, drawn at random; the test labels are left alone.

``features/…``  Fashion-MNIST, ReLU random features, the minimum-norm solution, and beside it ridge
``nets/…``      digits, tanh nets of one hidden layer, all layers trained with Adam until they fit
``minima/…``    digits, nets of width 128 that fit the same 200 images: on their own, together with
                300 further images that are rightly labelled, or together with 300 whose labels are
                all wrong

Rule of choice. Widths, noise and budgets are fixed beforehand. The ridge strength is the one with
the lowest mean squared error on 500 further rows, for each width, noise and seed. Of the learning
rates 0.01 and 0.03 the nets have the one with the lower training loss at the threshold.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from coursekit import curvature, data, generalization, train
from coursekit.experiment import Record

N, EXTRA, CLASSES = 200, 300, 10
SEEDS, NOISE = (0, 1, 2, 3, 4), (0.0, 0.2)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
RIDGES = [0.0] + [10.0**k for k in range(-6, 5)]
HIDDEN = (2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 64, 128, 256)
LR, STEPS, FITTED = 0.01, 6000, 1e-5  # of Adam with a cosine to a hundredth; loss to stop at
WIDE = 128  # of the nets whose minima are compared


@functools.cache
def rows(name: str, seed: int, noise: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return images and labels of four parts, scaled by one mean and deviation of the first.

    Only ``"train"`` has noisy labels.
    """
    x, y, x_test, y_test = data.load(name, flatten=True).tensors()
    x, y = torch.cat([x, x_test]), torch.cat([y, y_test])
    order = torch.randperm(len(x), generator=train.generator(seed, "rows"))
    sizes = {"train": N, "test": 1000, "validation": 200, "extra": EXTRA}
    x, y = x[order[: sum(sizes.values())]], y[order[: sum(sizes.values())]]
    x = (x - x[:N].mean()) / x[:N].std()
    wrong = (y + torch.randint(1, CLASSES, y.shape, generator=train.generator(seed, "wrong"))) % 10
    noisy = torch.rand(N, generator=train.generator(seed, "noisy")) < noise
    y = torch.cat([torch.where(noisy, wrong[:N], y[:N]), y[N:]])
    parts = zip(x.split(list(sizes.values())), y.split(list(sizes.values())), strict=True)
    found = dict(zip(sizes, parts, strict=True))
    found["validation"] = x[N + 1000 :], y[N + 1000 :]  # the extra rows too: ridge never fits them
    found["attack"] = (found["extra"][0], wrong[-EXTRA:])
    return found


def score(output: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the share of wrong classes, and the squared error of an example."""
    error = (output.argmax(dim=-1) != y).double().mean()
    return error.item(), (output - one_hot(y, CLASSES)).square().sum(dim=-1).mean().item()


# ---- random features ----


def features_at(width: int, seed: int, noise: float) -> dict[str, float]:
    """Return errors and norm of the minimum-norm solution, and errors of the tuned ridge."""
    part = {k: (x.double(), y) for k, (x, y) in rows("fashion_mnist", seed, noise).items()}
    (x, y), (x_val, y_val), (x_test, y_test) = (part[k] for k in ("train", "validation", "test"))
    stream = train.generator(seed, f"features {width}")
    phi = generalization.random_features(x.shape[1], width, generator=stream)
    z, z_val, z_test = phi(x), phi(x_val), phi(x_test)
    target = one_hot(y, CLASSES).double()
    by_ridge = [generalization.min_norm_solution(z, target, ridge=a) for a in RIDGES]
    best = min(by_ridge, key=lambda w: score(z_val @ w, y_val)[1])
    least = by_ridge[0]
    got = {"norm": least.norm().item(), "train_error": score(z @ least, y)[0]}
    got["test_error"], got["test_loss"] = score(z_test @ least, y_test)
    got["ridge_test_error"], got["ridge_test_loss"] = score(z_test @ best, y_test)
    return got


# ---- nets, those of all seeds in one batch of matrices ----


def draw_nets(width: int, seeds, inputs: int = 64) -> list[Tensor]:
    """Draw W, b, V, c of one net a seed, uniform in ±1/√fan_in."""

    def uniform(name, *shape, fan_in):
        streams = [train.generator(seed, f"{name} {width}") for seed in seeds]
        values = torch.stack([2 * torch.rand(shape, generator=g) - 1 for g in streams])
        return (values / fan_in**0.5).requires_grad_()

    first = uniform("W", inputs, width, fan_in=inputs), uniform("b", 1, width, fan_in=inputs)
    last = uniform("V", width, CLASSES, fan_in=width), uniform("c", 1, CLASSES, fan_in=width)
    return [*first, *last]


def forward(params: list[Tensor], x: Tensor) -> Tensor:
    """Return the outputs of all nets, ``(nets, n, classes)``."""
    w, b, v, c = params
    return torch.baddbmm(c, torch.tanh(torch.baddbmm(b, x, w)), v)


def train_nets(params: list[Tensor], x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Fit all nets to all their rows, and return their training losses."""
    optimizer = torch.optim.Adam(params, lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, LR / 100)
    target = one_hot(y, CLASSES).float()
    for step in range(steps):
        optimizer.zero_grad()
        losses = (forward(params, x) - target).square().sum(dim=2).mean(dim=1)
        if step % 100 == 0 and losses.max() < FITTED:
            break
        losses.sum().backward()
        optimizer.step()
        schedule.step()
    return losses.detach()


def stacked(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in parts]), torch.stack([y for _, y in parts])


def nets_at(width: int, seeds, steps: int) -> dict[str, list[float]]:
    """Train the nets of one width, all seeds without and with noise; one value a net."""
    jobs = [rows("digits", seed, noise) for noise in NOISE for seed in seeds]
    params = draw_nets(width, [seed for _ in NOISE for seed in seeds])
    (x, y), (x_test, y_test) = (stacked([job[k] for job in jobs]) for k in ("train", "test"))
    losses = train_nets(params, x, y, steps)
    with torch.no_grad():
        fit, test = forward(params, x), forward(params, x_test)
    scores = [score(test[i], y_test[i]) for i in range(len(jobs))]
    return {
        "train_loss": losses.tolist(),
        "train_error": [score(fit[i], y[i])[0] for i in range(len(jobs))],
        "test_error": [error for error, _ in scores],
        "test_loss": [loss for _, loss in scores],
        "norm": sum(p.detach().square().sum(dim=(1, 2)) for p in params).sqrt().tolist(),
    }


def minima(seeds, steps: int) -> dict[str, list[float]]:
    """Fit the same 200 images in three company; errors and sharpness *on these images*."""
    found = {}
    for name in ("alone", "extra", "attack"):
        jobs = [rows("digits", seed, 0.0) for seed in seeds]
        params = draw_nets(WIDE, seeds)
        own = stacked([job["train"] for job in jobs])
        x_test, y_test = stacked([job["test"] for job in jobs])
        x, y = own
        if name != "alone":
            more = stacked([job[name] for job in jobs])
            x, y = torch.cat([x, more[0]], dim=1), torch.cat([y, more[1]], dim=1)
        train_nets(params, x, y, steps)
        for i, seed in enumerate(seeds):
            one = [p[i : i + 1].detach().requires_grad_() for p in params]
            inputs, target = own[0][i : i + 1], one_hot(own[1][i : i + 1], CLASSES)

            def loss(one=one, inputs=inputs, target=target):
                return (forward(one, inputs) - target).square().sum(dim=2).mean()

            with torch.no_grad():
                errors = score(forward(one, inputs)[0], own[1][i])
                test = score(forward(one, x_test[i : i + 1])[0], y_test[i])
            top = curvature.top_eigenvalue(loss, one, generator=train.generator(seed, "lanczos"))
            probes = train.generator(seed, "probes")
            trace = curvature.hutchinson_trace(loss, one, samples=50, generator=probes).mean
            norm = sum(p.detach().square().sum() for p in one).sqrt().item()
            got = {"train_error": errors[0], "train_loss": errors[1], "test_error": test[0]}
            for key, value in (got | {"top": top, "trace": trace, "norm": norm}).items():
                found.setdefault(f"minima/{name}/{key}", []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few widths and steps, no record")
    smoke = parser.parse_args().smoke
    seeds = SEEDS[:2] if smoke else SEEDS
    ratios, hidden = ((0.2, 1.0, 2.0), (8, 32)) if smoke else (RATIOS, HIDDEN)
    steps = 50 if smoke else STEPS
    start = time.perf_counter()
    values: dict[str, list] = {}
    widths = [round(N * ratio) for ratio in ratios]
    for noise in NOISE:
        for seed in seeds:
            curve = [features_at(width, seed, noise) for width in widths]
            for key in curve[0]:
                values.setdefault(f"features/{noise}/{key}", []).append([c[key] for c in curve])
        errors = torch.tensor(values[f"features/{noise}/test_error"]).mean(dim=0)
        print(f"features, noise {noise}: test error {errors.numpy().round(3)}", flush=True)
    for width in hidden:
        got = nets_at(width, seeds, steps)
        for key, flat in got.items():
            for i, noise in enumerate(NOISE):
                runs = values.setdefault(f"nets/{noise}/{key}", [[] for _ in seeds])
                for j in range(len(seeds)):
                    runs[j].append(flat[i * len(seeds) + j])
        means = torch.tensor(got["test_error"]).view(len(NOISE), -1).mean(dim=1)
        print(f"nets, width {width}: test error {means.numpy().round(3)}", flush=True)
    values |= minima(seeds, steps)
    print("minima:", {k: round(sum(v) / len(v), 4) for k, v in values.items() if "minima" in k})
    if smoke:
        return
    record = Record(
        study="generalization/double_descent",
        config={
            "examples": N,
            "classes": CLASSES,
            "noise": NOISE,
            "features_data": "fashion_mnist",
            "feature_widths": widths,
            "ridges": RIDGES,
            "nets_data": "digits",
            "hidden_widths": HIDDEN,
            "parameters": [width * (64 + 1 + CLASSES) + CLASSES for width in HIDDEN],
            "learning_rate": LR,
            "steps": STEPS,
            "stop_at_loss": FITTED,
            "minima_width": WIDE,
            "minima_extra": EXTRA,
        },
        seeds=list(SEEDS),
        values=values,
        selection="ridge: lowest squared error on 500 validation rows; nothing else is chosen",
        tier="subset",
        wall_s=time.perf_counter() - start,
        command="python experiments/generalization/double_descent.py",
    )
    results = Path(__file__).parents[1] / "results" / "generalization"
    record.save(results / "double_descent.json")


if __name__ == "__main__":
    main()
