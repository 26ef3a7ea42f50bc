"""Asynchronous SGD on digits over all the processes that torchrun started, here or elsewhere.

Rank 0 is the server, every other rank a worker. On two machines, of which the first is 10.0.0.1
and the second has the same Python packages, with two processes each::

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 2 --master-addr 10.0.0.1 \
        --master-port 29500 -m coursekit.parallelism.engines      # on the first
    torchrun --nnodes 2 --node-rank 1 --nproc-per-node 2 --master-addr 10.0.0.1 \
        --master-port 29500 -m coursekit.parallelism.engines      # on the second

``GLOO_SOCKET_IFNAME`` names the network card where there are several. When a process dies, torchrun
ends all the others; with ``--max-restarts`` it starts them again, and with ``--checkpoint`` the run
goes on. To lose no more than the process that died, start each by itself, without torchrun::

    RANK=3 WORLD_SIZE=4 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 \
        python -m coursekit.parallelism.engines

A worker may then be started again at any time, and so may rank 0, from its checkpoint.
"""

import argparse
import os

import torch
from torch.nn.functional import cross_entropy

from coursekit import data, models, train
from coursekit.parallelism import asgd, launch, score_on

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--samples", type=int, default=50_000, help="examples to train on")
parser.add_argument("--checkpoint", help="file that is written, and read when it is there")
options = parser.parse_args()

x, y, x_test, y_test = data.load("digits").tensors("cpu", torch.float32)
net = models.mlp([64, 32, 10], generator=train.generator(0, "init"))
log = launch(
    net, cross_entropy, x, y, rule=asgd, workers=int(os.environ["WORLD_SIZE"]) - 1, lr=0.1,
    samples=options.samples, batch_size=32, evaluate=score_on(net, x_test, y_test),
    engine="torchrun", checkpoint=options.checkpoint, checkpoint_every=500,
)  # fmt: skip
if log is not None:
    error, staleness = log.evaluations[-1]["error"], log.mean_staleness()
    print(f"{len(log.rows)} updates, mean staleness {staleness:.2f}, test error {error:.3f}")
