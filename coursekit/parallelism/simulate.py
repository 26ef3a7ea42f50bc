"""A cluster in one process: virtual time, real gradients, exact staleness.

A heap of events, ordered by (clock in whole ns, sequence), carries every worker from pull to push
and back. A gradient depends only on the weights and the batch that were fixed at the pull; so when
one is needed, all that are pending are computed together, and nothing changes.
"""

import copy
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from coursekit import _check, train
from coursekit.parallelism.log import Event, Log
from coursekit.parallelism.server import Push, Rule, Server, join, leave, pull, receive, restart
from coursekit.parallelism.times import Times, constant, stream
from coursekit.parallelism.work import Objective, Shards, gradient, gradients, objective

FAULTS = ("death", "join", "pause", "nan")
STATE = ("pending", "answers", "clock", "sequence", "free_at", "refused")
DOWN, UP, ACKNOWLEDGE, ASK, LEGS = range(5)  # of the way between a worker and the server


class Fault(NamedTuple):
    """What goes wrong: one of the faults of `Event`, with whom, when; times are in ns."""

    kind: str
    worker: int
    clock: int
    length: int = 0


@dataclass
class _Worker:
    """What a worker is busy with; ``step`` counts its pulls, an event of an older one is void."""

    step: int = -1
    done_at: int = 0
    frozen_until: int = 0
    spoiled: bool = False


