"""What the real parameter server costs beside a bare echo; its staleness beside the simulator's.

    python benchmarks/engines.py                   # writes benchmarks/results/engines.json
    python benchmarks/engines.py --smoke           # one short turn, writes nothing

1. Round trips a second of three clients that compute nothing. *echo*: one gloo group, the server
   receives from any source and sends the same numbers back. *server*: `launch`'s server with
   `asgd`, which checks, applies, logs and answers every packet. They take turns in one run, on one
   machine that also runs the clients, so only the ratio is of use; the median over turns counts.
2. A real run on digits, three workers; then the simulator with the computing times of that run and
   the median time its server needed: spread and maximum of the staleness of both. The spread is the
   prediction, which should be right to a quarter; the mean is M − 1 in any run, by counting.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads measure noise

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.experiment import Record
from coursekit.parallelism import asgd, launch, replay, simulate
from coursekit.parallelism.engines import links, processes
from coursekit.parallelism.engines.serve import Job
from coursekit.parallelism.log import Log

CLIENTS, LIMIT = 3, 300.0
SIZES = {"4 KB": 1_000, "1 MB": 250_000, "10 MB": 2_500_000}  # float32
TRIPS = {"4 KB": 1_500, "1 MB": 500, "10 MB": 60}  # of each client
CONTEXT = multiprocessing.get_context("forkserver")  # as `launch`: torch is imported once
CONTEXT.set_forkserver_preload(["coursekit.parallelism"])


def echo(rank, address, size, trips):
    """Be rank 0, which sends back what comes from anywhere, or a client."""
    torch.set_num_threads(1)
    store = links.connect(address, LIMIT)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("echo", store), rank=rank, world_size=CLIENTS + 1,
        timeout=timedelta(seconds=LIMIT),
    )  # fmt: skip
    numbers = torch.zeros(size)
    if rank:
        for _ in range(trips):
            dist.send(numbers, 0)
            dist.recv(numbers, 0)
    else:
        begin = None
        for _ in range(CLIENTS * trips):
            source = dist.recv(numbers)
            begin = begin or time.perf_counter()  # imports and connections are not timed
            dist.send(numbers, source)
        store.set("rate", str(CLIENTS * trips / (time.perf_counter() - begin)))
    dist.destroy_process_group()


def client(job, address, worker):
    """Be a worker that computes nothing."""
    line = links.GlooLine(address, worker, job.start(), LIMIT)
    gradient = torch.zeros_like(line.like)
    header, _ = line.join()
    while not header.stop:
        header, _ = line.exchange(header._replace(samples=1), gradient)
    line.close()


def rate(name, size, trips):
    """Return round trips a second."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = ("127.0.0.1", store.port)
    with tempfile.TemporaryDirectory() as folder:
        if name == "echo":
            roles = [(echo, rank, address, size, trips) for rank in range(CLIENTS + 1)]
        else:
            job = Job(**dict.fromkeys(Job.__dataclass_fields__) | {
                "model": torch.zeros(size), "rule": asgd, "workers": CLIENTS, "lr": 0.1,
                "samples": CLIENTS * trips, "checkpoint": Path(folder) / "log.pt",
                "patience": 30.0, "deadline": LIMIT,
            })  # fmt: skip
            roles = [(processes._child, processes.run_server, job, address)]
            roles += [(processes._child, client, job, address, w) for w in range(CLIENTS)]
        running = [CONTEXT.Process(target=role, args=args, daemon=True) for role, *args in roles]
        try:
            for process in running:
                process.start()
            for process in running:
                process.join(LIMIT)
        finally:
            for process in running:
                if process.pid:
                    process.kill()
        if name == "echo":
            return float(store.get("rate"))
        clock = Log.from_dict(torch.load(folder + "/log.pt", weights_only=True)["log"]).column(
            "clock"
        )
        return (len(clock) - 1) / (clock[-1] - clock[0]) * 1e9


def staleness(samples):
    """Return mean, standard deviation and maximum, measured and simulated, and what was fitted."""
    x, y, *_ = data.load("digits").tensors("cpu", torch.float32)
    net = models.mlp([64, 256, 256, 10], generator=train.generator(0, "init"))
    options = {"rule": asgd, "workers": CLIENTS, "lr": 0.05, "samples": samples, "batch_size": 128}
    real = launch(net, cross_entropy, x, y, **options)
    server, free = [], 0
    arrived = {}
    for event in real.events:
        if event.kind == "push":
            arrived[event.worker] = event.clock
        elif event.kind == "server":  # it does one thing at a time
            server.append(event.clock - max(arrived[event.worker], free))
            free = event.clock
    server_time = round(statistics.median(server))
    times = replay(real.durations())
    again = simulate(net, cross_entropy, x, y, times=times, server_time=server_time, **options)
    found = {}
    for name, log in (("measured", real), ("simulated", again)):
        column = log.column("staleness")[CLIENTS:]
        found[name] = {
            "mean": float(column.mean()), "sd": float(column.std()), "max": int(column.max())
        }  # fmt: skip
    compute = statistics.median(sum(real.durations().values(), []))
    return found | {"compute_ms": compute / 1e6, "server_ms": server_time / 1e6}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one short turn, write nothing")
    options = parser.parse_args()
    sizes = {"4 KB": SIZES["4 KB"]} if options.smoke else SIZES
    turns = [0] if options.smoke else list(range(5))
    begin = time.perf_counter()
    values = {f"{who} {size}": [] for size in sizes for who in ("echo", "server")}
    for turn in turns:
        for size, count in sizes.items():
            for who in ("echo", "server")[:: 1 - 2 * (turn % 2)]:
                trips = 100 if options.smoke else TRIPS[size]
                values[f"{who} {size}"].append(rate(who, count, trips))
    print(f"round trips a second of {CLIENTS} clients, medians of {len(turns)} turns")
    for size in sizes:
        bare, full = (statistics.median(values[f"{who} {size}"]) for who in ("echo", "server"))
        print(
            f"  {size:5}  echo {bare:6.0f}, {1e3 / bare:6.2f} ms each; server {full:6.0f}, "
            f"{1e3 / full:6.2f} ms each: {full / bare:.2f} of it (at least 0.8)"
        )
    found = staleness(128 * (30 if options.smoke else 1500))
    for name in ("measured", "simulated"):
        numbers = found[name]
        print(
            f"  staleness {name:9}: mean {numbers['mean']:.3f}, sd {numbers['sd']:.2f}, "
            f"max {numbers['max']} (a mean of {CLIENTS - 1} is forced)"
        )
    if not options.smoke:
        Record(
            study="benchmarks/engines",
            config={"clients": CLIENTS, "floats": SIZES, "trips": TRIPS, "staleness": found},
            seeds=turns,
            values=values,
            selection="nothing is selected: one setting for all, fixed before",
            tier="full",
            wall_s=time.perf_counter() - begin,
            command="OMP_NUM_THREADS=1 python benchmarks/engines.py",
        ).save(Path(__file__).parent / "results" / "engines.json")


if __name__ == "__main__":
    main()
