"""What a run leaves behind: one row an update, all events, evaluations, and its last state."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from coursekit import _check
from coursekit.parallelism.server import Row, Server


class Event(NamedTuple):
    """Something that happens to a worker at a clock time in ns.

    ``kind`` is ``"pull"`` (weights arrive, computing begins), ``"compute"`` (the gradient is done),
    ``"push"`` (it arrives at the server), ``"server"`` (the server is done with it), ``"ask"`` (a
    request for weights arrives), or a fault: ``"death"``, ``"join"``, ``"pause"``, ``"nan"`` (the
    next gradient is spoiled), ``"restart"`` (of a real server, from its checkpoint). ``number``
    counts the worker's gradients; of a pause it is the length in ns. Events at one time happen in
    the order of ``sequence``.
    """

    clock: int
    sequence: int
    kind: str
    worker: int
    number: int = 0


# Events that make the weights what they are.
ORDER = ("server", "ask", "death", "join", "nan", "restart")


@dataclass(eq=False)
class Log:
    """The record of a run, simulated or real.

    Parameters
    ----------
    server
        As it is at the end.
    rows
        One an update.
    events
        In the order in which they happened.
    evaluations
        What ``evaluate`` returned, with ``samples`` and ``clock``.
    stacked
        How many gradients were computed at once, each time.
    diverged
        Whether the run ended since no worker had a finite gradient any more.
    state
        What `simulate` needs to go on.
    """

    server: Server
    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    stacked: list[int] = field(default_factory=list)
    diverged: bool = False
    state: dict[str, Any] = field(default_factory=dict)

    def record(self, clock: int) -> None:
        """Append a row about the server's last update."""
        if self.server.applied is None:
            raise RuntimeError("record: expected a server that has made an update")
        self.rows.append(self.server.applied._replace(clock=clock))

    def column(self, name: str) -> np.ndarray:
        """Return one field of all rows."""
        _check.one_of("column", "name", name, Row._fields)
        return np.array([getattr(row, name) for row in self.rows])

    @property
    def trace(self) -> list[Event]:
        """The events from which the weights follow; what ``simulate(order=…)`` replays."""
        return [event for event in self.events if event.kind in ORDER]

    def mean_staleness(self, after: int = 0) -> float:
        """Return the mean staleness of the updates after the first ``after``."""
        return float(self.column("staleness")[after:].mean())

    def durations(self) -> dict[int, list[int]]:
        """Return each worker's computing times in ns, from pull to gradient, which `replay` takes.

        Work that was given up has none, so that what follows it moves up.
        """
        begun: dict[int, Event] = {}
        times: dict[int, list[int]] = {}
        for event in self.events:
            if event.kind == "pull":
                begun[event.worker] = event
            elif event.kind == "compute" and event.worker in begun:
                times.setdefault(event.worker, []).append(event.clock - begun[event.worker].clock)
        return times

    def to_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and containers, ready for `torch.save`."""
        plain = vars(self) | {"server": self.server.to_dict()}
        return plain | {"rows": [*map(tuple, self.rows)], "events": [*map(tuple, self.events)]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Log":
        """Return the log that `to_dict` described."""
        return cls(**dict(plain) | {
            "server": Server.from_dict(plain["server"]),
            "rows": [Row(*row) for row in plain["rows"]],
            "events": [Event(*event) for event in plain["events"]],
            "evaluations": list(plain["evaluations"]),
            "stacked": list(plain["stacked"]),
        })  # fmt: skip

    def save(self, path: str | PathLike) -> None:
        """Write everything to a file, without pickled code, or leave the old file as it is."""
        part = f"{os.fspath(path)}.part"
        torch.save(self.to_dict(), part)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | PathLike) -> "Log":
        """Read what `save` wrote."""
        return cls.from_dict(torch.load(path, weights_only=True))
