"""The laws of the server and of every rule but delay compensation, by hand-made pushes."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coursekit.parallelism import (
    Push,
    Server,
    asgd,
    backup_workers,
    clipped,
    easgd,
    gap_aware,
    group_asynchronous,
    join,
    leave,
    load_,
    local_sgd,
    merge,
    ormo,
    pack,
    pull,
    receive,
    restart,
    ringmaster,
    score_on,
    spring,
    ssgd,
    stale_synchronous,
    staleness_aware,
    step,
    trainable,
    unpack,
)

RULES = {
    "asgd": asgd,
    "asgd with momentum": partial(asgd, momentum=0.9, weight_decay=0.01),
    "spring": partial(spring, strength=0.5),
    "ormo": partial(ormo, momentum=0.5),
    "easgd": partial(easgd, force=0.3),
    "ssgd": ssgd,
    "backup_workers": partial(backup_workers, spare=1),
    "backup_workers that finish": partial(backup_workers, spare=1, cancel=False),
    "group_asynchronous": partial(group_asynchronous, groups=2),
    "stale_synchronous": partial(stale_synchronous, bound=1),
    "ringmaster": partial(ringmaster, threshold=1),
    "staleness_aware": staleness_aware,
    "gap_aware": gap_aware,
    "clipped": partial(clipped, max_norm=1.0),
    "local_sgd": partial(local_sgd, outer_lr=0.7, momentum=0.5),
}
# With one worker each of these is SGD, to the last bit.
SGD_ALONE = {
    "asgd": asgd,
    "ssgd": ssgd,
    "backup_workers": partial(backup_workers, spare=0),
    "group_asynchronous": partial(group_asynchronous, groups=1),
    "stale_synchronous": partial(stale_synchronous, bound=0),
    "ringmaster": partial(ringmaster, threshold=0),
    "staleness_aware": staleness_aware,
    "gap_aware": gap_aware,
    "clipped": partial(clipped, max_norm=1e9),
    "spring": partial(spring, strength=3.0),
    "ormo": partial(ormo, momentum=0.0),
    "local_sgd": local_sgd,
    "clipped spring": partial(clipped, max_norm=1e9, update=spring),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def values(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


def cluster(workers, weights=None):
    """A server whose workers 0 … workers − 1 have pulled."""
    server = Server(values(1.0, -2.0) if weights is None else weights)
    for m in range(workers):
        server, _ = pull(join(server, m), m)
    return server


def send(server, worker, gradient, lr=0.1, rule=asgd, **fields):
    """Receive a gradient at the weights pulled last, and serve whom the rule names."""
    gradient = gradient if isinstance(gradient, torch.Tensor) else values(gradient, gradient)
    message = {"version": server.pulled[worker], "samples": 4, "epoch": server.epoch} | fields
    server, served = receive(server, Push(worker, gradient=gradient, **message), lr, rule)
    for m in served:
        server, _ = pull(server, m)
    return server, served


def play(order, rule, workers=3, lr=0.1, start=None):
    """Let workers push in this order, but for one that owes nothing; all servers on the way."""
    servers = [cluster(workers, start)]
    for i, m in enumerate(order):
        if m in servers[-1].awaited:
            gradient = servers[-1].backups[m] * 0.7 + math.sin(i)
            servers.append(send(servers[-1], m, gradient, lr, rule)[0])
    return servers


orders = st.lists(st.integers(0, 2), min_size=1, max_size=30)


# ---- one expression for every update ----


@pytest.mark.parametrize("rule", SGD_ALONE.values(), ids=SGD_ALONE)
def test_with_one_worker_a_rule_is_sgd_to_the_last_bit(rule, device, dtype):  # spec 5.1
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=draw, dtype=dtype).to(device)
    server, weights = cluster(1, start), start
    for _ in range(20):
        gradient = torch.randn(50, generator=draw, dtype=dtype).to(device)
        server, served = send(server, 0, gradient, 0.3, rule)
        weights = weights - 0.3 * gradient
        assert torch.equal(server.weights, weights)
        assert served == (0,)
    assert server.version == 20
    assert server.samples == 80


@given(orders)
def test_a_spring_of_strength_zero_is_asgd_to_the_last_bit(order):  # spec 5.2
    a, b = play(order, asgd)[-1], play(order, partial(spring, strength=0.0))[-1]
    assert torch.equal(a.weights, b.weights)
    assert b.applied.correction_norm == 0


@given(orders)
def test_ordered_momentum_of_zero_is_asgd_to_the_last_bit(order):
    a, b = play(order, asgd)[-1], play(order, partial(ormo, momentum=0.0))[-1]
    assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize(
    "rule",
    [partial(asgd, momentum=0.9), partial(ormo, momentum=0.9)],
    ids=["momentum", "ordered momentum"],
)
def test_momentum_of_one_worker_is_that_of_torch(rule, dtype):
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(12, 5, generator=draw, dtype=dtype)
    server = cluster(1, torch.ones(5, dtype=dtype))
    theirs = torch.ones(5, dtype=dtype, requires_grad=True)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for gradient in gradients:
        server, _ = send(server, 0, gradient, 0.1, rule)
        theirs.grad = gradient.clone()
        sgd.step()
    torch.testing.assert_close(server.weights, theirs.detach())


def test_weight_decay_of_one_worker_is_that_of_torch():
    server = cluster(1)
    theirs = values(1.0, -2.0).requires_grad_()
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.2)
    for number in (1.0, -3.0, 2.0):
        rule = partial(asgd, momentum=0.9, weight_decay=0.2)
        server, _ = send(server, 0, number, 0.1, rule)
        theirs.grad = values(number, number)
        sgd.step()
    torch.testing.assert_close(server.weights, theirs.detach())


# ---- asynchronous updates, by hand ----


@pytest.mark.covers("P2")
def test_three_workers_by_hand():  # spec 5.3
    server = cluster(3, values(1.0))
    rows = []
    for m, gradient in ((0, 1.0), (1, 2.0), (0, -1.0), (2, 3.0)):
        server, _ = send(server, m, values(gradient))
        about = server.applied
        rows.append((round(server.weights.item(), 10), about.staleness, round(about.distance, 10)))
    # w: 1 − .1 = .9 (pulled at 1); .9 − .2 = .7 (at 1); .7 + .1 = .8 (at .9); .8 − .3 = .5 (at 1)
    assert rows == [(0.9, 0, 0.0), (0.7, 1, 0.1), (0.8, 1, 0.2), (0.5, 3, 0.2)]
    assert server.clocks == {0: 2, 1: 1, 2: 1}
    assert server.samples == 16


def test_the_spring_pulls_back_to_the_weights_of_the_pull_by_hand():
    server = cluster(2, values(1.0))
    server, _ = send(server, 0, values(5.0), rule=spring)  # .5
    server, _ = send(server, 1, values(2.0), rule=spring)  # .5 − .1 (2 + (.5 − 1))
    assert server.weights.item() == pytest.approx(0.35)
    assert server.applied.correction_norm == pytest.approx(0.5)
    assert server.applied.gradient_norm == pytest.approx(2.0)


def test_a_backup_is_the_weights_sent_and_survives_later_updates():
    server, sent = pull(cluster(2, values(1.0)), 0)
    server, _ = send(server, 1, values(5.0))
    assert server.backups[0] is sent
    assert sent.item() == 1.0
    aliased = values(1.0)
    backup = aliased.view(1)
    aliased -= 0.5  # what an update in place would do to a backup: no displacement is left
    assert (aliased - backup).abs().max() == 0
    assert (server.weights - server.backups[0]).abs().max() == 0.5


def test_a_backup_can_be_handed_over_in_place_of_that_of_the_pull():
    server = cluster(2, values(1.0))
    push = Push(1, 0, values(2.0), 4)

    def correct(gradient, displacement, memory):
        return displacement, memory, 0.25

    own = step(server, push, 0.1, correct, backup=values(0.0))
    assert own.weights.item() == pytest.approx(1 - 0.1 * (2 + 1))
    assert own.applied.capped == 0.25
    assert step(server, push, 0.1, correct).weights.item() == pytest.approx(1 - 0.1 * 2)


def test_weight_decay_acts_on_the_current_weights_not_on_those_of_the_pull():  # spec 1.6
    server = cluster(2, values(1.0))
    server, _ = send(server, 0, values(5.0))
    server, _ = send(server, 1, values(0.0), rule=partial(asgd, weight_decay=0.1))
    assert server.weights.item() == pytest.approx(0.5 - 0.1 * 0.1 * 0.5)


@every_rule
def test_a_rule_writes_into_nothing_that_it_is_given(rule):
    for server in play([0, 1, 2, 0, 2, 1, 1], rule):
        before = server.to_dict()
        copies = {k: v.clone() for k, v in before["memory"].items()}
        weights, backups = server.weights.clone(), {m: b.clone() for m, b in server.backups.items()}
        m = min(server.awaited)
        gradient = values(3.0, 4.0)
        send(server, m, gradient, rule=rule)
        assert torch.equal(gradient, values(3.0, 4.0))
        assert torch.equal(server.weights, weights)
        assert all(torch.equal(server.backups[m], backups[m]) for m in backups)
        assert all(torch.equal(server.memory[k], copies[k]) for k in copies)


# ---- synchronous rules ----


@pytest.mark.covers("P1")
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_ssgd_is_sgd_on_the_concatenated_batch(sizes, seed):  # spec 5.13
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(4, generator=draw, dtype=torch.float64)
    x = torch.randn(sum(sizes), 4, generator=draw, dtype=torch.float64)
    y = torch.randn(sum(sizes), generator=draw, dtype=torch.float64)

    def gradient(x, y):
        return 2 * x.T @ (x @ start - y) / len(y)

    server = cluster(len(sizes), start)
    for m, (x_part, y_part) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        server, _ = send(server, m, gradient(x_part, y_part), 0.1, ssgd, samples=len(y_part))
    assert server.version == 1
    assert server.samples == sum(sizes)
    torch.testing.assert_close(server.weights, start - 0.1 * gradient(x, y))


def test_ssgd_weighs_a_gradient_by_its_examples_and_not_by_its_worker():
    server = cluster(2, values(0.0))
    server, served = send(server, 0, values(1.0), 1.0, ssgd, samples=3, loss=4.0)
    assert served == ()
    assert server.version == 0
    server, served = send(server, 1, values(5.0), 1.0, ssgd, samples=1, loss=8.0)
    assert served == (0, 1)
    assert server.weights.item() == -2.0  # and not −3, the plain mean
    assert server.applied.loss == 5.0


@given(st.permutations(range(4)))
def test_the_order_of_arrival_leaves_no_trace_in_a_synchronous_step(order):
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    server = cluster(4, torch.zeros(6))
    for m in order:
        server, _ = send(server, m, gradients[m], 0.1, ssgd)
    expected = -0.1 * torch.stack([g * 0.25 for g in gradients]).sum(0)
    assert torch.equal(server.weights, expected)


def test_merged_pushes_are_as_old_as_the_oldest_and_keep_their_examples():
    one, two = (Push(m, 5 - m, values(1.0), 2, rows=torch.tensor([m, m + 2])) for m in (1, 2))
    both = merge([two, one])
    assert (both.worker, both.version, both.samples) == (2, 3, 4)
    assert both.rows.tolist() == [1, 3, 2, 4]
    assert merge([one, Push(3, 5, values(1.0), 2)]).rows is None


@given(orders)
def test_one_group_is_ssgd(order):  # spec 5.12
    a, b = play(order, ssgd), play(order, partial(group_asynchronous, groups=1))
    assert [s.version for s in a] == [s.version for s in b]
    assert torch.equal(a[-1].weights, b[-1].weights)


@given(orders)
def test_a_group_for_every_worker_is_asgd(order):  # spec 5.12
    a, b = play(order, asgd)[-1], play(order, partial(group_asynchronous, groups=3))[-1]
    assert torch.equal(a.weights, b.weights)
    assert a.applied == b.applied or math.isnan(a.applied.loss)


@given(orders)
def test_no_spare_worker_is_ssgd(order):
    a, b = play(order, ssgd)[-1], play(order, partial(backup_workers, spare=0))[-1]
    assert torch.equal(a.weights, b.weights)


@pytest.mark.covers("P4")
def test_groups_are_synchronous_inside_and_asynchronous_between():
    rule = partial(group_asynchronous, groups=2)  # 0, 2 and 1, 3
    server = cluster(4, values(0.0))
    server, served = send(server, 0, values(1.0), 1.0, rule)
    assert served == ()
    server, served = send(server, 1, values(10.0), 1.0, rule)
    assert served == ()
    server, served = send(server, 2, values(3.0), 1.0, rule)
    assert served == (0, 2)
    assert server.weights.item() == -2.0
    server, served = send(server, 3, values(20.0), 1.0, rule)
    assert served == (1, 3)
    assert server.weights.item() == -17.0
    assert server.applied.staleness == 1


@pytest.mark.covers("P4")
def test_backup_workers_take_the_first_and_leave_the_last_gradient_out():
    rule = partial(backup_workers, spare=1, cancel=False)
    server = cluster(3, values(0.0))
    server, _ = send(server, 2, values(1.0), 1.0, rule)
    server, served = send(server, 0, values(3.0), 1.0, rule)
    assert served == (0, 2)
    assert server.weights.item() == -2.0
    server, served = send(server, 1, values(100.0), 1.0, rule)
    assert served == (1,)
    assert server.weights.item() == -2.0
    assert server.counts["dropped"] == 1


def test_cancelled_backup_workers_are_served_with_the_others_and_their_gradient_is_refused():
    rule = partial(backup_workers, spare=1)
    server = cluster(3, values(0.0))
    server, _ = send(server, 2, values(1.0), 1.0, rule)
    server, served = send(server, 0, values(3.0), 1.0, rule)
    assert served == (0, 1, 2)
    server, served = send(server, 1, values(100.0), 1.0, rule, version=0)
    assert served == ()
    assert server.weights.item() == -2.0


def test_a_round_waits_for_one_gradient_however_many_are_spare():
    server, served = send(cluster(2), 1, 1.0, rule=partial(backup_workers, spare=5))
    assert server.version == 1
    assert served == (0, 1)


@given(st.integers(0, 3), orders)
def test_nobody_is_served_further_ahead_than_the_bound(bound, order):  # spec 5.12
    servers = play(order, partial(stale_synchronous, bound=bound))
    for server in servers:
        slowest = min(server.clocks.values())
        assert all(server.clocks[m] - slowest <= bound for m in server.awaited)
        assert all(server.clocks[m] - slowest > bound for m in server.waiting)
        assert server.applied is None or server.applied.staleness <= 2 * (2 * bound + 1)
        assert server.awaited | set(server.waiting) == server.workers
    assert servers[-1].version == sum(servers[-1].clocks.values())


def test_a_large_bound_is_asgd_and_a_bound_of_zero_makes_rounds():
    order = [0, 0, 0, 1, 1, 2, 0, 1, 2, 2]
    a, b = play(order, asgd)[-1], play(order, partial(stale_synchronous, bound=99))[-1]
    assert torch.equal(a.weights, b.weights)
    rounds = play(order, partial(stale_synchronous, bound=0))
    assert max(rounds[-1].clocks.values()) - min(rounds[-1].clocks.values()) <= 1


# ---- rules that change or drop a gradient ----


@given(st.integers(0, 3), orders)
def test_ringmaster_applies_nothing_older_than_its_threshold(threshold, order):  # spec 5.12
    servers = play(order, partial(ringmaster, threshold=threshold))
    assert all(s.applied.staleness <= threshold for s in servers if s.applied)
    last = servers[-1]
    assert last.counts.get("accepted", 0) == last.version + last.counts.get("dropped", 0)


def test_ringmaster_drops_an_old_gradient_and_serves_its_worker():
    rule = partial(ringmaster, threshold=1)
    server = cluster(2, values(0.0))
    for _ in range(2):
        server, _ = send(server, 0, values(1.0), 1.0, rule)
    server, served = send(server, 1, values(50.0), 1.0, rule)
    assert served == (1,)
    assert server.weights.item() == -2.0
    assert server.counts["dropped"] == 1
    assert server.pulled[1] == 2


def test_the_rate_is_divided_by_the_staleness_from_two_on():
    server = cluster(2, values(0.0))
    weights = [0.0]
    for m in (0, 0, 0, 1):  # staleness 0, 0, 0, 3
        server, _ = send(server, m, values(3.0), 1.0, staleness_aware)
        weights.append(server.weights.item())
    assert weights == pytest.approx([0, -3, -6, -9, -10])
    server = cluster(2, values(0.0))
    server, _ = send(server, 0, values(3.0), 1.0, staleness_aware)
    server, _ = send(server, 1, values(3.0), 1.0, staleness_aware)  # staleness 1: the whole rate
    assert server.weights.item() == -6


def test_the_gap_is_the_distance_in_typical_steps_by_hand():
    server = cluster(2, values(0.0))
    server, _ = send(server, 0, values(2.0), 0.5, gap_aware)  # −1; no distance, the whole gradient
    assert server.weights.item() == -1.0
    server, _ = send(server, 1, values(4.0), 0.5, gap_aware)
    gap = 1.0 / (0.5 * 3.0)  # distance 1, mean gradient norm (2 + 4) / 2
    assert server.weights.item() == pytest.approx(-1 - 0.5 * 4 / (1 + gap))


def test_the_gap_of_a_zero_gradient_is_no_division_by_zero():
    server, _ = send(cluster(1), 0, values(0.0, 0.0), 0.5, gap_aware)
    assert server.weights.tolist() == [1.0, -2.0]


def test_clipping_shortens_long_gradients_to_the_norm_and_keeps_their_direction():
    rule = partial(clipped, max_norm=2.0)
    server, _ = send(cluster(1, values(0.0, 0.0)), 0, values(3.0, 4.0), 1.0, rule)
    torch.testing.assert_close(server.weights, values(-1.2, -1.6))  # by coordinate: −2, −2
    server, _ = send(cluster(1, values(0.0, 0.0)), 0, values(0.3, 0.4), 1.0, rule)
    assert server.weights.tolist() == [-0.3, -0.4]


def test_clipping_before_the_mean_is_not_clipping_the_mean():
    inside = partial(ssgd, update=partial(clipped, max_norm=1.0))
    outside = partial(clipped, max_norm=1.0, update=ssgd)
    results = []
    for rule in (inside, outside):
        server = cluster(2, values(0.0))
        server, _ = send(server, 0, values(8.0), 1.0, rule)
        server, _ = send(server, 1, values(-2.0), 1.0, rule)
        results.append(server.weights.item())
    assert results == [-1.0, 0.0]


# ---- ordered momentum, elastic averaging, local SGD ----


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_ordered_momentum_forgets_that_a_gradient_was_late(first, second):
    # All push what they pulled at version 0, in any order, then what they pulled after that, in any
    # order: the state after these two blocks is that of gradients which were all on time.
    rule, server = partial(ormo, momentum=0.5), cluster(3, values(0.0))
    blocks = [[], [], []]
    for m in (*first, *second):
        gradient = 1.0 + len(blocks[0]) + 10 * server.pulled[m]
        blocks[server.pulled[m] // 3].append(gradient)
        server, _ = send(server, m, values(gradient), 0.1, rule)
    w, u = 0.0, 0.0
    for block in blocks[:2]:  # six updates: two blocks have begun
        w, u = w - 0.1 * 0.5 * u, 0.5 * u
        w, u = w - 0.1 * sum(block), u + sum(block)
    assert server.weights.item() == pytest.approx(w)
    assert server.memory["ordered_momentum"].item() == pytest.approx(u)


def test_ordered_momentum_by_hand():
    rule, server = partial(ormo, momentum=0.5), cluster(2, values(0.0))
    for m, gradient in ((0, 1.0), (0, 2.0), (1, 4.0)):
        server, _ = send(server, m, values(gradient), 1.0, rule)
    # block 0: w = −1 − 2, u = 3. Block 1 begins: w −= 1.5, u = 1.5. The 4 is a block late:
    # w −= 4 (1 + ½), u += 2.
    assert server.weights.item() == pytest.approx(-3 - 1.5 - 6)
    assert server.memory["ordered_momentum"].item() == pytest.approx(3.5)


def test_elastic_averaging_by_hand():
    rule, server = partial(easgd, force=0.5), cluster(2, values(0.0))
    server, _ = send(server, 0, values(-10.0), 0.1, rule)
    # x_0 = 0 + .1 · 10 = 1; the force .1 · .5 moves it to .95, and the centre to .05
    assert server.weights.item() == pytest.approx(0.05)
    assert server.backups[0].item() == pytest.approx(0.95)
    assert server.backups[1].item() == 0
    server, _ = send(server, 0, values(0.0), 0.1, rule)
    assert server.backups[0].item() == pytest.approx(0.95 - 0.05 * 0.9)


def test_a_large_gradient_does_not_drown_the_elastic_force():
    server, rule = cluster(2, torch.ones(1)), partial(easgd, force=1e-6)
    server, _ = send(server, 0, torch.tensor([1e4]), 0.1, rule)  # own model: 1 − 1000
    assert server.weights.item() == pytest.approx(1 - 1e-4, abs=1e-7)
    assert server.applied.gradient_norm == pytest.approx(1e-3, rel=1e-4)
    assert server.applied.correction_norm == 0


@given(orders)
def test_the_elastic_force_moves_worker_and_centre_by_the_same_amount(order):
    servers = play(order, partial(easgd, force=2.0))
    for before, after in zip(servers, servers[1:], strict=False):
        m = after.applied.worker
        gradient_step = -0.1 * (before.backups[m] * 0.7 + math.sin(before.version))
        drift = after.weights + after.backups[m] - before.weights - before.backups[m]
        torch.testing.assert_close(drift, gradient_step)


def test_local_sgd_averages_the_local_models():
    server, lr = cluster(2, values(1.0, -2.0)), 0.1
    local = values(0.0, 0.0), values(4.0, 2.0)
    for m in (0, 1):
        pseudo = (server.backups[m] - local[m]) / lr
        server, _ = send(server, m, pseudo, lr, local_sgd)
    torch.testing.assert_close(server.weights, values(2.0, 1.0))


def test_an_outer_rate_moves_part_of_the_way_to_the_mean():
    server, _ = send(cluster(1), 0, values(10.0, 0.0), 0.1, partial(local_sgd, outer_lr=0.5))
    torch.testing.assert_close(server.weights, values(0.5, -2.0))


# ---- what every server does: refusals, faults, checkpoints ----


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(rule, bad):  # spec 5.25
    server = play([0, 1, 2, 0, 1, 2, 1, 0], rule)[-1]
    m = min(server.awaited)
    after, served = receive(server, Push(m, server.pulled[m], values(bad, 1.0), 4), 0.1, rule)
    assert served == (m,)  # it is told to pull again
    assert after.counts == {**server.counts, "refused_nonfinite": 1}
    changed = after.but(counts=server.counts).to_dict()
    assert all(changed[name] is value or changed[name] == value or name == "held"
               for name, value in server.to_dict().items())  # fmt: skip


@pytest.mark.parametrize("rule", [gap_aware, partial(clipped, max_norm=1.0), asgd])
def test_a_gradient_whose_squares_overflow_is_refused_and_a_large_one_is_not(rule):
    server = cluster(1, torch.zeros(1))
    huge, large = (values(size, dtype=torch.float32) for size in (1e25, 1e18))
    after, served = receive(server, Push(0, 0, huge, 4), 0.1, rule)
    assert served == (0,)
    assert after.counts == {"refused_nonfinite": 1}
    assert after.memory == {}
    after, _ = receive(after, Push(0, 0, large, 4), 0.1, rule)
    assert after.version == 1
    assert 0 < after.weights.abs().item() < math.inf
    assert all(value.isfinite().all() for value in after.memory.values())


@every_rule
def test_a_push_that_comes_twice_is_applied_once(rule):  # spec 5.26
    server = cluster(3)
    push = Push(1, 0, values(1.0, 2.0), 4)
    once, _ = receive(server, push, 0.1, rule)
    twice, served = receive(once, push, 0.1, rule)
    assert served == ()
    assert twice.counts["refused_duplicate"] == 1
    assert torch.equal(once.weights, twice.weights)
    assert len(once.held) == len(twice.held)
    assert once.clocks == twice.clocks


WRONG = {
    "version of the future": {"version": 99},
    "negative version": {"version": -1},
    "length": {"gradient": torch.ones(3, dtype=torch.float64)},
    "epoch": {"epoch": 1},
    "not finite": {"gradient": values(math.nan, 1.0)},
}


@every_rule
@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG)
def test_nobody_gets_two_gradients_into_one_update_by_a_push_that_cannot_be_used(rule, fields):
    for server in play([0, 1, 2, 0, 2, 1, 1], rule):  # spec 5.26, 5.27
        for m in server.workers:
            good = {"version": server.pulled[m], "gradient": values(1.0, 1.0), "samples": 4}
            after, served = receive(server, Push(m, **good | fields), 0.1, rule)
            assert served == ((m,) if m in server.awaited else ())
            assert after.but(counts=None).__dict__ == server.but(counts=None).__dict__


def test_a_worker_whose_gradient_is_held_cannot_push_again_by_way_of_a_wrong_version():
    server, _ = send(cluster(2, values(0.0)), 0, values(1.0), 1.0, ssgd)
    server, served = send(server, 0, values(9.0), 1.0, ssgd, version=5)
    assert served == ()
    server, _ = send(server, 1, values(3.0), 1.0, ssgd)
    assert server.weights.item() == -2.0


def test_a_late_copy_of_an_old_push_is_ignored_while_the_worker_is_busy_with_newer_weights():
    server, _ = send(cluster(2), 0, 1.0)  # spec 5.26; worker 0 has version 1 now
    after, served = receive(server, Push(0, 0, values(9.0, 9.0), 4), 0.1, asgd)
    assert served == ()
    assert after.version == 1
    assert after.awaited == {0, 1}


@pytest.mark.parametrize(
    ("fault", "fields", "told"),
    [
        ("unknown", {"worker": 7}, ()),
        ("version", {"version": 3}, (0,)),
        ("version", {"version": -1}, (0,)),
        ("length", {"gradient": torch.ones(3, dtype=torch.float64)}, (0,)),
        ("epoch", {"epoch": 1}, (0,)),
    ],
    ids=["unknown worker", "version of the future", "negative version", "length", "epoch"],
)
def test_a_push_that_cannot_be_used_is_refused_and_the_server_lives(fault, fields, told):
    server = cluster(2)  # spec 5.27
    push = {"worker": 0, "version": 0, "gradient": values(1.0, 1.0), "samples": 4} | fields
    after, served = receive(server, Push(**push), 0.1, asgd)
    assert served == told
    assert after.counts == {f"refused_{fault}": 1}
    assert torch.equal(after.weights, server.weights)
    after, _ = send(after, 0, 1.0)
    assert after.version == 1


def test_no_gradient_of_before_a_restart_is_applied_after_it():  # spec 5.28
    server = cluster(2)
    server, _ = send(server, 0, 1.0, rule=ssgd)
    again = restart(Server.from_dict(server.to_dict()))
    assert again.epoch == 1
    assert again.held == ()
    assert again.counts == {"accepted": 0, "lost": 1}
    assert again.backups == {}
    old = Push(1, 0, values(5.0, 5.0), 4, epoch=0)
    again, served = receive(again, old, 0.1, ssgd)
    assert served == (1,)
    assert again.version == 0
    assert again.counts["refused_epoch"] == 1
    for m in (0, 1):
        again, _ = pull(again, m)
        again, _ = send(again, m, 1.0, rule=ssgd)
    assert again.version == 1


@every_rule
def test_a_checkpoint_goes_on_as_the_server_would_have(rule, tmp_path):  # spec 5.18
    server = play([0, 1, 2, 2, 0, 1, 0], rule)[-1]
    torch.save(server.to_dict(), tmp_path / "server.pt")
    copy = Server.from_dict(torch.load(tmp_path / "server.pt", weights_only=True))
    for m in (0, 1, 2, 1, 0, 2, 2):
        if m in server.awaited:
            server, copy = (send(s, m, 0.5 + m, rule=rule)[0] for s in (server, copy))
    assert torch.equal(server.weights, copy.weights)
    assert server.clocks == copy.clocks
    assert server.applied.distance == copy.applied.distance


def test_what_belonged_to_the_dead_is_freed_and_the_others_go_on():  # spec 5.22
    server = cluster(3)
    server = server.but(memory={"mean/1": values(0.0), "mean/11": values(0.0)})
    server, served = leave(server, 1, 0.1, asgd)
    assert served == ()
    assert server.workers == {0, 2}
    assert set(server.backups) == set(server.pulled) == set(server.clocks) == {0, 2}
    assert set(server.memory) == {"mean/11"}
    after, served = receive(server, Push(1, 0, values(1.0, 1.0), 4), 0.1, asgd)
    assert after.version == 0
    assert after.counts == {"refused_unknown": 1}
    assert send(server, 2, 1.0)[0].version == 1


@pytest.mark.parametrize(
    ("rule", "served"),
    [
        (ssgd, (0, 1)),
        (partial(backup_workers, spare=0), (0, 1)),
        (partial(group_asynchronous, groups=1), (0, 1)),
        (partial(clipped, max_norm=9.0, update=ssgd), (0, 1)),
        (partial(ringmaster, threshold=3, update=ssgd), (0, 1)),
        (partial(gap_aware, update=partial(staleness_aware, update=ssgd)), (0, 1)),
        (partial(stale_synchronous, bound=0), (0, 1)),
        (partial(stale_synchronous, bound=0, update=ssgd), (0, 1)),
    ],
    ids=["ssgd", "backup", "groups", "clipped", "ringmaster", "aware", "stale_synchronous",
         "stale_synchronous ssgd"],
)  # fmt: skip
def test_those_who_waited_for_the_dead_go_on(rule, served):  # spec 5.22
    server = cluster(3)
    for m in (0, 1):
        server, now = send(server, m, 1.0, rule=rule)
        assert now == ()
    server, now = leave(server, 2, 0.1, rule)
    assert now == served
    assert server.samples == 8


def test_the_gradient_of_the_dead_is_dropped():  # spec 5.22
    server = cluster(3, values(0.0))
    server, _ = send(server, 0, values(100.0), 1.0, ssgd)
    server, served = leave(server, 0, 1.0, ssgd)
    assert served == ()
    assert server.counts == {"accepted": 0, "lost": 1}
    for m in (1, 2):
        server, _ = send(server, m, values(2.0), 1.0, ssgd)
    assert server.weights.item() == -2.0


def test_a_worker_that_returns_gets_a_fresh_backup():  # spec 5.24
    server, _ = leave(cluster(2, values(0.0)), 1, 1.0, asgd)
    server, _ = send(server, 0, values(1.0), 1.0)
    server = join(server, 1)
    assert 1 not in server.backups
    late = Push(1, 0, values(50.0), 4)  # of its earlier life
    refused, served = receive(server, late, 1.0, asgd)
    assert refused.weights.item() == -1.0
    assert served == (1,)
    server, weights = pull(server, 1)
    assert weights.item() == -1.0
    server, _ = send(server, 1, values(1.0), 1.0)
    assert server.applied.staleness == 0
    assert server.applied.distance == 0


def test_a_newcomer_starts_at_the_clock_of_the_slowest():
    server = cluster(2)
    for m in (0, 0, 1):
        server, _ = send(server, m, 1.0)
    assert join(server, 5).clocks == {0: 2, 1: 1, 5: 1}


def test_the_last_worker_may_leave():
    server, served = leave(cluster(1), 0, 0.1, ssgd)
    assert server.workers == frozenset()
    assert served == ()


# ---- weights as a vector ----


def test_packing_does_not_depend_on_the_order_of_the_names():
    one, two = torch.arange(6.0).view(2, 3), torch.arange(2.0)
    a = pack({"b": one, "a": two})
    assert torch.equal(a, pack({"a": two, "b": one}))
    back = unpack(a, {"b": one, "a": two})
    assert torch.equal(back["b"], one)
    assert torch.equal(back["a"], two)


def test_weights_go_into_a_model_and_come_out_again():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    weights = torch.arange(12.0)
    load_(model, weights)
    assert torch.equal(pack(trainable(model)), weights)
    assert torch.equal(model[0].bias, frozen)


def test_a_score_is_that_of_the_model_with_those_weights():
    model = torch.nn.Linear(2, 2, bias=False)
    x, y = torch.eye(2), torch.tensor([0, 1])
    before = model.weight.clone()
    evaluate = score_on(model, x, y)
    assert evaluate(values(9.0, 0.0, 0.0, 9.0).float())["error"] == 0
    assert evaluate(values(9.0, 9.0, 0.0, 0.0).float())["error"] == 0.5
    assert torch.equal(model.weight, before)


# ---- messages ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: pull(s, 4), r"pull: expected one of \[0, 1\], got worker 4"),
        (lambda s: join(s, 1), r"join: expected a new worker, got 1"),
        (lambda s: leave(s, 4, 0.1, asgd), r"leave: expected one of \[0, 1\], got worker 4"),
        (lambda s: send(s, 0, 1.0, rule=partial(clipped, max_norm=0.0)),
         r"clipped: expected max_norm positive and finite, got 0\.0"),
        (lambda s: send(s, 0, 1.0, rule=partial(ringmaster, threshold=-1)),
         r"ringmaster: expected threshold of at least 0, got -1"),
        (lambda s: send(s, 0, 1.0, rule=partial(stale_synchronous, bound=-1)),
         r"stale_synchronous: expected bound of at least 0, got -1"),
        (lambda s: send(s, 0, 1.0, rule=partial(backup_workers, spare=-1)),
         r"backup_workers: expected spare of at least 0, got -1"),
        (lambda s: send(s, 0, 1.0, rule=partial(group_asynchronous, groups=0)),
         r"group_asynchronous: expected groups of at least 1, got 0"),
        (lambda s: unpack(torch.zeros(3), {"a": torch.zeros(2)}),
         r"unpack: expected flat of shape \(2,\), got \(3,\)"),
    ],
    ids=["pull", "join", "leave", "clipped", "ringmaster", "bound", "spare", "groups", "unpack"],
)  # fmt: skip
def test_a_refusal_names_function_expectation_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(cluster(2))
