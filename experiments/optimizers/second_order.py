"""What M-FAC and two Kronecker methods cost per step, and what they buy, on the digits.

    python experiments/optimizers/second_order.py            # 4 minutes on one core
    python experiments/optimizers/second_order.py --smoke    # seconds, writes nothing

A 64-32-10 perceptron with ReLU, 2,410 weights, learns the digits for 10 epochs in batches of 64.
Seven methods take the same batches from the same start; each is w ← w − lr · direction:

``sgd momentum adam adahessian``  the course's own update rules
``mfac``   (λI + F)⁻¹ g with F the mean of g gᵀ over the last 64 gradients (Frantar et al. 2021)
``kfac``   (G + …)⁻¹ ∇W (A + …)⁻¹ by layer, A and G averages of a aᵀ and δ δᵀ, with δ from labels
           drawn by the model; inverted every 5 steps (Martens and Grosse 2015)
``rank1``  as kfac, but each factor gets one vector a step, the mean of its batch, and its inverse
           is kept by the Sherman-Morrison formula, pulled towards I, and the direction brought back
           to the gradient's length: the idea of MKOR (Mozaffari et al. 2023), not its release

The last three get heavy-ball momentum 0.9 on top, as `momentum` has, so that they differ from it in
the matrix alone. What their authors add beyond that (K-FAC's choice of step length and damping by a
quadratic model) is left out: learning rate and damping are constants, and tuned.

Rule of choice. For each method the pair of learning rate and damping with the lowest mean training
loss after the last epoch over two tuning seeds that are not among the five reported ones. Rates lie
half a decade apart, dampings a decade, and the grid is extended until the best pair is inside. A
run that leaves the finite numbers counts as loss 100.

Cost is processor time in units of a step of SGD with momentum, forward and backward pass included,
all methods taking turns in one process; memory counts the numbers kept between steps, in units of
the weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from coursekit import data, models, train
from coursekit.experiment import Record
from coursekit.optimizers import adahessian_update, adam_update, sgd_update

WIDTH, EPOCHS, BATCH, TARGET = 32, 10, 64, 0.1
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101)
WINDOW = 64  # gradients that M-FAC remembers
INVERT_EVERY, MEMORY = 5, 0.95  # of the Kronecker factors
WIDER = (128, 512)  # hidden layers of which the cost is measured too
LOST = 100.0  # the loss of a run that left the finite numbers


# ---- the network: one vector of weights, each layer's bias its last column ----


def shapes(width: int) -> list[tuple[int, int]]:
    """Return (outputs, inputs + 1) of each layer."""
    return [(width, 65), (10, width + 1)]


def matrices(w: Tensor, width: int) -> list[Tensor]:
    """Return views of a vector, such as weights or a gradient, as the layers' matrices."""
    parts = w.split([rows * columns for rows, columns in shapes(width)])
    return [part.view(shape) for part, shape in zip(parts, shapes(width), strict=True)]


def start(width: int, seed: int) -> Tensor:
    """Draw the weights of `models.mlp` and put each bias beside its matrix."""
    net = models.mlp([64, width, 10], generator=train.generator(seed, "init"))
    layers = [torch.cat([net[i].weight, net[i].bias[:, None]], dim=1) for i in (0, 2)]
    return parameters_to_vector(layers).detach().requires_grad_()