@dataclass
class _Run:
    """A simulation: what stays, what a checkpoint holds, and what each kind of event does."""

    rule: Rule
    lr: Callable[[int], float]
    objective: Objective
    data: tuple[Tensor, Tensor]
    shards: Shards
    compute_time: Callable[[int, int], int]
    network_time: Callable[[int, int], int]
    server_time: int
    local_steps: int
    seed: int
    separate_pull: bool
    scripted: bool
    batched: bool
    augment: Callable | None
    log: Log
    workers: dict[int, _Worker] = field(default_factory=dict)
    pending: dict[int, tuple[Tensor, float]] = field(default_factory=dict)  # weights, rate
    answers: dict[int, tuple[Tensor, float, Tensor]] = field(default_factory=dict)
    heap: list[Event] = field(default_factory=list)
    clock: int = 0
    sequence: int = 0
    free_at: int = 0  # when the server is done with all that has arrived
    refused: int = 0  # gradients that were not finite, since the last update

    def schedule(self, clock: int, kind: str, worker: int, number: int) -> None:
        heapq.heappush(self.heap, Event(clock, self.sequence, kind, worker, number))
        self.sequence += 1

    def follow(self, clock: int, kind: str, worker: int) -> None:
        """Schedule what comes next for a worker, unless a script says it."""
        if not self.scripted:
            self.schedule(clock, kind, worker, self.workers[worker].step)

    def network(self, worker: int, *legs: int) -> int:
        """Return the time of messages that belong to a worker's present step."""
        step = self.workers[worker].step
        return sum(self.network_time(worker, LEGS * step + leg) for leg in legs)

    def next_event(self) -> None:
        event = heapq.heappop(self.heap)
        worker = self.workers.setdefault(event.worker, _Worker())
        if event.kind not in FAULTS and not self.scripted and self.void(event, worker):
            return
        if event.kind == "compute" and event.clock < worker.done_at:  # it was paused meanwhile
            heapq.heappush(self.heap, event._replace(clock=worker.done_at))
            return
        self.clock = event.clock
        self.log.events.append(event)
        getattr(self, f"on_{event.kind}")(event.worker, worker, event)

    def void(self, event: Event, worker: _Worker) -> bool:
        """Tell whether an event is of work given up: the worker died or was served again."""
        return event.number != worker.step or event.worker not in self.log.server.workers

    # ---- what happens to a worker ----

    def on_pull(self, m: int, worker: _Worker, event: Event) -> None:
        first = worker.step * self.local_steps
        time = sum(self.compute_time(m, first + i) for i in range(self.local_steps))
        worker.done_at = max(self.clock, worker.frozen_until) + time
        self.follow(worker.done_at, "compute", m)

    def on_compute(self, m: int, worker: _Worker, event: Event) -> None:
        self.follow(self.clock + self.network(m, UP), "push", m)

    def on_push(self, m: int, worker: _Worker, event: Event) -> None:
        self.free_at = max(self.clock, self.free_at) + self.server_time
        self.follow(self.free_at, "server", m)

    def on_pause(self, m: int, worker: _Worker, event: Event) -> None:
        worker.frozen_until = max(worker.frozen_until, self.clock) + event.number
        if worker.done_at > self.clock:
            worker.done_at += event.number

    def on_nan(self, m: int, worker: _Worker, event: Event) -> None:
        worker.spoiled = True

    # ---- what happens at the server ----

    def on_server(self, m: int, worker: _Worker, event: Event) -> None:
        server = self.log.server
        if m not in server.awaited:
            raise ValueError(f"simulate: expected a worker that owes a gradient, got {event}")
        if m in self.pending:
            self.compute_pending()
        slope, loss, rows = self.answers[m]
        if worker.spoiled:
            worker.spoiled, slope = False, torch.full_like(slope, torch.nan)
        push = Push(m, server.pulled[m], slope, rows.numel(), server.epoch, loss, rows)
        self.log.server, served = receive(server, push, self.lr(server.samples), self.rule)
        before, now = (s.counts.get("refused_nonfinite", 0) for s in (server, self.log.server))
        self.refused += now - before
        self.after_rule(server.version, served)

    def on_ask(self, m: int, worker: _Worker, event: Event) -> None:
        self.serve(m)

    def on_death(self, m: int, worker: _Worker, event: Event) -> None:
        server = self.log.server
        self.log.server, served = leave(server, m, self.lr(server.samples), self.rule)
        self.workers[m] = _Worker(step=worker.step)
        self.pending.pop(m, None)
        self.after_rule(server.version, served)

    def on_restart(self, m: int, worker: _Worker, event: Event) -> None:
        self.log.server = restart(self.log.server)

    def on_join(self, m: int, worker: _Worker, event: Event) -> None:
        self.log.server = join(self.log.server, m)
        self.serve(m)

    def after_rule(self, version: int, served: Iterable[int]) -> None:
        """Log the update if there was one, and answer those whom the rule serves."""
        if self.log.server.version > version:
            self.log.record(self.clock)
            self.refused = 0
        for m in served:
            if self.separate_pull:
                self.follow(self.clock + self.network(m, ACKNOWLEDGE, ASK), "ask", m)
            else:
                self.serve(m)

    def serve(self, m: int) -> None:
        """Send the weights of this moment to a worker, which gives up what it was at."""
        self.log.server, weights = pull(self.log.server, m)
        self.pending[m] = weights, self.lr(self.log.server.samples)
        self.workers[m].step += 1
        self.workers[m].done_at = self.clock
        self.follow(self.clock + self.network(m, DOWN), "pull", m)

    # ---- gradients ----

    def compute_pending(self) -> None:
        """Compute the gradient of every worker that has weights and no gradient yet."""
        workers, count = sorted(self.pending), self.local_steps
        places = [(m, self.workers[m].step * count + i) for m in workers for i in range(count)]
        rows = torch.stack([self.shards.rows(*place) for place in places])
        rows = rows.view(len(workers), count, -1).to(self.data[0].device)
        x, y = self.data[0][rows], self.data[1][rows]
        if self.augment is not None:
            x = torch.stack([self.augmented(m, x[i]) for i, m in enumerate(workers)])
        weights = torch.stack([self.pending[m][0] for m in workers])
        rates = weights.new_tensor([self.pending[m][1] for m in workers])
        if self.batched and len(workers) > 1:
            slopes, losses = gradients(self.objective, weights, x, y, rates)
        else:
            one_by_one = zip(weights, x, y, rates, strict=True)
            results = [gradient(self.objective, *one) for one in one_by_one]
            slopes, losses = map(torch.stack, zip(*results, strict=True))
        for answer in zip(workers, slopes, losses.tolist(), rows.flatten(1), strict=True):
            self.answers[answer[0]] = answer[1:]
        self.pending.clear()
        self.log.stacked.append(len(workers))

    def augmented(self, m: int, x: Tensor) -> Tensor:
        draw = train.generator(self.seed, f"augmentation/{m}/{self.workers[m].step}")
        return torch.stack([self.augment(batch, draw) for batch in x]) if self.augment else x

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the log, which has the server."""
        workers = {m: dict(vars(worker)) for m, worker in self.workers.items()}
        plain = {name: getattr(self, name) for name in STATE}
        return plain | {"workers": workers, "heap": [*map(tuple, self.heap)]}

    def restore(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, copy.copy(state[name]))
        self.workers = {m: _Worker(**worker) for m, worker in state["workers"].items()}
        self.heap = [Event(*event) for event in state["heap"]]


def simulate(
    model: nn.Module | Tensor,
    loss: Callable,
    x: Shaped[Tensor, "examples ..."],
    y: Shaped[Tensor, "examples ..."],
    *,
    rule: Rule,
    workers: int,
    lr: float | Callable[[int], float],
    samples: int,
    batch_size: int,
    seed: int = 0,
    time_seed: int | None = None,
    times: Times | None = None,
    server_time: int = 0,
    network: Times | None = None,
    separate_pull: bool = False,
    local_steps: int = 1,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    faults: Sequence[Fault] = (),
    order: Sequence[Event | int] | None = None,
    evaluate: Callable[[Tensor], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    batched: bool = True,
    device: str | torch.device = "cpu",
    resume: Log | None = None,
) -> Log:
    """Train with many workers in virtual time; the same seed gives the same log to the last bit.

    Parameters
    ----------
    model, loss
        A module, which stays as it is, and a loss of (output, target); or a vector of start weights
        and a loss of (weights, x, y).
    x, y
        All examples.
    rule
        What the server does, for instance `asgd`.
    workers, batch_size
        How many, and the examples of a worker's batch.
    lr
        A number, or a function of the samples applied so far, by all workers.
    samples
        The run ends when gradients of this many examples have been applied.
    seed, time_seed
        Of the data order and augmentation; of computing and network times (the former unless
        given). Worker m's k-th time depends on (seed, m, k) alone, and so does its k-th batch,
        given the number of workers.
    times, network
        Time of a local step, 10 ms unless given; of a message in one direction, none unless given.
    server_time
        How many ns the server, which does one thing at a time, needs for a push.
    separate_pull
        Whether a worker asks for weights by a message of its own, so that others may come between.
    local_steps
        Steps a worker makes between pull and push.
    augment
        Maps a batch of ``x``, with a generator for its draws, to another of that shape.
    faults
        Deaths, joins, pauses and spoiled gradients.
    order
        Replay: events of another log's `Log.trace`, or workers in the order of their pushes, in
        place of times and faults.
    evaluate, evaluate_every
        Maps weights to a dictionary of numbers, at every multiple of this many samples (a tenth of
        the budget unless given, or what it was in the run that is resumed); it takes no virtual
        time.
    batched
        Compute pending gradients together, or one by one.
    device
        Where everything is computed.
    resume
        The log of a run with the same arguments but a smaller budget: go on where it ended. Seeds
        and numbers are checked; rule, rate, data, times and faults must be the same unchecked.

    Returns
    -------
    Log

    Raises
    ------
    ValueError
        For an order in which a worker pushes what it does not have, a log to resume whose seeds or
        numbers are others, and a model with running statistics or dropout in training mode.
    RuntimeError
        If nobody is left to go on.

    Examples
    --------
    >>> from coursekit.parallelism import asgd
    >>> square = lambda weights, x, y: (weights * weights).sum() / 2
    >>> data = torch.zeros(8, 1), torch.zeros(8)
    >>> options = dict(rule=asgd, lr=0.5, samples=4, batch_size=1)
    >>> log = simulate(torch.ones(1), square, *data, workers=2, **options)
    >>> log.column("staleness").tolist(), log.server.weights
    ([0, 1, 1, 1], tensor([-0.2500]))
    """
    for name, value in (("workers", workers), ("samples", samples), ("local_steps", local_steps)):
        _check.integer("simulate", name, value, at_least=1)
    _check.integer("simulate", "server_time", server_time, at_least=0)
    for fault in faults:
        _check.one_of("simulate", "fault", fault.kind, FAULTS)
    if order is not None and faults:
        raise ValueError("simulate: expected order or faults, got both; a trace has its faults")
    start, of_weights = objective(model, loss, device)
    time_seed = seed if time_seed is None else time_seed
    run = _Run(
        rule=rule,
        lr=lr if callable(lr) else lambda samples: lr,
        objective=of_weights,
        data=(x.to(device), y.to(device)),
        shards=Shards(len(x), workers, batch_size, seed),
        compute_time=stream(times or constant(10_000_000), time_seed, "compute"),
        network_time=stream(network or constant(0), time_seed, "network"),
        server_time=server_time,
        local_steps=local_steps,
        seed=seed,
        separate_pull=separate_pull,
        scripted=order is not None,
        batched=batched,
        augment=augment,
        log=Log(Server(start)) if resume is None else Log.from_dict(resume.to_dict()),
    )
    log = run.log
    first = {} if resume is None else resume.state.get("fixed", {})
    every = evaluate_every or first.get("evaluate_every") or max(1, samples // 10)
    fixed = dict(
        seed=seed,
        time_seed=time_seed,
        workers=workers,
        batch_size=batch_size,
        local_steps=local_steps,
        server_time=server_time,
        separate_pull=separate_pull,
        evaluate_every=every,
    )
    if resume is not None:
        if first != fixed:
            raise ValueError(
                f"simulate: expected to resume a run with {fixed}, got one with {first}"
            )
        run.restore(resume.state)
    else:
        for i, entry in enumerate(order or ()):
            run.heap.append(entry if isinstance(entry, Event) else Event(i, i, "server", entry))
        for fault in faults:
            run.schedule(fault.clock, fault.kind, fault.worker, fault.length)
        for m in range(workers):
            run.workers[m] = _Worker()
            run.on_join(m, run.workers[m], Event(0, 0, "join", m))
    while True:
        while evaluate is not None and log.server.samples >= len(log.evaluations) * every:
            about = {"samples": log.server.samples, "clock": run.clock}
            log.evaluations.append(about | evaluate(log.server.weights))
        log.diverged = run.refused >= 3 * max(1, len(log.server.workers))
        if log.server.samples >= samples or log.diverged or not run.heap:
            break
        run.next_event()
    if log.server.samples < samples and not (log.diverged or run.scripted):
        raise RuntimeError(f"simulate: expected a worker to go on, got none at {run.clock} ns")
    log.state = run.state() | {"fixed": fixed}
    return log
