"""Workers as Ray actors; the server is the process that calls."""

import os
from typing import Any

from torch import Tensor

from coursekit.parallelism.engines.links import Header, Hub, Message
from coursekit.parallelism.engines.serve import Job, computer


class _Actor:
    """A worker that is asked for one gradient at a time."""

    def __init__(self, job: Job, worker: int):
        self.worker, self.compute = worker, computer(job)

    def step(self, header: Header, weights: Tensor) -> tuple[Header, Tensor]:
        return self.compute(self.worker, header, weights)


class RayHub(Hub):
    """Messages are the results of remote calls; the death of a worker is an exception."""

    def __init__(self, job: Job, restarts: int):
        super().__init__()
        import ray

        self.ray, self.restarts = ray, restarts
        self.owner = not ray.is_initialized()
        if self.owner:  # a cluster of this machine alone, which tells nobody about it
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                num_cpus=job.workers,
                include_dashboard=False,
                object_store_memory=2**27,
                log_to_driver=False,
                _system_config={"agent_register_timeout_ms": 100_000},  # of a busy machine
                _node_ip_address="127.0.0.1",
            )
        self.actors: dict[str | int, Any] = {}
        self.pending: dict[Any, int] = {}  # results to come, oldest first
        self.joined: list[int] = []
        self.death: Exception | None = None  # the last one
        try:
            self.job, self.kind = ray.put(job), ray.remote(_Actor)
            for worker in range(job.workers):
                self._start(worker)
        except BaseException:
            self.close()
            raise

    def _start(self, worker: int) -> None:
        self.actors[worker] = self.kind.remote(self.job, worker)
        self.joined.append(worker)

    def receive(self, seconds: float) -> Message | None:
        if self.joined:
            worker = self.joined.pop(0)
            return Message("join", worker, Header(worker=worker))
        if not self.pending:
            raise RuntimeError(f"launch: every worker died\n{self.death}") from self.death
        ready, _ = self.ray.wait(list(self.pending), timeout=seconds)
        if not ready:
            return None
        worker = self.pending.pop(ready[0])
        try:
            return Message("push", worker, *self.ray.get(ready[0]))
        except self.ray.exceptions.RayActorError as death:
            self.death = death
            if self.restarts:
                self.restarts -= 1
                self._start(worker)
            return Message("gone", worker, Header(worker=worker))
        except self.ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"launch: a worker failed: {error}") from error

    def reply(self, worker: int, header: Header, weights: Tensor) -> None:
        if not header.stop:
            self.pending[self.actors[worker].step.remote(header, weights)] = worker

    def close(self) -> None:
        for actor in self.actors.values():
            self.ray.kill(actor)
        if self.owner:
            self.ray.shutdown()