def forward(w: Tensor, width: int, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's inputs, (batch, inputs + 1), without a graph, and outputs."""
    inputs, outputs = [], []
    for layer in matrices(w, width):
        if outputs:
            x = outputs[-1].relu()
        inputs.append(torch.cat([x, x.new_ones(len(x), 1)], dim=1))
        outputs.append(inputs[-1] @ layer.T)
    return [part.detach() for part in inputs], outputs


def gradient(w: Tensor, width: int, x: Tensor, y: Tensor, **options) -> Tensor:
    """Return the gradient of the mean cross-entropy of a batch."""
    loss = cross_entropy(forward(w, width, x)[1][-1], y)
    return torch.autograd.grad(loss, w, **options)[0]


# ---- the methods: (w, width, x, y, state, damping, draw) -> direction; the state is theirs ----


def sgd(w, width, x, y, state, damping, draw):
    """Return the gradient."""
    return gradient(w, width, x, y)


def momentum(w, width, x, y, state, damping, draw):
    """Return the heavy ball's direction."""
    return with_momentum(w, gradient(w, width, x, y), state)


def with_momentum(w, direction, state):
    """Let a direction pass through a heavy ball."""
    direction, state["ball"] = sgd_update(w, direction, state.get("ball", {}), momentum=0.9)
    return direction


def adam(w, width, x, y, state, damping, draw):
    """Return Adam's direction."""
    direction, state["adam"] = adam_update(w, gradient(w, width, x, y), state.get("adam", {}))
    return direction


def adahessian(w, width, x, y, state, damping, draw):
    """Return AdaHessian's direction, with one probe of the diagonal."""
    g = gradient(w, width, x, y, create_graph=True)
    signs = 2.0 * torch.randint(0, 2, w.shape, generator=draw) - 1
    diagonal = signs * torch.autograd.grad(g, w, signs)[0]
    old = state.get("adahessian", {})
    direction, state["adahessian"] = adahessian_update(w, g.detach(), old, diagonal)
    return direction


def mfac(w, width, x, y, state, damping, draw):
    """Return (λI + F)⁻¹ g, F from the last gradients, this one included."""
    g = gradient(w, width, x, y)
    if not state:
        state |= {"seen": 0, "rows": g.new_zeros(WINDOW, len(g))}
        state["gram"] = g.new_zeros(WINDOW, WINDOW)
    place = state["seen"] % WINDOW
    state["seen"] += 1
    state["rows"][place] = g
    state["gram"][place] = state["gram"][:, place] = state["rows"] @ g
    m = min(state["seen"], WINDOW)
    return with_momentum(w, woodbury(state["rows"][:m], state["gram"][:m, :m], damping, g), state)


def woodbury(rows: Tensor, gram: Tensor, damping: float, g: Tensor) -> Tensor:
    """Return (λI + RᵀR / m)⁻¹ g = (g − Rᵀ (λmI + RRᵀ)⁻¹ R g) / λ for m rows, in O(mM + m³)."""
    eye = torch.eye(len(rows), dtype=g.dtype)
    return (g - torch.linalg.solve(damping * len(rows) * eye + gram, rows @ g) @ rows) / damping


def recursion(rows: Tensor, damping: float, g: Tensor) -> Tensor:
    """Return the same from rank-one updates, one row at a time, in O(m² M).

    F_k⁻¹ = F_{k−1}⁻¹ − v vᵀ / (m + r_kᵀ v),  v = F_{k−1}⁻¹ r_k,  F_0 = λI
    """
    m, solved = len(rows), []  # v and its denominator, for each row
    for row in [*rows, g]:
        v = row / damping
        for before, scale in solved:
            v = v - before * (before @ row) / scale
        solved.append((v, m + row @ v))
    return solved[-1][0]


def kfac(w, width, x, y, state, damping, draw):
    """Return G⁻¹ ∇W A⁻¹ of each layer, the factors of labels that the model draws itself."""
    inputs, outputs = forward(w, width, x)
    g = torch.autograd.grad(cross_entropy(outputs[-1], y), w, retain_graph=True)[0]
    drawn = torch.multinomial(outputs[-1].detach().softmax(dim=1), 1, generator=draw)[:, 0]
    deltas = torch.autograd.grad(cross_entropy(outputs[-1], drawn, reduction="sum"), outputs)
    step = state["step"] = state.get("step", 0) + 1
    keep = min(1 - 1 / step, MEMORY)  # section 5 of the paper
    fresh = [b.T @ b / len(b) for pair in zip(inputs, deltas, strict=True) for b in pair]
    old = state.get("factors", fresh)
    state["factors"] = [keep * f + (1 - keep) * new for f, new in zip(old, fresh, strict=True)]
    if step % INVERT_EVERY == 1:
        pairs = zip(state["factors"][::2], state["factors"][1::2], strict=True)
        state["inverses"] = [damped_inverses(a, delta, damping) for a, delta in pairs]
    parts = zip(matrices(g, width), state["inverses"], strict=True)
    direction = torch.cat([(of_g @ part @ of_a).flatten() for part, (of_a, of_g) in parts])
    return with_momentum(w, direction, state)


def damped_inverses(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹ with π from the mean eigenvalues, section 6.3."""
    pi = (a.diagonal().mean() / g.diagonal().mean().clamp(min=1e-30)).sqrt()
    shifts = math.sqrt(damping) * pi, math.sqrt(damping) / pi
    return tuple(
        torch.cholesky_inverse(torch.linalg.cholesky_ex(f + shift * torch.eye(len(f)).to(f))[0])
        for f, shift in zip((a, g), shifts, strict=True)
    )


def rank1(w, width, x, y, state, damping, draw):
    """Return G⁻¹ ∇W A⁻¹ of each layer, of the gradient's length, inverses kept by rank one."""
    inputs, outputs = forward(w, width, x)
    loss = cross_entropy(outputs[-1], y)
    g, *deltas = torch.autograd.grad(loss, [w, *outputs])
    vectors = [v for a, d in zip(inputs, deltas, strict=True) for v in (a.mean(dim=0), d.sum(0))]
    old = state.get("inverses") or [torch.eye(len(v)) for v in vectors]
    state["inverses"] = [
        (sherman_morrison(f, v) + damping * torch.eye(len(v))) / (1 + damping)
        for f, v in zip(old, vectors, strict=True)
    ]
    directions = []
    for i, part in enumerate(matrices(g, width)):
        of_a, of_g = state["inverses"][2 * i : 2 * i + 2]
        turned = of_g @ part @ of_a
        directions.append((turned * (part.norm() / turned.norm().clamp(min=1e-30))).flatten())
    return with_momentum(w, torch.cat(directions), state)


def sherman_morrison(inverse: Tensor, v: Tensor, keep: float = MEMORY) -> Tensor:
    """Return the inverse of keep · L + (1 − keep) v vᵀ from the inverse of L, in O(d²)."""
    u = inverse @ v
    return (inverse - torch.outer(u, u) * ((1 - keep) / (keep + (1 - keep) * (v @ u)))) / keep


METHODS = {  # direction, learning rate and damping in the middle of the first grid
    "sgd": (sgd, 0.3, None),
    "momentum": (momentum, 0.1, None),
    "adam": (adam, 0.01, None),
    "adahessian": (adahessian, 0.1, None),
    "mfac": (mfac, 0.001, 0.001),
    "kfac": (kfac, 0.1, 0.1),
    "rank1": (rank1, 0.1, 0.1),
}
BACKWARD_PASSES = {name: 1 + (name in ("adahessian", "kfac")) for name in METHODS}


# ---- checks, before anything is measured ----


def check() -> None:
    """Compare every formula with the dense matrix it stands for, in float64."""
    draw = train.generator(0, "check")
    dense = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)
    rows, g, damping = dense(8, 30), dense(30), 0.03
    fisher = damping * torch.eye(30, dtype=torch.float64) + rows.T @ rows / 8
    expected = torch.linalg.solve(fisher, g)
    torch.testing.assert_close(woodbury(rows, rows @ rows.T, damping, g), expected)
    torch.testing.assert_close(recursion(rows, damping, g), expected)

    a, delta, grad = dense(40, 5), dense(40, 3), dense(3, 5)
    factors = a.T @ a / 40, delta.T @ delta / 40
    of_a, of_g = damped_inverses(*factors, damping)
    block = torch.kron(of_g.inverse(), of_a.inverse())  # of a matrix flattened row by row
    solved = torch.linalg.solve(block, grad.flatten()).view(3, 5)
    torch.testing.assert_close(of_g @ grad @ of_a, solved)
    small = torch.kron(*reversed(damped_inverses(*factors, 1e-12))).inverse()
    torch.testing.assert_close(small, torch.kron(*reversed(factors)), rtol=1e-4, atol=1e-4)
    one = torch.outer(delta[0], a[0]).flatten()  # one example: its Fisher block is this product
    product = torch.kron(torch.outer(delta[0], delta[0]), torch.outer(a[0], a[0]))
    torch.testing.assert_close(torch.outer(one, one), product)

    factor = factors[0] + torch.eye(5, dtype=torch.float64)
    updated = MEMORY * factor + (1 - MEMORY) * torch.outer(a[0], a[0])
    torch.testing.assert_close(sherman_morrison(factor.inverse(), a[0]), updated.inverse())

    width, w = 8, start(8, 0)
    x, y, _, _ = data.load("digits").tensors()
    inputs, outputs = forward(w, width, x)
    deltas = torch.autograd.grad(cross_entropy(outputs[-1], y), outputs)
    by_layer = [d.T @ a for d, a in zip(deltas, inputs, strict=True)]  # the gradient is Σ δ aᵀ
    torch.testing.assert_close(matrices(gradient(w, width, x, y), width), by_layer)


# ---- the study ----


def run(name: str, lr: float, damping: float | None, seed: int, epochs: int, look: bool) -> dict:
    """Train once; with ``look`` watch the training loss after every step."""
    x, y, x_test, y_test = data.load("digits").tensors()
    w, state, steps, loss = start(WIDTH, seed), {}, [], []
    order, draw = train.generator(seed, "data"), train.generator(seed, "draws")
    with torch.no_grad():
        of = lambda x, y: cross_entropy(forward(w, WIDTH, x)[1][-1], y).item()
        for _ in range(epochs):
            for x_batch, y_batch in train.batches(x, y, BATCH, generator=order):
                with torch.enable_grad():
                    batch = (w, WIDTH, x_batch, y_batch)
                    direction = METHODS[name][0](*batch, state, damping, draw)
                w.sub_(direction, alpha=lr)
                if look:
                    steps.append(of(x, y))
            loss.append(of(x, y))
        right = (forward(w, WIDTH, x_test)[1][-1].argmax(dim=1) == y_test).double().mean().item()
    reached = [step for step, value in enumerate(steps, start=1) if value <= TARGET]
    return {
        "train_loss": [float(f"{value if value < LOST else LOST:.4g}") for value in loss],
        "test_accuracy": right,
        "steps_to_target": reached[0] if reached else len(steps) + 1,
    }


def grid(middle: float | None, indices: range, per_decade: int) -> list[float | None]:
    """Return numbers on a logarithmic grid, rounded to two digits; a method without has None."""
    if middle is None:
        return [None]
    return [float(f"{middle * 10 ** (i / per_decade):.2g}") for i in indices]


def tune(name: str, epochs: int, seeds: tuple[int, ...], reach: int) -> dict[tuple, list[float]]:
    """Return final training losses by rate and damping, on a grid with the best pair inside."""
    _, lr, damping = METHODS[name]
    low, high, weak, strong = -reach, reach, -(reach // 2), reach // 2
    sweep: dict[tuple, list[float]] = {}
    while True:
        rates = grid(lr, range(low, high + 1), 2)
        dampings = grid(damping, range(weak, strong + 1), 1)
        for pair in itertools.product(rates, dampings):
            if pair not in sweep:
                runs = [run(name, *pair, seed, epochs, look=False) for seed in seeds]
                sweep[pair] = [one["train_loss"][-1] for one in runs]
        best_lr, best_damping = chosen(sweep)
        ends = best_lr == rates[0], best_lr == rates[-1]
        if damping is not None:
            ends += best_damping == dampings[0], best_damping == dampings[-1]
        if not reach or not any(ends):
            return sweep
        low, high = low - ends[0], high + ends[1]
        if damping is not None:
            weak, strong = weak - ends[2], strong + ends[3]


def chosen(sweep: dict[tuple, list[float]]) -> tuple:
    """Return the pair with the lowest mean loss, the smaller rate in a tie."""
    return min(sweep, key=lambda pair: (sum(sweep[pair]), pair[0]))


def costs(width: int, turns: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return time a step in units of momentum's, and numbers kept in units of the weights."""
    x, y, _, _ = (part[:BATCH] for part in data.load("digits").tensors())
    w, states = start(width, seed), {name: {} for name in METHODS}
    draw = train.generator(seed, "draws")
    times = {name: [] for name in METHODS}
    names = list(METHODS)
    warm = math.ceil(WINDOW / INVERT_EVERY)  # M-FAC's window is full from here
    for turn in range(warm + turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            method, _, damping = METHODS[name]
            begin = time.process_time()
            for _ in range(INVERT_EVERY):
                direction = method(w, width, x, y, states[name], damping, draw)
                with torch.no_grad():
                    w.sub_(direction, alpha=0.0)  # the same weights for all
            if turn >= warm:
                times[name].append(time.process_time() - begin)
    median = {name: statistics.median(times[name]) for name in names}
    ratios = {name: float(f"{median[name] / median['momentum']:.3g}") for name in names}
    kept = {name: float(f"{numbers(states[name]) / len(w):.3g}") for name in names}
    return ratios, kept


def numbers(state) -> int:
    """Count the entries of all tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        return state.numel()
    inner = state.values() if isinstance(state, dict) else state
    return sum(numbers(part) for part in inner if isinstance(part, Tensor | dict | list | tuple))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one epoch, no tuning, no record")
    smoke = parser.parse_args().smoke
    seeds, tuning_seeds = (SEEDS[:2], TUNING_SEEDS[:1]) if smoke else (SEEDS, TUNING_SEEDS)
    epochs, widths, turns = (1, (), 3) if smoke else (EPOCHS, WIDER, 60)
    begin = time.perf_counter()
    check()
    measured = [costs(WIDTH, turns, seed) for seed in seeds]
    memory_of = measured[0][1]
    wider = {str(width): costs(width, turns, SEEDS[0]) for width in widths}
    values, settings, sweeps = {}, {}, {}
    print(f"{'':11}     lr  damping  train loss  test acc.  steps to {TARGET}  time  memory")
    for name in METHODS:
        sweep = tune(name, epochs, tuning_seeds, 0 if smoke else 2)
        lr, damping = chosen(sweep)
        settings[name] = {"lr": lr, "damping": damping}
        sweeps[name] = [{"lr": p[0], "damping": p[1], "train_loss": sweep[p]} for p in sweep]
        runs = [run(name, lr, damping, seed, epochs, look=True) for seed in seeds]
        values |= {f"{name}/{metric}": [r[metric] for r in runs] for metric in runs[0]}
        ratios = values[f"{name}/relative_step_time"] = [times[name] for times, _ in measured]
        mean = {
            k: statistics.mean(r[k] for r in runs) for k in ("test_accuracy", "steps_to_target")
        }
        print(
            f"{name:11}{lr:7.2g}{damping or 0:9.2g}"
            f"{statistics.mean(r['train_loss'][-1] for r in runs):12.5f}"
            f"{mean['test_accuracy']:11.4f}{mean['steps_to_target']:14.1f}"
            f"{statistics.median(ratios):6.2f}{memory_of[name]:8.1f}",
            flush=True,
        )
    if smoke:
        return
    Record(
        study="optimizers/second_order",
        config={
            "sizes": [64, WIDTH, 10],
            "parameters": sum(rows * columns for rows, columns in shapes(WIDTH)),
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "target_loss": TARGET,
            "window": WINDOW,
            "invert_every": INVERT_EVERY,
            "tuning_seeds": TUNING_SEEDS,
            "settings": settings,
            "sweeps": sweeps,
            "backward_passes": BACKWARD_PASSES,
            "extra_memory": memory_of,
            "wider": {
                width: {"relative_step_time": times, "extra_memory": memory}
                for width, (times, memory) in wider.items()
            },
        },
        seeds=list(SEEDS),
        values=values,
        selection="lowest mean training loss after the last epoch over two tuning seeds",
        tier="subset",
        wall_s=time.perf_counter() - begin,
        command="python experiments/optimizers/second_order.py",
    ).save(Path(__file__).parents[1] / "results" / "optimizers" / "second_order.json")


if __name__ == "__main__":
    main()
