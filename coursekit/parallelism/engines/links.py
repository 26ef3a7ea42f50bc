"""How packets travel between a server and its workers: pairs of processes, or queues.

A packet is a header and a flat tensor, both of a size that never changes. Two choices keep a server
on gloo alive, and both were measured:

* Every worker has a process group of two, itself and the server, and the server a thread for each.
  In one group for all, a receive from any source that times out closes the connections of *every*
  worker, and no worker can be added later. A pair fails alone, and a new pair replaces it.
* A tensor of another size than expected aborts the receiving process; nothing can catch that. So
  size and precision are agreed upon before a pair is made, and checked before anything is sent.

NCCL has no part in this: it aborts a process whose peer has died, and its waits have no deadline.
On machines with GPUs the workers compute there, and packets go through the memory of the host.
"""

import math
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BEAT, CONNECT = 0.1, 10.0  # seconds between heartbeats, and to build a connection in


class Header(NamedTuple):
    """What stands before the numbers of a packet, as float64: integers are exact up to 2⁵³."""

    epoch: int = 0  # the server's life
    worker: int = 0
    version: int = 0  # of the weights sent, or of those the gradient was computed at
    samples: int = 0  # examples in the gradient
    step: int = 0  # which of the worker's batches; when it joins: how many gradients it has sent
    nanoseconds: int = 0  # what computing the gradient took
    loss: float = 0.0
    lr: float = 0.0
    stop: int = 0  # from the server: the training is over

    def tensor(self) -> Tensor:
        return torch.tensor(self, dtype=torch.float64)

    @classmethod
    def of(cls, numbers: Tensor) -> "Header":
        epoch, worker, version, samples, step, nanoseconds, loss, lr, stop = numbers.tolist()
        about = int(epoch), int(worker), int(version), int(samples), int(step), int(nanoseconds)
        return cls(*about, loss, lr, int(stop))


class Message(NamedTuple):
    """What reaches the server: ``kind`` is push, join, gone (disconnected) or silent."""

    kind: str
    worker: int
    header: Header
    body: Tensor = torch.empty(0)
    clock: int = 0  # when it came, in monotonic ns


class Hub:
    """The server's end of all connections: one queue in, one mailbox a worker out."""

    def __init__(self) -> None:
        self.epoch = 0  # which life of the server this is
        self.progress = 0  # the version, for whoever watches
        self.boxes: dict[int, queue.SimpleQueue] = {}
        self._arrived: queue.SimpleQueue = queue.SimpleQueue()

    def open(self, worker: int, header: Header) -> queue.SimpleQueue:
        """Connect a worker, in place of the connection that it had."""
        box = self.boxes[worker] = queue.SimpleQueue()
        self.put(box, Message("join", worker, header))
        return box

    def put(self, box: queue.SimpleQueue, message: Message) -> None:
        self._arrived.put((box, message._replace(clock=time.monotonic_ns())))

    def fail(self, error: Exception) -> None:
        """Let the server end with the error of a worker."""
        self._arrived.put((None, error))

    def receive(self, seconds: float) -> Message | None:
        """Wait for the next message; None when none came in time."""
        try:
            box, message = self._arrived.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(message, Exception):
            raise RuntimeError(f"launch: a worker failed: {message}") from message
        # What an old connection still had to say is counted when the worker joins again.
        return message if self.boxes.get(message.worker) is box else None

    def reply(self, worker: int, header: Header, weights: Tensor) -> None:
        self.boxes[worker].put((header, weights))

    def close(self) -> None: ...


def connect(address: tuple[str, int], seconds: float) -> dist.TCPStore:
    """Open a connection to the store; threads have one each, since a waiting one blocks it."""
    return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=seconds))


def device(host: str) -> Any:
    """Return the network card from which the host of the store is reached."""
    gloo: Any = dist.ProcessGroupGloo
    if host in ("127.0.0.1", "localhost"):
        return gloo.create_device(hostname="127.0.0.1")
    card = os.environ.get("GLOO_SOCKET_IFNAME")
    return gloo.create_device(interface=card) if card else gloo.create_default_device()


class Pair:
    """Two processes and nobody else."""

    def __init__(self, store: Any, name: str, rank: int, like: Tensor, seconds: float):
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()  # the default takes the address of the host's name
        options._timeout = timedelta(seconds=CONNECT)
        options._devices = [device(store.host)]
        self.group = gloo(dist.PrefixStore(name, store), rank, 2, options)
        self.like, self.peer, self.deadline = like, 1 - rank, timedelta(seconds=seconds)

    def send(self, header: Header, body: Tensor) -> None:
        if (body.shape, body.dtype) != (self.like.shape, self.like.dtype):
            raise ValueError(
                f"send: expected {self.like.dtype} of shape {tuple(self.like.shape)}, "
                f"got {body.dtype} of shape {tuple(body.shape)}"
            )
        numbers, body = header.tensor(), body.contiguous()
        works = [self.group.send([numbers], self.peer, 0), self.group.send([body], self.peer, 1)]
        for work in works:
            work.wait(self.deadline)

    def recv(self) -> tuple[Header, Tensor]:
        numbers, body = Header().tensor(), torch.empty_like(self.like)
        works = [self.group.recv([numbers], self.peer, 0), self.group.recv([body], self.peer, 1)]
        for work in works:
            work.wait(self.deadline)
        return Header.of(numbers), body


