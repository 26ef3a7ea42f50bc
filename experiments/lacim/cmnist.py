"""Coloured MNIST by LaCIM's definition: seven methods, two rules of selection, LaCIM's ladder.

    python experiments/lacim/cmnist.py                         # shipped subset, 14 x 14
    python experiments/lacim/cmnist.py --tier full             # full MNIST, 28 x 28
    python experiments/lacim/cmnist.py --seeds 0 1 2 --only erm grey
    python experiments/lacim/cmnist.py --final                 # four rows, ten seeds
    python experiments/lacim/cmnist.py --smoke                 # seconds, writes nothing
    python experiments/lacim/cmnist.py --cost                  # times a fit of each, writes nothing

Two training domains, halves of the training images, in which the colour agrees with the class with
probability 0.9 and 0.8; a fifth of each is held out. On the test images it agrees with 0.1; in the
column *neutral* with 0.5. No label is noisy. Every method has the same convolutional backbone,
batches, number of steps and three settings: ERM of its rate, the others of their weight at the
rate 0.001, or 0.003 at full size, where ERM has that rate too. *erm_fixed* is ERM at 0.001 on the
subset, to tell a method's gain from a rate's.

Rule of choice. Setting and step by the mean accuracy on the held-out parts of the training domains
(training-domain validation), at each seed. The column *oracle* is another, and no method can be had
that way: the setting by accuracy on the test domain, at the last step. What LaCIM does after
training is fixed: nothing in it is chosen by test images.

LaCIM's ladder: generic decoder; decoder that draws from s and paints with v; the same with a latent
found by likelihood instead of by the encoder; the same with the label head fitted again on latents
found that way for training images. Beside it ERM with random colours in training, and the oracle of
causes, ERM on grey images.

Latents are searched for on the first 4,000 images of a test set, when it has more; the accuracy of
every method on these is *test_searched*. They are harder than the others: compare on the same.

With ``--of-subset`` each method has the one setting that was chosen most often in the record of the
subset, and the step is chosen as before; full-size runs take hours otherwise.

Every finished pair of method and seed is kept in a file beside the record, so that an interrupted
study goes on where it stopped; the record is written when all are there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from coursekit import data, lacim, train
from coursekit.experiment import Record

RESULTS = Path(__file__).parents[1] / "results" / "lacim"
SEEDS = tuple(range(5))
TIERS = {  # side, steps, images a domain in a step, training images for the refit head, rate
    "subset": (14, 1500, 64, 4000, 1e-3),
    "full": (28, 4000, 64, 4000, 3e-3),  # the rate that ERM has there, of the subset's record
}
SEARCHED = 4000  # test images, at most, whose latents are searched for
SMOKE, LOOKS = (14, 20, 16, 60, 1e-3), 20  # looks at the held-out parts
AGREEMENT = (0.9, 0.8)
INFERENCE = {"steps": 100, "draws": 9, "starts": 4}
PAINT = {"decoder": "paint", "class_weight": 30.0}
METHODS = {  # class, fixed options, the one knob and its three settings
    "erm": (lacim.ERM, {}, "lr", (3e-4, 1e-3, 3e-3)),
    "erm_fixed": (lacim.ERM, {}, "lr", (1e-3,)),  # the rate that all others have
    "irm": (lacim.IRM, {"anneal": 300}, "weight", (1.0, 100.0, 10_000.0)),
    "dann": (lacim.DANN, {}, "weight", (0.1, 0.3, 1.0)),
    "mmdaae": (lacim.MMDAAE, {}, "weight", (0.1, 1.0, 10.0)),
    "diva": (lacim.DIVA, {}, "weight", (0.1, 1.0, 10.0)),
    "svae": (lacim.SVAE, {}, "weight", (0.1, 1.0, 10.0)),
    "svae_paint": (lacim.SVAE, {"decoder": "paint"}, "weight", (0.1, 1.0, 10.0)),
    "lacim_generic": (lacim.LaCIM, {"decoder": "generic"}, "class_weight", (10.0, 30.0, 100.0)),
    "lacim_paint": (lacim.LaCIM, {"decoder": "paint"}, "class_weight", (10.0, 30.0, 100.0)),
    "lacim_film": (lacim.LaCIM, {"decoder": "film"}, "class_weight", (10.0, 30.0, 100.0)),
    # What the ladder does not need, each at the middle setting alone:
    "paint_single": (lacim.LaCIM, PAINT | {"prior": "single"}, "lr", (1e-3,)),
    "paint_mixture": (lacim.LaCIM, PAINT | {"prior": "mixture"}, "lr", (1e-3,)),
    "paint_rho": (lacim.LaCIM, PAINT | {"prior": "rho"}, "lr", (1e-3,)),
    "paint_m4": (lacim.LaCIM, PAINT | {"samples": 4}, "lr", (1e-3,)),
    "colour_augmented": (lacim.ERM, {}, "lr", (3e-4, 1e-3, 3e-3)),
    "grey": (lacim.ERM, {}, "lr", (3e-4, 1e-3, 3e-3)),
}
FINAL = ("erm", "lacim_paint", "colour_augmented", "grey")  # for which there are more seeds


class Recoloured:
    """ERM whose training batches get random colours: channels of an image mix at random."""

    def __init__(self, model, draw):
        self.model, self.draw, self.predict = model, draw, model.predict

    def update(self, minibatches):
        """Give every image a colour of its own, then take a step."""
        new = []
        for x, y in minibatches:
            grey = x.amax(dim=1, keepdim=True)
            colour = torch.rand(len(x), 3, 1, 1, generator=self.draw)
            new.append((grey * colour / colour.amax(dim=1, keepdim=True), y))
        return self.model.update(new)


def as_grey(x):
    """Return three equal channels, in which no colour is left."""
    return x.amax(dim=1, keepdim=True).expand(-1, 3, -1, -1).contiguous()


def environments(tier, seed, side, count=None):
    """Return kept and held-out parts of the training domains, the test set and the neutral set."""
    split = data.load("mnist", tier="subset" if count else tier)
    x, digits = torch.tensor(split.x_train[:count]), torch.tensor(split.y_train[:count])
    x_test, digits_test = torch.tensor(split.x_test[:count]), torch.tensor(split.y_test[:count])
    draw, half = train.generator(seed, "colour"), len(x) // 2
    domains = [
        lacim.colored_mnist(part, label, p, side=side, generator=draw)[:2]
        for part, label, p in zip(x.split(half), digits.split(half), AGREEMENT, strict=False)
    ]
    test, neutral = (
        lacim.colored_mnist(x_test, digits_test, p, side=side, generator=draw) for p in (0.1, 0.5)
    )
    kept, held = lacim.hold_out(domains, generator=train.generator(seed, "held out"))
    return kept, held, test, neutral


def fit(name, setting, kept, held, seed, sizes):
    """Train once; return the model of the best held-out step, and that of the last step."""
    side, steps, batch, _, rate = sizes
    kind, options, knob, _ = METHODS[name]

    def make():
        draw = train.generator(seed, "model")
        return kind(
            (3, side, side), domains=2, **{"lr": rate} | options | {knob: setting}, generator=draw
        )

    model, best, state = make(), -1.0, None
    draw = train.generator(seed, "augment")
    learner = Recoloured(model, draw) if name == "colour_augmented" else model
    draw = train.generator(seed, "batches")
    for _ in range(LOOKS):
        lacim.fit_domains(learner, kept, max(1, steps // LOOKS), batch, generator=draw)
        score = sum(lacim.accuracy(model.predict, x, y) for x, y in held)
        if score > best:
            best, state = score, copy.deepcopy(model.state_dict())
    last = make()
    last.load_state_dict(model.state_dict())
    model.load_state_dict(state)
    return model, last


def leak(s, colour):
    """Return the accuracy of a linear probe of colour from s; fitted on one half of the images."""
    half = len(s) // 2
    head = torch.nn.Linear(s.shape[1], 2)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    s = (s - s[:half].mean(dim=0)) / s[:half].std(dim=0).clamp(min=1e-6)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100)

    def closure():
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(s[:half]), colour[:half])
        loss = loss + 1e-3 * (head.weight**2).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return lacim.accuracy(head, s[half:], colour[half:])


def by_likelihood(model, kept, test, neutral, seed, count):
    """Return accuracies of the amortised, initial, optimised and refit predictions, and leaks."""
    order = torch.randperm(sum(len(x) for x, _ in kept), generator=train.generator(seed, "refit"))
    x, y = (torch.cat(column)[order[:count]] for column in zip(*kept, strict=True))
    gaussian = lacim.latent_gaussian(model, x, generator=train.generator(seed, "gaussian"))

    def infer(images):
        draw = train.generator(seed, "candidates")
        return lacim.infer_latents(model, images, prior=gaussian, **INFERENCE, generator=draw)

    draw = train.generator(seed, "head")
    head = lacim.refit_head(model, infer(x).optimised, y, generator=draw)
    found = {}
    for place, whole in (("test", test), ("neutral", neutral)):
        images = whole._replace(**{k: v[:SEARCHED] for k, v in whole._asdict().items()})
        inference = infer(images.x)
        for name, out in lacim.predictions(model, inference, head).items():
            found[f"{name}/{place}"] = float((out.argmax(dim=1) == images.y).double().mean())
        if place == "neutral":  # where colour says nothing about the class
            for name in ("initial", "optimised"):
                s = getattr(inference, name)[:, : model.s_dim]
                found[f"{name}/leak"] = leak(s, images.colour)
    return found


def settings_of_the_subset():
    """Return, for each method, the setting chosen most often in the subset's record."""
    stored = Record.load(RESULTS / "cmnist_subset.json").values
    chosen = {name: stored[f"{name}/setting"] for name in METHODS if f"{name}/setting" in stored}
    return {name: (max(sorted(set(got)), key=got.count),) for name, got in chosen.items()}


