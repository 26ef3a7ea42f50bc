"""The laws of the simulated cluster: staleness, time, faults, exactness."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from coursekit import models, train
from coursekit.parallelism import (
    Event,
    Fault,
    Log,
    Server,
    Shards,
    asgd,
    backup_workers,
    clipped,
    constant,
    gamma,
    gap_aware,
    gradient,
    gradients,
    group_asynchronous,
    load_,
    local_sgd,
    lognormal,
    objective,
    ormo,
    pauses,
    replay,
    ringmaster,
    shifted_exponential,
    simulate,
    spring,
    ssgd,
    stale_synchronous,
    straggler,
    stream,
    trainable,
)

MS = 1_000_000  # ns
TIMES = {
    "constant": constant(10 * MS),
    "gamma": gamma(10 * MS, 0.3),
    "wide gamma": gamma(10 * MS, 0.7),
    "exponential": shifted_exponential(10 * MS),
    "shifted exponential": shifted_exponential(10 * MS, 6 * MS),
    "lognormal": lognormal(10 * MS, 0.5),
    "straggler": straggler(constant(10 * MS), slow=1),
    "pauses": pauses(gamma(10 * MS, 0.1), probability=0.02, length=100 * MS),
}
RULES = {
    "asgd": partial(asgd, momentum=0.3),
    "spring": spring,
    "ormo": partial(ormo, momentum=0.5),
    "ssgd": ssgd,
    "backup_workers": partial(backup_workers, spare=1),
    "stale_synchronous": partial(stale_synchronous, bound=1),
    "group_asynchronous": partial(group_asynchronous, groups=2),
    "gap_aware": gap_aware,
    "ringmaster": partial(ringmaster, threshold=2),
}
every_times = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def squares(weights, x, y):
    """Half the mean squared error of a linear model: a plain function of packed weights."""
    return ((x @ weights - y) ** 2).mean() / 2


DRAW = torch.Generator().manual_seed(0)
X = torch.randn(96, 3, generator=DRAW, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
Y = Y + 0.1 * torch.randn(96, generator=DRAW, dtype=torch.float64)


def run(updates=60, workers=4, rule=asgd, **options):
    """A short run on a linear model, in batches of two."""
    start = torch.zeros(3, dtype=torch.float64)
    fixed = {"lr": 0.02, "batch_size": 2, "samples": 2 * updates} | options
    return simulate(start, squares, X, Y, rule=rule, workers=workers, **fixed)


def same(a, b):
    """Whether two logs agree to the last bit."""
    here, there = a.to_dict(), b.to_dict()
    logs = [
        [repr(d[name]) for name in ("rows", "events", "evaluations", "stacked", "diverged")]
        for d in (here, there)
    ]
    return logs[0] == logs[1] and torch.equal(a.server.weights, b.server.weights)


# ---- staleness ----


@pytest.mark.covers("P2")
@pytest.mark.parametrize("workers", [1, 2, 5, 8])
def test_with_constant_times_the_staleness_is_m_minus_1_after_warm_up(workers):  # spec 5.9
    staleness = run(workers=workers, times=constant(5 * MS)).column("staleness")
    assert staleness.tolist() == [min(i, workers - 1) for i in range(60)]


@every_times
def test_the_mean_staleness_tends_to_m_minus_1_whatever_the_times(times):  # spec 5.10
    log = run(400, workers=5, times=times)
    # Every update is counted once by each other gradient under way.
    assert log.mean_staleness() == pytest.approx(4, abs=0.2)
    assert log.column("staleness").min() >= 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
@settings(max_examples=25)
def test_staleness_adds_up_to_what_is_not_under_way_any_more(order):
    log = run(99, order=order)
    # Each of the three others counts an update once, at once or when its gradient arrives.
    under_way = sum(log.server.version - log.server.pulled[m] for m in range(4))
    assert log.column("staleness").sum() == 3 * len(order) - under_way


def test_a_slow_worker_is_stale_and_the_others_are_fresh():
    log = run(400, workers=4, times=straggler(constant(10 * MS), slow=2, factor=5))
    by = {m: log.column("staleness")[log.column("worker") == m][3:].mean() for m in range(4)}
    assert by[2] > 14
    assert max(by[m] for m in (0, 1, 3)) < 3.3


def test_ringmaster_discards_what_a_slow_worker_sends():  # spec 5.23
    times = straggler(constant(10 * MS), slow=2, factor=8)
    log = run(200, rule=partial(ringmaster, threshold=6), times=times)
    assert log.column("staleness").max() <= 6
    assert 2 not in log.column("worker")[10:]
    assert log.server.counts["dropped"] > 5


def test_a_stale_synchronous_server_waits_for_a_slow_worker():  # spec 5.23
    times = straggler(constant(10 * MS), slow=2, factor=8)
    log = run(200, rule=partial(stale_synchronous, bound=3), times=times)
    clocks = log.server.clocks.values()
    assert max(clocks) - min(clocks) <= 4
    assert log.column("clock")[-1] > 1.9 * run(200, times=times).column("clock")[-1]


# ---- time ----


def harmonic(count, start=1):
    return sum(1 / i for i in range(start, count + 1))


@pytest.mark.covers("P4")
@pytest.mark.parametrize("workers", [2, 6])
def test_a_synchronous_step_with_exponential_times_takes_the_harmonic_number(workers):  # spec 5.11
    updates = 300
    options = {"samples": 2 * workers * updates, "times": shifted_exponential(MS)}
    log = run(workers=workers, rule=ssgd, **options)
    assert log.server.version == updates
    spread = math.sqrt(sum(i**-2 for i in range(1, workers + 1)) / updates)
    assert log.column("clock")[-1] / MS / updates == pytest.approx(
        harmonic(workers), abs=4 * spread
    )


@pytest.mark.covers("P4")
def test_a_step_of_n_out_of_n_plus_b_takes_their_part_of_the_sum():  # spec 5.11
    updates, first, spare = 300, 4, 2
    rule = partial(backup_workers, spare=spare)
    options = {"samples": 2 * first * updates, "times": shifted_exponential(MS)}
    log = run(workers=first + spare, rule=rule, **options)
    step = log.column("clock")[-1] / MS / updates
    expected = harmonic(first + spare, spare + 1)
    assert step == pytest.approx(expected, abs=0.1)
    assert expected < 0.5 * harmonic(first + spare)


@every_rule
def test_twice_the_times_are_twice_the_clock_and_no_other_weight(rule):  # spec 5.14
    one = run(rule=rule, times=gamma(10 * MS, 0.4), network=constant(MS), server_time=MS // 2)
    base = gamma(10 * MS, 0.4)
    two = run(
        rule=rule,
        times=replay_of(base, 2),
        network=constant(2 * MS),
        server_time=MS,
    )
    assert torch.equal(one.server.weights, two.server.weights)
    assert (2 * one.column("clock")).tolist() == two.column("clock").tolist()
    assert one.column("staleness").tolist() == two.column("staleness").tolist()


def replay_of(base, factor):
    """Times that are an integer multiple of another model's, to the nanosecond."""
    return lambda rng, worker, steps: factor * np.rint(base(rng, worker, steps))


