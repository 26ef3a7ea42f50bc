"""Sums over ranks: our ring of sends and receives beside torch's all_reduce, and the model of both.

Two and four real processes, joined by gloo on loopback, sum tensors of 4 KiB to 8 MiB

1. by `ring_all_reduce`, by `torch.distributed.all_reduce` and by `server_all_reduce`, in turns; a
   turn's time is the fastest of its repetitions, which nothing disturbed;
2. beside a message back and forth between two ranks, from which come the α (latency) and β (time a
   byte) of the model `all_reduce_cost`, and with them its predictions.
3. Two processes share the batch of a synchronous step of SGD, once with little to compute for each
   weight that is sent and once with much; the speed-up stands beside Amdahl's law, whose serial
   part, the sum and the update, is timed by itself.

The record has every turn; a turn is a seed. What is promised is a ratio of medians over the turns.
With four ranks on a machine of two cores the ranks wait for cores, and not only for messages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: there are more processes than cores

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from coursekit import models, train
from coursekit.experiment import Record
from coursekit.parallelism import (
    all_reduce_cost,
    amdahl_speedup,
    ring_all_reduce,
    server_all_reduce,
)

SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)  # bytes
REPEATS = {4 << 10: 100, 64 << 10: 60, 1 << 20: 20, 8 << 20: 6}
METHODS = {"ring": ring_all_reduce, "torch": dist.all_reduce, "server": server_all_reduce}
STEPS = {"light": ([64, 128, 10], 64), "heavy": ([64, 512, 512, 10], 2048)}  # net, batch


def fastest(repeats, function, *arguments):
    """Return the least time of a call in ms, all ranks beginning together."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        function(*arguments)
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times)


def ping_pong(x, rank):
    """Send a tensor to rank 1 and get it back; the other ranks look on."""
    if rank == 0:
        dist.send(x, 1)
        dist.recv(x, 1)
    elif rank == 1:
        dist.recv(x, 0)
        dist.send(x, 0)


def sgd_step(net, x, y, world):
    """Make one step of SGD with the mean gradient of all ranks."""
    params = list(net.parameters())
    gradients = torch.autograd.grad(cross_entropy(net(x), y), params)
    share(torch.cat([g.flatten() for g in gradients]), params, world)


def share(flat, params, world):
    """Sum a gradient over the ranks, and step: the part that is not divided."""
    if world > 1:
        dist.all_reduce(flat)
    with torch.no_grad():
        for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.sub_(g.view_as(p), alpha=1e-3 / world)


def look_on(*_):
    """Do nothing, while another rank works alone."""


def time_steps(rank, world, scale, found):
    """Time one rank with the whole batch, all ranks with a part each, and what is not divided."""
    for name, (sizes, batch) in STEPS.items():
        net = models.mlp(sizes, generator=train.generator(0, "init"))
        params = list(net.parameters())
        x, y = torch.ones(batch, sizes[0]), torch.zeros(batch, dtype=torch.long)
        flat = torch.zeros(sum(p.numel() for p in params))
        mine, repeats = slice(None, None, world), max(2, {"light": 200, "heavy": 20}[name] // scale)
        times = {
            "alone": fastest(repeats, look_on if rank else sgd_step, net, x, y, 1),
            "update": fastest(repeats, look_on if rank else share, flat, params, 1),
            "serial": fastest(repeats, share, flat, params, world),
            "shared": fastest(repeats, sgd_step, net, x[mine], y[mine], world),
        }
        for what, ms in times.items():
            found.setdefault(f"{name}_{what}", []).append(ms)


def run_rank(rank, world, folder, turns, scale):
    """Take all times as one of the ranks; rank 0 writes them down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank,
                            world_size=world)  # fmt: skip
    found = {}
    for turn in range(turns):
        for size in SIZES:
            x, repeats = torch.ones(size // 4), max(2, REPEATS[size] // scale)
            names = list(METHODS)
            for name in names[turn % 3 :] + names[: turn % 3]:
                ms = fastest(repeats, METHODS[name], x.fill_(0.0))
                found.setdefault(f"{name}_{size}", []).append(ms)
            ms = fastest(repeats, ping_pong, x, rank)
            found.setdefault(f"message_{size}", []).append(ms / 2)
        if world == 2:
            time_steps(rank, world, scale, found)
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(world, turns, scale):
    """Return the times of all turns in ms, taken by real processes."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(
            run_rank, (world, folder, turns, scale), nprocs=world, join=False
        )
        end = time.monotonic() + 900
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError("the ranks have not ended in time")
        finally:
            for process in context.processes:
                process.kill()
        return json.loads(Path(folder, f"{world}.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two ranks, one turn, write nothing")
    options = parser.parse_args()
    worlds, turns, scale = ((2,), 1, 20) if options.smoke else ((2, 4), 5, 1)
    begin, values, config = time.perf_counter(), {}, {"sizes": list(SIZES), "steps": STEPS}
    for world in worlds:
        found = measure(world, turns, scale)
        median = {name: statistics.median(times) for name, times in found.items()}
        first, last = SIZES[0], SIZES[-1]
        beta = (median[f"message_{last}"] - median[f"message_{first}"]) / (last - first) / 1e3
        alpha = median[f"message_{first}"] / 1e3 - beta * first
        config |= {f"alpha_s_{world}": alpha, f"beta_s_per_byte_{world}": beta}
        print(f"{world} ranks: a message takes {1e3 * alpha:.3f} ms and {1e9 * beta:.2f} s a GB")
        print("     bytes    ring   torch  server ms   predicted ring  server   ring/torch")
        for size in SIZES:
            ring, torchs, server = (median[f"{name}_{size}"] for name in METHODS)
            predicted = [
                1e3 * all_reduce_cost(size, world, latency=alpha, per_byte=beta, method=name)
                for name in ("ring", "server")
            ]
            print(f"{size:10} {ring:7.2f} {torchs:7.2f} {server:7.2f}", end="")
            print(f" {predicted[0]:17.2f} {predicted[1]:7.2f} {ring / torchs:12.2f}")
            config[f"predicted_ms_{world}_{size}"] = dict(
                zip(("ring", "server"), predicted, strict=True)
            )
        values |= {f"{name}_{world}": times for name, times in found.items()}
        for name in STEPS if world == 2 else ():
            alone, serial = median[f"{name}_alone"], median[f"{name}_serial"]
            # the whole work: what one worker does, and the sum that it would not need
            whole = alone - median[f"{name}_update"] + serial
            law = amdahl_speedup(serial / whole, world) * alone / whole
            print(f"{name}: {alone / median[f'{name}_shared']:.2f} times faster, law {law:.2f}")
            config[f"{name}_speedup_law"] = law
    if not options.smoke:
        Record(
            study="benchmarks/collectives", config=config, seeds=list(range(turns)), values=values,
            selection="nothing is selected: one setting for all, fixed before",
            tier="full", wall_s=time.perf_counter() - begin,
            command="OMP_NUM_THREADS=1 python benchmarks/collectives.py",
        ).save(Path(__file__).parent / "results" / "collectives.json")  # fmt: skip


if __name__ == "__main__":
    main()