def run(name, seed, tier, sizes, count=None, settings=None):
    """Run one method at one seed; return what the record has of it."""
    begin = time.perf_counter()
    kept, held, test, neutral = environments(tier, seed, sizes[0], count)
    if name == "grey":
        kept, held = ([(as_grey(x), y) for x, y in part] for part in (kept, held))
        test, neutral = (part._replace(x=as_grey(part.x)) for part in (test, neutral))
    settings = settings or METHODS[name][3]
    fits = {setting: fit(name, setting, kept, held, seed, sizes) for setting in settings}
    models = {setting: model for setting, (model, _) in fits.items()}
    chosen = lacim.select("training_domain_validation", models, held_out=held)
    finals = {setting: final for setting, (_, final) in fits.items()}
    oracle = lacim.select("oracle", finals, test=(test.x, test.y))
    model = models[chosen.setting]
    out = {
        "setting": chosen.setting,
        "held_out": chosen.scores[chosen.setting],
        "test": lacim.accuracy(model.predict, test.x, test.y),
        "neutral": lacim.accuracy(model.predict, neutral.x, neutral.y),
        "test_searched": lacim.accuracy(model.predict, test.x[:SEARCHED], test.y[:SEARCHED]),
        "oracle_setting": oracle.setting,
        "oracle": oracle.scores[oracle.setting],
    }
    trained = time.perf_counter()
    if hasattr(model, "candidates"):
        out |= by_likelihood(model, kept, test, neutral, seed, sizes[3])
    return out | {"fit_s": trained - begin, "inference_s": time.perf_counter() - trained}


