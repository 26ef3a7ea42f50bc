"""What server and worker do, whichever way their packets travel."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coursekit import train
from coursekit.parallelism import server as rules
from coursekit.parallelism.engines.links import BEAT, Header, Hub, Message
from coursekit.parallelism.log import Event, Log
from coursekit.parallelism.work import Shards, gradient, objective


@dataclass(frozen=True, eq=False)
class Job:
    """All that `launch` was asked for, in a form that can be sent to another process."""

    model: nn.Module | Tensor
    loss: Callable
    x: Tensor
    y: Tensor
    rule: rules.Rule
    workers: int
    lr: float | Callable[[int], float]
    samples: int
    batch_size: int
    seed: int
    local_steps: int
    augment: Callable | None
    order: Sequence[int] | None
    evaluate: Callable[[Tensor], dict[str, float]] | None
    evaluate_every: int
    device: str | torch.device
    checkpoint: Path
    checkpoint_every: int | None
    patience: float
    deadline: float

    def start(self) -> Tensor:
        """Return the first weights, whose size and precision every packet has."""
        return objective(self.model, self.loss)[0]


def computer(job: Job) -> Callable[[int, Header, Tensor], tuple[Header, Tensor]]:
    """Return a worker's part: from weights with their header to a gradient with its header."""
    _, of_weights = objective(job.model, job.loss, job.device)
    x, y = job.x.to(job.device), job.y.to(job.device)
    shards = Shards(len(x), job.workers, job.batch_size, job.seed)

    def compute(worker: int, header: Header, weights: Tensor) -> tuple[Header, Tensor]:
        begin = time.perf_counter_ns()
        first = header.step * job.local_steps
        rows = torch.stack([shards.rows(worker, first + i) for i in range(job.local_steps)])
        inputs, targets = x[rows.to(x.device)], y[rows.to(x.device)]
        if job.augment is not None:
            draw = train.generator(job.seed, f"augmentation/{worker}/{header.step}")
            inputs = torch.stack([job.augment(batch, draw) for batch in inputs])
        slope, loss = gradient(of_weights, weights.to(x.device), inputs, targets, header.lr)
        slope, value = slope.cpu(), loss.item()  # waits for the device
        took = time.perf_counter_ns() - begin
        sent = header._replace(samples=rows.numel(), nanoseconds=took, loss=value)
        return sent._replace(worker=worker), slope

    return compute


def work(line: Any, job: Job) -> None:
    """Be a worker: a gradient for weights, until the server says stop."""
    compute = computer(job)
    header, weights = line.join()
    while not header.stop:
        header, weights = line.exchange(*compute(line.worker, header, weights))


