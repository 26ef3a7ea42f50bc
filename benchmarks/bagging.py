"""What it costs to train an ensemble at once, beside a loop over its members and scikit-learn.

    python benchmarks/bagging.py                   # writes benchmarks/results/bagging.json
    python benchmarks/bagging.py --device cuda     # the same with members on a GPU, K up to 1,024
    python benchmarks/bagging.py --smoke           # one epoch, writes nothing

1. Sixteen 64-32-10 perceptrons with ReLU on digits, each on its own bootstrap sample, by three
   ways that take turns, so that a busy machine slows all of them: `bagging.Ensemble`; a loop in
   which each member is an ordinary torch module with an optimizer of its own; and scikit-learn's
   ``BaggingClassifier(MLPClassifier)``. All use Adam with the same rate, epochs and batch size and
   no weight decay, and answer by the average of their probabilities.
2. Time of a step of `Ensemble` against the number of members: the fastest of a hundred.

The record has the seconds and the test accuracy of each turn; a turn is a seed. What is promised
is a ratio of medians over the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: two busy threads would measure noise

import torch
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch.nn.functional import cross_entropy

from coursekit import bagging, data, models, train
from coursekit.experiment import Record

MEMBERS, HIDDEN, RATE, EPOCHS, BATCH = 16, 32, 3e-3, 20, 32
SPLIT = data.load("digits")


def start(seed, members, device):
    """Return data, nets and bootstrap rows on the device, and the stream that drew them."""
    x, y, x_test, _ = SPLIT.tensors(device)
    draw = train.generator(seed, "bagging")
    nets = [models.mlp([64, HIDDEN, 10], generator=draw).to(device) for _ in range(members)]
    rows = bagging.bootstrap_indices(len(x), members, generator=draw).to(device)
    return x, y, x_test, nets, rows, draw


def accuracy(probabilities):
    """Return the share of test rows whose most probable class is right."""
    return float((probabilities.argmax(axis=1) == SPLIT.y_test).mean())


def at_once(seed, epochs, device):
    """Train all members by `Ensemble`; return seconds and test accuracy."""
    x, y, x_test, nets, rows, draw = start(seed, MEMBERS, device)
    begin = time.perf_counter()
    ensemble = bagging.Ensemble(nets)
    adam = torch.optim.Adam(ensemble.parameters(), lr=RATE, fused=True)
    bagging.fit_members(ensemble, x, y, adam, epochs, BATCH, rows=rows, generator=draw)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        mean = bagging.average_probabilities(ensemble(x_test).softmax(dim=-1))
    return seconds, accuracy(mean.cpu().numpy())


def one_by_one(seed, epochs, device):
    """Train member after member in a plain loop; return seconds and test accuracy."""
    x, y, x_test, nets, rows, draw = start(seed, MEMBERS, device)
    begin = time.perf_counter()
    for net, mine in zip(nets, rows, strict=True):
        adam = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
        for _ in range(epochs):
            order = mine[torch.randperm(len(mine), generator=draw).to(device)]
            for batch in order.split(BATCH):
                loss = cross_entropy(net(x[batch]), y[batch])
                adam.zero_grad()
                loss.backward()
                adam.step()
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        each = torch.stack([net(x_test).softmax(dim=-1) for net in nets])
    return seconds, accuracy(bagging.average_probabilities(each).cpu().numpy())


def by_sklearn(seed, epochs, device):
    """Train the same nets by scikit-learn, on the CPU; return seconds and test accuracy."""
    net = MLPClassifier(
        (HIDDEN,), solver="adam", learning_rate_init=RATE, batch_size=BATCH, alpha=0.0,
        max_iter=epochs, n_iter_no_change=epochs + 1,
    )  # fmt: skip
    model = BaggingClassifier(net, n_estimators=MEMBERS, random_state=seed)
    x, x_test = SPLIT.x_train.astype("float32"), SPLIT.x_test.astype("float32")
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are fixed on purpose
        model.fit(x, SPLIT.y_train)
    return time.perf_counter() - begin, accuracy(model.predict_proba(x_test))


CONTESTANTS = {"ensemble": at_once, "loop": one_by_one, "sklearn": by_sklearn}


def step_ms(members, steps, device):
    """Return the time in ms of a step of all members: the fastest, which nothing disturbed."""
    x, y, _, nets, rows, _ = start(0, members, device)
    ensemble = bagging.Ensemble(nets)
    adam, times = torch.optim.Adam(ensemble.parameters(), lr=RATE, fused=True), []
    for batch in (rows[:, :BATCH] for _ in range(steps)):
        begin = time.perf_counter()
        output, target = ensemble(x[batch], separate=True), y[batch]
        adam.zero_grad()
        (members * cross_entropy(output.flatten(0, 1), target.flatten())).backward()
        adam.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one epoch, write nothing")
    parser.add_argument("--device", default="cpu", help="where torch computes: cpu or cuda")
    options = parser.parse_args()
    epochs, seeds = (1, [0]) if options.smoke else (EPOCHS, list(range(5)))
    sizes = [1, 4, 16] if options.smoke else [1, 4, 16, 64]
    sizes += [256, 1024] * (options.device != "cpu" and not options.smoke)
    begin = time.perf_counter()
    names = list(CONTESTANTS)
    seconds, scores = ({name: [] for name in names} for _ in range(2))
    for name in names:  # warm up: imports and allocators are not to be timed
        CONTESTANTS[name](0, 1, options.device)
    for turn, seed in enumerate(seeds):
        for name in names[turn % 3 :] + names[: turn % 3]:
            took, score = CONTESTANTS[name](seed, epochs, options.device)
            seconds[name].append(took)
            scores[name].append(score)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{MEMBERS} nets 64-{HIDDEN}-10 on digits, {epochs} epochs, medians of {len(seeds)} turns"
    )
    for name in names:
        mean = statistics.mean(scores[name])
        print(f"  {name:9} {1e3 * median[name]:8.0f} ms, test accuracy {mean:.4f}")
    for name, limit in (("loop", 0.3), ("sklearn", 0.4)):
        print(f"  ensemble / {name:8} = {median['ensemble'] / median[name]:.2f} (at most {limit})")
    steps = {k: step_ms(k, 5 if options.smoke else 100, options.device) for k in sizes}
    for k, ms in steps.items():
        print(f"  a step of {k:5} members {ms:8.2f} ms, {ms / k:7.3f} ms a member")
    if not options.smoke:
        Record(
            study="benchmarks/bagging",
            config={
                "members": MEMBERS, "hidden": HIDDEN, "rate": RATE, "epochs": EPOCHS,
                "batch": BATCH, "torch_device": options.device,
                "step_ms": {str(k): ms for k, ms in steps.items()},
            },
            seeds=seeds,
            values={f"{name}_s": seconds[name] for name in names}
            | {f"{name}_accuracy": scores[name] for name in names},
            selection="nothing is selected: one setting for all, fixed before",
            tier="full",
            wall_s=time.perf_counter() - begin,
            command="OMP_NUM_THREADS=1 python benchmarks/bagging.py"
            + f" --device {options.device}" * (options.device != "cpu"),
        ).save(Path(__file__).parent / "results" / "bagging.json")  # fmt: skip


if __name__ == "__main__":
    main()