def load(path):
    """Return what is finished."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=sorted(TIERS), default="subset")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--only", choices=sorted(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--final", action="store_true", help=f"only {', '.join(FINAL)}")
    parser.add_argument("--of-subset", action="store_true", help="settings from its record alone")
    parser.add_argument("--steps", type=int, help="updates, where others than the tier's")
    parser.add_argument("--smoke", action="store_true", help="two methods, twenty steps, no record")
    parser.add_argument("--cost", action="store_true", help="time one fit of each method")
    args = parser.parse_args()
    args.seeds = args.seeds or list(range(10) if args.final else SEEDS)
    args.only = FINAL if args.final else args.only
    name_of_record = f"cmnist_{args.tier}" + "_final" * args.final
    side, steps, batch, refit, rate = TIERS[args.tier]
    steps = args.steps or steps
    sizes = side, steps, batch, refit, rate
    known = settings_of_the_subset() if args.of_subset else {}
    settings = {name: known.get(name, METHODS[name][3]) for name in args.only}
    if args.smoke:
        for name in ("irm", "lacim_paint"):
            out = run(name, 0, "subset", SMOKE, count=200)
            print(f"{name:16} " + " ".join(f"{k} {v:.3g}" for k, v in out.items()))
        return
    if args.cost:
        short = (sizes[0], 40, sizes[2], 0, sizes[4])
        kept, held, test, _ = environments(args.tier, 0, sizes[0])
        for name in args.only:
            begin = time.process_time()
            model, _ = fit(name, METHODS[name][3][0], kept, held[:0], 0, short)
            step = (time.process_time() - begin) / 40
            begin = time.process_time()
            if hasattr(model, "candidates"):
                draw = train.generator(0, "candidates")
                lacim.infer_latents(model, test.x[:500], **INFERENCE, generator=draw)
            each = (time.process_time() - begin) / 500
            images = 2 * len(test.x) + sizes[3]
            print(
                f"{name:16} {1e3 * step:6.1f} ms a step, {step * sizes[1]:6.0f} s a fit, "
                f"{each * images:6.0f} s inference, {len(METHODS[name][3])} fits a seed",
                flush=True,
            )
        return
    done_path = RESULTS / f"{name_of_record}.part"
    done = load(done_path)
    for seed in args.seeds:
        for name in args.only:
            if f"{name}/{seed}" in done:
                continue
            out = done[f"{name}/{seed}"] = run(
                name, seed, args.tier, sizes, settings=settings[name]
            )
            done_path.parent.mkdir(parents=True, exist_ok=True)
            done_path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            line = " ".join(f"{k} {v:.4g}" for k, v in out.items())
            print(f"{name:16} seed {seed} {line}", flush=True)
    runs = {name: [done[f"{name}/{seed}"] for seed in args.seeds] for name in args.only}
    values = {
        f"{name}/{metric}": [out[metric] for out in outs]
        for name, outs in runs.items()
        for metric in outs[0]
    }
    command = f"python experiments/lacim/cmnist.py --tier {args.tier}"
    command += f" --steps {steps}" * (args.steps is not None) + " --of-subset" * args.of_subset
    command += " --final" * args.final
    if not args.final and list(args.only) != list(METHODS):
        command += f" --only {' '.join(args.only)}"
    record = Record(
        study="lacim/cmnist",
        config={
            "side": side, "steps": steps, "batch_a_domain": batch, "refit_images": refit,
            "inference": INFERENCE, "searched": SEARCHED, "rate": rate,
            "agreement": AGREEMENT, "test_agreement": 0.1, "neutral_agreement": 0.5,
            "settings": {name: (METHODS[name][2], settings[name]) for name in args.only},
        },
        seeds=args.seeds,
        values=values,
        selection="setting and step by training-domain validation"
        + " (setting: in the subset's record)" * args.of_subset
        + "; oracle: setting by test accuracy at the last step",
        tier=args.tier,
        wall_s=sum(out["fit_s"] + out["inference_s"] for outs in runs.values() for out in outs),
        command=f"{command} --seeds {' '.join(map(str, args.seeds))}",
    )  # fmt: skip
    record.save(RESULTS / f"{name_of_record}.json")
    done_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