class Service:
    """The server's side of a run: the rule decides, this carries, counts and logs.

    Every gradient that a worker sent is counted once: as accepted or refused by `receive`, as
    ``late`` when it came after the last update, as ``lost`` with a connection or a server. A worker
    that is lost and comes back, or sends what it may not, leaves and joins again, so that the
    server's restarts and its faults stand in the log as events that the simulator can replay.
    """

    def __init__(self, hub: Hub, job: Job, watch: Callable[[int], object] | None = None):
        self.hub, self.job, self.watch = hub, job, watch
        self.heard: dict[int, int] = {}  # gradients, by worker, since that worker was started
        self.steps: dict[int, int] = {}  # the batch each worker is at: it pulled so often
        self.refused = 0  # in a row
        self.pulled: dict[int, int] = {}  # when, by worker
        self.silent: set[int] = set()  # who is connected, but was let go for saying nothing
        self.script = list(job.order or ())
        self.early: dict[int, Message] = {}  # gradients that came before their turn
        self.resumed = job.checkpoint.exists()
        if self.resumed:
            plain = torch.load(job.checkpoint, weights_only=True)
            self.heard, self.steps = plain["heard"], plain["steps"]
            self.log = Log.from_dict(plain["log"])
            server = rules.restart(self.log.server)
        else:
            server = rules.Server(job.start())
            for worker in range(job.workers):
                server = rules.join(server, worker)
            self.log = Log(server)
        self.log.server = replace(server, epoch=max(server.epoch, hub.epoch))
        self.begin = time.monotonic_ns() - (self.log.events[-1].clock if self.log.events else 0)
        if self.resumed:
            self.note("restart", 0)

    def clock(self) -> int:
        return time.monotonic_ns() - self.begin

    def note(self, kind: str, worker: int, clock: int | None = None) -> None:
        clock = self.clock() if clock is None else clock
        step = self.steps.setdefault(worker, -1)
        self.log.events.append(Event(clock, len(self.log.events), kind, worker, step))

    def lr(self) -> float:
        lr, samples = self.job.lr, self.log.server.samples
        return lr(samples) if callable(lr) else lr

    def run(self) -> Log:
        """Serve until the samples are used up, then tell everybody to stop."""
        until = time.monotonic() + self.job.deadline
        self.gather()
        while self.log.server.samples < self.job.samples and not self.log.diverged:
            self.evaluate()
            message = self.next_message()
            if message is not None:
                getattr(self, f"on_{message.kind}")(message)
            if self.watch is not None:
                self.watch(self.log.server.version)
            if time.monotonic() > until:
                raise TimeoutError(f"launch: not done within {self.job.deadline} s")
        self.evaluate()
        self.finish()
        self.save()
        return self.log

    def next_message(self) -> Message | None:
        """Receive what comes; gradients of the living in the order of a script."""
        members = self.log.server.workers
        while self.script and self.script[0] not in members:
            self.script.pop(0)
        if self.script and self.script[0] in self.early:
            return self.early.pop(self.script.pop(0))
        message = self.hub.receive(BEAT)
        if message is None or message.kind != "push" or message.worker not in members:
            return message
        if not self.script:
            return message
        if message.worker == self.script[0]:
            self.script.pop(0)
            return message
        self.early[message.worker] = message
        return None

    # ---- what happens ----

    def gather(self) -> None:
        """Wait until all workers are there, or nobody has come for some time, and serve them."""
        members = sorted(self.log.server.workers)
        here: set[int] = set()
        while len(here) < len(members):
            message = self.hub.receive(self.job.patience)
            if message is None:
                break
            self.hear(message)
            (here.add if message.kind == "join" else here.discard)(message.worker)
        if not here:
            raise TimeoutError(f"launch: no worker came within {self.job.patience} s")
        for worker in members if self.resumed else sorted(set(members) - here):
            self.leave(worker)
        for worker in sorted(here):
            self.enter(worker)

    def on_push(self, message: Message) -> None:
        self.hear(message)
        header, worker, before = message.header, message.worker, self.log.server
        push = rules.Push(
            worker, header.version, message.body, header.samples, header.epoch, header.loss
        )
        server, served = rules.receive(before, push, self.lr(), self.job.rule)
        refusals = {k for k, n in server.counts.items() if n > before.counts.get(k, 0)}
        if refusals & {"refused_unknown", "refused_epoch", "refused_version", "refused_duplicate"}:
            self.log.server = server
            self.leave(worker)
            self.enter(worker)  # it waits for an answer
            return
        self.refused = self.refused + 1 if "refused_nonfinite" in refusals else 0
        self.log.diverged = self.refused >= 3 * len(server.workers)
        self.note("compute", worker, self.pulled[worker] + header.nanoseconds)
        self.note("push", worker, message.clock - self.begin)
        self.note("server", worker)
        self.advance(server, served, worker)

    def on_join(self, message: Message) -> None:
        self.leave(message.worker)
        self.hear(message)
        self.enter(message.worker)

    def on_gone(self, message: Message) -> None:
        self.silent.discard(message.worker)
        self.leave(message.worker)

    def on_silent(self, message: Message) -> None:
        self.silent.add(message.worker)
        self.leave(message.worker)

    def hear(self, message: Message) -> None:
        """Notice, when a worker joins, how many of the gradients that it sent never came."""
        worker, sent = message.worker, message.header.step
        self.silent.discard(worker)
        if message.kind == "push":
            self.heard[worker] = self.heard.get(worker, 0) + 1
        elif message.kind == "join":
            for _ in range(self.heard.get(worker, 0), sent):
                self.log.server = rules.count(self.log.server, "lost")
            self.heard[worker] = sent

    def leave(self, worker: int) -> None:
        if worker in self.early:
            self.hear(self.early.pop(worker))
            self.log.server = rules.count(self.log.server, "lost")
        if worker in self.log.server.workers:
            self.note("death", worker)
            self.advance(*rules.leave(self.log.server, worker, self.lr(), self.job.rule), worker)

    def enter(self, worker: int) -> None:
        if worker not in self.log.server.workers:
            self.note("join", worker)
            self.log.server = rules.join(self.log.server, worker)
        self.send(worker)

    def advance(self, server: rules.Server, served: Sequence[int], sender: int) -> None:
        """Log an update, if there was one, and serve who waits: who computes cannot be stopped."""
        updated = server.version > self.log.server.version
        self.log.server = server
        for worker in served:
            if worker == sender or worker not in server.awaited:
                self.send(worker)
        if updated:
            self.log.record(self.clock())
            self.hub.progress = server.version
            every = self.job.checkpoint_every
            if every and server.version % every == 0:
                self.save()

    def send(self, worker: int) -> None:
        self.log.server, weights = rules.pull(self.log.server, worker)
        server, self.pulled[worker] = self.log.server, self.clock()
        self.steps[worker] = self.steps.get(worker, -1) + 1
        self.note("pull", worker, self.pulled[worker])
        header = Header(server.epoch, worker, server.version, step=self.steps[worker])
        self.hub.reply(worker, header._replace(lr=self.lr()), weights)

    # ---- what is written down ----

    def evaluate(self) -> None:
        """Evaluate at every multiple of so many samples, while the clock stands still."""
        log, begin = self.log, time.monotonic_ns()
        while self.job.evaluate and log.server.samples >= (
            len(log.evaluations) * self.job.evaluate_every
        ):
            about = {"samples": log.server.samples, "clock": begin - self.begin}
            log.evaluations.append(about | self.job.evaluate(log.server.weights))
        self.begin += time.monotonic_ns() - begin

    def finish(self) -> None:
        """Tell everybody to stop, and count what was still on its way."""
        server, stop = self.log.server, Header(stop=1)
        until, kept = time.monotonic() + self.job.patience, list(self.early.values())
        owing = server.awaited | self.silent
        for worker in server.workers - owing:
            self.hub.reply(worker, stop, server.weights)
        while owing and time.monotonic() < until:
            message = kept.pop() if kept else self.hub.receive(BEAT)
            if message is None:
                continue
            owing = owing - {message.worker}
            self.hear(message)
            if message.kind == "push":
                self.log.server = rules.count(self.log.server, "late")
            if message.kind != "gone":
                self.hub.reply(message.worker, stop, server.weights)

    def save(self) -> None:
        """Write all that another life of the server needs, or leave the old file as it is."""
        part = self.job.checkpoint.with_suffix(".part")
        with open(part, "wb") as file:
            counts = {"heard": self.heard, "steps": self.steps}
            torch.save({"log": self.log.to_dict()} | counts, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.job.checkpoint)
