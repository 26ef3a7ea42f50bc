"""Parallel training: server rules, a simulator with real gradients, and real processes.

``server``    what every parameter server does, whatever its rule
``rules``     updates: what is done with a gradient that arrives
``gates``     when another rule is called, and with which gradient: SSGD, backups, SSP, clipping
``work``      what workers do: their batches and gradients
``simulate``  a cluster in virtual time
``times``     how long computing and messages take in virtual time
``log``       what a run leaves behind
``packing``   weights as one flat vector
``engines``   the same with real workers: processes, threads, Ray actors, ranks of torchrun
``collectives``  sums over ranks, made of sends and receives, and their cost
``pipeline``  stages, their schedule and bubble; layouts of many ranks
``compression``  the largest entries, sketches, error feedback; what a gradient gives away
"""

from coursekit.parallelism.collectives import (
    CountedGroup,
    all_reduce_cost,
    amdahl_speedup,
    copy_to_ranks,
    ring_all_reduce,
    run_ranks,
    server_all_reduce,
    sum_over_ranks,
)
from coursekit.parallelism.compression import (
    CountSketch,
    count_sketch,
    error_feedback,
    match_gradient,
    recover_input,
    top_k,
)
from coursekit.parallelism.engines.processes import Status
from coursekit.parallelism.engines.run import launch
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
from coursekit.parallelism.log import Event, Log
from coursekit.parallelism.packing import load_, pack, score_on, trainable, unpack
from coursekit.parallelism.pipeline import (
    idle_share,
    layout,
    peak_activations,
    pipeline_bubble,
    pipeline_schedule,
)
from coursekit.parallelism.rules import asgd, easgd, ormo, sgd, spring
from coursekit.parallelism.server import (
    Correction,
    Push,
    Row,
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
