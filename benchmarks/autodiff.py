"""What the course engine costs, beside hand-written NumPy and HIPS autograd, in one run.

    python benchmarks/autodiff.py            # all three; writes benchmarks/results/autodiff.json
    python benchmarks/autodiff.py --smoke    # a few repetitions, writes nothing

1. Gradient of the cross-entropy of a 64-128-128-10 MLP, batch 128, float64. The three contestants
   take turns, so that a busy machine slows all of them; medians over the turns are compared.
2. A chain of 400,000 nodes: it must differentiate, and the time a node is stated.
3. Peak memory of a chain of n steps, stored whole and with √n checkpoints.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
import tracemalloc
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: two busy threads would measure noise

import autograd
import autograd.numpy as anp
import numpy as np
from autograd.scipy.special import logsumexp as hips_logsumexp

from coursekit import autodiff as ad

SIZES, BATCH = (64, 128, 128, 10), 128


def problem():
    """Return parameters [(W, b), …], inputs (128, 64) and labels (128,)."""
    rng = np.random.default_rng(0)
    pairs = zip(SIZES, SIZES[1:], strict=False)
    parameters = [(rng.normal(0, m**-0.5, (m, n)), np.zeros(n)) for m, n in pairs]
    return parameters, rng.normal(size=(BATCH, SIZES[0])), rng.integers(0, SIZES[-1], BATCH)


def by_hand(parameters, x, labels):
    """Return the loss and its gradients, written out by hand, in place wherever that is right."""
    inputs = [x]
    for w, b in parameters[:-1]:
        z = inputs[-1] @ w
        z += b
        inputs.append(np.maximum(z, 0, out=z))
    w, b = parameters[-1]
    z = inputs[-1] @ w
    z += b
    z -= z.max(axis=1, keepdims=True)
    rows = np.arange(len(x))
    right = z[rows, labels]
    g = np.exp(z, out=z)
    total = g.sum(axis=1, keepdims=True)
    loss = np.mean(np.log(total[:, 0]) - right)
    g /= total
    g[rows, labels] -= 1
    g /= len(x)
    gradients = []
    for i in reversed(range(len(parameters))):
        gradients.append((inputs[i].T @ g, g.sum(axis=0)))
        if i:
            g = g @ parameters[i][0].T
            g *= inputs[i] > 0
    return loss, gradients[::-1]


def course_loss(parameters, x, labels):
    for w, b in parameters[:-1]:
        x = ad.relu(ad.affine(x, w, b))
    w, b = parameters[-1]
    return ad.cross_entropy(ad.affine(x, w, b), labels)


def composite_loss(parameters, x, labels):
    """Return the loss by the same expression as `hips_loss`, with no fused primitive."""
    for w, b in parameters[:-1]:
        x = ad.maximum(x @ w + b, 0)
    w, b = parameters[-1]
    z = x @ w + b
    return ad.mean(ad.logsumexp(z, axis=1) - z[np.arange(len(labels)), labels])


def hips_loss(parameters, x, labels):
    for w, b in parameters[:-1]:
        x = anp.maximum(anp.dot(x, w) + b, 0)
    w, b = parameters[-1]
    z = anp.dot(x, w) + b
    return anp.mean(hips_logsumexp(z, axis=1) - z[anp.arange(len(labels)), labels])


def gradient_times(turns):
    """Return the median time in ms of each contestant, after checking that they agree."""
    parameters, x, labels = problem()
    contestants = {
        "by hand": by_hand,
        "course": ad.value_and_grad(course_loss),
        "course, unfused": ad.value_and_grad(composite_loss),
        "hips autograd": autograd.value_and_grad(hips_loss),
    }
    results = {name: f(parameters, x, labels) for name, f in contestants.items()}
    for name in list(contestants)[1:]:
        for mine, reference in zip(results[name][1], results["by hand"][1], strict=True):
            np.testing.assert_allclose(mine[0], reference[0], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(mine[1], reference[1], rtol=1e-9, atol=1e-12)
    times = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            f = contestants[name]
            start = time.perf_counter()
            f(parameters, x, labels)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t[len(t) // 10 :]) for name, t in times.items()}


def chain_time(nodes):
    """Return the time in s of the gradient of a chain of multiplications."""

    def chain(x):
        for _ in range(nodes):
            x = x * 0.999999
        return x

    start = time.perf_counter()
    slope = ad.grad(chain)(1.0)
    elapsed = time.perf_counter() - start
    assert math.isclose(slope, 0.999999**nodes, rel_tol=1e-9)
    return elapsed


def peak_memory(steps, checkpointed, width=20_000):
    """Return the peak memory in arrays of ``width`` float64 while differentiating a chain."""

    def run(x, n):
        for _ in range(n):
            x = ad.sin(x)
        return x

    k = math.isqrt(steps)
    segment = ad.checkpoint(lambda x: run(x, k))

    def loss(x):
        if not checkpointed:
            return ad.sum(run(x, steps))
        for _ in range(k):
            x = segment(x)
        return ad.sum(x)

    x = np.linspace(0, 1, width)
    tracemalloc.start()
    ad.grad(loss)(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / x.nbytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few repetitions, write nothing")
    smoke = parser.parse_args().smoke

    times = gradient_times(20 if smoke else 2000)
    print(f"gradient of the {'-'.join(map(str, SIZES))} MLP, batch {BATCH}, float64, medians")
    for name, ms in times.items():
        print(f"  {name:15} {ms:7.3f} ms")
    to_hand = times["course"] / times["by hand"]
    to_hips = times["course"] / times["hips autograd"]
    print(f"  course / by hand = {to_hand:.2f} (at most 1.3)")
    unfused = times["course, unfused"] / times["hips autograd"]
    print(f"  course / hips    = {to_hips:.2f}, unfused {unfused:.2f} (at most 0.7)")

    nodes = 40_000 if smoke else 400_000
    seconds = chain_time(nodes)
    print(f"chain of {nodes:,} nodes: {seconds:.2f} s, {1e6 * seconds / nodes:.1f} µs a node")

    steps = [16, 64, 256] if smoke else [16, 64, 256, 1024, 4096]
    stored = [peak_memory(n, False) for n in steps]
    recomputed = [peak_memory(n, True) for n in steps]
    law = [2 * math.sqrt(n) + 4 for n in steps]  # input, gradient and temporaries: four arrays
    off = max(abs(m - expected) for m, expected in zip(recomputed, law, strict=True))
    print("peak memory in arrays   n: " + " ".join(f"{n:7d}" for n in steps))
    print("  stored whole             " + " ".join(f"{m:7.1f}" for m in stored))
    print("  √n checkpoints           " + " ".join(f"{m:7.1f}" for m in recomputed))
    print("  2√n + 4                  " + " ".join(f"{m:7.1f}" for m in law))

    if not smoke:
        record = {
            "gradient_ms": times,
            "course_over_by_hand": to_hand,
            "course_over_hips": to_hips,
            "unfused_over_hips": unfused,
            "chain": {"nodes": nodes, "seconds": seconds},
            "memory": {"steps": steps, "stored": stored, "checkpointed": recomputed},
            "memory_off_the_law": off,
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "command": "OMP_NUM_THREADS=1 python benchmarks/autodiff.py",
        }
        path = Path(__file__).parent / "results" / "autodiff.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
