"""G-SGD on CIFAR-10 beside the controls that the paper's table lacks; one record a run.

    python experiments/gsgd/cifar.py                          # reduced, half an hour of one core
    python experiments/gsgd/cifar.py --tier full --net plain34 --method gsgd-paper --device cuda
    python experiments/gsgd/cifar.py --smoke                  # seconds, noise for images, no record

Methods. ``sgd``: plain SGD from torch's own start, as the released code has it. ``sgd-skeleton``:
the same from the start of G-SGD, every skeleton weight 1. ``frozen``: that, and the free set never
moves. ``gsgd-paper``: G-SGD through batch norm by the paper's heuristic (section 11.2; the released
code has another). ``gsgd``: G-SGD with γ as the edge into a map, which is exact; the skeleton
weights of its own chains begin at 1 too. Those are others, heads among them, than the ones that
``sgd-skeleton``, ``frozen`` and ``gsgd-paper`` set: ``gsgd`` starts elsewhere than its controls,
and a difference between them is not of the update alone.

Full tier: the released settings. Plain-34 or ResNet-34 with batch norm, crops of 32 after padding
by 4, flips, images standardized, batches of 128, 160 epochs, rate 1 for all methods, a tenth of it
after 80 and a hundredth after 120 epochs, no momentum and no weight decay. ``--schedule released``
gives a thousandth after 120: what the released G-SGD really runs with, unlike its own baseline.
A run stores a checkpoint after each epoch in ``--checkpoints`` and continues from it; a run that
has a record is left alone. Not run for the book: it takes a GPU for days.

Reduced tier (where no GPU is at hand): Plain-8 and ResNet-8 of 8, 16 and 32 maps, the first 10,000
training images averaged to 16 x 16 pixels, 6 epochs with the rate divided by 10 after 3 and 5, and
each method at its own rate. Rule of choice: the rate with the highest accuracy after the last epoch
on images 10,000 to 12,000, for one tuning seed that is not reported; the smaller rate in a tie.
Rates lie half a decade apart; when the best is at an end of the grid, the grid is extended. Test
images are looked at only afterwards. A run that leaves the finite numbers counts as accuracy 0.
There is one tuning seed, 100, and there are three reported ones, 0, 1 and 2: few, so a difference
within the spread over seeds says nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from coursekit import data, gsgd, models, train
from coursekit.experiment import Record

RESULTS = Path(__file__).parents[1] / "results" / "gsgd"
METHODS = ("sgd", "sgd-skeleton", "frozen", "gsgd-paper", "gsgd")
NETS = {
    "plain8": (models.plain_cifar, 8, 8),
    "resnet8": (models.resnet_cifar, 8, 8),
    "plain34": (models.plain_cifar, 34, None),
    "resnet34": (models.resnet_cifar, 34, None),
}
SEEDS, TUNING_SEED, GRID = (0, 1, 2), 100, (0.1, 0.1 * 10**0.5, 1.0)
SETTINGS = {
    "full": {"epochs": 160, "batch_size": 128, "milestones": (80, 120), "images": 50_000},
    "subset": {"epochs": 6, "batch_size": 64, "milestones": (3, 5), "images": 10_000},
    "smoke": {"epochs": 2, "batch_size": 8, "milestones": (1,), "images": 16},
}


@functools.cache
def images(tier: str, tuning: bool, device: str) -> tuple[torch.Tensor, ...]:
    """Return standardized images: ``x_train, y_train, x_test, y_test``."""
    if tier == "smoke":
        noise = train.generator(0, "noise")
        x, y = torch.randn(32, 3, 16, 16, generator=noise), torch.arange(32) % 10
        return x[:16], y[:16], x[16:], y[16:]
    whole = data.load("cifar10", tier="full")
    keep = SETTINGS[tier]["images"]
    x, y, x_test, y_test = whole.tensors(device)
    if tuning:
        x_test, y_test = x[keep : keep + 2000], y[keep : keep + 2000]
    x, y = x[:keep], y[:keep]
    if tier == "subset":
        x, x_test = avg_pool2d(x, 2), avg_pool2d(x_test, 2)
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / std, y, (x_test - mean) / std, y_test


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crop at random after padding by an eighth of the side, and flip every other image."""
    n, _, side, _ = x.shape
    margin = side // 8
    corner = torch.randint(2 * margin + 1, (2, n, 1), generator=generator)
    rows, columns = (c + torch.arange(side) for c in corner)
    flip = torch.randint(2, (n, 1), generator=generator).bool()
    columns = torch.where(flip, columns.flip(1), columns).to(x.device)
    big, rows = pad(x, (margin,) * 4), rows.to(x.device)
    picture = torch.arange(n, device=x.device)[:, None, None]
    return big[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def begin(net_name: str, method: str, lr: float, seed: int, device: str):
    """Draw a net, set the skeleton to 1 where the method wants it, and make the optimizer."""
    make, depth, width = NETS[net_name]
    net = make(depth, width=width, generator=train.generator(seed, "init")).to(device)
    if method == "sgd":
        return net, torch.optim.SGD(net.parameters(), lr=lr)
    paper = gsgd.Skeleton(net, batch_norm="paper").ones_()
    if method == "sgd-skeleton":
        return net, torch.optim.SGD(net.parameters(), lr=lr)
    if method == "frozen":
        return net, gsgd.FrozenSkeletonSGD(net, lr=lr, skeleton=paper)
    skeleton = paper if method == "gsgd-paper" else gsgd.Skeleton(net).ones_()
    return net, gsgd.GSGD(net, lr=lr, skeleton=skeleton)


def run(
    net_name, method, lr, seed, tier, *, tuning=False, schedule="same", device="cpu", file=None
):
    """Train once; return accuracies and losses after each epoch, or None if one was not finite."""
    settings, (x, y, x_test, y_test) = SETTINGS[tier], images(tier, tuning, device)
    net, optimizer = begin(net_name, method, lr, seed, device)
    draw = train.generator(seed, "data")
    history = {"train_loss": [], "test_accuracy": []}
    if file and file.exists():
        stored = torch.load(file, weights_only=True, map_location="cpu")
        net.load_state_dict(stored["net"])
        optimizer.load_state_dict(stored["optimizer"])
        draw.set_state(stored["generator"])
        history = stored["history"]
    for epoch in range(len(history["train_loss"]), settings["epochs"]):
        passed = sum(epoch >= milestone for milestone in settings["milestones"])
        power = passed * (passed + 1) // 2 if schedule == "released" else passed
        optimizer.param_groups[0]["lr"] = lr * 0.1**power
        total = 0.0
        net.train()
        for a, b in train.batches(x, y, settings["batch_size"], generator=draw):
            optimizer.zero_grad()
            loss = cross_entropy(net(augment(a, draw)), b)
            if not loss.isfinite():
                return None
            loss.backward()
            try:
                optimizer.step()
            except RuntimeError as error:
                if "finite" not in str(error):
                    raise
                return None
            total += loss.item() * len(a)
        history["train_loss"].append(total / len(x))
        history["test_accuracy"].append(train.evaluate(net, x_test, y_test).accuracy)
        if file:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": draw.get_state(), "history": history}
            torch.save(state, part := file.with_suffix(".part"))
            part.replace(file)
            print(f"{file.stem}: epoch {epoch + 1}, {history['test_accuracy'][-1]:.4f}", flush=True)
    return history


def tune(net_name: str, method: str, tier: str, grid) -> dict[float, float]:
    """Return the held-out accuracy by rate, on a grid that has its best inside."""
    sweep: dict[float, float] = {}
    wanted = list(grid)
    while wanted:
        for lr in wanted:
            got = run(net_name, method, lr, TUNING_SEED, tier, tuning=True)
            sweep[lr] = got["test_accuracy"][-1] if got else 0.0
        best = max(sorted(sweep), key=sweep.get)
        wanted = [best / 10**0.5] if best == min(sweep) else []
        wanted += [best * 10**0.5] if best == max(sweep) else []
        if tier == "smoke":
            break
    return dict(sorted(sweep.items()))


def reduced(net_name: str, method: str, tier: str, again: bool) -> None:
    """Choose the rate, run the seeds, store one record for a method on a net."""
    path = RESULTS / f"cifar_reduced_{net_name}_{method}.json"
    if path.exists() and not again and tier != "smoke":
        return
    start = time.perf_counter()
    grid, seeds = (GRID[:1], SEEDS[:1]) if tier == "smoke" else (GRID, SEEDS)
    sweep = tune(net_name, method, tier, grid)
    lr = max(sorted(sweep), key=sweep.get)
    runs = [run(net_name, method, lr, seed, tier) for seed in seeds]
    if None in runs:
        raise RuntimeError(f"{net_name}, {method}: a reported seed left the finite numbers at {lr}")
    last = [history["test_accuracy"][-1] for history in runs]
    mean, took = sum(last) / len(last), time.perf_counter() - start
    print(
        f"{net_name:8} {method:13} lr {lr:<7.3g} test accuracy {mean:.4f} {took:6.0f} s", flush=True
    )
    if tier == "smoke":
        return
    options = {"net": net_name, "method": method, "schedule": "same", "image": [3, 16, 16]}
    Record(
        study="gsgd/cifar",
        config=options | SETTINGS[tier] | {"lr": lr, "tuning_seed": TUNING_SEED}
        | {"validation_accuracy": {f"{rate:.3g}": score for rate, score in sweep.items()}},
        seeds=list(seeds),
        values={name: [history[name] for history in runs] for name in runs[0]},
        selection="highest accuracy on held-out images after the last epoch, one tuning seed",
        tier=tier,
        wall_s=took,
        command=f"python experiments/gsgd/cifar.py --net {net_name} --method {method}",
    ).save(path)  # fmt: skip


def full(args: argparse.Namespace, net_name: str, method: str, seed: int) -> None:
    """Run one seed at the released settings, from its checkpoint if there is one."""
    name = f"cifar_full_{net_name}_{method}_{args.schedule}_{seed}"
    path = RESULTS / f"{name}.json"
    if path.exists() and not args.again:
        return
    start = time.perf_counter()
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    history = run(
        *(net_name, method, 1.0, seed, "full"),
        schedule=args.schedule, device=args.device, file=args.checkpoints / f"{name}.pt",
    )  # fmt: skip
    if history is None:
        print(f"{name}: left the finite numbers, no record")
        return
    options = {"net": net_name, "method": method, "schedule": args.schedule, "lr": 1.0}
    Record(
        study="gsgd/cifar",
        config=options | SETTINGS["full"] | {"torch_device": args.device},
        seeds=[seed],
        values={key: [got] for key, got in history.items()},
        selection="nothing is selected: the released settings",
        tier="full",
        wall_s=time.perf_counter() - start,
        command=f"python experiments/gsgd/cifar.py --tier full --net {net_name} --method {method}"
        f" --schedule {args.schedule} --seeds {seed} --device {args.device}",
    ).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=("reduced", "full"), default="reduced")
    parser.add_argument("--net", nargs="+", choices=NETS, help="plain8 and resnet8 unless given")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the full tier")
    parser.add_argument("--schedule", choices=("same", "released"), default="same")
    parser.add_argument("--device", default="cpu", help="of the full tier: cpu or cuda")
    parser.add_argument("--again", action="store_true", help="run what has a record, too")
    place = Path(tempfile.gettempdir()) / "coursekit-cifar"
    parser.add_argument("--checkpoints", type=Path, default=place, help="of the full tier")
    parser.add_argument("--smoke", action="store_true", help="two epochs of noise, no record")
    args = parser.parse_args()
    small = args.smoke or args.tier == "reduced"
    for net_name in args.net or (("plain8", "resnet8") if small else ("plain34", "resnet34")):
        for method in args.method:
            if small:
                reduced(net_name, method, "smoke" if args.smoke else "subset", args.again)
            else:
                for seed in args.seeds:
                    full(args, net_name, method, seed)


if __name__ == "__main__":
    main()
