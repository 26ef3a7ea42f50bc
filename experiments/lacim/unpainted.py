"""Coloured MNIST without the hand-built decoder: what makes s drop colour by itself?

    python experiments/lacim/unpainted.py                # three seeds, shipped subset, 14 x 14
    python experiments/lacim/unpainted.py --smoke        # seconds, writes nothing

Every row is LaCIM with a *generic* decoder and a change or two: another prior, domains that differ
more, more domains, less room for s, a price in nats on what s knows of x. ERM is fitted in the same
environments beside it, as domains that differ more help every method. The last two rows paint, the
second of them in domains that do not differ at all.

Rule of choice. The step by the mean accuracy on the held-out parts of the training domains; the
weight of the class term is 30 for all, the middle of the three in lacim/cmnist.

Finished pairs of row and seed are kept in a file beside the record.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import cache

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cmnist
import torch

from coursekit import data, lacim, train
from coursekit.experiment import Record
from coursekit.lacim.model import descend, stacked

SEEDS, STEPS, BATCH, REFIT = tuple(range(3)), 1500, 128, 2000  # batch: of all domains together
PAIR = (0.9, 0.8)
ROWS = {  # what is said of it, agreements, options
    "generic": ("as before", PAIR, {}),
    "mixture": ("mixture prior", PAIR, {"prior": "mixture"}),
    "rho": ("re-parametrised prior", PAIR, {"prior": "rho"}),
    "m16": ("16 samples", PAIR, {"samples": 16}),
    "apart": ("agreements 0.9 and 0.5", (0.9, 0.5), {}),
    "opposed": ("agreements 0.9 and 0.2", (0.9, 0.2), {}),
    "five": ("five domains, 0.9 to 0.5", (0.9, 0.8, 0.7, 0.6, 0.5), {}),
    "narrow": ("s of 4 dimensions", PAIR, {"s_dim": 4}),
    "wide_v": ("v of 16 dimensions", PAIR, {"v_dim": 16}),
    "price_1": ("price on s, weight 1", PAIR, {"price": 1.0}),
    "price_4": ("price on s, weight 4", PAIR, {"price": 4.0}),
    "both": ("0.9 and 0.2, price 4", (0.9, 0.2), {"price": 4.0}),
    "faithful": ("0.9 and 0.2, mixture", (0.9, 0.2), {"prior": "mixture"}),
    "painted": ("painting decoder", PAIR, {"decoder": "paint"}),
    "equal": ("painted, 0.85 and 0.85", (0.85, 0.85), {"decoder": "paint"}),
}


class Priced(lacim.LaCIM):
    """LaCIM whose objective has one term more: price · KL(q(s|x) ‖ N(0, I))."""

    def __init__(self, shape, *, price=0.0, **options):
        super().__init__(shape, **options)
        self.price = price

    def update(self, minibatches):
        """Take one step on the bound and the price."""
        x, y, domain = stacked("Priced", minibatches, self.domains)
        terms = {"elbo": -self.bound(x, y, domain).mean()}
        if self.price:
            rows = torch.arange(len(x))
            mean, log_std = (t[rows, domain, : self.s_dim] for t in self.posterior(x))
            zero = torch.zeros_like(mean)
            known = lacim.gaussian_kl(mean, log_std, zero, zero)
            terms["price"] = self.price * known.mean()
        return descend(self, terms)


def environments(agreements, seed, count=None):
    """Return kept and held-out parts of as many domains as agreements, test and neutral set."""
    split = data.load("mnist")
    x, digits = (torch.tensor(t[:count]) for t in (split.x_train, split.y_train))
    test = [torch.tensor(t[:count]) for t in (split.x_test, split.y_test)]
    draw, m = train.generator(seed, "colour"), len(agreements)
    parts = zip(x.chunk(m), digits.chunk(m), agreements, strict=True)
    domains = [lacim.colored_mnist(*part, side=14, generator=draw)[:2] for part in parts]
    other = [lacim.colored_mnist(*test, p, side=14, generator=draw) for p in (0.1, 0.5)]
    return *lacim.hold_out(domains, generator=train.generator(seed, "held out")), *other


def fit(model, kept, held, seed, steps):
    """Train; the step with the best mean accuracy on the held-out parts is kept."""
    draw, looks = train.generator(seed, "batches"), max(1, steps // 20)
    lacim.fit_domains(
        model, kept, steps, BATCH // len(kept), generator=draw, held_out=held, check_every=looks
    )
    return model


@cache
def erm(agreements, seed, steps, count):
    """Return accuracies of ERM in these environments; rows that share them share this fit."""
    kept, held, test, neutral = environments(agreements, seed, count)
    draw = train.generator(seed, "model")
    model = lacim.ERM((3, 14, 14), domains=len(kept), lr=1e-3, generator=draw)
    fit(model, kept, held, seed, steps)
    found = (lacim.accuracy(model.predict, part.x, part.y) for part in (test, neutral))
    return dict(zip(("erm", "erm/neutral"), found, strict=True))


def run(name, seed, steps=STEPS, count=None, refit=REFIT):
    """Fit ERM and LaCIM in the row's environments; return accuracies and leaks."""
    begin = time.perf_counter()
    _, agreements, options = ROWS[name]
    kept, held, test, neutral = environments(agreements, seed, count)
    out = erm(agreements, seed, steps, count)
    model = Priced(
        (3, 14, 14), domains=len(kept), class_weight=30.0, lr=1e-3,
        generator=train.generator(seed, "model"), **{"decoder": "generic"} | options,
    )  # fmt: skip
    fit(model, kept, held, seed, steps)
    out = out | cmnist.by_likelihood(model, kept, test, neutral, seed, refit)
    return out | {"wall_s": time.perf_counter() - begin}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--smoke", action="store_true", help="two rows, few steps, no record")
    args = parser.parse_args()
    if args.smoke:
        for name in ("five", "price_1"):
            out = run(name, 0, steps=10, count=300, refit=60)
            print(f"{name:8} " + " ".join(f"{k} {v:.3g}" for k, v in out.items() if k != "wall_s"))
        return
    path = cmnist.RESULTS / "unpainted.part"
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for seed in args.seeds:
        for name in ROWS:
            if f"{name}/{seed}" in done:
                continue
            out = done[f"{name}/{seed}"] = run(name, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            print(name, seed, " ".join(f"{k} {v:.3g}" for k, v in out.items()), flush=True)
    runs = {name: [done[f"{name}/{seed}"] for seed in args.seeds] for name in ROWS}
    Record(
        study="lacim/unpainted",
        config={
            "rows": {name: said for name, (said, _, _) in ROWS.items()},
            "agreements": {name: pair for name, (_, pair, _) in ROWS.items()},
            "options": {name: options for name, (_, _, options) in ROWS.items()},
            "steps": STEPS, "batch_of_all_domains": BATCH, "refit_images": REFIT,
        },
        seeds=args.seeds,
        values={
            f"{name}/{metric}": [out[metric] for out in outs]
            for name, outs in runs.items()
            for metric in outs[0]
        },
        selection="step by training-domain validation; class weight 30 throughout",
        tier="subset",
        wall_s=sum(out["wall_s"] for outs in runs.values() for out in outs),
        command=f"python experiments/lacim/unpainted.py --seeds {' '.join(map(str, args.seeds))}",
    ).save(cmnist.RESULTS / "unpainted.json")  # fmt: skip
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
