"""A server and workers as processes of this machine, or as the ranks that torchrun started."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from coursekit import _check
from coursekit.parallelism.engines.links import GlooHub, GlooLine, connect
from coursekit.parallelism.engines.serve import Job, Service, work

Address = tuple[str, int]


class Status(NamedTuple):
    """What ``watch`` sees: the server's version; processes or actors by worker, or ``"server"``."""

    version: int
    processes: dict[str | int, Any]


def run_server(job: Job, address: Address) -> None:
    """Serve one life of the server: the first, or one that goes on from the checkpoint."""
    life = connect(address, job.deadline).add("lives", 1)
    hub = GlooHub(address, life - 1, job.start(), job.patience, job.deadline)
    Service(hub, job).run()
    hub.close()


def run_worker(job: Job, address: Address, worker: int) -> None:
    """Work until the server says that it is over."""
    line = GlooLine(address, worker, job.start(), job.deadline)
    work(line, job)
    line.close()


def as_rank(job: Job) -> int:
    """Be what this process is among those that torchrun, or a person, started; return its rank."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _check.one_of("launch", "workers", job.workers, (size - 1,))
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank:
        run_worker(job, address, rank - 1)
        return rank
    torchrun_has_a_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = None if torchrun_has_a_store else _host(*address)
    run_server(job, address)
    del store
    return rank


def _host(host: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)


def _child(role: Callable, *args: Any) -> None:
    """Play a role in a process that outlives neither its parent nor its own failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    torch.set_num_threads(1)  # there are as many processes as cores, or more
    _keep_freed_memory()
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    status = 0
    try:
        role(*args)
    except BaseException:
        status = 1
        store = connect(args[1], 10.0)
        store.set(f"error/{store.add('errors', 1)}", traceback.format_exc())
    sys.stdout.flush()
    os._exit(status)  # threads that wait for packets need not be waited for


def _keep_freed_memory() -> None:
    """Let glibc use memory again: fresh pages for a packet of 10 MB cost more than the update."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    for option, value in ((-1, 2**30), (-3, 2**25), (-8, 1)):  # trim and mmap thresholds, arenas
        getattr(libc, "mallopt", lambda *_: None)(option, value)


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def supervise(job: Job, restarts: int, watch: Callable[[Status], object] | None) -> None:
    """Start server and workers, start again who dies, and leave no process behind."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    store = _host("127.0.0.1", 0)
    store.set("version", "0")
    context.set_forkserver_preload([__name__])  # torch is imported once for all
    address = ("127.0.0.1", store.port)
    processes: dict[str | int, Any] = {}

    def start(name: str | int) -> None:
        role = (run_server, job, address) if name == "server" else (run_worker, job, address, name)
        process = context.Process(target=_child, args=role, daemon=True)
        process.start()
        processes[name] = process

    until = time.monotonic() + job.deadline
    try:
        for name in ("server", *range(job.workers)):
            start(name)
        while processes["server"].exitcode != 0:
            connection.wait([p.sentinel for p in processes.values() if p.is_alive()], timeout=0.05)
            if store.add("errors", 0):
                raise RuntimeError(f"launch: a process failed\n{store.get('error/1').decode()}")
            for name, process in list(processes.items()):
                if process.exitcode not in (None, 0) and restarts:
                    restarts -= 1
                    start(name)
            dead = [name for name, process in processes.items() if process.exitcode]
            if "server" in dead or len(dead) == job.workers:
                raise RuntimeError(f"launch: too many processes died: {dead}")
            if time.monotonic() > until:
                raise TimeoutError(f"launch: not done within {job.deadline} s")
            if watch is not None:
                watch(Status(store.add("version", 0), processes))
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join(10)
