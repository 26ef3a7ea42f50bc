"""Parallel training: server rules, a simulator with real gradients, and real processes.

``server``    what every parameter server does, whatever its rule
``rules``     updates: what is done with a gradient that arrives
``gates``     when another rule is called, and with which gradient: SSGD, backups, SSP, clipping
``work``      what workers do: their batches and gradients
``simulate``  a cluster in virtual time
``times``     how long computing and messages take in virtual time
``log``       what a run leaves behind
``packing``   weights as one flat vector
"""

from coursekit.parallelism.gates import (
    backup_workers,
    clipped,
    drop,
    gap_aware,
    group_asynchronous,
    local_sgd,
    merge,
    ringmaster,
    ssgd,
    stale_synchronous,
    staleness_aware,
)
from coursekit.parallelism.log import Event, Log, Row
from coursekit.parallelism.packing import load_, pack, score_on, trainable, unpack
from coursekit.parallelism.rules import asgd, easgd, ormo, sgd, spring
from coursekit.parallelism.server import (
    Applied,
    Correction,
    Push,
    Rule,
    Server,
    join,
    leave,
    pull,
    receive,
    restart,
    step,
)
from coursekit.parallelism.simulate import Fault, simulate
from coursekit.parallelism.times import (
    constant,
    gamma,
    lognormal,
    pauses,
    replay,
    shifted_exponential,
    straggler,
    stream,
)
from coursekit.parallelism.work import Shards, gradient, gradients, objective