class GlooHub(Hub):
    """A thread at the door, and one for every worker that came in."""

    def __init__(
        self, address: tuple[str, int], epoch: int, like: Tensor, patience: float, deadline: float
    ):
        super().__init__()
        self.address, self.epoch, self.like = address, epoch, like
        self.patience, self.deadline = patience, deadline
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._start(self._door)

    def _start(self, target: Callable, *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _door(self) -> None:
        """Say that the server lives, let workers in, and notice who is silent for too long."""
        store = connect(self.address, self.patience)
        admitted = 0
        heard: dict[int, tuple[int, float]] = {}  # heartbeats, and when they were counted
        while not self._over.wait(BEAT):
            store.set("server", f"{self.epoch} {time.monotonic_ns()}")
            store.set("version", str(self.progress))
            while store.add(f"tickets/{self.epoch}", 0) > admitted:
                admitted += 1
                self._admit(store, f"{self.epoch}/{admitted}")
            for worker, box in list(self.boxes.items()):
                beat, now = store.add(f"beat/{worker}", 0), time.monotonic()
                if heard.get(worker, (None, 0))[0] != beat:
                    heard[worker] = (beat, now)
                elif now - heard[worker][1] > self.patience:
                    heard[worker] = (beat, math.inf)  # say it once
                    self.put(box, Message("silent", worker, Header(worker=worker)))
        store.set("server", "over")

    def _admit(self, store: Any, ticket: str) -> None:
        worker, sent, *size = store.get(f"ticket/{ticket}").decode().split()
        expected = [str(self.like.numel()), str(self.like.dtype)]
        if size == expected:
            self._start(self._attend, int(worker), int(sent), ticket)
            store.set(f"answer/{ticket}", "welcome")
        else:
            refusal = f"join: expected a gradient of {' '.join(expected)}, got {' '.join(size)}"
            store.set(f"answer/{ticket}", refusal)

    def _attend(self, worker: int, sent: int, ticket: str) -> None:
        store, name = connect(self.address, CONNECT), f"pair/{ticket}"
        try:
            pair = Pair(store, name, 0, self.like, self.deadline)
        except RuntimeError:  # it died while it joined
            return
        box = self.open(worker, Header(worker=worker, step=sent))
        try:
            while True:
                pair.send(*box.get(timeout=self.deadline))
                self.put(box, Message("push", worker, *pair.recv()))
        except Exception:  # this worker's connection is lost, and nothing else
            self.put(box, Message("gone", worker, Header(worker=worker)))

    def close(self) -> None:
        """Say that it is over, and give the workers time to hear it."""
        self._over.set()
        until = time.monotonic() + self.patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


class GlooLine:
    """A worker's end: it joins, exchanges gradients for weights, and joins again when it must."""

    def __init__(self, address: tuple[str, int], worker: int, like: Tensor, deadline: float):
        self.address, self.worker, self.like, self.deadline = address, worker, like, deadline
        self.sent, self._over = 0, threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        store = None
        while not self._over.wait(BEAT):
            try:
                store = store or connect(self.address, CONNECT)
                store.add(f"beat/{self.worker}", 1)
            except RuntimeError:  # the process that had the store died; another may come
                store = None

    def close(self) -> None:
        """Disconnect, and stop the heart: a process must not end while it beats."""
        vars(self).pop("pair", None)
        self._over.set()
        self._heart.join(2 * CONNECT)

    def join(self) -> tuple[Header, Tensor]:
        """Wait for a server that lives, connect to it, and receive weights."""
        until = time.monotonic() + self.deadline
        while True:
            try:
                store = connect(self.address, CONNECT)
                epoch = self._epoch_of_living_server(store)
                if epoch is None:
                    return Header(stop=1), self.like
                ticket = f"{epoch}/{store.add(f'tickets/{epoch}', 1)}"
                size = f"{self.like.numel()} {self.like.dtype}"
                store.set(f"ticket/{ticket}", f"{self.worker} {self.sent} {size}")
                answer = store.get(f"answer/{ticket}").decode()
                if answer != "welcome":
                    raise ValueError(answer)
                self.pair = Pair(store, f"pair/{ticket}", 1, self.like, self.deadline)
                return self.pair.recv()
            except RuntimeError as error:  # no store, no server, or one that died meanwhile
                if time.monotonic() > until:
                    raise TimeoutError(f"join: no server within {self.deadline} s") from error
                time.sleep(BEAT)

    def _epoch_of_living_server(self, store: Any) -> int | None:
        """Read the server's heartbeat until it changes: what a dead server left stands still."""
        first = store.get("server")
        until = time.monotonic() + CONNECT
        while time.monotonic() < until:
            if first == b"over":
                return None
            time.sleep(BEAT / 2)
            if (now := store.get("server")) != first:
                return None if now == b"over" else int(now.split()[0])
        raise RuntimeError("join: the server's heart stands still")

    def exchange(self, header: Header, gradient: Tensor) -> tuple[Header, Tensor]:
        """Send a gradient, receive weights: those of a new server where the old one died."""
        self.sent += 1
        try:
            self.pair.send(header, gradient)
            return self.pair.recv()
        except RuntimeError:
            return self.join()


class QueueLine:
    """The end of a worker that is a thread of the server's process."""

    def __init__(self, hub: Hub, worker: int, deadline: float):
        self.hub, self.worker, self.deadline = hub, worker, deadline

    def join(self) -> tuple[Header, Tensor]:
        self.box = self.hub.open(self.worker, Header(worker=self.worker))
        return self.box.get(timeout=self.deadline)

    def exchange(self, header: Header, gradient: Tensor) -> tuple[Header, Tensor]:
        self.hub.put(self.box, Message("push", self.worker, header, gradient))
        return self.box.get(timeout=self.deadline)
