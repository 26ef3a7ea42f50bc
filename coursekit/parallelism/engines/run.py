"""`launch`: the same arguments as `simulate`, real workers."""

import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coursekit import _check
from coursekit.parallelism.engines.links import Header, Hub, QueueLine
from coursekit.parallelism.engines.processes import Status, as_rank, supervise
from coursekit.parallelism.engines.serve import Job, Service, work
from coursekit.parallelism.log import Log
from coursekit.parallelism.server import Rule

ENGINES = ("gloo", "threads", "ray", "torchrun")


def launch(
    model: nn.Module | Tensor,
    loss: Callable,
    x: Tensor,
    y: Tensor,
    *,
    rule: Rule,
    workers: int,
    lr: float | Callable[[int], float],
    samples: int,
    batch_size: int,
    seed: int = 0,
    local_steps: int = 1,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    order: Sequence[int] | None = None,
    evaluate: Callable[[Tensor], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    device: str | torch.device = "cpu",
    engine: str = "gloo",
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    restarts: int = 0,
    patience: float = 10.0,
    deadline: float = 600.0,
    watch: Callable[[Status], object] | None = None,
) -> Log | None:
    """Train with workers that are real: processes, threads, Ray actors or ranks of torchrun.

    What `simulate` does in virtual time happens here in real time. The log is of the same kind, and
    ``simulate(order=log.trace)`` with the other arguments unchanged arrives at the same weights.

    Parameters
    ----------
    model, loss, x, y, rule, workers, lr, samples, batch_size, seed, local_steps, augment
        As for `simulate`. Other processes get them pickled: functions come from a module, not from
        a cell of a notebook, and options are bound by `functools.partial`.
    order
        Workers in the order in which their gradients are to be used; who is early waits, and the
        turns of the dead are skipped. Not together with a checkpoint or restarts.
    evaluate, evaluate_every
        As for `simulate`; it is called by the server, while the clock stands still.
    device
        Where the workers compute; packets go through the memory of the host.
    engine
        ``"gloo"``: processes of this machine, joined by `torch.distributed`. ``"threads"``: of this
        process. ``"ray"``: actors of the cluster that Ray is connected to, else of a local one.
        ``"torchrun"``: this process is one of several that were started with ``RANK``,
        ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``; rank 0 serves, and ``workers`` is one
        less than the world.
    checkpoint, checkpoint_every
        A file, and the number of updates after which it is written anew. If the file is there, the
        run goes on from it.
    restarts
        How many times in all a process that died is started again.
    patience
        Seconds of silence after which a worker is let go; it may come back.
    deadline
        Seconds after which everything ends, whatever it waits for.
    watch
        Called again and again with the server's version and the processes or actors.

    Returns
    -------
    Log or None
        None for a worker under torchrun. Clocks are real, in ns since the first weights were sent.
        The counts of ``log.server`` have every gradient once: accepted, refused, late, lost.

    Raises
    ------
    ValueError
        For an argument out of range.
    RuntimeError
        If a worker or the server failed or died, with what it said.
    TimeoutError
        If the deadline passed.

    Convention: the server never waits for the network. It keeps one model in the host's memory, and
    asynchronous rules make its result depend on timing; the order of arrival is in the log.

    Source: M. Li et al., Scaling distributed machine learning with the parameter server (2014).
    Curriculum: P2, P5.

    Examples
    --------
    >>> from coursekit import data, models, parallelism, train
    >>> x, y, *_ = data.load("digits").tensors("cpu", torch.float32)
    >>> net = models.mlp([64, 32, 10], generator=train.generator(0, "init"))
    >>> options = dict(rule=parallelism.asgd, workers=3, lr=0.1, samples=3200, batch_size=32)
    >>> loss = torch.nn.functional.cross_entropy
    >>> log = launch(net, loss, x, y, engine="threads", **options)
    >>> again = parallelism.simulate(net, loss, x, y, order=log.trace, **options)
    >>> torch.allclose(log.server.weights, again.server.weights, atol=1e-6)
    True
    """
    _check.one_of("launch", "engine", engine, ENGINES)
    for name, value in (("workers", workers), ("samples", samples), ("local_steps", local_steps)):
        _check.integer("launch", name, value, at_least=1)
    for name, seconds in (("patience", patience), ("deadline", deadline)):
        _check.positive("launch", name, seconds)
    if order is not None and (restarts or checkpoint):
        raise ValueError("launch: expected order or a run that can be restarted, got both")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=model,
            loss=loss,
            x=x.cpu(),
            y=y.cpu(),
            rule=rule,
            workers=workers,
            lr=lr,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            local_steps=local_steps,
            augment=augment,
            order=order,
            evaluate=evaluate,
            evaluate_every=evaluate_every or max(1, samples // 10),
            device=device,
            checkpoint=Path(checkpoint or Path(folder) / "log.pt"),
            checkpoint_every=checkpoint_every,
            patience=patience,
            deadline=deadline,
        )
        if engine == "gloo":
            supervise(job, restarts, watch)
        elif engine == "torchrun":
            if as_rank(job) > 0:
                return None
        elif engine == "threads":
            return _in_threads(job, watch)
        else:
            return _on_ray(job, restarts, watch)
        return Log.from_dict(torch.load(job.checkpoint, weights_only=True)["log"])


Watch = Callable[[Status], object]


def _watching(watch: Watch | None, workers: dict[str | int, Any]) -> Callable[[int], object]:
    return lambda version: watch and watch(Status(version, workers))


def _in_threads(job: Job, watch: Watch | None) -> Log:
    hub = Hub()

    def run_worker(worker: int) -> None:
        try:
            work(QueueLine(hub, worker, job.deadline), job)
        except Exception as error:
            hub.fail(error)

    for worker in range(job.workers):
        threading.Thread(target=run_worker, args=(worker,), daemon=True).start()
    try:
        return Service(hub, job, _watching(watch, {})).run()
    finally:
        for box in hub.boxes.values():
            box.put((Header(stop=1), job.x))


def _on_ray(job: Job, restarts: int, watch: Watch | None) -> Log:
    from coursekit.parallelism.engines.on_ray import RayHub

    hub = RayHub(job, restarts)
    try:
        return Service(hub, job, _watching(watch, hub.actors)).run()
    finally:
        hub.close()