def test_the_server_does_one_thing_at_a_time():
    fast = run(300, workers=8, times=gamma(10 * MS, 0.2), server_time=0)
    slow = run(300, workers=8, times=gamma(10 * MS, 0.2), server_time=5 * MS)
    assert np.diff(slow.column("clock")).min() >= 5 * MS
    assert np.diff(slow.column("clock")[20:]).mean() == pytest.approx(5 * MS, rel=0.01)
    assert np.diff(fast.column("clock")[20:]).mean() == pytest.approx(10 / 8 * MS, rel=0.05)


def test_a_round_takes_the_way_there_computing_the_way_back_and_the_server():
    log = run(3, workers=1, times=constant(10 * MS), network=constant(2 * MS), server_time=MS)
    assert log.column("clock").tolist() == [15 * MS, 30 * MS, 45 * MS]
    first = [(e.kind, e.clock // MS) for e in log.events[:4]]
    assert first == [("pull", 2), ("compute", 12), ("push", 14), ("server", 15)]


def test_evaluation_takes_no_virtual_time_and_comes_at_fixed_sample_counts():
    seen = []

    def evaluate(weights):
        seen.append(weights)
        return {"norm": weights.norm().item()}

    log = run(20, evaluate=evaluate, evaluate_every=10)
    assert same(run(20), Log.from_dict(log.to_dict() | {"evaluations": []}))
    assert [e["samples"] for e in log.evaluations] == [0, 10, 20, 30, 40]
    assert log.evaluations[0]["norm"] == 0
    assert torch.equal(seen[-1], log.server.weights)


@pytest.mark.parametrize("rule", [asgd, ssgd], ids=["asgd", "ssgd"])
def test_the_learning_rate_follows_the_samples_of_all_workers(rule):
    asked = []

    def lr(samples):
        asked.append(samples)
        return 0.1 if samples < 48 else 0.0

    log = run(40, workers=3, rule=rule, lr=lr)
    weights = run(24, workers=3, rule=rule, lr=0.1).server.weights
    assert torch.equal(log.server.weights, weights)
    assert asked == sorted(asked)


@pytest.mark.parametrize(
    ("times", "mean", "cv"),
    [
        (gamma(10.0, 0.3), 10, 0.3),
        (lognormal(10.0, 0.5), 10, 0.5),
        (shifted_exponential(10.0, 6.0), 10, 0.4),
        (shifted_exponential(10.0), 10, 1.0),
        (pauses(constant(10.0), probability=0.5, length=20.0), 20, 0.5),
    ],
    ids=["gamma", "lognormal", "shifted", "exponential", "pauses"],
)
def test_times_have_the_mean_and_the_spread_they_are_asked_for(times, mean, cv):
    drawn = times(train.rng(0, "compute"), 0, np.arange(40_000))
    assert drawn.mean() == pytest.approx(mean, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(cv, rel=0.04)


def test_a_time_depends_on_seed_worker_and_step_alone():
    forward, backward = (stream(gamma(1e6, 0.3), 3, "compute") for _ in range(2))
    places = [(m, k) for m in range(3) for k in (0, 1, 255, 256, 700)]
    there = [forward(*place) for place in places]
    assert there == [backward(*place) for place in reversed(places)][::-1]
    assert len(set(there)) == len(there)


def test_recorded_times_replayed_give_the_same_log():
    log = run(times=gamma(10 * MS, 0.5))
    recorded = log.durations()
    more = {m: [*times, *times] for m, times in recorded.items()}
    assert run(times=replay(more)).rows == log.rows


def test_recorded_times_of_several_local_steps_are_as_long_as_they_were():
    options = {"local_steps": 4, "samples": 480}
    log = run(times=gamma(10 * MS, 0.5), **options)
    more = {m: [*times, *times] for m, times in log.durations().items()}
    again = run(times=replay(more, local_steps=4), **options)
    assert again.column("worker").tolist() == log.column("worker").tolist()
    np.testing.assert_allclose(again.column("clock"), log.column("clock"), rtol=1e-6)


# ---- exactness ----


@every_rule
def test_one_seed_gives_one_log_to_the_last_bit(rule):  # spec 5.15
    options = {"rule": rule, "times": gamma(10 * MS, 0.5), "network": gamma(MS, 0.5)}
    assert same(run(seed=4, **options), run(seed=4, **options))
    assert not same(run(seed=4, **options), run(seed=5, **options))


def drawn(log):
    """The rows of each worker's batches, in its own order."""
    shards = Shards(len(X), 4, 2, seed=0)
    steps = {m: [e.number for e in log.events if (e.kind, e.worker) == ("server", m)]
             for m in range(4)}  # fmt: skip
    return {m: [shards.rows(m, k).tolist() for k in steps[m]] for m in steps}


def test_other_times_leave_every_worker_its_batches():  # spec 5.16
    seen = []

    def recording(server, push, lr):
        seen[-1].setdefault(push.worker, []).append(push.rows.tolist())
        return asgd(server, push, lr)

    logs = []
    for options in ({"time_seed": 1}, {"time_seed": 2}, {"times": constant(MS)}):
        seen.append({})
        logs.append(run(rule=recording, **{"times": gamma(10 * MS, 0.7)} | options))
    assert logs[0].column("worker").tolist() != logs[1].column("worker").tolist()
    for m in range(4):
        least = min(len(s[m]) for s in seen)
        assert least > 8
        assert seen[0][m][:least] == seen[1][m][:least] == seen[2][m][:least]


def test_shards_deal_every_epoch_out_and_shuffle_it():
    shards = Shards(24, 3, 4, seed=0)
    epochs = [[shards.rows(m, 2 * e + k) for m in range(3) for k in range(2)] for e in range(2)]
    for epoch in epochs:
        assert torch.cat(epoch).sort()[0].tolist() == list(range(24))
    assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
    again = Shards(24, 3, 4, seed=0)
    assert torch.equal(again.rows(2, 3), epochs[1][5])  # asked for first, not last


def digits():
    """A small net with tanh and sixty examples."""
    net = models.mlp([6, 5, 3], nn.Tanh, generator=train.generator(0, "init")).double()
    draw = train.generator(0, "data")
    x = torch.randn(60, 6, generator=draw, dtype=torch.float64)
    return net, cross_entropy, x, x[:, :3].argmax(dim=1)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_gradients_of_many_workers_at_once_are_those_one_by_one(local_steps, device, dtype):
    net, loss, x, y = digits()  # spec 5.17
    start, function = objective(net.to(dtype), loss, device)
    x, y = x.to(device, dtype).view(10, 6, 6)[:, :, :], y.to(device).view(10, 6)
    x, y = (t.view(10, local_steps, 6 // local_steps, *t.shape[2:]) for t in (x, y))
    noise = torch.randn(10, len(start), generator=train.generator(1, "w"), dtype=dtype)
    weights, lr = start + noise.to(device), torch.linspace(0.1, 1, 10, dtype=dtype, device=device)
    together, losses = gradients(function, weights, x, y, lr)
    for i in range(10):
        alone, loss_alone = gradient(function, weights[i], x[i], y[i], lr[i])
        torch.testing.assert_close(together[i], alone)
        torch.testing.assert_close(losses[i], loss_alone)


@pytest.mark.parametrize("rule", [asgd, ssgd], ids=["asgd", "ssgd"])
def test_batched_and_one_by_one_runs_agree(rule):  # spec 5.17
    options = {"rule": rule, "workers": 5, "lr": 0.3, "samples": 240, "batch_size": 4}
    together = simulate(*digits(), **options)
    alone = simulate(*digits(), **options, batched=False)
    torch.testing.assert_close(together.server.weights, alone.server.weights)
    np.testing.assert_allclose(together.column("loss"), alone.column("loss"))
    assert max(together.stacked) == 5


def test_a_gradient_is_that_of_torch():
    net, loss, x, y = digits()
    start, function = objective(net, loss)
    got, value = gradient(function, start, x[None], y[None], 0.1)
    expected = loss(net(x), y)
    expected.backward()
    params = trainable(net)
    flat = torch.cat([params[name].grad.flatten() for name in sorted(params)])
    torch.testing.assert_close(got, flat)
    torch.testing.assert_close(value, expected.detach())


def test_one_worker_is_torch_sgd_on_the_same_batches():
    net, loss, x, y = digits()
    log = simulate(net, loss, x, y, rule=asgd, workers=1, lr=0.3, samples=120, batch_size=4)
    shards, theirs = Shards(60, 1, 4, seed=0), copy.deepcopy(net)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3)
    for step in range(30):
        rows = shards.rows(0, step)
        sgd.zero_grad()
        loss(theirs(x[rows]), y[rows]).backward()
        sgd.step()
    ours = load_(copy.deepcopy(net), log.server.weights)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_local_sgd_is_the_mean_of_workers_that_each_made_their_own_steps():
    net, loss, x, y = digits()
    options = {"workers": 2, "lr": 0.3, "batch_size": 4, "local_steps": 3}
    log = simulate(net, loss, x, y, rule=local_sgd, samples=24, **options)
    shards, ends = Shards(60, 2, 4, seed=0), []
    for m in range(2):
        own = copy.deepcopy(net)
        sgd = torch.optim.SGD(own.parameters(), lr=0.3)
        for step in range(3):
            rows = shards.rows(m, step)
            sgd.zero_grad()
            loss(own(x[rows]), y[rows]).backward()
            sgd.step()
        ends.append(trainable(own))
    mean = torch.cat([(ends[0][n] + ends[1][n]).flatten() / 2 for n in sorted(ends[0])])
    torch.testing.assert_close(log.server.weights, mean.detach())
    assert log.column("clock")[0] == 30 * MS
    assert log.column("batch").tolist() == [24]


def test_the_model_that_is_handed_in_stays_as_it_is():
    net, loss, x, y = digits()
    before = copy.deepcopy(net.state_dict())
    simulate(net, loss, x, y, rule=asgd, workers=2, lr=0.3, samples=40, batch_size=4)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_frozen_parameters_take_no_part():
    net, loss, x, y = digits()
    net[0].weight.requires_grad_(False)
    log = simulate(net, loss, x, y, rule=asgd, workers=2, lr=0.3, samples=40, batch_size=4)
    assert log.server.weights.numel() == sum(p.numel() for p in net.parameters()) - 30


def test_augmentation_has_a_stream_of_its_own():
    def noise(x, generator):
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    times = gamma(10 * MS, 0.5)
    plain, noisy = run(times=times), run(times=times, augment=noise)
    assert plain.column("clock").tolist() == noisy.column("clock").tolist()
    assert drawn(plain) == drawn(noisy)
    assert not torch.equal(plain.server.weights, noisy.server.weights)
    assert same(noisy, run(times=times, augment=noise))
    assert same(plain, run(times=times, augment=lambda x, generator: x))


def test_no_global_random_state_is_touched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    run(times=gamma(10 * MS, 0.5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


# ---- checkpoints and replay ----


@every_rule
@pytest.mark.parametrize("updates", [1, 17])
def test_a_run_resumed_at_an_update_has_the_log_of_one_that_went_through(rule, updates, tmp_path):
    options = {  # spec 5.18
        "rule": rule, "times": gamma(10 * MS, 0.5), "network": gamma(MS, 0.2), "server_time": MS,
        "faults": [Fault("death", 1, 60 * MS), Fault("pause", 2, 20 * MS, 50 * MS),
                   Fault("nan", 0, 45 * MS), Fault("join", 1, 100 * MS)],
        "evaluate": lambda weights: {"norm": weights.norm().item()}, "evaluate_every": 10,
    }  # fmt: skip
    whole = run(60, **options)
    run(updates, **options).save(tmp_path / "log.pt")
    half = Log.load(tmp_path / "log.pt")
    rows = len(half.rows)
    resumed = run(60, **options, resume=half)
    assert same(whole, resumed)
    assert whole.server.counts["refused_nonfinite"] == 1
    assert len(half.rows) == rows  # what is resumed from stays as it is


def test_a_log_of_another_run_is_not_resumed():
    with pytest.raises(ValueError, match=r"simulate: expected to resume a run with .*'seed': 1"):
        run(60, seed=1, resume=run(10, seed=0))


@pytest.mark.parametrize(
    "other", [{"workers": 3}, {"server_time": MS}, {"separate_pull": True}, {"evaluate_every": 7}]
)
def test_a_log_of_a_run_with_other_numbers_is_not_resumed(other):
    with pytest.raises(ValueError, match=f"simulate: expected to resume .*'{next(iter(other))}'"):
        run(60, resume=run(10), **other)


def test_a_resumed_run_goes_on_evaluating_as_often_as_it_did():
    options = {"evaluate": lambda weights: {"norm": weights.norm().item()}}
    log = run(40, resume=run(20, **options), **options)
    assert [e["samples"] for e in log.evaluations] == list(range(0, 81, 4))


def test_a_log_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    log = run(5)
    log.save(tmp_path / "log.pt")

    def half(plain, path):
        Path(path).write_bytes(b"half")
        raise OSError("full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="full"):
        run(9).save(tmp_path / "log.pt")
    assert same(Log.load(tmp_path / "log.pt"), log)


def test_a_newcomer_leaves_everybody_the_batches_they_had():
    late = [Fault("join", 7, 10**15)]
    assert torch.equal(run(20).server.weights, run(20, faults=late).server.weights)


@every_rule
def test_a_trace_replayed_gives_the_same_weights_and_rows(rule):  # spec 5.21
    options = {
        "rule": rule,
        "faults": [Fault("death", 1, 60 * MS), Fault("nan", 0, 45 * MS), Fault("join", 1, 90 * MS),
                   Fault("join", 7, 70 * MS)],
    }  # fmt: skip
    log = run(times=gamma(10 * MS, 0.6), network=gamma(MS, 0.6), **options)
    again = run(rule=rule, order=log.trace)
    assert torch.equal(again.server.weights, log.server.weights)
    assert again.rows == log.rows
    assert again.trace == log.trace


def test_a_script_of_workers_is_played_as_it_stands():
    log = run(99, order=[0, 0, 3, 1, 0])
    assert log.column("worker").tolist() == [0, 0, 3, 1, 0]
    assert log.column("staleness").tolist() == [0, 0, 2, 3, 2]


def test_a_separate_pull_lets_another_update_come_between():
    together = run(20, workers=2, times=constant(10 * MS))
    apart = run(20, workers=2, times=constant(10 * MS), separate_pull=True)
    # Both push at one time and pull after both: each then sees the other's update.
    assert together.column("staleness").tolist() == [0] + [1] * 19
    assert apart.column("staleness").tolist() == [0, 1] * 10
    assert apart.column("distance")[2] == 0
    assert run(99, workers=2, separate_pull=True, order=apart.trace).rows == apart.rows


# ---- faults ----


def test_after_a_death_the_mean_staleness_is_that_of_those_who_live():  # spec 5.22
    log = run(400, workers=5, times=gamma(10 * MS, 0.3), faults=[Fault("death", 3, 400 * MS)])
    after = log.column("clock") > 450 * MS
    assert log.column("staleness")[~after][20:].mean() == pytest.approx(4, abs=0.2)
    assert log.column("staleness")[after].mean() == pytest.approx(3, abs=0.1)
    assert 3 not in log.column("worker")[log.column("clock") > 400 * MS]
    assert set(log.server.backups) == {0, 1, 2, 4}


@pytest.mark.parametrize(
    "rule", [ssgd, partial(stale_synchronous, bound=0), partial(group_asynchronous, groups=2)],
    ids=["ssgd", "stale_synchronous", "group_asynchronous"],
)  # fmt: skip
def test_a_death_does_not_stop_those_who_wait(rule):  # spec 5.22
    times = straggler(constant(10 * MS), slow=3)
    log = run(60, rule=rule, times=times, faults=[Fault("death", 3, 35 * MS)])
    assert log.server.samples >= 120
    assert log.server.workers == {0, 1, 2}


def test_a_paused_worker_is_late_by_the_pause_and_logged_with_its_staleness():  # spec 5.23
    pause = Fault("pause", 1, 25 * MS, 100 * MS)
    log = run(60, times=constant(10 * MS), faults=[pause])
    mine = log.column("worker") == 1
    assert log.column("clock")[mine][:4].tolist() == [10 * MS, 20 * MS, 130 * MS, 140 * MS]
    assert log.column("staleness")[mine][:4].tolist() == [1, 3, 32, 3]


def test_an_idle_worker_that_is_paused_begins_when_it_wakes():
    pause = Fault("pause", 0, 5 * MS, 100 * MS)  # its weights are still on the way
    log = run(3, workers=1, network=constant(10 * MS), times=constant(10 * MS), faults=[pause])
    assert log.column("clock").tolist() == [125 * MS, 155 * MS, 185 * MS]


@pytest.mark.parametrize(
    ("rule", "least", "most"),
    [
        (ssgd, 100, 100),
        (partial(backup_workers, spare=1), 0, 20),
        (asgd, 20, 40),
        (partial(stale_synchronous, bound=2), 80, 90),
    ],
    ids=["ssgd", "backup_workers", "asgd", "stale_synchronous"],
)
def test_a_pause_costs_no_more_than_the_rule_lets_it(rule, least, most):  # spec 5.23
    faults = [Fault("pause", 1, 25 * MS, 100 * MS)]
    calm, paused = (
        run(60, rule=rule, times=constant(10 * MS), faults=f).column("clock")[-1]
        for f in ((), faults)
    )
    assert least * MS <= paused - calm <= most * MS


def test_a_worker_that_joins_or_returns_begins_with_the_weights_of_that_moment():  # spec 5.24
    faults = [
        Fault("death", 1, 25 * MS), Fault("join", 1, 205 * MS), Fault("join", 7, 205 * MS),
    ]  # fmt: skip
    log = run(150, times=constant(10 * MS), faults=faults)
    for m in (1, 7):
        back = (log.column("worker") == m) & (log.column("clock") > 205 * MS)
        assert log.column("clock")[back][0] == 215 * MS
        assert log.column("staleness")[back][0] <= 4  # what the others do in one step
    assert log.server.workers == {0, 1, 2, 3, 7}


@every_rule
def test_a_spoiled_gradient_is_refused_and_its_worker_pulls_again(rule):  # spec 5.25
    log = run(60, rule=rule, times=constant(10 * MS), faults=[Fault("nan", 2, 22 * MS)])
    assert log.server.counts["refused_nonfinite"] == 1
    assert log.server.weights.isfinite().all()
    assert not log.diverged
    times = [e.clock // MS for e in log.events if (e.kind, e.worker) == ("server", 2)]
    assert times[2:4] == [30, 40]


@pytest.mark.parametrize("rule", [asgd, ssgd], ids=["asgd", "ssgd"])
def test_a_run_that_diverges_ends_and_says_so(rule):
    log = run(100_000, rule=rule, lr=1e30)
    assert log.diverged
    assert len(log.rows) < 1000


def test_a_run_in_which_everybody_dies_is_an_error():
    faults = [Fault("death", m, 35 * MS) for m in range(4)]
    with pytest.raises(RuntimeError, match="simulate: expected a worker to go on, got none at 35"):
        run(60, faults=faults)


# ---- delay on a quadratic ----


def parabola(weights, x, y):
    return 0.5 * (weights**2).sum()


@pytest.mark.covers("P2")
@pytest.mark.parametrize("delay", [0, 1, 2, 7])
def test_a_constant_delay_shrinks_the_stable_rate_to_the_edge_of_theory(delay):  # spec 5.4
    edge = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    period = 2 * (2 * delay + 1)  # of the oscillation at the edge
    growth = []
    for factor in (0.98, 1.02):
        data = torch.zeros(delay + 1, 1), torch.zeros(delay + 1)
        options = {"rule": asgd, "workers": delay + 1, "lr": factor * edge, "batch_size": 1}
        start = torch.ones(1, dtype=torch.float64)
        log = simulate(start, parabola, *data, samples=10 * period, **options)
        assert log.column("staleness").tolist()[delay:] == [delay] * (10 * period - delay)
        size = log.column("gradient_norm").reshape(10, period).max(axis=1)  # abs(w) at the pull
        growth.append((size[-1] / size[4]) ** (1 / 5 / period))
        # The delayed recursion w ← w − a w(t − delay) grows as its largest root.
        roots = np.roots(
            [1, -1] + [0] * (delay - 1) + [factor * edge] if delay else [1, factor * edge - 1]
        )
        assert growth[-1] == pytest.approx(abs(roots).max(), abs=2e-3)
    assert growth[0] < 1 < growth[1]


# ---- refusals ----


def test_running_statistics_are_refused_with_advice_and_group_norm_is_not():
    _, loss, x, y = digits()
    options = {"rule": asgd, "workers": 2, "lr": 0.1, "samples": 40, "batch_size": 4}
    bad = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(ValueError, match=r"objective: expected no running .* BatchNorm1d '1'; use"):
        simulate(bad, loss, x, y, **options)
    assert simulate(bad.eval(), loss, x, y, **options).server.version == 10
    for norm in (nn.GroupNorm(2, 4), nn.BatchNorm1d(4, track_running_stats=False)):
        good = nn.Sequential(nn.Linear(6, 4), norm).double()
        assert simulate(good, loss, x, y, **options).server.version == 10


def test_dropout_in_training_mode_is_refused():
    _, loss, x, y = digits()
    net = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).double()
    options = {"rule": asgd, "workers": 2, "lr": 0.1, "samples": 40, "batch_size": 4}
    with pytest.raises(ValueError, match=r"objective: expected no random layer .* Dropout '1'"):
        simulate(net, loss, x, y, **options)
    assert simulate(net.eval(), loss, x, y, **options).server.version == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "simulate: expected workers of at least 1, got 0"),
        ({"samples": 0}, "simulate: expected samples of at least 1, got 0"),
        ({"local_steps": 0}, "simulate: expected local_steps of at least 1, got 0"),
        ({"server_time": -1}, "simulate: expected server_time of at least 0, got -1"),
        ({"batch_size": 30}, r"Shards: expected at least 120 examples for 4 batches of 30, got 96"),
        (
            {"faults": [Fault("fire", 0, 1)]},
            "simulate: expected fault to be one of .*'fire'",
        ),
        ({"faults": [Fault("join", 2, 1)]}, "join: expected a new worker, got 2"),
        ({"faults": [Fault("death", 9, 1)]}, r"leave: expected one of .*, got worker 9"),
        ({"faults": [Fault("nan", 0, 1)], "order": [0]}, "simulate: expected order or faults"),
        ({"order": [0, 0], "rule": ssgd}, "simulate: expected a worker that owes a gradient"),
        ({"times": constant(-1.0)}, "stream: expected finite compute times of at least 0"),
        ({"times": constant(math.nan)}, "stream: expected finite compute times of at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_impossible_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gamma(10.0, 0.0), "gamma: expected cv positive and finite, got 0.0"),
        (lambda: lognormal(10.0, -1.0), "lognormal: expected cv positive and finite, got -1.0"),
        (
            lambda: shifted_exponential(10.0, 11.0),
            r"shifted_exponential: expected shift in",
        ),
        (
            lambda: pauses(constant(1.0), probability=2.0, length=1.0),
            "pauses: expected prob",
        ),
        (lambda: run(2).column("speed"), "column: expected name to be one of 'version'.*'speed'"),
    ],
    ids=["gamma", "lognormal", "shifted_exponential", "pauses", "column"],
)
def test_a_refusal_names_function_expectation_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_server_without_an_update_makes_no_row():
    with pytest.raises(RuntimeError, match="record: expected a server that has made an update"):
        Log(Server(torch.zeros(1))).record(0)


def test_events_at_one_time_happen_in_the_order_in_which_they_were_planned():
    assert Event(3, 1, "push", 9) < Event(3, 2, "death", 0) < Event(4, 0, "pull", 0)


def test_clipping_is_a_gate_of_the_simulator_too():
    log = run(rule=partial(clipped, max_norm=0.5))
    assert log.column("gradient_norm").max() == pytest.approx(0.5)


def test_tied_weights_are_one_parameter_with_one_gradient():
    _, loss, x, y = digits()
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    net[1].weight = net[0].weight
    start, function = objective(net, loss)
    assert len(start) == 36 + 6 + 6
    got, _ = gradient(function, start, x[None], y[None], 0.1)
    loss(net(x), y).backward()
    params = trainable(net)
    torch.testing.assert_close(got, torch.cat([params[n].grad.flatten() for n in sorted(params)]))


def test_the_stored_record_keeps_the_promised_cost_of_an_update():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "parallelism.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    config, took = record["config"], record["values"]
    assert config["workers"] == 8
    assert config["ratio"]["constant"] <= 1.2
    ratios = [a / b for a, b in zip(took["constant, ms"], took["plain, ms"], strict=True)]
    assert config["ratio"]["constant"] == pytest.approx(np.median(ratios))
    assert config["gradients_at_once"]["constant"] == 8
    assert config["ratio"].keys() >= {"gamma, cv 0.3", "exponential"}
